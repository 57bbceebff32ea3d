"""The trainer: its average, its clipping, and that what it saves is all that it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffem import trainer as trainer_module
from diffem.corruptions import BlackBox, Blur, Corruption, GaussianNoise, Mask, RandomMask
from diffem.data import Dataset, Observations
from diffem.denoiser import Denoiser, DenoiserConfig
from diffem.networks import NetworkConfig
from diffem.trainer import Batch, Examples, MStepConfig, Trainer, weigh


def trainer(corruption: Corruption = GaussianNoise(0.3), **config) -> Trainer:  # noqa: B008
    network = NetworkConfig(kind="mlp", width=8, depth=1, embedding=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = Denoiser(corruption, (3,), DenoiserConfig(precondition="plain"), network)
    return Trainer(denoiser, MStepConfig(**{"learning_rate": 1e-2, **config}))


def loss(of: Trainer, step: int, factor: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 3, generator=generator)
    y = x + 0.3 * torch.randn(16, 3, generator=generator)
    return factor * of.denoiser.loss(x, y, {}, generator)


def run(of: Trainer, first: int, last: int) -> None:
    for step in range(first, last):
        of.update([loss(of, step)], 1e-2)


def vector(denoiser: Denoiser) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in denoiser.network.parameters()])


def test_average_is_young_first():
    of = trainer(ema=0.4)
    assert torch.equal(vector(of.averaged), vector(of.denoiser))
    average = vector(of.denoiser)
    decays = [0.0, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4, 0.4]  # a copy, (1 + n) / (10 + n), then ema
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
    of = trainer()
    parameters = list(of.denoiser.network.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(of, 0), parameters)])
    for factor in (0.5 / gradient.norm(), 1e4):
        of = trainer()
        of.update([loss(of, 0, factor)], 0.0)
        left = torch.cat([p.grad.flatten() for p in of.denoiser.network.parameters()])
        expected = gradient * min(factor, 1 / gradient.norm())  # of both heads together
        torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("before", [0, 4])
def test_state_and_load_go_on_bitwise(before, monkeypatch):
    monkeypatch.setattr(trainer_module, "CLIP", 1e-3)  # so that all is clipped
    whole, part, fresh = (trainer() for _ in range(3))
    run(whole, 0, before + 5)
    run(part, 0, before)
    run(fresh, 100, 103)  # what was there is replaced
    if before == 0:
        fresh = trainer()
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
    of.update([loss(of, 9, 1e3)], 1e-3)
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
    first = vector(of.denoiser)
    assert torch.equal(vector(of.averaged), first)  # the average is young
    run(of, 7, 8)
    torch.testing.assert_close(vector(of.averaged), first.lerp(vector(of.denoiser), 9 / 11))


@pytest.mark.parametrize("micro", [1, 5, 16, 99])
@pytest.mark.parametrize("weighed", [False, True])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(weighed, micro):
    corruption, generator = RandomMask(0.5, 0.1), torch.Generator().manual_seed(2)
    x = torch.randn(16, 3, generator=generator)
    y, params = corruption.observe(x, generator)
    source = corruption.draw(16, (3,), generator) if weighed else None
    ones = torch.ones(16, dtype=torch.bool)
    batch = Batch(x, y, params, source, ones, ~ones)
    gradients = []
    for size in (0, micro):
        of = trainer(corruption, micro_batch=size)
        generator = torch.Generator().manual_seed(3)
        values = [loss.backward() or loss.item() for loss in of.losses(batch, generator, 0.3)]
        assert len(values) == (-(-16 // size) if size else 1)
        gradients.append((sum(values), torch.cat([p.grad.flatten() for p in of.denoiser.network.parameters()])))
    (whole, gradient), (parts, added) = gradients
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(added, gradient, rtol=1e-4, atol=1e-6)
    assert gradient.norm() > 1e-3


def test_weights_are_one_where_measured_and_lambda_where_imputed():
    x = torch.arange(1.0, 9).view(2, 1, 2, 2)
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1]]).bool().view(2, 1, 2, 2)
    yes, no = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    batch = Batch(x, x, {}, {"mask": mask}, yes, no)
    expected = torch.where(mask, 1.0, 0.25) * x
    torch.testing.assert_close(weigh(x, batch, Mask(0.0), 0.25), expected, rtol=1e-4, atol=1e-4)
    mirrored = Batch(x, x, {}, {"mask": mask}, yes, torch.tensor([True, False]))
    other = torch.stack([torch.where(mask[0].flip(-1), 1.0, 0.25) * x[0], expected[1]])
    torch.testing.assert_close(weigh(x, mirrored, Mask(0.0), 0.25), other, rtol=1e-4, atol=1e-4)
    clean = Batch(x, x, {}, {"mask": mask}, torch.tensor([False, True]), no)
    torch.testing.assert_close(weigh(x, clean, Mask(0.0), 0.25), torch.stack([x[0], expected[1]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("corruption", "params", "weighed"),
    [
        (Mask(0.1), {"mask": np.eye(40, 4, dtype=bool)[:, None, :].repeat(4, 1)[:, None]}, True),
        (Mask(0.1), {"mask": np.eye(4, dtype=bool)[None, None]}, False),
        (GaussianNoise(0.1), {}, False),
        (GaussianNoise(), {"noise": np.linspace(0.1, 0.2, 40).reshape(40, 1, 1, 1)}, True),
        (Blur("reflect", 0.1), {"kernel": np.full((1, 3, 3), 1 / 9)}, False),
        (BlackBox(lambda x, params: x * params["gain"]), {"gain": np.linspace(1, 2, 40).reshape(40, 1, 1, 1)}, False),
    ],
    ids=["masks", "one mask for all", "noise", "noise by item", "one kernel for all", "black box"],
)
def test_entries_are_weighed_where_observations_measure_different_parts(corruption, params, weighed):
    y = np.random.default_rng(0).normal(size=(40, 1, 4, 4))
    observations = Observations(y, corruption, params, range=(-2, 2))
    data = Dataset(observations, observations.units(np.arange(40)))
    assert Examples(data, np.arange(40), MStepConfig(), torch.device("cpu")).weighed == weighed


def test_what_is_not_finite_is_told_and_undone_by_loading():
    of = trainer()
    run(of, 0, 3)
    before = {k: v.clone() for k, v in of.state().items()}
    assert not of.update([loss(of, 3), loss(of, 4, math.nan)], 1e-2).isfinite()
    of.load(before)
    assert all(torch.equal(v, before[k]) for k, v in of.state().items())


class Unread(TorchDispatchMode):
    """No number is read on the host, which would wait for a GPU; counters, which are integers, stay on the CPU."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert "_local_scalar_dense" not in str(function) or not arguments[0].is_floating_point()
        return function(*arguments, **(keywords or {}))


def test_an_update_reads_no_tensor():
    of = trainer(micro_batch=5)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    y, params = of.denoiser.corruption.observe(x, torch.Generator().manual_seed(1))
    no = torch.zeros(16, dtype=torch.bool)
    batch, generator = Batch(x, y, params, None, ~no, no), torch.Generator().manual_seed(2)
    with Unread():
        first = of.update(of.losses(batch, generator, 0.3), 1e-2)
        second = of.update(of.losses(batch, generator, 0.3), 1e-2)
    assert 0 < float(second) != float(first) > 0
    with pytest.raises(AssertionError), Unread():
        float(first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_update_does_not_wait_for_a_gpu():
    """From the choice of the rows to the average."""
    device = torch.device("cuda")
    mask = np.random.default_rng(0).random((40, 1, 4, 4)) < 0.5
    y = np.random.default_rng(1).normal(size=(40, 1, 4, 4))
    observations = Observations(np.where(mask, y, 0), Mask(0.1), {"mask": mask}, range=(-2, 2))
    data = Dataset(observations, observations.units(np.arange(40)))
    config = MStepConfig(batch=16, micro_batch=5)
    examples, x = Examples(data, np.arange(40), config, device), data.items(y)
    network = NetworkConfig(channels=(8, 8), blocks=(1, 1), embedding=8)
    of = Trainer(Denoiser(data.corruption, data.shape, DenoiserConfig(), network).to(device), config)
    for step in range(3):  # in the first ones the libraries get ready
        generator = torch.Generator(device).manual_seed(step)
        torch.cuda.set_sync_debug_mode("default" if step < 2 else "error")
        try:
            of.update(of.losses(examples.batch(x, generator, step), generator, 0.1), 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_learning_rate_is_constant_or_falls_in_a_line_to_a_twentieth():
    linear, constant = (MStepConfig(learning_rate=2.0, schedule=schedule) for schedule in ("linear", "constant"))
    assert [linear.rate(done) for done in (0, 0.5, 0.95, 1)] == pytest.approx([2, 1, 0.1, 0.1])
    assert constant.rate(1) == 2
