"""What can be known without clean data.

    scores.py       how well a posterior sampler predicts hidden parts of held-out observations: CRPS, ratio, coverage
    divergence.py   whether re-corrupted samples could be observations: two-sample tests
    calibration.py  whether posterior and prior fit each other: simulation-based calibration and TARP
    check.py        whether observations can be learned from at all, before any training
"""

from .scores import Score, crps, score

__all__ = ["Score", "crps", "score"]
