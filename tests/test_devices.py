"""Devices and precisions: what is chosen, what cannot be, and that bfloat16 changes a draw a little."""

from __future__ import annotations

import pytest
import torch

from diffem import devices, seeding
from diffem.corruptions import RandomMask
from diffem.denoiser import Denoiser, DenoiserConfig
from diffem.errors import DiffemError
from diffem.networks import NetworkConfig
from diffem.posterior import Posterior, from_pretrained
from diffem.samplers import DiffusionSampler, SamplerConfig
from diffem.units import Units


def error(*arguments: str) -> str:
    with pytest.raises(DiffemError) as caught:
        devices.choose(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_auto_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.choose() == (torch.device("cpu"), torch.float32)
    assert devices.choose("auto", "bfloat16") == (torch.device("cpu"), torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_with_a_gpu():
    assert devices.choose() == (torch.device("cuda"), torch.bfloat16)
    assert devices.choose("auto", "float32") == (torch.device("cuda"), torch.float32)
    assert devices.choose("cpu") == (torch.device("cpu"), torch.float32)


def test_what_cannot_be_chosen():
    with pytest.raises(RuntimeError) as reason:
        torch.device("gpu9")
    assert error("gpu9") == f"--device: gpu9 cannot be used: {str(reason.value).splitlines()[0]}"
    assert error("cuda:99").startswith("--device: cuda:99 cannot be used: ")
    assert error("cpu", "half") == "--precision: must be auto, float32, bfloat16, got 'half'"


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_bfloat16_draws_are_close(kind, tmp_path):
    corruption, shape = RandomMask(0.5, 0.1), (1, 4, 4)
    network = NetworkConfig(kind=kind, width=32, depth=2, channels=(8, 8), blocks=(1, 1), embedding=16)
    denoiser = Denoiser(corruption, shape, DenoiserConfig(precondition="plain"), network)
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.network.parameters():  # else the network is zero
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    posterior = Posterior(DiffusionSampler(denoiser.eval(), SamplerConfig(steps=8)), corruption, Units())
    posterior.save_pretrained(tmp_path)
    params = corruption.draw(64, shape, generator)
    y = corruption.apply(torch.randn(64, *shape, generator=generator), params, generator)
    seeds = seeding.item_seeds(0, 0, "user", range(64))
    whole, half = (from_pretrained(tmp_path, precision=p) for p in ("float32", "bfloat16"))
    exact, close = (p.sample(y, params, seeds=seeds)[0] for p in (whole, half))
    assert torch.equal(exact, posterior.sample(y, params, seeds=seeds)[0])
    assert {v.dtype for v in (*half.sampler.denoiser.network.parameters(), close)} == {torch.float32}
    difference = (close - exact).square().mean().sqrt() / exact.std()
    assert 1e-5 < difference < 0.05
