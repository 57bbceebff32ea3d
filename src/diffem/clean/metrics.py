"""Distances of reconstructions and prior samples to clean data."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffem import memory

Features = Callable[[Tensor], Tensor]  # items (N, *) to features (N, f)
ITEMS = 4096  # the most items that are compared: the cost of pairwise distances is quadratic
NUMBERS = 2**26  # the most values in these items: fewer are compared if they are large


def most(shape: tuple[int, ...]) -> int:
    """How many items of an array (N, *shape) are compared."""
    return memory.at_once(math.prod(shape[1:]), ITEMS, NUMBERS)


def compare(u: Tensor, v: Tensor, features: Features | None = None) -> dict[str, float]:
    """Distances between items u (N, *) and the clean items v of the same rows, in model units; with `features`, also
    the Frechet distance between their features (N, f)."""
    found = {"psnr": psnr(u, v, 2.0), "energy_distance": energy_distance(u, v, of_one_row=True)}
    if features is not None:
        found["frechet"] = frechet_distance(features(u), features(v))
    return {**found, **manifold_overlap(*apart(u.flatten(1), v.flatten(1)))}


def apart(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Even rows of u and odd rows of v: row i of u may be an estimate of row i of v, and so not independent of it."""
    return u[::2], v[1::2]


def psnr(x: Tensor, clean: Tensor, width: float) -> float:
    """Peak signal-to-noise ratio in dB of x (N, *) against clean (N, *), for data whose range has `width`."""
    return (-10 * torch.log10((x - clean).square().mean() / width**2)).item()


def interval(draws: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the central interval of draws (n, ...). If they are exchangeable with the truth, it holds the truth with
    probability `level`, exactly so if (n + 1) (1 - level) / 2 is a whole number."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
    return low, high


def energy_distance(u: Tensor, v: Tensor, of_one_row: bool = False) -> float:
    """Unbiased estimate of 2 E|u - v| - E|u - u'| - E|v - v'| from samples (N, *) and (M, *); 0 if their distributions
    are equal. `of_one_row`: row i of u is an estimate of row i of v, and the distance within such pairs is left out."""
    u, v = u.flatten(1), v.flatten(1)
    n, m = len(u), len(v)
    within = torch.cdist(u, u).sum() / (n * (n - 1)) + torch.cdist(v, v).sum() / (m * (m - 1))
    across = torch.cdist(u, v)
    between = (across.sum() - across.trace()) / (n * (n - 1)) if of_one_row else across.mean()
    return (2 * between - within).item()


def frechet_distance(u: Tensor, v: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two samples of features (N, f) and (M, f)."""
    u, v = u.double(), v.double()
    a, b = torch.cov(u.T), torch.cov(v.T)
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return ((u.mean(0) - v.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross).item()


def sinkhorn_divergence(u: Tensor, v: Tensor, regularisation: float = 1e-3) -> float:
    """Debiased entropic transport cost of two samples (N, d) and (M, d) with squared distances, as in the paper.

    S(u, v) = T(u, v) - T(u, u) / 2 - T(v, v) / 2, where T is the dual value of optimal transport with entropic
    `regularisation`, found by Sinkhorn iterations in the log domain with decreasing regularisation (Feydy et al.,
    2019, arXiv 1810.08278).
    """

    def transport(a: Tensor, b: Tensor) -> float:
        cost = torch.cdist(a, b).square()
        f, g = torch.zeros(len(a)).to(a), torch.zeros(len(b)).to(a)
        entropy = float(cost.max())
        while True:
            for _ in range(20 if entropy == regularisation else 2):
                f = -entropy * (((g - cost) / entropy).logsumexp(1) - math.log(len(b)))
                g = -entropy * (((f[:, None] - cost) / entropy).logsumexp(0) - math.log(len(a)))
            if entropy == regularisation:
                return (f.mean() + g.mean()).item()
            entropy = max(0.6 * entropy, regularisation)

    u, v = u.flatten(1), v.flatten(1)
    return transport(u, v) - 0.5 * transport(u, u) - 0.5 * transport(v, v)


def manifold_overlap(u: Tensor, v: Tensor, neighbours: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage of generated features u (N, f) against clean ones v (M, f).

    The ball around a point reaches to its `neighbours`-th neighbour in its own sample. `precision`: the fraction of u
    in a ball of v; `recall`: the fraction of v in a ball of u (Kynkaanniemi et al., 2019, arXiv 1904.06991); `density`:
    the mean number of balls of v that contain a point of u, divided by `neighbours`; `coverage`: the fraction of balls
    of v that contain a point of u (Naeem et al., 2020, arXiv 2002.09797). Precision and density measure fidelity,
    recall and coverage diversity.
    """
    u, v = u.flatten(1).double(), v.flatten(1).double()  # near distances suffer from cancellation in single precision
    if min(len(u), len(v)) <= neighbours:
        return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
    radius = lambda a: torch.cdist(a, a).kthvalue(neighbours + 1, dim=1).values  # noqa: E731 - itself is the first
    between, real, fake = torch.cdist(u, v), radius(v), radius(u)
    inside = between < real
    return {
        "precision": inside.any(1).double().mean().item(),
        "recall": (between < fake[:, None]).any(0).double().mean().item(),
        "density": inside.double().sum(1).mean().item() / neighbours,
        "coverage": (between.amin(0) < real).double().mean().item(),
    }


def distances(x: Tensor, clean: Tensor) -> dict[str, float]:
    """Distances between the distributions of items x (N, *) and clean ones (M, *)."""
    u, v = x.flatten(1), clean.flatten(1)
    return {
        "energy_distance": energy_distance(*apart(u, v)),
        "nearest_clean": nearest(u, v).mean().item(),
        "nearest_item": nearest(v, u).mean().item(),
        **manifold_overlap(*apart(u, v)),
    }


def nearest(u: Tensor, v: Tensor, batch: int = 1024) -> Tensor:
    """Distance of every row of u (N, d) to the nearest row of v (M, d), shape (N,)."""
    return torch.cat([torch.cdist(chunk.double(), v.double()).amin(1) for chunk in u.split(batch)])
