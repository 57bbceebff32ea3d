"""What can be known with clean data: distances of reconstructions and prior samples to a clean reference."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(x: Tensor, clean: Tensor, width: float) -> float:
    """Peak signal-to-noise ratio in dB of x (N, *) against clean (N, *), for data whose range has `width`."""
    return (-10 * torch.log10((x - clean).square().mean() / width**2)).item()


def energy_distance(u: Tensor, v: Tensor) -> float:
    """2 E|u - v| - E|u - u'| - E|v - v'| without bias, of two samples (N, *) and (M, *); 0 if equal in law."""
    u, v = u.flatten(1), v.flatten(1)
    n, m = len(u), len(v)
    within = torch.cdist(u, u).sum() / (n * (n - 1)) + torch.cdist(v, v).sum() / (m * (m - 1))
    return (2 * torch.cdist(u, v).mean() - within).item()


def frechet_distance(u: Tensor, v: Tensor) -> float:
    """Frechet distance of the Gaussians with the moments of two samples of features (N, f) and (M, f)."""
    u, v = u.double(), v.double()
    a, b = torch.cov(u.T), torch.cov(v.T)
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return ((u.mean(0) - v.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross).item()


def nearest(u: Tensor, v: Tensor, batch: int = 1024) -> Tensor:
    """Distance of every row of u (N, d) to the nearest row of v (M, d), shape (N,)."""
    return torch.cat([torch.cdist(chunk, v).amin(1) for chunk in u.split(batch)])
