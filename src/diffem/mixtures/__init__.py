"""Mixtures of low-rank Gaussians, for the start and the denoiser's reference: exact posteriors, exact EM on
observations.

- likelihoods.py: the likelihood of an item, given its observation
- model.py: the mixture and its posteriors
- fit.py: EM
"""

from .likelihoods import Basis, Diagonal, Likelihood, Rows
from .model import ExactPosterior, Mixture

__all__ = ["Basis", "Diagonal", "ExactPosterior", "Likelihood", "Mixture", "Rows"]
