"""The effect of a wrong corruption, and whether it is detected without clean data.

    python benchmarks/misspecified.py --seeds 0 1 2      # one JSON per case and seed, in results/misspecified/
    python benchmarks/table.py                           # the table

Digits are observed through one corruption, and a Gaussian mixture is fitted by exact EM under another: a mask rate of
0.65 or 0.85 instead of 0.75, a blur or a noise that is 30 % off. The effect is measured on test digits with clean data;
`check` and `diagnose` see the observations only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from compare import about

from diffem import config as configuration
from diffem.clean import datasets, metrics
from diffem.corruptions import Corruption, GaussianBlur, RandomMask
from diffem.data import Items, Observations, evenly
from diffem.diagnostics.check import check
from diffem.diagnostics.diagnose import diagnose
from diffem.em import DiffEM
from diffem.posterior import from_pretrained

HERE = Path(__file__).parent
SETTINGS = {"em.iterations": "0"}  # the start only: it is exact, and has no training error
CASES: dict[str, list[Corruption]] = {  # the first is the truth
    "mask-rate": [RandomMask(0.75, 0.08), RandomMask(0.65, 0.08), RandomMask(0.85, 0.08)],
    "mask-noise": [RandomMask(0.75, 0.8), RandomMask(0.75, 0.56), RandomMask(0.75, 1.04)],
    "blur-width": [GaussianBlur(1.0, 0.08), GaussianBlur(0.7, 0.08), GaussianBlur(1.3, 0.08)],
    "blur-noise": [GaussianBlur(1.0, 0.8), GaussianBlur(1.0, 0.56), GaussianBlur(1.0, 1.04)],
}


def run(true: Corruption, assumed: Corruption, seed: int, folder: Path) -> dict:
    """The effect of the assumed corruption, and the diagnostics that detect it."""
    data = datasets.load("digits")
    clean = torch.from_numpy(np.asarray(data.items, dtype=np.float32))
    y, params = true.observe(clean, torch.Generator().manual_seed(seed))
    observations = Observations(y.numpy(), assumed, {k: v.numpy() for k, v in params.items()}, data.range, formula=True)
    config = configuration.load_config("digits", list({**SETTINGS, "em.seed": str(seed)}.items()))
    shutil.rmtree(folder, ignore_errors=True)
    em = DiffEM(config, observations, folder, allow_unobserved=True)
    rows = list(em.iterate())
    scale = em.data.units.scale
    posterior, prior = (from_pretrained(folder / name) for name in ("posterior", "prior"))
    held = evenly(em.test, 512)
    draws, truth = scale(posterior.reconstruct(observations, held, 8, seed)), scale(clean[torch.from_numpy(held)])
    some = evenly(em.train, 1024)
    x = Items(np.load(folder / "reconstructions.npy"), em.data.units)[some[::2]]
    others = scale(clean[torch.from_numpy(some[1::2])])
    spread, error = draws.var(0).mean().item(), (draws.mean(0) - truth).square().mean().item()
    return {
        "psnr_mean": metrics.psnr(draws.mean(0), truth, 2.0),
        "clean_ratio": (1 + 1 / 8) * spread / error,
        "energy_distance": metrics.energy_distance(x, others),
        "prior_energy_distance": metrics.energy_distance(scale(prior.generate(512, seed)), others),
        "ratio": rows[-1]["ratio"],
        "check": [f"{f.level}: {f.text}" for f in check(observations) if f.level != "note"],
        "diagnose": diagnose(folder, observations)["warnings"],
    }


def words(corruption: Corruption) -> str:
    settings = {k: v for k, v in corruption.config.items() if k not in ("name", "block")}
    return f"{corruption.config['name']} " + ", ".join(f"{k} {v}" for k, v in settings.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/misspecified"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "misspecified")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for case in arguments.cases:
            true = CASES[case][0]
            for number, assumed in enumerate(CASES[case]):
                name = f"{case}-{number}-{seed}"
                file = arguments.results / f"{name}.json"
                if file.exists():
                    continue
                found = run(true, assumed, seed, arguments.runs / name)
                file.parent.mkdir(parents=True, exist_ok=True)
                command = f"python benchmarks/misspecified.py --cases {case} --seeds {seed}"
                result = {"case": case, "true": words(true), "assumed": words(assumed), "seed": seed, **about(command)}
                file.write_text(json.dumps({**result, **found}, indent=1) + "\n")
                print(json.dumps({"name": name, **found}, indent=1), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
