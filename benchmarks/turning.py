"""Runs whose quality turns: is the iteration that observations choose the one that clean data would have chosen?

    python benchmarks/turning.py --seeds 0 1 2        # all tasks; one JSON a run, in results/turning/
    python benchmarks/table.py                        # the table

EM as in the paper, with the plain sampler and nothing that guards it, on 600 digits. After each iteration the
reconstructions are compared with the digits that the run never sees: energy distance in pixels, Frechet distance in the
features of a classifier, means of four draws. The guard is asked, from the scores that the run recorded, which iteration it would
have saved, and of every best one whether a close look would have preferred the start.
The channels: a mask of 90 %; the same and three levels of grey, which the run takes for Gaussian noise of the same variance; a
mask of 90 % that it takes for one of 85 %, and one of 75 % for 50 %; coarse quantisation of what is noisy (a black box); and a
noise that it takes for one half as large again.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from diffem import datasets
from diffem.corruptions import BlackBox, Corruption, GaussianNoise, Params, RandomMask
from diffem.em import DiffEM
from diffem.guard import Guard, compare
from diffem.observations import Observations
from diffem.posteriors import PosteriorSampler, draw_many

HERE = Path(__file__).parent
ITEMS = 600
SETTINGS = {"em.iterations": "20", "m_step.schedule": "constant"}  # the rate of the preset when they were run
DRAWS = 4  # of each observation, for the distances to clean data
STEP = 8  # between levels of grey
BARE = {"e_step.sharp": "1", "e_step.ratio": "0", "em.guard": "false", "prior.steps": "1"}


SMALL = {"network.channels": "[16, 32]", "network.blocks": "[1, 1]", "m_step.steps": "100", "em.iterations": "14"}


def coarse(x: Tensor) -> Tensor:
    """Three levels of what has 17, after much noise."""
    return STEP * torch.round((x + 4.5 * torch.randn_like(x)) / STEP)


class Quantised(RandomMask):
    """A mask, and three levels of what has 17 on what is left."""

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        return STEP * torch.round(super().apply(x, params, generator) / STEP) * params["mask"]


@dataclass(frozen=True)
class Task:
    """What made the observations, what a run takes for it, and settings of its own."""

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


class Watched(DiffEM):
    """A run that is compared with clean items that it does not see, and told what a guard would have done."""

    def watch(self, clean: Tensor, labels: Tensor) -> Watched:
        centre, half = self.scaling
        self.others = (clean - centre) / half
        self.features = classifier(self.others, labels)[:-1]
        return self

    def _row(self, current, divergence, verdict, drawn, sampler, x) -> dict:
        row = super()._row(current, divergence, verdict, drawn, sampler, x)
        if "of" in verdict:
            return row
        if row["iteration"] == 0:
            guarded = dataclasses.replace(self.config, em=dataclasses.replace(self.config.em, guard=True))
            self.shadow, would = Guard.begin(guarded, current, divergence), {}
        else:
            would = self.shadow.decide(row["iteration"], current, divergence)
            if would["best"]:
                closely, first = self._score(sampler, True), self._score(self._start_sampler(), True)
                found = compare(closely, divergence, first, self.shadow.first_divergence)
                would |= {"outdoes": self.shadow.outdoes(found), "closely": found}
        return {**row, "guard": {**would, "over": self.shadow.over}, "clean": self._distances(sampler)}

    @torch.no_grad()
    def _distances(self, sampler: PosteriorSampler) -> dict[str, float]:
        """The mean distances of several reconstructions of every training observation."""
        x = draw_many(sampler, self.observations, self.train, DRAWS, self.seed)
        centre, half = self.scaling
        each = [distribution((x[:, j] - centre) / half, self.others, self.features) for j in range(DRAWS)]
        return means(each)


def run(task: str, seed: int, settings: dict[str, str], folder: Path) -> list[dict]:
    """The rows of a run."""
    data = datasets.load("digits")
    order = np.random.default_rng(seed).permutation(len(data.items))
    x = torch.from_numpy(np.asarray(data.items, dtype=np.float32))[order]
    labels = torch.from_numpy(np.asarray(data.labels))[order]
    made = TASKS[task].made()
    y, params = made.observe(x[:ITEMS], torch.Generator().manual_seed(seed))
    assumed = (TASKS[task].assumed or TASKS[task].made)()
    observations = Observations(y.numpy(), assumed, {k: v.numpy() for k, v in params.items()}, data.range)
    config = configuration.load("digits", list({**settings, "em.seed": str(seed)}.items()))
    em = Watched(config, observations, folder, allow_unobserved=True)
    em.watch(x[ITEMS:], labels[ITEMS:])
    for row in em.iterate():
        if "of" in row:
            continue
        clean = row["clean"]
        print(
            f"{task} {seed}: iteration {row['iteration']}, score {row['score']:.4f}, criterion {row['criterion']:.3f}, "
            f"divergence {row['divergence']:.4f}, ratio {row['ratio'] or 0:.2f}, {'best' if row['guard'].get('best') else ''} {row['guard'].get('outdoes', '')}, energy distance {clean['energy_distance']:.4f}, Frechet {clean['frechet']:.1f}",
            flush=True,
        )
    return em.rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--default", action="store_true", help="with everything that diffem adds")
    parser.add_argument("--runs", type=Path, default=Path("runs/turning"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "turning")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for task in arguments.tasks:
            name = f"{task}-default" if arguments.default else task
            file = arguments.results / f"{name}-{seed}.json"
            if file.exists():
                continue
            settings = {**SETTINGS, **TASKS[task].settings, **({} if arguments.default else BARE)}
            folder = arguments.runs / f"{name}-{seed}" / "run"
            shutil.rmtree(folder, ignore_errors=True)  # the guard's memory is not in a checkpoint
            rows = run(task, seed, settings, folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            command = f"python benchmarks/turning.py --tasks {task} --seeds {seed}" + " --default" * arguments.default
            file.write_text(json.dumps({"task": name, "seed": seed, **about(command), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
