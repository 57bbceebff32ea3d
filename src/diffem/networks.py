"""Backbones: an MLP for vectors and a U-Net for signals and images, both modulated by the noise level.

A backbone maps a list of input tensors (x_t, means, y, masks, ...) and log sigma to two tensors of the shape of an
item: the correction of a mean, and h, from which the share of a variance is computed. Both are zero before training, so
that an untrained denoiser equals its reference posterior (see :mod:`diffem.denoiser`). :class:`Given` turns any module
into a backbone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from azula.nn.attention import MultiheadSelfAttention
from azula.nn.layers import ConvNd, LayerNorm, SineEncoding
from azula.nn.unet import UNet, UNetBlock
from torch import Tensor, nn

from diffem.errors import DiffemError

HEADS = 4  # of each self-attention layer
DEEPEST = 12  # levels of a U-Net: each halves the resolution
VARIANCE_GRADIENT = 0.1  # the share of the variance head's gradient that reaches the features


@dataclass(frozen=True)
class NetworkConfig:
    """The backbone.

    Attributes:
        kind: `mlp` (fully connected), `unet` (convolutional), or `auto`: an MLP for vectors, a U-Net for everything
            else. Set `mlp` if a U-Net is refused since y and x differ in shape.
        width: Hidden features of the MLP. Lower it for tables of few rows (preset `table`: 64).
        depth: Residual blocks of the MLP. Lower it for tables of few rows (preset `table`: 2).
        channels: Channels of the U-Net at each level, finest first; each further level has half the resolution. Raise
            it, or add levels, for larger images and many observations.
        blocks: Blocks of the U-Net at each level, on the way down and again on the way up; as many numbers as channels
            has. Raise it for images that are hard to learn, lower it to save time.
        attention: Levels of the U-Net (0 = finest) that have self-attention after each block, which connects distant
            pixels. Add the coarsest level for large images; on fine levels it takes much time.
        embedding: Features by which the network is told the noise level. Leave it.
        dropout: Dropout rate inside the blocks. Raise it if observations are few (preset `table`: 0.3).
    """

    kind: str = "auto"
    width: int = 256
    depth: int = 3
    channels: tuple[int, ...] = (32, 64)
    blocks: tuple[int, ...] = (2, 2)
    attention: tuple[int, ...] = ()
    embedding: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "mlp", "unet"):
            raise DiffemError(f"network.kind: must be auto, mlp or unet, got {self.kind!r}")
        if len(self.channels) > DEEPEST:
            raise DiffemError(f"network.channels: at most {DEEPEST} levels, got {len(self.channels)}")
        if min(self.width, self.embedding, *self.channels, *self.blocks) < 1 or self.depth < 0:
            raise DiffemError("network: width, embedding, channels and blocks must be at least 1, depth >= 0")
        if not 0 <= self.dropout < 1:
            raise DiffemError(f"network.dropout: must be in [0, 1), got {self.dropout}")
        if len(self.channels) != len(self.blocks):
            raise DiffemError("network.blocks: must have as many entries as network.channels")
        if any(not 0 <= level < len(self.channels) for level in self.attention):
            raise DiffemError(
                f"network.attention: levels are 0 to {len(self.channels) - 1}, got {list(self.attention)}"
            )

    def build(self, shape: tuple[int, ...], inputs: list[tuple[int, ...]]) -> nn.Module:
        """The backbone for items of `shape` and input tensors of the shapes `inputs` (without the batch)."""
        if self.kind == "mlp" or (self.kind == "auto" and len(shape) == 1):
            return MLP(self, shape, sum(torch.Size(s).numel() for s in inputs))
        if len(shape) == 1:
            raise DiffemError("network.kind: unet needs items of shape (channels, *spatial); use mlp for vectors")
        _check_spatial(shape, inputs)
        return ModulatedUNet(self, shape, sum(s[0] for s in inputs))


Network = Callable[[int, tuple[int, ...]], nn.Module]


@dataclass(frozen=True)
class Given:
    """A backbone of the user's own.

    Attributes:
        make: Called with the number of input channels (for vectors: features) and the shape of an item. It returns a
            module that maps an input (B, channels, *spatial) and log sigma (B,) to (B, 2 * shape[0], *spatial): the
            correction of the mean, then h, where exp(h) is the remaining share of the reference's variance (1 + h where
            h > 0). A last layer that is initialised to zero trains best.
    """

    make: Network

    def build(self, shape: tuple[int, ...], inputs: list[tuple[int, ...]]) -> nn.Module:
        """As :meth:`NetworkConfig.build`."""
        if len(shape) > 1:
            _check_spatial(shape, inputs)
        channels = sum(s[0] if len(shape) > 1 else torch.Size(s).numel() for s in inputs)
        return Joined(self.make(channels, shape), shape)


def _check_spatial(shape: tuple[int, ...], inputs: list[tuple[int, ...]]) -> None:
    for s in inputs:
        if s[1:] != shape[1:]:
            raise DiffemError(
                f"network.kind: unet cannot be shown an observation of shape {s} beside items of shape {shape}; "
                "use mlp, or give the corruption a condition() of the items' spatial shape"
            )


class Joined(nn.Module):
    """A user's module, with its inputs concatenated into one tensor."""

    def __init__(self, module: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.module, self.shape = module, shape

    def forward(self, inputs: list[Tensor], log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat(inputs if len(self.shape) > 1 else [v.flatten(1) for v in inputs], 1)
        both = self.module(x, log_sigma)
        wanted = (len(x), 2 * self.shape[0], *self.shape[1:])
        if tuple(both.shape) != wanted:
            raise DiffemError(f"network: gave {tuple(both.shape)} where {wanted} is wanted: a mean and a variance")
        mean, variance = both.chunk(2, 1)
        return mean, variance


class NoiseEmbedding(nn.Sequential):
    """log sigma (B,) -> features (B, embedding)."""

    def __init__(self, features: int) -> None:
        super().__init__(SineEncoding(64), nn.Linear(64, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU())


class ResidualBlock(nn.Module):
    """LayerNorm, modulation, and a two-layer perceptron around a skip connection."""

    def __init__(self, width: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(embedding, 2 * width)
        last = nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), last)
        with torch.no_grad():
            self.modulation.weight.mul_(0.1)
            last.weight.mul_(0.1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, 1)
        return h + self.layers(self.norm(h) * (1 + scale) + shift)


class Heads(nn.Module):
    """Two heads, whose last layers are initialised to zero: the mean, and h of the variance. Both train the features.

    The variance is easier to learn than the mean. Its gradient helps to form features that the mean needs, too.

    Arguments:
        hidden: The hidden layer of the variance head, with as many outputs as inputs.
        last: The last layer of the mean head; the variance head gets a copy.
    """

    def __init__(self, hidden: nn.Module, last: nn.Module) -> None:
        super().__init__()
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.mean, self.variance = last, nn.Sequential(hidden, nn.SiLU(), copy.deepcopy(last))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(h), self.variance(VARIANCE_GRADIENT * h + (1 - VARIANCE_GRADIENT) * h.detach())


class MLP(nn.Module):
    """Residual perceptron on the concatenated, flattened inputs."""

    def __init__(self, config: NetworkConfig, shape: tuple[int, ...], features: int) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = NoiseEmbedding(config.embedding)
        self.first = nn.Linear(features, config.width)
        self.blocks = nn.ModuleList(
            ResidualBlock(config.width, config.embedding, config.dropout) for _ in range(config.depth)
        )
        self.last = Heads(nn.Linear(config.width, config.width), nn.Linear(config.width, torch.Size(shape).numel()))

    def forward(self, inputs: list[Tensor], log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.embedding(log_sigma)
        h = self.first(torch.cat([v.flatten(1) for v in inputs], 1))
        for block in self.blocks:
            h = block(h, embedding)
        mean, variance = self.last(h)
        return mean.view(-1, *self.shape), variance.view(-1, *self.shape)


class SpatialAttention(nn.Module):
    """Self-attention over all positions, around a skip connection; (B, C, *spatial)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = MultiheadSelfAttention(channels, attention_heads=HEADS)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        return x + self.attention(self.norm(tokens)).mT.reshape(x.shape)


class ChannelNorm(nn.Module):
    """Standardises (B, C, *spatial) over its channels, like azula's LayerNorm (which divides by N - 1 instead of N).

    One kernel instead of five: a training step takes a quarter less time on a CPU.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        return nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps).movedim(-1, 1)


class ModulatedUNet(nn.Module):
    """azula's U-Net, with self-attention after the blocks of the chosen levels."""

    def __init__(self, config: NetworkConfig, shape: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.embedding = NoiseEmbedding(config.embedding)
        self.unet = UNet(
            channels,
            shape[0],
            hid_channels=config.channels,
            hid_blocks=config.blocks,
            spatial=len(shape) - 1,
            mod_features=config.embedding,
            dropout=config.dropout or None,
        )
        for level in config.attention:
            for paths, i in ((self.unet.descent, level), (self.unet.ascent, len(config.channels) - 1 - level)):
                modules = nn.ModuleList()
                for module in cast(nn.ModuleList, paths[i]):
                    modules.append(module)
                    if isinstance(module, UNetBlock):
                        modules.append(SpatialAttention(config.channels[level]))
                paths[i] = modules
        for block in self.unet.modules():
            if isinstance(block, UNetBlock) and isinstance(block.norm, LayerNorm):
                block.add_module("norm", ChannelNorm(block.norm.eps))
        finest = cast(nn.ModuleList, self.unet.ascent[-1])
        hidden = ConvNd(config.channels[0], config.channels[0], spatial=len(shape) - 1, kernel_size=1)
        self.last, finest[-1] = Heads(hidden, finest[-1]), nn.Identity()
        # the memory layout with the fastest convolutions (by 7 % on a CPU)
        self.layout = torch.channels_last if len(shape) == 3 else torch.contiguous_format
        self.to(memory_format=self.layout)

    def forward(self, inputs: list[Tensor], log_sigma: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat(inputs, 1).contiguous(memory_format=self.layout)
        mean, variance = self.last(self.unet(x, self.embedding(log_sigma)))
        return mean.contiguous(), variance.contiguous()
