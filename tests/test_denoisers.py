"""What the second head of a denoiser learns, and that it leaves the first alone."""

from __future__ import annotations

import math

import pytest
import torch

from diffem.corruptions import GaussianBlur, RandomMask, RandomProjection
from diffem.denoisers import LEAST, Denoiser, DenoiserConfig
from diffem.m_step import MStepConfig, Trainer
from diffem.networks import NetworkConfig

CORRUPTION, SIGMA = RandomMask(0.5, 0.1), 1.0
MLP = NetworkConfig(kind="mlp", width=16, depth=1, embedding=8)
UNET = NetworkConfig(kind="unet", channels=(4, 8), blocks=(1, 1), embedding=8)


def build(network: NetworkConfig, shape: tuple[int, ...], corruption=CORRUPTION, precondition="plain") -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(corruption, shape, DenoiserConfig(precondition, 0.5, 2.0), network)


def test_variance_is_that_of_two_points():
    # x is -1 or 1 in one entry, 0 in the other: given x_t its mean is tanh(x_t / sigma^2), and its variance 1 - tanh^2.
    network, config = NetworkConfig(kind="mlp", width=64, depth=2, embedding=32), MStepConfig(learning_rate=2e-3)
    trainer = Trainer(build(network, (2,)), build(network, (2,)), config)
    generator = torch.Generator().manual_seed(1)

    def items(n: int) -> torch.Tensor:
        return torch.randint(2, (n, 1), generator=generator) * torch.tensor([2.0, 0.0]) - torch.tensor([1.0, 0.0])

    for step in range(800):
        x = items(256)
        y, params = CORRUPTION.observe(x, generator)
        trainer.update(trainer.denoiser.loss(x, y, params, generator, 1.0), 2e-3 if step < 530 else 5e-4)
    x, withheld = items(20_000), torch.ones(20_000, dtype=torch.bool)
    x_t = x + SIGMA * torch.randn(x.shape, generator=generator)
    y, params = CORRUPTION.observe(x, generator)
    with torch.no_grad():
        posterior, _, v = trainer.averaged.predict(x_t, torch.full((20_000,), SIGMA), y, params, withheld)
    found, exact = (posterior.variance * v)[:, 0], 1 - torch.tanh(x_t[:, 0] / SIGMA**2).square()
    for low, high in ((0.0, 0.3), (0.3, 0.8), (0.8, 1.2), (1.2, 2.0)):
        within = (x_t[:, 0].abs() >= low) & (x_t[:, 0].abs() < high)
        assert found[within].mean().item() == pytest.approx(exact[within].mean().item(), rel=0.25)
    assert v[:, 1].mean() < 2 * LEAST


@pytest.mark.parametrize(("said", "expected"), [(-3.0, math.exp(-3)), (0.0, 1.0), (100.0, 101.0)])
def test_a_share_beyond_one_does_not_grow_like_an_exponential(said, expected):
    """On digits, e^20 was said of an observation unlike all others, and its draw ended as NaN."""
    denoiser = build(MLP, (6,))
    denoiser.network.last.variance[-1].bias.data += said
    x, sigma = torch.zeros(1, 6), torch.ones(1)
    _, _, v = denoiser.predict(x, sigma, *CORRUPTION.observe(x, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(v, torch.full((1, 6), LEAST + (1 - LEAST) * expected))


@pytest.mark.parametrize(
    ("network", "shape", "corruption", "precondition", "by_entry"),
    [
        (MLP, (6,), CORRUPTION, "plain", True),
        (UNET, (2, 4, 4), CORRUPTION, "fuse", True),
        (UNET, (1, 4, 4), GaussianBlur(0.5, 0.1), "fuse", False),
        (MLP, (6,), RandomProjection(2, 0.1), "fuse", False),
    ],
)
def test_variances_do_not_shape_the_mean(network, shape, corruption, precondition, by_entry):
    denoiser, generator = build(network, shape, corruption, precondition), torch.Generator().manual_seed(2)
    for parameter in denoiser.network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    x = torch.randn(5, *shape, generator=generator)
    y, params = corruption.observe(x, generator)
    loss = denoiser.loss(x, y, params, torch.Generator().manual_seed(3))
    names, parameters = zip(*denoiser.network.named_parameters(), strict=True)
    found = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    again = torch.Generator().manual_seed(3)
    sigma = denoiser.times(5, again).to(x)
    noise = torch.randn(x.shape, generator=again)
    x_t = x + sigma.view(-1, *(1,) * len(shape)) * noise
    posterior, f, v = denoiser.predict(x_t, sigma, y, params)
    alone = (posterior.whiten(x.flatten(1) - posterior.mean) - f).square().mean()
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    error = posterior.whiten(x.flatten(1) - posterior.mean - posterior.scale(f)).square()
    # where S is not diagonal, the shares of entries would turn noise into directions that were observed
    assert torch.allclose(v, v[:, :1]) == (not by_entry) == (not posterior.by_entry)
    of_mean = torch.autograd.grad(alone, parameters, retain_graph=True, allow_unused=True)
    of_variance = torch.autograd.grad((error.detach().to(v) / v + v.log()).mean(), parameters, allow_unused=True)
    for name, first, second in zip(names, of_mean, of_variance, strict=True):
        assert (first is None) == (second is not None) == name.startswith("last.variance")
        expected = second if first is None else first
        assert expected is not None
        torch.testing.assert_close(found[name], expected)
        assert found[name].any()
