"""Draws the comparisons: curves from benchmarks/results/compare, and galleries from the run folders that still exist.

python benchmarks/figures.py --runs runs/compare --out docs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from table import HERE, load

PANELS = {
    "crps": "CRPS, held out, over the start's",  # relative, since its level depends on which pixels are hidden
    "ratio": "calibration ratio, held out (1 is calibrated)",
    "density": "density of the draws",
    "coverage": "coverage of the clean items",
}
# colours, the same in every figure; no curve for the start, where the others begin, and for the observed, far away
DRAWN = ("clean", "diffem", "lambda1", "paper", "scsi", "scsi+weights", "em-mmps", "emdiffusion", "ambient")
COLOURS = {m: f"C{i}" for i, m in enumerate(DRAWN)}


def curves(folder: Path, out: Path) -> None:
    """Quality against the budget, a line per method and seed; methods of a single iteration are a dashed level."""
    runs = {k: v for k, v in load(folder).items() if k in COLOURS}
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.4), layout="constrained")
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for method, results in runs.items():
            style = {"color": COLOURS[method], "lw": 1, "alpha": 0.8}
            for j, result in enumerate(results):
                # the last point is scored on other observations, the test part
                points = [p for p in result["curve"] if p.get(name) is not None and not p["last"]]
                if name == "crps":
                    points = [{**p, name: p[name] / points[0][name]} for p in points]
                style["label"] = method if j == 0 else None
                if result["iterations"] == 1:
                    axis.axhline(points[-1][name], ls="--", **style)
                    continue
                x = [p["evaluations"] / 1e6 for p in points]
                axis.plot(x, [p[name] for p in points], ".-", ms=3, **style)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("network evaluations [10⁶]", fontsize=8)
        if name == "crps":  # diverging curves leave the picture
            axis.set_ylim(top=min(axis.get_ylim()[1], 2))
        if name == "ratio":
            axis.axhspan(0.75, 1.25, color="0.9", zorder=0)
            axis.set_ylim(0, 2)
    axes[0].legend(fontsize=7)
    figure.suptitle(folder.name)
    figure.savefig(out / f"compare-{folder.name}.png", dpi=90)
    plt.close(figure)


def gallery(runs: Path, folder: Path, out: Path) -> None:
    """Pictures: clean item, observation, one draw per method; and samples of the priors."""
    methods = [m for m in load(folder) if (runs / folder.name / "0" / m / "gallery.npz").exists()]
    if not methods:
        return
    pictures = {m: np.load(runs / folder.name / "0" / m / "gallery.npz") for m in methods}
    first = pictures[methods[0]]
    if first["clean"].ndim != 4:
        return
    rows = [("the truth", first["clean"], None), ("observation", first["y"], None)]
    rows += [(m, p["draws"], p["prior"]) for m, p in pictures.items()]
    low, high = float(first["clean"].min()), float(first["clean"].max())
    figure, axes = plt.subplots(len(rows), 21, figsize=(13, 0.62 * len(rows)), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for line, (name, left, right) in zip(axes, rows, strict=True):
        line[10].text(0.5, 0.5, name, ha="center", va="center", fontsize=7)
        for offset, items in ((0, left), (11, right)):
            for axis, item in zip(line[offset:], () if items is None else items[:10], strict=False):
                shown = (np.nan_to_num(np.moveaxis(item, 0, -1)) - low) / (high - low)
                axis.imshow(shown.clip(0, 1), cmap="gray", vmin=0, vmax=1)
    figure.suptitle(f"{folder.name}: draws for held-out observations, and samples of the prior", fontsize=9)
    figure.savefig(out / f"gallery-{folder.name}.png", dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    arguments = parser.parse_args()
    for folder in sorted((HERE / "results" / "compare").glob("*")):
        curves(folder, arguments.out)
        gallery(arguments.runs, folder, arguments.out)


if __name__ == "__main__":
    main()
