"""Methods side by side on the same observations, network, optimiser and budget.

    python benchmarks/compare.py --tasks digits-mask75 manifold --seeds 0 1 2              # the methods of the paper
    python benchmarks/compare.py --tasks digits-mask75 --methods diffem diffem-plain --seeds 0
    python benchmarks/compare.py --tasks digits-mask75 --budget 2000000

The budget is counted in evaluations of the network: a forward pass of one item is 1, a derivative through it 2 more. It pays
for the training and the E-steps; held-out scores and the same number of steps that train every method's prior at the end are
not counted. One JSON a run is written to `results/compare/`; a run that has one is not repeated, and a run that was killed
goes on. `table.py` makes tables of them, `figures.py` figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from judge import Judge, cost, means

from diffem import cli
from diffem.ambient import Ambient
from diffem.config import Config, load
from diffem.corruptions import LinearCorruption
from diffem.diagnostics import score
from diffem.em import DiffEM, repeats
from diffem.metrics import ITEMS, compare
from diffem.observations import Observations, evenly
from diffem.posteriors import PosteriorSampler, draw_many, from_pretrained, sample_many

HERE = Path(__file__).parent
WATCHED, DRAWS, SPLITS = 5, 3, 8  # iterations from one comparison to the next in a long run of diffem, draws and splits
AGAIN = 4  # times as many, of the iterations that are the best of such a run, and of what it keeps
CLOSE = ("close_crps", "energy_distance", "frechet")  # what they are compared by
EXAMPLES = 50  # clean ones, where a method is given some


class Fixed(DiffEM):
    """One long iteration on items that are given: the clean ones, or the observations as they are."""

    clean = True

    def _reconstruct(self, sampler, out, iteration):
        if iteration:
            return super()._reconstruct(sampler, out, iteration)
        clean = np.load(Path(self.observations.source) / "clean.npy", mmap_mode="r")
        for rows in self.observations.chunks():
            if self.clean:
                out[rows] = clean[rows]
            else:
                y, params = self.observations.batch(rows)
                assert isinstance(self.corruption, LinearCorruption)
                centre, half = self.scaling  # what was not observed is the middle of the range
                y = self.model_corruption.scale_y(y, params, centre, half)
                out[rows] = y if y.shape[1:] == self.shape else self.corruption.adjoint(y, params)
                out[rows] = out[rows] * half + centre
        return 0

    def _settled(self, window=200):
        return False


class Observed(Fixed):
    """The lower bound."""

    clean = False


class Watched(DiffEM):
    """Compared every few iterations, by the same draws each time, more than one: what an iteration changes is small.

    The least of many comparisons owes something to chance, so that the iterations that have it are compared again, by others.
    """

    def _compared(self, sampler, x):
        at = self.state.iteration
        if self.state.phase != "calibration":
            if at % WATCHED and at != self.config.em.iterations:
                return {}
            sampler.save_pretrained(self._look(at))
        return {"clean": self._closely(sampler, self.seed)}

    def _look(self, iteration: int) -> Path:
        return self.run.folder / "looks" / f"{iteration:03d}"

    def _closely(self, sampler: PosteriorSampler, seed: int, times: int = 1) -> dict[str, float]:
        """Distances of draws to the clean reference, and the CRPS of held-out items."""
        assert self.reference is not None
        rows, number = evenly(np.arange(len(self.observations)), ITEMS), times * DRAWS
        drawn = draw_many(sampler, self.observations, rows, number, seed).numpy()
        each = [compare(drawn[:, j], self.reference[rows], self.scaling, self.features) for j in range(number)]
        crps = score(sampler, self.observations, self.held_out, seed, 2, times * SPLITS, repeats(sampler))
        return {**means(each), "close_crps": crps.mean}

    def again(self) -> dict[str, dict[str, float]]:
        """The start, every iteration that is the best in something, and what is kept, by draws that chose none of them."""
        seen = {row["iteration"]: row["clean"] for row in self.rows if row.get("clean") and "of" not in row}
        best = {min(seen, key=lambda at, name=name: seen[at][name]) for name in CLOSE}
        samplers = {str(at): from_pretrained(self._look(at)) for at in sorted({0, *best})}
        samplers["last"] = from_pretrained(self.run.folder / "posterior")
        found = {at: self._closely(sampler, self.seed + 1, AGAIN) for at, sampler in samplers.items()}
        return {at: {name: distances[name] for name in CLOSE} for at, distances in found.items()}


@dataclass(frozen=True)
class Method:
    """A way to learn from observations: the algorithm, its settings, and what it goes on from.

    Attributes:
        settings: Overrides of the task's.
        algorithm: The class of the run.
        single: One iteration that takes the whole budget.
        after: The method whose finished run this one goes on from.
    """

    settings: dict[str, str] = field(default_factory=dict)
    algorithm: type[DiffEM] = DiffEM
    single: bool = False
    after: str = ""


# EM without what diffem adds to it: dispersion, calibration, guard
BARE = {"e_step.sharp": "1", "e_step.ratio": "0", "em.guard": "false"}
MMPS = {**BARE, "sampler.guidance": "mmps", "denoiser.observation_dropout": "1"}
# the strengths of DPS are the best of 0.1, 0.3, 1, 3, 10 on held-out observations of digits-mask75, at 16 steps
DPS = {**BARE, "sampler.guidance": "dps", "denoiser.observation_dropout": "1", "sampler.guidance_strength": "3"}
BOUND = {"em.guard": "false", "e_step.sharp": "0", "em.refresh": "1", "e_step.ratio": "0"}
# an M-step of a few updates on a pool of which a small part is new: SCSI with a replay of 0.9
SCSI = {**BARE, "m_step.steps": "15", "em.refresh": "0.1", "em.score_items": "64"}

METHODS: dict[str, Method] = {
    "start": Method({"em.iterations": "0"}),
    "observed": Method(BOUND, Observed, single=True),
    "clean": Method(BOUND, Fixed, single=True),
    "diffem": Method(),
    "em-mmps": Method(MMPS),
    "emdiffusion": Method(DPS),
    "ambient": Method({**DPS, "sampler.guidance_strength": "0.3"}, Ambient, single=True),
    "scsi": Method(SCSI),
    # what a finished run, or a few clean items, are worth
    "em-mmps+em-mmps": Method(MMPS, after="em-mmps"),
    "em-mmps+diffem": Method(after="em-mmps"),
    "ambient+diffem": Method(after="ambient"),
    "diffem-examples": Method({"m_step.clean_examples": "{examples}"}),
    "emdiffusion-examples": Method({**DPS, "m_step.clean_examples": "{examples}", "m_step.reinitialise": "1"}),
    # our own choices, one changed at a time
    "diffem-paper": Method({**BARE, "denoiser.precondition": "plain"}),
    "diffem-gaussian": Method({"start.kind": "gaussian"}),
    "diffem-plain": Method({"denoiser.precondition": "plain"}),
    "diffem-fuse": Method({"denoiser.precondition": "fuse"}),
    "diffem-sharp": Method({**BARE, "em.guard": "true"}),
    "plain-12": Method({**BARE, "sampler.steps": "12"}),
    "plain-64": Method({**BARE, "sampler.steps": "64"}),
    "plain-256": Method({**BARE, "sampler.steps": "256"}),
    "diffem-steady": Method({"e_step.sharp": "0"}),
    "diffem-8steps": Method({"sampler.steps": "8"}),
    "diffem-64steps": Method({"sampler.steps": "64"}),
    "diffem-short": Method({"m_step.steps": "75"}),
    "diffem-pool": Method({"m_step.steps": "30", "em.refresh": "0.2", "em.score_items": "64"}),
    "diffem-falling": Method({"m_step.schedule": "linear"}),  # the learning rate of the presets
    "diffem-long": Method({"m_step.steps": "300"}),
}
MAIN = ["start", "observed", "clean", "diffem", "em-mmps", "emdiffusion", "ambient", "scsi"]


@dataclass(frozen=True)
class Task:
    """A preset, overrides of it, and the budget."""

    preset: str
    budget: int
    settings: dict[str, str] = field(default_factory=dict)


def _digits(corruption: str, budget: int = 1_200_000, settings: dict[str, str] | None = None) -> Task:
    # at a constant learning rate, the preset's when they were run
    fixed = {"data.corruption": corruption, "prior.steps": "300", "m_step.schedule": "constant"}
    return Task("digits", budget, {**fixed, **(settings or {})})


# some forty iterations of a small network, which nothing ends early: does quality turn?
LONG = {"network.channels": "[16, 32]", "network.blocks": "[1, 1]", "m_step.steps": "75", "em.patience": "0"}


TASKS: dict[str, Task] = {
    "manifold": Task("manifold", 5_000_000, {"data.limit": "8192", "prior.steps": "500"}),
    "digits-mask50": _digits("{name: RandomMask, rate: 0.5, noise: 0.08}"),
    "digits-mask75": _digits("{name: RandomMask, rate: 0.75, noise: 0.08}"),
    "digits-mask90": _digits("{name: RandomMask, rate: 0.9, noise: 0.08}"),
    "digits-mask75-long": _digits("{name: RandomMask, rate: 0.75, noise: 0.08}", 2_650_000, LONG),
    "digits-mask90-long": _digits("{name: RandomMask, rate: 0.9, noise: 0.08}", 2_650_000, LONG),
    "digits-blur": _digits("{name: GaussianBlur, std: 1.0, noise: 0.08}"),
    "fashion-mask75": Task("fashion-mask75", 600_000, {"data.limit": "8192", "prior.steps": "300"}),
    "cifar10-mask75": Task("cifar10-mask75", 1_500_000, {"data.limit": "8192", "network.channels": "[16, 32, 64]"}),
}


def plan(config: Config, method: Method, n: int, budget: int) -> dict[str, str]:
    """The settings that spend the budget: the number of iterations, or of steps of the only one."""
    draw, item = config.sampler.evaluations * n, 3 * config.m_step.batch
    if method.single:
        return {"em.iterations": "1", "m_step.first_steps": str(max(1, (budget - draw) // item))}
    if not config.em.iterations:
        return {}
    first = config.m_step.steps if method.after else config.m_step.first_steps
    partial = round(config.em.refresh * draw) + item * config.m_step.steps
    left = budget - item * first - round(config.em.refresh * draw)
    left -= item * (config.m_step.first_steps - config.m_step.steps) * config.m_step.reinitialise
    left -= draw if config.e_step.ratio or config.em.refresh < 1 else 0  # the last E-step
    return {"em.iterations": str(1 + max(0, left // partial)), "m_step.first_steps": str(first)}


def run(task: str, name: str, seed: int, budget: int, runs: Path, root: str | None) -> dict:
    """One run: trained, judged, and described."""
    method, settings = METHODS[name], {**TASKS[task].settings, "em.seed": str(seed)}
    folder, observed = runs / task / str(seed) / name, runs / task / str(seed) / "observations"
    if not (observed / "y.npy").exists():
        cli.make_observations(load(TASKS[task].preset, list(settings.items())), task, observed, root)
    examples = observed / "examples.npy"
    if not examples.exists():
        np.save(examples, np.load(observed / "clean.npy", mmap_mode="r")[:EXAMPLES])
    settings |= {k: v.format(examples=examples) for k, v in method.settings.items()}
    observations, start = Observations.load(observed), None
    if method.after:
        after = runs / task / str(seed) / method.after
        settings |= {"start.kind": "run", "start.run": str(after)}
    elif name not in ("start", "diffem-gaussian"):  # the fit is the same for all: it is made once
        start = from_pretrained(runs / task / str(seed) / "start" / "posterior")
    config = load(TASKS[task].preset, list(settings.items()))
    settings |= plan(config, method, len(observations), budget)
    config = load(TASKS[task].preset, list(settings.items()))
    clean = np.load(observed / "clean.npy", mmap_mode="r")
    bar = cli.ProgressBar()
    judge = Judge(observed, seed, seed)
    began = time.monotonic()
    algorithm = Watched if name.startswith("diffem") and task.endswith("-long") else method.algorithm
    arm = algorithm(
        config, observations, folder, progress=bar.update, start=start, reference=clean, features=judge.features
    )
    for row in arm.iterate():
        bar.clear()
        print(
            f"{task} {name} {seed}: iteration {row['iteration']}, {row['score']:.4f}, ratio {row['ratio']}", flush=True
        )
    first = None if name == "start" else judge.score(from_pretrained(runs / task / str(seed) / "start" / "posterior"))
    posterior, prior = from_pretrained(folder / "posterior"), from_pretrained(folder / "prior")
    columns = judge.posterior(posterior, first)
    columns |= judge.prior(prior)
    if task.endswith("blur") and name == "start":
        columns["psnr_classical"] = richardson_lucy(judge)
    few = judge.held_out[:10]
    np.savez_compressed(
        folder / "gallery.npz",
        clean=clean[few],
        y=observations.y[few],
        draws=draw_many(posterior, observations, few, 1, seed)[:, 0],
        prior=sample_many(prior, 10, seed),
    )
    return {
        "task": task,
        "method": name,
        "seed": seed,
        "budget": budget,
        **cost(folder),
        **about(f"python benchmarks/compare.py --tasks {task} --methods {name} --seeds {seed} --budget {budget}"),
        "wall": round(time.monotonic() - began, 1),
        "settings": {k: v for k, v in settings.items() if "{" not in v and not k.endswith(("examples", ".run"))},
        "metrics": columns,
        "curve": curve(arm.rows),
        **({"again": arm.again()} if isinstance(arm, Watched) else {}),
    }


def curve(rows: list[dict]) -> list[dict]:
    """Quality after every iteration, against what had been spent by then."""
    spent, seconds, points = 0, 0.0, []
    for row in rows:
        spent, seconds = spent + row["network_evaluations"], seconds + row["seconds"]
        keep = {"iteration": row["iteration"], "evaluations": spent, "seconds": seconds, "crps": row["score"]}
        keep |= {k: row[k] for k in ("ratio", "dispersion", "criterion", "divergence", "accepted", "best")}
        keep["delta"] = row.get("delta")  # to the least score before
        points.append({**keep, "calibrated": "of" in row, **row.get("clean", {})})
    return points


def richardson_lucy(judge: Judge, iterations: int = 30) -> float:
    """PSNR of the held-out observations after Richardson-Lucy deconvolution (Richardson, 1972; Lucy, 1974)."""
    corruption = judge.observations.corruption
    assert isinstance(corruption, LinearCorruption)
    y, params = judge.observations.batch(judge.held_out)
    y = y.clamp(min=1e-3)
    x = y.clone()
    for _ in range(iterations):
        x = x * corruption.adjoint(y / corruption.forward(x, params).clamp(min=1e-3), params)
    return (-10 * ((judge.scale(x) - judge.clean_held_out).square().mean() / 4).log10()).item()


def about(command: str) -> dict:
    """How a result came about."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    versions = {"python": platform.python_version(), **{k: version(k) for k in ("torch", "azula", "numpy")}}
    return {"command": command, "commit": done.stdout.strip() or "unknown", "versions": versions}


def _order(methods: list[str]) -> list[str]:
    """The methods, each after the one that it goes on from."""
    wanted = list(methods)
    for name in methods:
        wanted += [METHODS[name].after] if METHODS[name].after else []
    return [name for name in METHODS if name in {*wanted, "start"}]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["digits-mask75"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=MAIN)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--budget", type=int, help="evaluations of the network; the task's own by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="where the runs are kept")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "compare", help="where the JSON files go")
    parser.add_argument("--root", help="the folder of a data set that is not built in")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for task in arguments.tasks:
            budget = arguments.budget or TASKS[task].budget
            for name in _order(arguments.methods):
                if name == "ambient" and "blur" in task:
                    print(f"{task} ambient: left out; it is for masks and projections")
                    continue
                file = arguments.results / task / f"{name}-{seed}.json"
                if file.exists() and json.loads(file.read_text())["budget"] == budget:
                    continue
                result = run(task, name, seed, budget, arguments.runs, arguments.root)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{file}: {result['metrics']['crps']:.4f}, {result['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
