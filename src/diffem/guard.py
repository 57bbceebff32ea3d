"""What observations decide: whether an iteration is accepted, which one is the best, how wide the next draws are, and when to stop.

accepted    its score (CRPS) is not worse than the least so far; what is refused trains nothing
best        what the run folder holds, the start at first. Two numbers decide: the criterion (see
            :mod:`diffem.diagnostics.scores`), which looks at the posterior and does not forgive draws that are too narrow, and
            the divergence (:func:`diffem.diagnostics.divergence.energy_items` of the reconstructions that train), which
            looks at the prior and has less noise. The best is accepted, and its criterion better than that of the last best;
            or it is a tie: neither is worse, nor is the ratio farther from 1, and the criterion is less, or the divergence
            better with a ratio that is not even a little farther (of a wrong corruption, narrow draws may be the closest).
            A worse divergence is so by a thousandth, too
black box   its score is a divergence too, but of held-out observations only, and has many times the error: the best is what
            has a better divergence than the last best
dispersion  none in the sharp part of the run; then `e_step.dispersion`, or more if the last iteration was over-confident.
            The sharp part pays by a score that falls faster: it ends when that has not fallen for two iterations in a row,
            or the ratio is below `e_step.sharp_ratio`
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
WIDEST = 4.0  # the most that is made of a dispersion
RISES = 2  # iterations in a row whose score did not fall, which end the sharp part
SCORES = ("first", "lowest", "best")


@dataclass
class Guard:
    """The decisions of a run so far; see the module.

    Attributes:
        config: The run's.
        first: The score of the start.
        lowest: The least score of an accepted iteration.
        best: The score of what the run folder holds.
        divergence: What the reconstructions of the best add to it, item by item.
        dispersion: Of the next E-step after the sharp part.
        sharp: The last iteration of the sharp part.
        before: The mean score of the iteration before, in the sharp part; None at first.
        rises: So many iterations in a row it has not fallen there.
        stale: Iterations since the last improvement.
        over: Whether patience has run out.
    """

    config: Config
    first: Score
    lowest: Score
    best: Score
    divergence: Tensor
    dispersion: float
    sharp: int
    before: float | None = None
    rises: int = 0
    stale: int = 0
    over: bool = False

    @classmethod
    def begin(cls, config: Config, start: Score, divergence: Tensor) -> Guard:
        sharp = round(config.e_step.sharp * config.em.iterations)
        return cls(config, start, start, start, divergence, config.e_step.dispersion, sharp)

    def width(self, iteration: int) -> float:
        """The dispersion of an iteration's draws."""
        return 0.0 if iteration <= self.sharp else self.dispersion

    def compare(self, current: Score, divergence: Tensor) -> dict[str, float]:
        """Paired differences and their standard errors: `delta` of the score to the least, `criterion_delta`,
        `divergence_delta` and (of the distance from 1, in logarithms) `ratio_delta` to those of the best, and `start_delta`
        of the score to the start's. A black box has no `ratio_delta`."""
        apart = divergence - self.divergence
        found = {
            "delta": current.difference(self.lowest),
            "criterion_delta": current.criterion_difference(self.best),
            "divergence_delta": (apart.mean().item(), standard_error(apart)),
            "start_delta": current.difference(self.first),
        }
        if (farther := current.ratio_difference(self.best)) is not None:
            found["ratio_delta"] = farther
        return {k: v for name, pair in found.items() for k, v in zip((name, f"{name}_se"), pair, strict=True)}

    def decide(self, iteration: int, current: Score, divergence: Tensor) -> dict[str, float | bool]:
        """Takes note of an iteration: whether it is `accepted`, and `best`, and :meth:`compare`.

        Arguments:
            iteration: Its number, from 1.
            current: Its score.
            divergence: What its reconstructions add to their divergence, in the order of those of the start.
        """
        em, e_step, found = self.config.em, self.config.e_step, self.compare(current, divergence)

        def worse(name: str, sign: int = 1) -> bool:
            return sign * found[name] > em.gate * found[f"{name}_se"]

        accepted = not em.guard or not worse("delta")
        closer = worse("divergence_delta", -1)
        if "ratio_delta" not in found:  # a black box
            improved = closer
        else:
            apart = worse("divergence_delta") and found["divergence_delta"] > TOLERANCE
            tie = not (worse("criterion_delta") or worse("ratio_delta") or apart)
            closer = closer and found["ratio_delta"] <= 0
            improved = worse("criterion_delta", -1) or (tie and (found["criterion_delta"] < 0 or closer))
        best = not em.guard or (accepted and improved)
        lower = accepted and found["delta"] < 0
        if lower:
            self.lowest = current
        if best:
            self.best, self.divergence = current, divergence
        self.stale = 0 if best or (lower and current.ratio is not None) else self.stale + 1
        if current.ratio is not None:
            if iteration > self.sharp:
                # Not added to the last one: reconstructions that are too narrow narrow the next iteration's, so that the
                # loop adds up by itself.
                self.dispersion = e_step.dispersion + e_step.gain * max(e_step.ratio - current.ratio, 0.0)
                self.dispersion = min(self.dispersion, WIDEST)
            else:
                fell = self.before is None or current.mean < self.before
                self.rises = 0 if fell else self.rises + 1
                self.before = current.mean
                if em.guard and (current.ratio < e_step.sharp_ratio or self.rises >= RISES):
                    self.sharp = iteration
        if em.guard and em.patience and self.stale >= em.patience:
            self.over = iteration >= self.sharp
            self.sharp, self.stale = min(self.sharp, iteration), 0
        return {"accepted": accepted, "best": best, **found}

    @property
    def facts(self) -> dict:
        """What a checkpoint holds of it beside :attr:`tensors`."""
        numbers = {k: getattr(self, k) for k in ("dispersion", "sharp", "before", "rises", "stale", "over")}
        return {**numbers, "name": self.first.name}

    @property
    def tensors(self) -> dict[str, Tensor]:
        scores = {f"{name}.{k}": v for name in SCORES for k, v in getattr(self, name).tensors.items()}
        return {**scores, "divergence": self.divergence}

    @classmethod
    def load(cls, config: Config, facts: dict, tensors: dict[str, Tensor]) -> Guard:
        def score(which: str) -> Score:
            parts = (tensors.get(f"{which}.{k}") for k in ("spread", "error", "excess"))
            return Score(facts["name"], tensors[f"{which}.items"], *parts)

        rest = {k: v for k, v in facts.items() if k != "name"}
        return cls(config, score("first"), score("lowest"), score("best"), tensors["divergence"], **rest)
