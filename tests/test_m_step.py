"""The trainer: its average, its clipping, and that what it saves is all that it is."""

from __future__ import annotations

import pytest
import torch

from diffem.corruptions import GaussianNoise
from diffem.denoisers import Denoiser, DenoiserConfig
from diffem.m_step import MStepConfig, Trainer
from diffem.networks import NetworkConfig


def trainer(**config) -> Trainer:
    def make() -> Denoiser:
        network = NetworkConfig(kind="mlp", width=8, depth=1, embedding=8)
        return Denoiser(GaussianNoise(0.3), (3,), DenoiserConfig(precondition="plain"), network)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Trainer(make(), make(), MStepConfig(**config))


def loss(of: Trainer, step: int, factor: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 3, generator=generator)
    y = x + 0.3 * torch.randn(16, 3, generator=generator)
    return factor * of.denoiser.loss(x, y, {}, generator)


def run(of: Trainer, first: int, last: int) -> None:
    for step in range(first, last):
        of.update(loss(of, step), 1e-2)


def vector(denoiser: Denoiser) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in denoiser.network.parameters()])


def test_average_is_young_first():
    of = trainer(ema=0.4)
    assert torch.equal(vector(of.averaged), vector(of.denoiser))
    average, decays = vector(of.denoiser), [2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4, 0.4]  # (1 + n) / (10 + n), then ema
    for step, decay in enumerate(decays):
        run(of, step, step + 1)
        average = decay * average + (1 - decay) * vector(of.denoiser)
        torch.testing.assert_close(vector(of.averaged), average, rtol=1e-6, atol=1e-7)
    assert (average - vector(of.denoiser)).abs().max() > 1e-3


def test_only_the_denoiser_is_trained():
    of = trainer()
    assert not any(p.requires_grad for p in of.averaged.parameters())
    assert not of.averaged.training
    run(of, 0, 1)
    assert all(p.grad is None for p in of.averaged.parameters())


def test_gradient_is_clipped():
    of = trainer(clip=1.0)
    parameters = list(of.denoiser.network.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(of, 0), parameters)])
    for factor in (0.5 / gradient.norm(), 1e4):
        of = trainer(clip=1.0)
        of.update(loss(of, 0, factor), 0.0)
        left = torch.cat([p.grad.flatten() for p in of.denoiser.network.parameters()])
        expected = gradient * min(factor, 1 / gradient.norm())  # of both heads together
        torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("before", [0, 4])
def test_state_and_load_go_on_bitwise(before):
    whole, part, fresh = (trainer(clip=1e-3) for _ in range(3))  # so that all is clipped
    run(whole, 0, before + 5)
    run(part, 0, before)
    run(fresh, 100, 103)  # what was there is replaced
    if before == 0:
        fresh = trainer(clip=1e-3)
    fresh.load({k: v.clone() for k, v in part.state().items()})
    run(fresh, before, before + 5)
    one, two = whole.state(), fresh.state()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert fresh.updates == before + 5


def test_reset_optimizer_forgets_moments():
    of = trainer()
    run(of, 0, 3)
    assert any(k.startswith("optimizer.") for k in of.state())
    of.reset_optimizer()
    assert not any(k.startswith("optimizer.") for k in of.state())
    before = vector(of.denoiser)
    of.update(loss(of, 9, 1e3), 1e-3)
    moved = (vector(of.denoiser) - before).abs()
    assert moved.max() == pytest.approx(1e-3, rel=1e-2)  # Adam's first step has the size of the learning rate


def test_restart_from_average():
    of = trainer()
    run(of, 0, 6)
    average = vector(of.averaged)
    assert not torch.equal(vector(of.denoiser), average)
    of.restart_from_average()
    assert torch.equal(vector(of.denoiser), average)
    assert torch.equal(vector(of.averaged), average)
    assert not any(k.startswith("optimizer.") for k in of.state())
    run(of, 6, 7)
    torch.testing.assert_close(vector(of.averaged), average.lerp(vector(of.denoiser), 9 / 11))  # the average is young


def test_weight_decay_is_decoupled():
    of = trainer(weight_decay=0.5)
    before = vector(of.denoiser)
    of.update(loss(of, 0, 0.0), 0.1)
    torch.testing.assert_close(vector(of.denoiser), before * (1 - 0.1 * 0.5))
