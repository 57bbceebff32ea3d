"""Runs that get better and then worse: do observations choose the same iteration as clean data would?

    python benchmarks/turning.py --seeds 0 1 2            # all tasks; one JSON per run, in results/turning/
    python benchmarks/turning.py --seeds 0 1 2 --paper    # the same with the paper's settings: plain DDPM, lambda 1
    python benchmarks/table.py                            # the table

EM on 600 digits, without early stopping. After each iteration the reconstructions are compared with digits that the run
never sees: energy distance in pixels, Frechet distance in the features of a classifier, means of four draws. The
selection decides as in every run, but does not end it.
The corruptions: a mask of 90 %; the same with three grey levels, which the run models as Gaussian noise of the same
variance; a mask of 90 % modelled as 85 %, and one of 75 % modelled as 50 %; coarse quantisation of noisy data (a black
box); and a noise that is modelled as half as large again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from compare import about
from judge import classifier, distribution, means
from torch import Tensor

from diffem import config as configuration
from diffem.clean import datasets
from diffem.corruptions import BlackBox, Corruption, GaussianNoise, Params, RandomMask
from diffem.data import Observations
from diffem.em import DiffEM
from diffem.loop import Hook
from diffem.samplers import draw_many

HERE = Path(__file__).parent
ITEMS = 600
SETTINGS = {"em.iterations": "20", "em.patience": "0", "prior.steps": "1"}
DRAWS = 4  # of each observation, for the distances to clean data
STEP = 8  # between grey levels
PAPER = {"sampler.width": "0", "m_step.imputed_weight": "1"}

SMALL = {"network.channels": "[16, 32]", "network.blocks": "[1, 1]", "m_step.steps": "100", "em.iterations": "14"}


def coarse(x: Tensor) -> Tensor:
    """Adds strong noise, and rounds 17 grey levels to three."""
    return STEP * torch.round((x + 4.5 * torch.randn_like(x)) / STEP)


class Quantised(RandomMask):
    """A mask; the 17 grey levels of the remaining pixels are rounded to three."""

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        return STEP * torch.round(super().apply(x, params, generator) / STEP) * params["mask"]


@dataclass(frozen=True)
class Task:
    """The true corruption, the one that the run assumes, and settings of the task."""

    made: Callable[[], Corruption]
    assumed: Callable[[], Corruption] | None = None
    settings: dict[str, str] = field(default_factory=dict)


TASKS = {
    "mask90": Task(lambda: RandomMask(0.9, 0.08)),
    "quantised": Task(lambda: Quantised(0.9, 0.08), lambda: RandomMask(0.9, STEP / 12**0.5), SMALL),
    "wrong-rate-85": Task(lambda: RandomMask(0.9, 0.08), lambda: RandomMask(0.85, 0.08), SMALL),
    "wrong-rate-50": Task(lambda: RandomMask(0.75, 0.08), lambda: RandomMask(0.5, 0.08), SMALL),
    "coarse": Task(lambda: BlackBox(coarse, "turning:coarse"), settings=SMALL),
    "wrong-noise": Task(lambda: GaussianNoise(4.0), lambda: GaussianNoise(6.0), SMALL),
}


def watch(clean: Tensor, labels: Tensor) -> Hook:
    """A hook that compares every iteration with clean items that the run does not see, in the units of the data."""
    model: list[torch.nn.Module] = []

    @torch.no_grad()
    def hook(em: DiffEM, row: dict) -> dict:
        others = em.data.units.scale(clean)
        if not model:
            with torch.enable_grad():
                model.append(classifier(others, labels)[:-1])
        x = draw_many(em.sampler, em.data, em.train, DRAWS, em.seed)
        return {"clean": means([distribution(draw, others, model[0]) for draw in x])}

    return hook


def run(task: str, seed: int, settings: dict[str, str], folder: Path) -> list[dict]:
    """The metrics rows of a run."""
    data = datasets.load("digits")
    order = np.random.default_rng(seed).permutation(len(data.items))
    x = torch.from_numpy(np.asarray(data.items, dtype=np.float32))[order]
    labels = torch.from_numpy(np.asarray(data.labels))[order]
    made = TASKS[task].made()
    y, params = made.observe(x[:ITEMS], torch.Generator().manual_seed(seed))
    assumed = (TASKS[task].assumed or TASKS[task].made)()
    observations = Observations(y.numpy(), assumed, {k: v.numpy() for k, v in params.items()}, data.range, formula=True)
    config = configuration.load_config("digits", list({**settings, "em.seed": str(seed)}.items()))
    hooks = [watch(x[ITEMS:], labels[ITEMS:])]
    em = DiffEM(config, observations, folder, hooks=hooks, allow_unobserved=True)
    for row in em.iterate():
        print(
            f"{task} {seed}: iteration {row['iteration']}, criterion {row['criterion']:.3f}, ratio {row['ratio'] or 0:.2f}, "
            f"{'best, ' * row['best']}energy distance {row['clean']['energy_distance']:.4f}, Frechet {row['clean']['frechet']:.1f}",
            flush=True,
        )
    return em.rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--paper", action="store_true", help="plain DDPM, and imputed entries weigh as much as measured ones"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/turning"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "turning")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for task in arguments.tasks:
            name = f"{task}-paper" if arguments.paper else task
            file = arguments.results / f"{name}-{seed}.json"
            if file.exists():
                continue
            settings = {**SETTINGS, **TASKS[task].settings, **(PAPER if arguments.paper else {})}
            folder = arguments.runs / f"{name}-{seed}" / "run"
            shutil.rmtree(folder, ignore_errors=True)
            rows = run(task, seed, settings, folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            command = f"python benchmarks/turning.py --tasks {task} --seeds {seed}" + " --paper" * arguments.paper
            file.write_text(json.dumps({"task": name, "seed": seed, **about(command), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
