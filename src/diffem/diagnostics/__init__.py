"""Diagnostics that need no clean data.

- check.py: whether observations can be learned from, before any training
- noise.py: an estimate of the noise, if it is not known
- spectrum.py: the directions in which observations vary
- scores.py: how well a posterior sampler predicts hidden parts of held-out observations: CRPS, calibration ratio, coverage
- divergence.py: whether re-corrupted samples could be observations: two-sample tests
- calibration.py: whether posterior and prior fit each other: simulation-based calibration and TARP
- collapse.py: whether reconstructions or prior samples have become too narrow, too few, or copies
- diagnose.py: all diagnostics of a finished run, and warnings in words
"""

from .diagnose import diagnose
from .scores import PREDICTIONS, Coverage, Score, coverage, crps, final_splits, score

__all__ = ["PREDICTIONS", "Coverage", "Score", "coverage", "crps", "diagnose", "final_splits", "score"]
