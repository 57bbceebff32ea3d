"""Other methods, for comparison. Only the command line imports them; importing this package registers their samplers.

- guidance.py: the E-steps of EM-MMPS and EMDiffusion
- ambient.py: Ambient Diffusion
"""

from .ambient import Ambient
from .guidance import DPSSampler, MMPSSampler

__all__ = ["Ambient", "DPSSampler", "MMPSSampler"]
