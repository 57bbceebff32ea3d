"""Mixtures of low-rank Gaussians: exact posteriors, and exact EM on observations. The start, and the denoiser's reference.

- likelihoods.py: what an observation says of an item
- model.py: the mixture and its posteriors
- fit.py: EM
"""

from .likelihoods import Basis, Diagonal, Likelihood, Rows
from .model import ExactPosterior, Mixture

__all__ = ["Basis", "Diagonal", "ExactPosterior", "Likelihood", "Mixture", "Rows"]
