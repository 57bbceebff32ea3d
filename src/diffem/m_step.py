"""The M-step: the denoiser, the running average of its weights, and the optimiser, one update at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffem.denoisers import Denoiser
from diffem.errors import DiffemError


@dataclass(frozen=True)
class MStepConfig:
    """The M-step.

    Attributes:
        steps: Optimiser steps per iteration.
        first_steps: Steps of the first iteration.
        batch: Items per step.
        learning_rate: Of Adam.
        schedule: `constant`, or `linear`: falls to a twentieth over all iterations, and again over the prior's steps.
        weight_decay: Decoupled weight decay.
        clip: The gradient's norm is clipped to this.
        ema: Decay of the exponential moving average of the weights, which the E-step uses.
        thinned: The fraction of the simulated observations that is thinned.
        imputed_weight: How much imputed entries of a reconstruction weigh beside measured ones (lambda of
            :mod:`diffem.denoisers`). With 1 the M-step is the paper's, which never shows the network a real observation.
            Taken as 1 for noise, blurs and black boxes, whose observations all measure the same, and in guided runs.
        optimizer: `carry` or `reset` its state between iterations.
        flip: Mirror half of the items left to right before they are corrupted; for images that may be.
        clean_examples: A .npy of a few clean items, shape (n, *shape), in the units of y; none by default.
        clean_share: The fraction of a batch that is taken from them.
        checkpoint: Steps between two checkpoints.
    """

    steps: int = 150
    first_steps: int = 600
    batch: int = 128
    learning_rate: float = 2e-3
    schedule: str = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.99
    thinned: float = 0.5
    imputed_weight: float = 0.003
    optimizer: str = "carry"
    flip: bool = False
    clean_examples: str = ""
    clean_share: float = 0.1
    checkpoint: int = 500

    def __post_init__(self) -> None:
        if min(self.steps, self.first_steps, self.batch, self.checkpoint) < 1:
            raise DiffemError("m_step: steps, first_steps, batch and checkpoint must be at least 1")
        if not 0 <= self.ema < 1 or not all(0 <= share <= 1 for share in (self.thinned, self.clean_share)):
            raise DiffemError("m_step: ema must be in [0, 1), thinned and clean_share in [0, 1]")
        if not 0 < self.imputed_weight <= 1:
            raise DiffemError(f"m_step.imputed_weight: must be in (0, 1], got {self.imputed_weight}")
        if self.schedule not in ("constant", "linear"):
            raise DiffemError(f"m_step.schedule: must be constant or linear, got {self.schedule!r}")
        if self.optimizer not in ("carry", "reset"):
            raise DiffemError(f"m_step.optimizer: must be carry or reset, got {self.optimizer!r}")


class Trainer:
    """A denoiser in training.

    Arguments:
        denoiser: What is trained.
        averaged: A second one of the same form; its weights become the average of the first one's.
        config: See :class:`MStepConfig`.
    """

    def __init__(self, denoiser: Denoiser, averaged: Denoiser, config: MStepConfig) -> None:
        self.denoiser, self.averaged, self.config, self.updates = denoiser, averaged, config, 0
        self.averaged.network.load_state_dict(self.denoiser.network.state_dict())
        self.averaged.requires_grad_(False).eval()
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Forgets the optimiser's moments."""
        config = self.config
        self.optimizer = torch.optim.AdamW(
            self.denoiser.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )

    def restart_from_average(self) -> None:
        """Goes on from the averaged weights, with a new optimiser and a new average."""
        self.denoiser.network.load_state_dict(self.averaged.network.state_dict())
        self.updates = 0
        self.reset_optimizer()

    def update(self, loss: Tensor, learning_rate: float) -> None:
        """One step down the gradient of `loss`, and one step of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.network.parameters(), self.config.clip)
        self.optimizer.step()
        self.updates += 1
        decay = min(self.config.ema, (1 + self.updates) / (10 + self.updates))  # a young average forgets quickly
        with torch.no_grad():
            averaged: list[Tensor] = [*self.averaged.network.parameters()]
            current: list[Tensor] = [*self.denoiser.network.parameters()]
            torch._foreach_lerp_(averaged, current, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """Weights, average and optimiser, by name."""
        network = self.denoiser.network
        tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.averaged.network.state_dict().items()}
        names = [name for name, _ in network.named_parameters()]
        for i, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{names[i]}.{slot}": torch.as_tensor(v) for slot, v in slots.items()}
        return {**tensors, "updates": torch.tensor(self.updates)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what :meth:`state` gave."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.denoiser.network.load_state_dict(part("network."))
        self.averaged.network.load_state_dict(part("average."))
        self.updates = int(tensors["updates"])
        slots: dict[int, dict[str, Tensor]] = {}
        for i, (name, parameter) in enumerate(self.denoiser.network.named_parameters()):
            if found := part(
                f"optimizer.{name}."
            ):  # laid out as before: strides change the rounding of the fused update
                slots[i] = {k: torch.empty_like(parameter).copy_(v) if v.ndim else v for k, v in found.items()}
        if slots:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
