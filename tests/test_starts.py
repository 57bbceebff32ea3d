"""The first guess of the start, where the truth is known; EM on it is tested in test_mixtures.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffem.corruptions import GaussianBlur
from diffem.observations import Observations
from diffem.starts import StartConfig, _spectrum, fit

N, SHAPE = 1500, (1, 8, 8)
CORRUPTION = GaussianBlur(1.2, 0.1)


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Items whose spectrum falls, what is observed of them, and the variances of their coefficients."""
    basis, gain = CORRUPTION.gains(SHAPE)
    variance = 0.5 * gain.flatten() + 1e-4
    generator = torch.Generator().manual_seed(0)
    coefficients = variance.sqrt() * torch.randn(N, 64, generator=generator, dtype=torch.float64)
    x = basis.synthesise(coefficients).view(-1, *SHAPE).float()
    return x, CORRUPTION.observe(x, generator)[0], variance


def test_first_variances_of_a_blur_are_the_spectrum_where_it_is_seen():
    _, y, variance = drawn()
    likelihood = CORRUPTION.likelihood(y, {})
    _mean, found = _spectrum(likelihood)
    noise = (1 / likelihood.precision).mean(0)
    error = (2 / N) ** 0.5 * (variance + noise)  # of an estimated variance
    seen = variance > 8 * error
    assert 8 < seen.sum() < 40
    assert ((found - variance).abs() < 4 * error)[seen].all()
    assert (found[~seen] <= found[seen].min()).all()  # of the others, it is known that the spectrum falls


@pytest.mark.parametrize("noise", [0.1, 0.02])
def test_start_of_a_noisy_blur_is_nearly_the_best_linear_estimate(noise):
    """From one variance for all, its error is tens of times as large: EM leaves what the noise hides as it was."""
    corruption = GaussianBlur(1.2, noise)
    x, _, variance = drawn()
    y, params = corruption.observe(x, torch.Generator().manual_seed(1))
    data = Observations(y.numpy(), corruption, range=(-1, 1))
    config = StartConfig(components=(1,), ranks=(4,))
    mixture, _about = fit(config, data, np.arange(N), corruption, (0.0, 1.0), 0)
    likelihood = corruption.likelihood(y, params)
    wiener = variance / (variance + 1 / likelihood.precision)
    best = likelihood.basis.synthesise(wiener * likelihood.z).view_as(x)
    ours = mixture.posterior(likelihood).mean.view_as(x)
    assert (ours - x).square().mean() < 1.5 * (best - x).square().mean()
