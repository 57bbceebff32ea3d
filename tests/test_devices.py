"""Devices and precisions: what is chosen, what cannot be, and that bfloat16 changes a draw a little."""

from __future__ import annotations

import pytest
import test_em
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


def weights(folder) -> dict[str, torch.Tensor]:
    return from_pretrained(folder / "posterior").sampler.state_dict()


def run(folder, **options) -> dict[str, torch.Tensor]:
    """The weights of a run of few updates; 60 observations in draws of 16: four chunks, the last one of 12."""
    config = test_em.settings(em={"iterations": 2}, m_step={"micro_batch": 8})
    for _row in test_em.DiffEM(config, test_em.observations(), folder, batch=16, **options).iterate():
        pass
    return weights(folder)


def test_a_compiled_network_is_used_for_updates_and_draws_at_their_sizes(tmp_path, monkeypatch):
    called = set()

    def translate(network, dynamic):
        assert not dynamic

        def translated(inputs, level):
            called.add((len(level), network.training))
            return network(inputs, level)

        return translated

    plain = run(tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", translate)
    same = run(tmp_path / "compiled", compile=True)
    assert all(torch.equal(plain[k], same[k]) for k in plain)
    assert {(8, True), (16, False)} <= called <= {(8, True), (8, False), (16, False)}


@pytest.mark.parametrize("error", [RuntimeError("no C++ compiler\nwas found"), NotImplementedError()], ids=str)
def test_a_run_goes_on_where_compilation_fails(error, tmp_path, monkeypatch, capsys):
    def fail(network, dynamic):
        def translated(inputs, level):
            raise error

        return translated

    plain = run(tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", fail)
    same = run(tmp_path / "eager", compile=True)
    assert all(torch.equal(plain[k], same[k]) for k in plain)
    reason = "no C++ compiler" if str(error) else "NotImplementedError"
    assert set(capsys.readouterr().err.splitlines()) == {
        f"diffem: --compile: goes on without it, since it fails: {reason}"
    }


def test_an_error_of_the_network_is_no_error_of_its_compilation():
    class Wrong(torch.nn.Module):
        def forward(self, inputs, level):
            raise DiffemError("mine")

    with pytest.raises(DiffemError, match="mine"):
        devices.Compiled(Wrong(), {1})([torch.zeros(1)], torch.zeros(1))


def test_a_tensor_is_put_on_a_device():
    x = torch.arange(3)
    assert devices.put(x, "cpu") is x
    assert devices.put(x, torch.device("meta")).device.type == "meta"
