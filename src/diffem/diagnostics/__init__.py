"""What can be known without clean data.

- check.py: whether observations can be learned from, before any training
- noise.py: how large the noise is, where nobody told
- spectrum.py: in which directions they vary
- scores.py: how well a posterior sampler predicts hidden parts of held-out observations: CRPS, calibration ratio, coverage
- divergence.py: whether re-corrupted samples could be observations: two-sample tests
- calibration.py: whether posterior and prior fit each other: simulation-based calibration and TARP
- collapse.py: whether reconstructions or prior samples have become too narrow, too few, or copies
- diagnose.py: all of it for a finished run, and what is wrong in words
"""

from .diagnose import diagnose
from .scores import PREDICTIONS, Coverage, Score, coverage, crps, final_splits, score

__all__ = ["PREDICTIONS", "Coverage", "Score", "coverage", "crps", "diagnose", "final_splits", "score"]
