"""Methods side by side on the same observations, network, optimiser and budget.

    python benchmarks/compare.py --tasks digits-mask75 manifold --seeds 0 1 2              # the methods of the paper
    python benchmarks/compare.py --tasks digits-mask75 --methods diffem lambda1 --seeds 0
    python benchmarks/compare.py --tasks digits-mask75 --budget 2000000

The budget is counted in evaluations of the network: a forward pass of one item counts 1, a derivative through it 2
more. It covers the training and the E-steps; the paper's schedule gets at least one iteration, whatever that costs.
Held-out scores are not counted, nor the steps that train each method's prior at the end. One JSON per run is written to
`results/compare/`. A run that has one is not repeated, and a killed run is resumed. `table.py` makes tables from these
files, `figures.py` figures.
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
import splitting
from judge import Judge, cost

from diffem.clean.datasets import make_observations
from diffem.clean.evaluation import against
from diffem.cli.console import ProgressBar
from diffem.config import Config, load_config
from diffem.data import Observations
from diffem.em import STEPS, DiffEM, e_step
from diffem.posterior import from_pretrained
from diffem.rivals import Ambient
from diffem.samplers import trained_kind
from diffem.trainer import measure_differently

HERE = Path(__file__).parent
EXAMPLES = 50  # clean items for methods that get some


def given(em: DiffEM) -> None:
    """Replaces the first E-step: the reconstructions are the clean items."""
    if em.state.iteration:
        e_step(em)
        return
    out, clean = (
        em.run.array("next", (len(em.data), *em.data.shape)),
        np.load(folder_of(em) / "clean.npy", mmap_mode="r"),
    )
    for rows in em.data.chunks():
        out[rows] = clean[rows]
    out.flush()
    em.next("judge")


def observed(em: DiffEM) -> None:
    """Replaces the first E-step: the reconstructions are the observations themselves."""
    if em.state.iteration:
        e_step(em)
        return
    out = em.run.array("next", (len(em.data), *em.data.shape))
    for rows in em.data.chunks():
        y, params = em.data.batch(rows)  # entries that were not observed are at the middle of the range
        x = y if y.shape[1:] == em.data.shape else em.data.corruption.adjoint(y, params)
        out[rows] = em.data.units.restore(x).numpy()
    out.flush()
    em.next("judge")


def folder_of(em: DiffEM) -> Path:
    return Path(em.observations.source)


class Fixed(DiffEM):
    """One long iteration on the clean items: the upper bound on quality."""

    steps = {**STEPS, "e_step": given}  # noqa: RUF012


class Observed(DiffEM):
    """The same on the observations themselves: the lower bound."""

    steps = {**STEPS, "e_step": observed}  # noqa: RUF012


@dataclass(frozen=True)
class Method:
    """A method: the algorithm, its settings, and the method from which it continues.

    Attributes:
        settings: Overrides of the task's settings.
        algorithm: The class of the run.
        single: Whether one iteration takes the whole budget.
        epochs: Passes of an M-step over the observations; 0 keeps the task's number of steps.
        after: The method whose finished run is continued.
    """

    settings: dict[str, str] = field(default_factory=dict)
    algorithm: type[DiffEM] = DiffEM
    single: bool = False
    epochs: int = 0
    after: str = ""


# EM as published: plain DDPM, no selection, no thinning, and equal weights for imputed and measured entries
LAMBDA1 = {"m_step.imputed_weight": "1", "em.renoise": "false"}
BARE = {**LAMBDA1, "m_step.thinned": "0", "sampler.width": "0", "em.guard": "false"}
MMPS = {**BARE, "sampler.kind": "mmps", "denoiser.observation_dropout": "1"}
# the strengths of DPS are the best of 0.1, 0.3, 1, 3, 10 on held-out observations of digits-mask75, at 16 steps
DPS = {**BARE, "sampler.kind": "dps", "denoiser.observation_dropout": "1", "sampler.options": "{strength: 3}"}
AMBIENT = {**DPS, "sampler.kind": "ambient", "sampler.options": "{strength: 0.3}"}
BOUND = {**LAMBDA1, "em.guard": "false", "em.refresh": "1"}
# M-steps of a few updates on a pool of which a small part is new: SCSI with a replay of 0.9; no early stopping of its
# many short iterations
POOL = {"m_step.steps": "15", "em.refresh": "0.1", "em.renoise": "false", "em.score_items": "64", "em.patience": "0"}

METHODS: dict[str, Method] = {
    "start": Method({"em.iterations": "0"}),
    "observed": Method(BOUND, Observed, single=True),
    "clean": Method(BOUND, Fixed, single=True),
    "diffem": Method(),
    "lambda1": Method(LAMBDA1),
    # its sampler and preconditioning; the number of epochs makes the M-step take three times as long as the E-step
    "paper": Method({**BARE, "sampler.steps": "256", "denoiser.precondition": "plain"}, epochs=256),
    "scsi": Method({**BARE, **POOL}),
    "scsi+weights": Method(POOL),
    "em-mmps": Method(MMPS),
    "emdiffusion": Method(DPS),
    "ambient": Method(AMBIENT, Ambient, single=True),
    # the benefit of a finished run, or of a few clean items
    "em-mmps+diffem": Method(after="em-mmps"),
    "diffem-examples": Method({"m_step.clean_examples": "{examples}"}),
}
SPLITTING = ("splitting", "splitting-deepinv")  # no posterior: only the PSNR of the mean
MAIN = ["start", "clean", "diffem", "lambda1", "paper", "scsi", "scsi+weights", "em-mmps", "splitting"]


@dataclass(frozen=True)
class Task:
    """A preset, overrides of it, and the budget."""

    preset: str
    budget: int
    settings: dict[str, str] = field(default_factory=dict)


def _digits(corruption: str, budget: int = 1_200_000, settings: dict[str, str] | None = None) -> Task:
    return Task("digits", budget, {"data.corruption": corruption, "prior.steps": "300", **(settings or {})})


# about thirty iterations of a small network without early stopping: does quality decline after a peak?
LONG = {"network.channels": "[16, 32]", "network.blocks": "[1, 1]", "m_step.steps": "150", "em.patience": "0"}
FASHION = {
    "data.limit": "8192",
    "m_step.first_steps": "300",
    "m_step.steps": "200",
    "prior.steps": "300",
    "prior.sampler_steps": "16",
}
CIFAR = {
    **FASHION,
    "data.source": "cifar10",
    "data.corruption": "{name: RandomMask, rate: 0.75, noise: 0.64}",
    "network.channels": "[24, 48]",
    "network.blocks": "[1, 1]",
    "start.components": "[1]",
    "start.ranks": "[8, 16, 32]",
    "start.items": "4096",
}

TASKS: dict[str, Task] = {
    "manifold": Task("manifold", 5_000_000, {"data.limit": "8192", "prior.steps": "500"}),
    "digits-mask50": _digits("{name: RandomMask, rate: 0.5, noise: 0.08}"),
    "digits-mask75": _digits("{name: RandomMask, rate: 0.75, noise: 0.08}"),
    "digits-mask90": _digits("{name: RandomMask, rate: 0.9, noise: 0.08}"),
    "digits-mask75-long": _digits("{name: RandomMask, rate: 0.75, noise: 0.08}", 2_650_000, LONG),
    "digits-mask90-long": _digits("{name: RandomMask, rate: 0.9, noise: 0.08}", 2_650_000, LONG),
    "digits-noise": _digits("{name: GaussianNoise, noise: 4.0}", 900_000, LONG),
    "digits-blur": _digits("{name: GaussianBlur, std: 1.0, noise: 0.08}"),
    "fashion-mask75": Task("fashion-mask75", 600_000, FASHION),
    "fashion-mask75-long": Task("fashion-mask75", 2_500_000, FASHION),
    "cifar10-mask75": Task("fashion-mask75", 900_000, CIFAR),
    "cifar10-mask75-long": Task("fashion-mask75", 2_700_000, CIFAR),
}


def plan(config: Config, method: Method, n: int, budget: int, later: float = 1.0) -> dict[str, str]:
    """The settings that spend the budget: the number of iterations (at least one), or the steps of a single iteration.

    Arguments:
        config: The configuration of the run.
        method: The method.
        n: The number of observations.
        budget: Evaluations of the network.
        later: Cost of a draw in later E-steps, relative to the first E-step.
    """
    kind, em, item = trained_kind(config.sampler), config.em, 3 * config.m_step.batch
    draw, renoised = (kind.evaluations(config.sampler, renoised) * n for renoised in (False, em.renoise))
    if method.single:
        return {"em.iterations": "1", "m_step.first_steps": str(max(1, (budget - draw) // item))}
    if not config.em.iterations:
        return {}
    steps = method.epochs * n // config.m_step.batch or config.m_step.steps
    first = steps if method.after or method.epochs else config.m_step.first_steps
    left = budget - item * first - round(em.refresh * draw)
    left -= draw if em.guard or em.refresh < 1 or em.renoise else 0  # the last E-step
    each = round(later * em.refresh * renoised) + item * steps
    iterations = 1 + max(0, left // each)
    spare = max(0, left - (iterations - 1) * each) // item  # steps that do not fill an iteration
    if iterations > 1:
        steps += spare // (iterations - 1)
    else:
        first += spare
    return {"em.iterations": str(iterations), "m_step.first_steps": str(first), "m_step.steps": str(steps)}


def inapplicable(observations: Observations, seed: int) -> dict[str, str]:
    """Settings that have no effect on these observations, switched off, since :func:`plan` has to know."""
    return {} if measure_differently(observations, observations.split(seed)[0]) else {"em.renoise": "false"}


def run(task: str, name: str, seed: int, budget: int, runs: Path, root: str | None) -> dict:
    """Trains and judges one run; returns its results."""
    began, folder, observed = time.monotonic(), runs / task / str(seed) / name, runs / task / str(seed) / "observations"
    settings = {**TASKS[task].settings, "em.seed": str(seed)}
    if not (observed / "y.npy").exists():
        make_observations(load_config(TASKS[task].preset, list(settings.items())), task, observed, root)
    observations = Observations.load(observed)
    command = f"python benchmarks/compare.py --tasks {task} --methods {name} --seeds {seed} --budget {budget}"
    described = {"task": task, "method": name, "seed": seed, "budget": budget, **about(command)}
    if name in SPLITTING:
        config = load_config(TASKS[task].preset, list(settings.items()))
        estimate = splitting.train(observations, config, seed, budget, library=name == "splitting-deepinv")
        seconds = time.monotonic() - began
        columns = {"psnr_mean": Judge(observed, seed, seed).psnr_of(estimate)}
        steps = budget // (3 * config.m_step.batch)
        spent = {"seconds": seconds, "evaluations": 3 * config.m_step.batch * steps, "iterations": 1}
        return {**described, **spent, "settings": _plain(settings), "metrics": columns, "curve": []}
    method = METHODS[name]
    examples = observed.parent / "examples.npy"
    if not examples.exists():
        few = observations.split(seed)[0][:EXAMPLES]  # of training items
        np.save(examples, np.load(observed / "clean.npy", mmap_mode="r")[few])
    settings |= {k: v.replace("{examples}", str(examples)) for k, v in method.settings.items()}
    start = None
    if method.after:
        after = runs / task / str(seed) / method.after
        settings |= {"start.kind": "run", "start.run": str(after)}
    elif name != "start":  # the fit is the same for all methods, so it is made once
        start = from_pretrained(runs / task / str(seed) / "start" / "posterior")
    settings |= inapplicable(observations, seed)
    config = load_config(TASKS[task].preset, list(settings.items()))
    settings |= plan(config, method, len(observations), budget)
    config = load_config(TASKS[task].preset, list(settings.items()))
    clean = np.load(observed / "clean.npy", mmap_mode="r")
    bar = ProgressBar()
    judge = Judge(observed, seed, seed)
    arm = method.algorithm(
        config, observations, folder, start=start, hooks=[against(clean, judge.features)], progress=bar.update
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
    few = judge.test[:10]
    np.savez_compressed(
        folder / "gallery.npz",
        clean=clean[few],
        y=observations.y[few],
        draws=posterior.reconstruct(observations, few, 1, seed)[0],
        prior=prior.generate(10, seed),
    )
    wall = {"wall": round(time.monotonic() - began, 1)}
    return {
        **described,
        **cost(folder),
        **wall,
        "settings": _plain(settings),
        "metrics": columns,
        "curve": curve(arm.rows),
    }


def _plain(settings: dict[str, str]) -> dict[str, str]:
    """Settings without paths of this machine."""
    return {k: v for k, v in settings.items() if not k.endswith(("examples", ".run"))}


def curve(rows: list[dict]) -> list[dict]:
    """Quality after every iteration, and the budget spent by then."""
    spent, seconds, points = 0, 0.0, []
    for row in rows:
        spent, seconds = spent + row["network_evaluations"], seconds + row["seconds"]
        keep = {"iteration": row["iteration"], "evaluations": spent, "seconds": seconds, "crps": row["score"]}
        keep |= {k: row[k] for k in ("ratio", "width", "criterion", "accepted", "best")}
        points.append({**keep, "last": "final" in row, **row.get("clean", {})})
    return points


def richardson_lucy(judge: Judge, iterations: int = 30) -> float:
    """PSNR of the held-out observations after Richardson-Lucy deconvolution (Richardson, 1972; Lucy, 1974)."""
    corruption = judge.observations.corruption
    y, params = judge.observations.batch(judge.test)
    y = y.clamp(min=1e-3)
    x = y.clone()
    for _ in range(iterations):
        x = x * corruption.adjoint(y / corruption.forward(x, params).clamp(min=1e-3), params)
    return (-10 * ((judge.units.scale(x) - judge.clean_test).square().mean() / 4).log10()).item()


def about(command: str) -> dict:
    """The provenance of a result."""
    git = lambda *words: subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()  # noqa: E731
    commit = git("describe", "--always") or "unknown"
    if git("status", "--porcelain", "--", "../src", "*.py"):  # results change with every run
        commit += "-dirty"
    versions = {"python": platform.python_version(), **{k: version(k) for k in ("torch", "azula", "numpy")}}
    return {"command": command, "commit": commit, "versions": versions}


def _order(methods: list[str]) -> list[str]:
    """The methods, each after the one that it continues."""
    wanted = {*methods, "start", *(METHODS[name].after for name in methods if name in METHODS)}
    return [name for name in (*METHODS, *SPLITTING) if name in wanted]


def _unsuited(name: str, task: str) -> str:
    """Why a task omits a method; empty if it does not."""
    if name == "paper" and task.startswith(("fashion", "cifar10")):
        return "one of its iterations takes ten times the budget"
    if name in SPLITTING and "mask" not in task:
        return "it is for masks"
    return "it is for masks and projections" if name == "ambient" and "blur" in task else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["digits-mask75"])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *SPLITTING], default=MAIN)
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
                if why := _unsuited(name, task):
                    print(f"{task} {name}: left out; {why}")
                    continue
                file = arguments.results / task / f"{name}-{seed}.json"
                made = file.exists() and json.loads(file.read_text())["budget"] == budget
                if made and (name != "start" or (arguments.runs / task / str(seed) / name / "posterior").exists()):
                    continue  # the other methods need the folder of the start
                result = run(task, name, seed, budget, arguments.runs, arguments.root)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{file}: PSNR of the mean {result['metrics']['psnr_mean']:.2f}, {result['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
