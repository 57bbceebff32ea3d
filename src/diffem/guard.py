"""What observations decide: whether an iteration is accepted, which one is the best, how wide the next draws are, and when to stop.

accepted    its score (CRPS) is not worse than the start's, nor than the least so far; what is refused trains nothing
best        what the run folder holds, the start at first. Two numbers decide: the criterion (see
            :mod:`diffem.diagnostics.scores`), which looks at the posterior and does not forgive draws that are too narrow, and
            the divergence (:func:`diffem.diagnostics.divergence.energy_items` of the reconstructions that train), which
            looks at the prior and has less noise. The best is accepted, neither number is worse than the start's, and its
            criterion is better than that of the last best; or it is a tie: neither is worse, nor is the ratio farther from
            calibrated (0.9 to 1 / 0.9: in there it has no say), and the three differences, each in its standard errors, are
            better in sum. A worse divergence is so by a thousandth, too
last        the best iteration against the start. Common random numbers compare two iterations closely, but not a network
            with what it started from: both are scored once more, with many draws. In a tie the ratio has less of a say
            here: what is too narrow has been widened first, and the criterion sees the rest. Only where it is farther
            from calibrated does a smaller divergence count for nothing (of a wrong corruption, narrow draws may have the least)
black box   its score is a divergence too, but of held-out observations only, and has many times the error: the best is what
            has a better divergence than the last best
dispersion  none in the sharp part of the run; then `e_step.dispersion`, or more if the last iteration was over-confident.
            The sharp part pays by a score that falls faster: it ends when that has not fallen for two iterations in a row,
            or the ratio is below `e_step.sharp_ratio`. If the score is not below that of the first iteration then, it is
            `undone`: training goes on from the reconstructions of the best iteration, or the start's
stop        `em.patience` iterations in a row neither improved the score nor were the best (a black box: were not the best):
            that ends the sharp part, or else the run

Worse and better are by more than `em.gate` standard errors of the paired difference.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffem.config import Config
from diffem.diagnostics import Score
from diffem.diagnostics.scores import standard_error

TOLERANCE = 1e-3  # of a divergence: many observations find what is too small to matter
WIDEST = 10.0  # the most that is made of a dispersion
SMALLEST = 1e-12  # standard error that is divided by
RISES = 2  # iterations in a row whose score did not fall, which end the sharp part
SCORES = ("first", "lowest", "best")


def compare(current: Score, divergence: Tensor, other: Score, others: Tensor) -> dict[str, float]:
    """Paired differences to another model, and their standard errors (NAME_se): `delta` of the score, `criterion_delta`,
    `divergence_delta` and (of the distance from calibrated, in logarithms) `ratio_delta`, which a black box does not have.

    Arguments:
        current: A score.
        divergence: What the model's reconstructions add to their divergence, item by item.
        other: The score of the other model.
        others: The other one's divergence, of the same observations in the same order.
    """
    apart = divergence - others
    found = {
        "delta": current.difference(other),
        "criterion_delta": current.criterion_difference(other),
        "divergence_delta": (apart.mean().item(), standard_error(apart)),
    }
    if (farther := current.ratio_difference(other)) is not None:
        found["ratio_delta"] = farther
    return {k: v for name, pair in found.items() for k, v in zip((name, f"{name}_se"), pair, strict=True)}


@dataclass
class Guard:
    """The decisions of a run so far; see the module.

    Attributes:
        config: The run's.
        first: The score of the start.
        first_divergence: What the reconstructions of the start add to it, item by item.
        lowest: The least score of an accepted iteration; None at first.
        best: The score of the best iteration; None at first.
        divergence: What its reconstructions add to their divergence; at first the start's.
        dispersion: Of the next E-step after the sharp part.
        sharp: The last iteration of the sharp part.
        before: The mean score of the iteration before, in the sharp part; None at first.
        opening: That of the first iteration, if it was sharp; None at first.
        rises: So many iterations in a row it has not fallen there.
        stale: Iterations since the last improvement.
        over: Whether patience has run out.
    """

    config: Config
    first: Score
    first_divergence: Tensor
    lowest: Score | None
    best: Score | None
    divergence: Tensor
    dispersion: float
    sharp: int
    before: float | None = None
    opening: float | None = None
    rises: int = 0
    stale: int = 0
    over: bool = False

    @classmethod
    def begin(cls, config: Config, start: Score, divergence: Tensor) -> Guard:
        sharp = round(config.e_step.sharp * config.em.iterations)
        return cls(config, start, divergence, None, None, divergence, config.e_step.dispersion, sharp)

    def width(self, iteration: int) -> float:
        """The dispersion of an iteration's draws."""
        return 0.0 if iteration <= self.sharp else self.dispersion

    def decide(self, iteration: int, current: Score, divergence: Tensor) -> dict[str, float | bool]:
        """Takes note of an iteration: whether it is `accepted`, and `best`, ends a sharp part that is `undone`, and the
        numbers that decide it.

        They are those of :func:`compare`: `start_NAME` to the start, `delta` to the least score so far, the others to the
        best iteration so far; to the start where there is none.

        Arguments:
            iteration: Its number, from 1.
            current: Its score.
            divergence: What its reconstructions add to their divergence, in the order of those of the start.
        """
        em, e_step = self.config.em, self.config.e_step
        to_start = compare(current, divergence, self.first, self.first_divergence)
        to_best = compare(current, divergence, self.best or self.first, self.divergence)
        to_best |= dict(zip(("delta", "delta_se"), current.difference(self.lowest or self.first), strict=True))
        accepted = not em.guard or not (self._worse(to_best, "delta") or self._worse(to_start, "delta"))
        sound = not (self._worse(to_start, "criterion_delta") or self._apart(to_start))
        improved = sound and (self.best is None or self._better(to_best))
        best = not em.guard or (accepted and improved)
        lower = accepted and (self.lowest is None or to_best["delta"] < 0)
        if lower:
            self.lowest = current
        if best:
            self.best, self.divergence = current, divergence
        self.stale = 0 if best or (lower and current.ratio is not None) else self.stale + 1
        undone = False
        if current.ratio is not None:
            if iteration > self.sharp:
                # Not added to the last one: reconstructions that are too narrow narrow the next iteration's, so that the
                # loop adds up by itself.
                self.dispersion = e_step.dispersion + e_step.gain * max(e_step.ratio - current.ratio, 0.0)
                self.dispersion = min(self.dispersion, WIDEST)
            else:
                fell = self.before is None or current.mean < self.before
                self.opening = current.mean if self.opening is None else self.opening
                self.rises = 0 if fell else self.rises + 1
                self.before = current.mean
                if em.guard and (current.ratio < e_step.sharp_ratio or self.rises >= RISES):
                    self.sharp = iteration
                    undone = current.mean >= self.opening
        if em.guard and em.patience and self.stale >= em.patience:
            self.over = iteration >= self.sharp
            self.sharp, self.stale = min(self.sharp, iteration), 0
        starts = {f"start_{name}": value for name, value in to_start.items()}
        return {"accepted": accepted, "best": best, "undone": undone, **to_best, **starts}

    def outdoes(self, found: dict[str, float]) -> bool:
        """Whether the best iteration is better than the start, by what :func:`compare` found of the two."""
        return not self.config.em.guard or self._better(found, last=True)

    def _worse(self, found: dict[str, float], name: str, sign: int = 1) -> bool:
        return sign * found[name] > self.config.em.gate * found[f"{name}_se"]

    def _apart(self, found: dict[str, float]) -> bool:
        return self._worse(found, "divergence_delta") and found["divergence_delta"] > TOLERANCE

    def _better(self, found: dict[str, float], last: bool = False) -> bool:
        if "ratio_delta" not in found:  # a black box
            return self._worse(found, "divergence_delta", -1)
        if self._worse(found, "criterion_delta", -1):
            return True
        farther = self._worse(found, "ratio_delta")
        if self._worse(found, "criterion_delta") or self._apart(found) or (farther and not last):
            return False
        names = ("criterion", "divergence", "ratio")
        criterion, divergence, ratio = (found[f"{k}_delta"] / max(found[f"{k}_delta_se"], SMALLEST) for k in names)
        if last:
            ratio, divergence = 0.0, max(divergence, 0.0) if farther else divergence
        return criterion + divergence + ratio < 0

    @property
    def facts(self) -> dict:
        """What a checkpoint holds of it beside :attr:`tensors`."""
        numbers = {k: getattr(self, k) for k in ("dispersion", "sharp", "before", "opening", "rises", "stale", "over")}
        return {**numbers, "name": self.first.name}

    @property
    def tensors(self) -> dict[str, Tensor]:
        scores = {name: score for name in SCORES if (score := getattr(self, name)) is not None}
        found = {f"{name}.{k}": v for name, score in scores.items() for k, v in score.tensors.items()}
        return {**found, "divergence": self.divergence, "first_divergence": self.first_divergence}

    @classmethod
    def load(cls, config: Config, facts: dict, tensors: dict[str, Tensor]) -> Guard:
        def score(which: str) -> Score | None:
            if f"{which}.items" not in tensors:
                return None
            parts = (tensors.get(f"{which}.{k}") for k in ("spread", "error", "excess"))
            return Score(facts["name"], tensors[f"{which}.items"], *parts)

        first, lowest, best = (score(name) for name in SCORES)
        assert first is not None
        rest = {k: v for k, v in facts.items() if k != "name"}
        return cls(config, first, tensors["first_divergence"], lowest, best, tensors["divergence"], **rest)
