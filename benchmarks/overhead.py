"""Overhead of the M-step and the E-step over a bare loop with the same network.

    python benchmarks/overhead.py                # one thread; the median of paired, interleaved timings

The bare M-step is forward, loss, backward, clipping, Adam and the average, on prepared inputs. The bare E-step is as
many evaluations of the network as a draw takes, with the sampler's steps in between.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from diffem import seeding
from diffem.clean.datasets import make_observations
from diffem.config import load_config
from diffem.data import Observations
from diffem.em import DiffEM
from diffem.samplers import draw_from

PRESETS = {"digits": [], "fashion-size": [("network.channels", "[32, 64]")]}


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def paired(ours, bare, rounds: int) -> float:
    """The median ratio of our time to the bare time, measured in alternation in every round."""
    ours(), bare()
    return statistics.median(seconds(ours) / seconds(bare) for _ in range(rounds))


def measure(settings: list[tuple[str, str]], rounds: int, folder: Path) -> dict[str, float]:
    config = load_config("digits", [*settings, ("em.iterations", "1"), ("m_step.first_steps", "1")])
    make_observations(config, "digits", folder / "observations")
    em = DiffEM(config, Observations.load(folder / "observations"), folder / "run")
    rows = em.iterate()
    next(rows)
    trainer, batch = em.trainer, config.m_step.batch
    network, x = trainer.denoiser.network, em.items("current")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        y, params = em.data.batch(range(batch))
        nothing = torch.zeros(batch, dtype=torch.bool)
        inputs = trainer.denoiser._inputs(x[em.train[:batch]], torch.ones(batch), y, params, nothing)[1]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    average = [p.detach().clone() for p in network.parameters()]

    def update() -> None:
        optimizer.zero_grad()
        mean, variance = network(inputs, torch.zeros(batch))
        (mean.square().mean() + variance.square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, [*network.parameters()], 0.01)

    m_step = paired(lambda: trainer.update(em.losses(x, generator, 0.0), 1e-4), update, rounds)
    sampler, shape = em.diffusion(), em.data.shape
    seeds = seeding.item_seeds(0, 0, "user", range(batch))

    @torch.no_grad()
    def evaluate() -> None:
        x_t = torch.randn(batch, *shape)
        for sigma in sampler.sigmas:
            mean, _ = network([x_t, *inputs[1:]], sigma.log().expand(batch))
            x_t = x_t - 0.5 * (x_t - mean) + 0.1 * torch.randn(batch, *shape)

    e_step = paired(lambda: draw_from(sampler, y, params, seeds), evaluate, rounds)
    rows.close()
    return {"m_step": m_step, "e_step": e_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, settings in PRESETS.items():
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"network": name, **measure(settings, arguments.rounds, Path(folder))}), flush=True)


if __name__ == "__main__":
    main()
