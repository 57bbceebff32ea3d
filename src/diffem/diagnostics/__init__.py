"""What can be known without clean data.

- scores.py: how well a posterior sampler predicts hidden parts of held-out observations: CRPS, calibration ratio
- divergence.py: whether re-corrupted samples could be observations: two-sample tests
- calibration.py: whether posterior and prior fit each other: simulation-based calibration and TARP
"""

from .scores import Score, crps, score

__all__ = ["Score", "crps", "score"]
