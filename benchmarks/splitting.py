"""The competing method for a point estimate: one network with the splitting loss (SSDU; deepinv's `SplittingLoss`).

The network sees a part of the observed pixels; its loss is over all observed pixels:

    E || M (f(M' y, M') - y) ||^2,    M' keeps 70 % of the observed pixels M.

f(y, M) then estimates E[x | y]. Masks only. `library` trains deepinv's own U-Net with deepinv's own loss (`pip install -e .[benchmarks]`).

Reference:
    | Self-supervised learning of physics-guided reconstruction neural networks without fully sampled reference data
    | (Yaman et al., 2020)
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffem import seeding
from diffem.config import Config
from diffem.corruptions import Params
from diffem.data import Dataset, Observations
from diffem.trainer import CLIP

HIDDEN = 0.3  # the fraction of the observed pixels that is hidden from the network
Estimate = Callable[[Tensor, Params], Tensor]  # maps observations to E[x | y], both in model units


def train(observations: Observations, config: Config, seed: int, budget: int, library: bool = False) -> Estimate:
    """Trains a network of the run's size with a budget of evaluations; an update takes 3 per item.

    Arguments:
        observations: Masked observations.
        config: Network, batch, learning rate and average of the run that it is compared with.
        seed: Seed of the split, the weights and the batches.
        budget: Evaluations of the network.
        library: deepinv's U-Net and loss, instead of ours.
    """
    train_rows, *_ = observations.split(seed)
    data = Dataset(observations, observations.units(train_rows))
    m_step, shape = config.m_step, observations.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, loss_of = _deepinv(shape) if library else _ours(config, shape)
    averaged = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=m_step.learning_rate)
    steps = budget // (3 * m_step.batch)
    for step in range(steps):
        generator = seeding.generator(seed, 0, "m_step", step)
        rows = torch.randint(len(train_rows), (m_step.batch,), generator=generator)
        y, params = data.batch(train_rows[rows.numpy()])
        mask = params["mask"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.fold(seed, step) >> 1)
            loss = loss_of(model, y, mask)
        for group in optimizer.param_groups:
            group["lr"] = m_step.rate(step / steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        share = min(m_step.ema, (2 + step) / (11 + step))
        with torch.no_grad():
            torch._foreach_lerp_([*averaged.parameters()], [*model.parameters()], 1 - share)

    @torch.no_grad()
    def estimate(y: Tensor, params: Params) -> Tensor:
        return _call(averaged, y, params["mask"])

    return estimate


def _call(model: nn.Module, y: Tensor, mask: Tensor) -> Tensor:
    if hasattr(model, "last"):  # ours
        return model([y, mask.to(y).expand_as(y)], torch.zeros(len(y)))[0]
    return model(torch.cat((y, mask.to(y).expand_as(y)), 1))


def _ours(config: Config, shape: tuple[int, ...]) -> tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    def loss(model: nn.Module, y: Tensor, mask: Tensor) -> Tensor:
        shown = mask & (torch.rand(mask.shape) > HIDDEN)
        seen = mask.expand_as(y)
        return (_call(model, shown * y, shown) - y)[seen].square().mean()

    return config.network.build(shape, [shape, shape]), loss


def _deepinv(shape: tuple[int, ...]) -> tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    import deepinv

    model = deepinv.models.UNet(2 * shape[0], shape[0], scales=2, residual=False, batch_norm=False)
    split = deepinv.loss.SplittingLoss(split_ratio=1 - HIDDEN, pixelwise=True)

    def loss(model: nn.Module, y: Tensor, mask: Tensor) -> Tensor:
        physics = deepinv.physics.Inpainting(img_size=shape, mask=mask.to(y).expand_as(y))
        reconstruct = lambda y, physics, **_: _call(model, y, physics.mask)  # noqa: E731
        adapted = split.adapt_model(reconstruct)
        x = adapted(y, physics, update_parameters=True)
        return split(x, y, physics, adapted).mean()

    return model, loss
