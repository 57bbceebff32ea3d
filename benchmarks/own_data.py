"""Realistic data sets and the results of a run on each: cases that once failed silently.

    python benchmarks/own_data.py                        # all cases, minutes each; JSON in results/own_data/
    python benchmarks/own_data.py --cases gaps           # one of them
    python benchmarks/table.py                           # the table

Every case is simulated, so that the truth is known; the run sees the observations only. Figures are in the units of the
data: `rmse` of the posterior mean; `usual`, the RMSE of a common simple method, named by the case; `claimed`, the
standard deviation of the draws; `coverage`, how often the truth lies within the central 95 % interval; `said`, the
run's own estimate of coverage, from hidden parts of held-out observations. If entries are missing, figures are over
those only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from compare import about
from sklearn.datasets import load_digits

from diffem import config as configuration
from diffem.clean import metrics
from diffem.corruptions import (
    Blur,
    Compose,
    Corruption,
    GaussianBlur,
    GaussianNoise,
    LinearCorruption,
    Mask,
    OneOf,
    PoissonGaussian,
    Quantise,
    Saturate,
)
from diffem.data import Observations, evenly
from diffem.diagnostics.diagnose import diagnose
from diffem.em import DiffEM
from diffem.posterior import from_pretrained

HERE = Path(__file__).parent
ITEMS, DRAWS, LEVEL, DECILES = 400, 79, 0.95, 10  # with 79 draws, 95 % is a whole number of ranks


@dataclass
class Case:
    """Observations of a known truth.

    Attributes:
        observations: What the run sees.
        clean: The truth, shape (N, *shape).
        usual: The estimate of a common simple method.
        usual_name: The name of that method.
        where: The entries that figures are computed on, boolean, broadcasts against `clean`.
        by: A number for each observation; coverage is also reported by its deciles.
    """

    observations: Observations
    clean: np.ndarray
    usual: np.ndarray
    usual_name: str
    where: np.ndarray | bool = True
    by: np.ndarray | None = None
    settings: dict[str, str] = field(default_factory=dict)


def digits() -> np.ndarray:
    return load_digits().images[:, None].astype(np.float32)


def gaps(rng: np.random.Generator) -> Case:
    """400 series of two sines with one gap of 30 of 96 points each."""
    n, length, gap = 400, 96, 30
    t = 2 * np.pi * np.arange(length) / length
    wave = lambda low, high: np.sin(rng.uniform(low, high, (n, 1)) * t + rng.uniform(0, 2 * np.pi, (n, 1)))  # noqa: E731
    clean = (wave(1, 3) + wave(4, 8))[:, None].astype(np.float32)
    begin = rng.integers(0, length - gap + 1, (n, 1, 1))
    mask = (np.arange(length) < begin) | (np.arange(length) >= begin + gap)
    y = np.where(mask, clean + 0.05 * rng.normal(size=clean.shape), np.nan).astype(np.float32)
    observations, filled = Observations(y, Mask(0.05)), np.full_like(clean, np.nanmean(y))
    return Case(observations, clean, filled, "mean filling", ~mask, settings={"em.iterations": "10"})


def noise_by_item(rng: np.random.Generator) -> Case:
    """Digits, each with its own noise level, from a thirtieth to a half of the range."""
    clean = digits()
    noise = np.exp(rng.uniform(np.log(0.5), np.log(8.0), len(clean))).astype(np.float32)
    y = (clean + noise[:, None, None, None] * rng.normal(size=clean.shape)).astype(np.float32)
    observations = Observations(y, GaussianNoise(), {"noise": noise}, range=(0, 16))
    return Case(observations, clean, y, "the observation", by=noise, settings={"preset": "demo"})


def box(rng: np.random.Generator) -> Case:
    """Digits blurred by a 5-pixel box with a known kernel."""
    return blurred(rng, Blur(noise=0.5), {"kernel": torch.full((1, 5, 5), 1 / 25)})


def blur_and_mask(rng: np.random.Generator) -> Case:
    """Digits blurred by a Gaussian of one pixel, with half of the pixels deleted."""
    mask = rng.random((len(digits()), 1, 8, 8)) < 0.5
    return blurred(rng, Compose([GaussianBlur(1.0), Mask()], 0.5), {"mask": torch.from_numpy(mask)})


def blurred(rng: np.random.Generator, corruption: LinearCorruption, params: dict[str, torch.Tensor]) -> Case:
    clean, generator = digits(), torch.Generator().manual_seed(int(rng.integers(2**31)))
    rows = {k: v.expand(len(clean), *v.shape[1:]) for k, v in params.items()}
    y = corruption.apply(torch.from_numpy(clean), rows, generator).numpy()
    observations = Observations(y, corruption, {k: v.numpy() for k, v in params.items()}, range=(0, 16))
    return Case(observations, clean, y, "the observation", settings={"preset": "demo"})


def simulated(true: Corruption, rng: np.random.Generator, assumed: Corruption | None = None) -> Case:
    """Digits with a simulated corruption; the run may assume another one."""
    clean, generator = digits(), torch.Generator().manual_seed(int(rng.integers(2**31)))
    y = true.apply(torch.from_numpy(clean), {}, generator).numpy()
    observations = Observations(y, assumed or true, range=(0, 16))
    return Case(observations, clean, y, "the observation", settings={"preset": "demo"})


def photons(rng: np.random.Generator) -> Case:
    """Digits with at most five photons per pixel."""
    return simulated(PoissonGaussian(16 / 5), rng)


def levels(rng: np.random.Generator) -> Case:
    """Digits with four grey levels."""
    return simulated(Quantise(4, 0, 16), rng)


def clipped(rng: np.random.Generator) -> Case:
    """Digits on a sensor that saturates at 60 % of the range."""
    return simulated(Saturate(0.6 * 16), rng)


WIDTHS = [GaussianBlur(width, 0.5) for width in (0.4, 0.7, 1.0, 1.3)]


def unknown_width(rng: np.random.Generator) -> Case:
    """Digits with blurs of four widths; the width of each is unknown."""
    return simulated(OneOf(WIDTHS), rng)


def wrong_width(rng: np.random.Generator) -> Case:
    """The same, but the smallest width is assumed for all."""
    return simulated(OneOf(WIDTHS), rng, WIDTHS[0])


CASES: dict[str, Callable[[np.random.Generator], Case]] = {
    "gaps": gaps,
    "noise-by-item": noise_by_item,
    "box": box,
    "blur-and-mask": blur_and_mask,
    "photons": photons,
    "levels": levels,
    "clipped": clipped,
    "unknown-width": unknown_width,
    "wrong-width": wrong_width,
}


def run(name: str, seed: int, folder: Path) -> dict:
    """The figures of a case."""
    case, began = CASES[name](np.random.default_rng(seed)), time.monotonic()
    settings = dict(case.settings)
    config = configuration.load_config(settings.pop("preset", None), list({**settings, "em.seed": str(seed)}.items()))
    em = DiffEM(config, case.observations, folder)
    for row in em.iterate():
        print(f"{name} {seed}: iteration {row['iteration']}, {row['score']:.4f}, ratio {row['ratio']}", flush=True)
    rows = evenly(np.arange(len(em.data)), ITEMS)
    clean, usual = case.clean[rows], case.usual[rows]
    draws = from_pretrained(folder / "posterior").reconstruct(case.observations, rows, DRAWS, seed).numpy()
    where = np.broadcast_to(case.where, case.clean.shape)[rows]
    low, high = metrics.interval(draws, LEVEL)
    inside, rmse = (clean >= low) & (clean <= high), lambda x: float(np.sqrt(np.square(x[where]).mean()))
    found = {
        "rmse": rmse(draws.mean(0) - clean),
        "usual": rmse(usual - clean),
        "usual_name": case.usual_name,
        "claimed": float(np.sqrt(draws.var(0)[where].mean())),
        "spread_of_data": float(case.clean.std()),
        "coverage": float(inside[where].mean()),
        "said": said(diagnose(folder, case.observations, full=True)),
        "seconds": round(time.monotonic() - began),
    }
    if case.by is not None:
        parts = np.array_split(np.argsort(case.by[rows]), DECILES)
        found["coverage_by_decile"] = [float(inside[part][where[part]].mean()) for part in parts]
    return found


def said(found: dict) -> float | None:
    """The run's own estimate of its coverage."""
    return (
        dict(zip(found["coverage"]["levels"], found["coverage"]["shares"], strict=True))[LEVEL]
        if "coverage" in found
        else None
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/own_data"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "own_data")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for name in arguments.cases:
            file = arguments.results / f"{name}-{seed}.json"
            if file.exists():
                continue
            found = run(name, seed, arguments.runs / f"{name}-{seed}")
            file.parent.mkdir(parents=True, exist_ok=True)
            command = f"python benchmarks/own_data.py --cases {name} --seeds {seed}"
            file.write_text(json.dumps({"case": name, "seed": seed, **about(command), **found}, indent=1) + "\n")
            print(json.dumps({"case": name, **found}, indent=1), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
