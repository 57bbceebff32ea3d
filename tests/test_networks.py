"""Backbones: the norm that stands in for azula's, an untrained network that says nothing, and what shapes the features."""

from __future__ import annotations

import pytest
import torch
from azula.nn.layers import LayerNorm
from azula.nn.unet import UNetBlock
from torch import nn

from diffem import networks
from diffem.networks import ChannelNorm, Heads, NetworkConfig


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("shape", [(3, 8, 5), (3, 8, 5, 4), (3, 2, 5, 4), (2, 4, 3, 2, 5)])
def test_channel_norm_standardises_over_channels(shape, eps):
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 2
    x[0] = 7.0  # no variance at all: 0, not infinite
    variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
    expected = (x - mean) * torch.rsqrt(variance + eps)
    found = ChannelNorm(eps)(x)
    torch.testing.assert_close(found, expected)
    assert not found[0].any()
    bessel = (x - mean) * torch.rsqrt(torch.var(x, dim=1, keepdim=True) + eps)
    assert (found - bessel).abs().max() > 1e-2  # which correction it is can be told here


def test_channel_norm_keeps_the_layout():
    x = torch.randn(2, 8, 5, 4, generator=torch.Generator().manual_seed(0))
    last = ChannelNorm(1e-5)(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, ChannelNorm(1e-5)(x))


@pytest.mark.parametrize("shape", [(2, 12), (2, 8, 8)])
@pytest.mark.parametrize("attention", [(), (1,)])
def test_unet_is_normalised_by_it_throughout(shape, attention):
    config = NetworkConfig(kind="unet", channels=(4, 8), blocks=(1, 2), attention=attention, embedding=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = config.build(shape, [shape, (1, *shape[1:])])
    blocks = [module for module in unet.modules() if isinstance(module, UNetBlock)]
    assert len(blocks) == 6  # on the way down and up
    assert all(isinstance(block.norm, ChannelNorm) for block in blocks)
    assert not any(isinstance(module, LayerNorm) and module.dim != -1 for module in unet.modules())
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, *shape, generator=generator), torch.randn(3, 1, *shape[1:], generator=generator)]
    log_sigma = torch.tensor([-3.0, 0.0, 2.0])
    assert not any(out.any() for out in unet(inputs, log_sigma))  # its last layers are zero
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    for found, other in zip(unet(inputs, log_sigma), unet(inputs, log_sigma + 1), strict=True):
        assert found.shape == (3, *shape)
        assert found.abs().max() > 1e-2
        assert (found - other).abs().max() > 5e-4  # the noise level modulates it


def test_the_second_head_shapes_the_features_less_than_the_first():
    generator = torch.Generator().manual_seed(0)
    heads = Heads(nn.Linear(5, 5), nn.Linear(5, 3))
    h = torch.randn(4, 5, generator=generator, requires_grad=True)
    assert not any(out.any() for out in heads(h))  # the last layers begin at zero
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    cotangent = torch.randn(4, 3, generator=generator)
    assert 0 < networks.VARIANCE_GRADIENT < 1
    whole = heads.mean(h), heads.variance(h)
    for out, expected, factor in zip(heads(h), whole, (1.0, networks.VARIANCE_GRADIENT), strict=True):
        torch.testing.assert_close(out, expected)
        found, of_all = (torch.autograd.grad(v, h, cotangent)[0] for v in (out, expected))
        torch.testing.assert_close(found, factor * of_all)
        assert found.abs().max() > 0.01
    # what lies behind the features learns as fast as it would alone
    names, parameters = zip(*heads.variance.named_parameters(), strict=True)
    for name, *pair in zip(
        names,
        *(torch.autograd.grad(v, parameters, cotangent) for v in (heads(h)[1], heads.variance(h))),
        strict=True,
    ):
        torch.testing.assert_close(*pair, msg=name)


@pytest.mark.parametrize(("kind", "shape"), [("mlp", (6,)), ("mlp", (2, 3)), ("unet", (2, 8)), ("unet", (2, 4, 4))])
def test_both_heads_reach_every_feature(kind, shape, monkeypatch):
    config = NetworkConfig(kind=kind, width=8, depth=2, channels=(4, 8), blocks=(1, 1), embedding=8)
    generator = torch.Generator().manual_seed(0)
    inputs, log_sigma = [torch.randn(3, *shape, generator=generator)], torch.tensor([-1.0, 0.0, 1.0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = config.build(shape, [shape])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    features = {n: p for n, p in network.named_parameters() if not n.startswith("last.")}
    assert len(features) > 8

    def gradients(shapes: float, head: int) -> tuple[torch.Tensor, ...]:
        monkeypatch.setattr(networks, "VARIANCE_GRADIENT", shapes)
        return torch.autograd.grad(network(inputs, log_sigma)[head].square().sum(), list(features.values()))

    for name, found, of_all, first in zip(
        features, gradients(0.3, 1), gradients(1.0, 1), gradients(0.3, 0), strict=True
    ):
        torch.testing.assert_close(found, 0.3 * of_all, rtol=1e-4, atol=1e-5, msg=name)
        assert found.any(), name
        assert first.any(), name
