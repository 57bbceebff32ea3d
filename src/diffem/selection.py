"""Model selection on validation observations: which iterations are accepted, which one is kept, and when a run ends.

Two models are compared by one number, the criterion of their scores (:mod:`diffem.diagnostics.scores`). The difference
is paired, observation by observation, and has a standard error.

accepted  the criterion is not worse than the best so far by more than :data:`GATE` standard errors. The draws of a
          refused iteration are discarded: the next M-step trains on the previous reconstructions
best      accepted, and the criterion is smaller than the best so far (at first, that of the start)
stop      `em.patience` iterations in a row were not the best

An iteration whose criterion is not a number is refused. Without `em.guard` all others are accepted, and the last one is
the best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from diffem.diagnostics import Score

GATE = 2.0  # standard errors


@dataclass
class Selection:
    """The decisions of a run so far; see the module.

    Attributes:
        guard: Whether scores decide; if not, every iteration with a score is accepted, and the last one is the best.
        patience: The run ends after this many iterations in a row without a new best; with 0, never.
        first: The score of the start.
        best: The score of the best iteration; at first that of the start.
        stale: Iterations since the last best one.
    """

    guard: bool
    patience: int
    first: Score
    best: Score
    stale: int = 0

    @classmethod
    def begin(cls, guard: bool, patience: int, start: Score) -> Selection:
        return cls(guard, patience, start, start)

    @property
    def over(self) -> bool:
        """Whether patience has run out."""
        return self.guard and 0 < self.patience <= self.stale

    def decide(self, current: Score) -> dict[str, float | bool]:
        """Whether an iteration is `accepted` and `best`, and two differences, each with its standard error (NAME_se):
        `criterion_delta`, of the criterion from the previous best, and `start_delta`, of the score from the start's.

        Arguments:
            current: The score of the iteration.
        """
        delta, error = current.criterion_difference(self.best)
        first = math.isfinite(current.criterion) and not math.isfinite(self.best.criterion)  # any number beats none
        if self.guard:
            accepted = first or delta <= GATE * error
            best = first or (accepted and delta < 0)
        else:
            accepted = best = not math.isnan(current.criterion)
        self.stale = 0 if best else self.stale + 1
        if best:
            self.best = current
        return {"accepted": accepted, "best": best, "criterion_delta": delta, "criterion_delta_se": error} | to_start(
            current, self.first
        )

    @property
    def facts(self) -> dict:
        """Values stored in the checkpoint in addition to :attr:`tensors`."""
        return {"name": self.first.name, "stale": self.stale}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{k}": v for name in ("first", "best") for k, v in getattr(self, name).tensors.items()}

    @classmethod
    def load(cls, guard: bool, patience: int, facts: dict, tensors: dict[str, Tensor]) -> Selection:
        def score(which: str) -> Score:
            found = {k[len(which) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{which}.")}
            return Score(facts["name"], **found)

        return cls(guard, patience, score("first"), score("best"), facts["stale"])


def to_start(current: Score, start: Score) -> dict[str, float]:
    """The paired difference between a score and that of the start, and its standard error."""
    return dict(zip(("start_delta", "start_delta_se"), current.difference(start), strict=True))
