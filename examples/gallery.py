"""What the scripts of the gallery share: checks of their data, figures, one picture and one JSON for each."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from diffem.clean import metrics

ROOT = Path(__file__).resolve().parents[1]
DRAWS, LEVEL = 39, 0.9  # with 39 draws, 90 % is a whole number of ranks: 36 of 40
BEGAN = time.monotonic()
sys.path.append(str(ROOT / "benchmarks"))  # compare.py says where figures come from, judge.py has a classifier


def need(path: str, package: str) -> Path:
    """The path of a data file; without the file, the script ends with one line that says what to install."""
    if not Path(path).exists():
        sys.exit(f"{path}: not found; on Debian or Ubuntu: apt install {package}")
    return Path(path)


def rmse(error: np.ndarray) -> float:
    return float(np.sqrt(np.nanmean(np.square(error))))


def psnr(estimate: np.ndarray, clean: np.ndarray, peak: float) -> float:
    """The mean over images (N, ...) of the PSNR, in dB."""
    pairs = zip(torch.from_numpy(estimate), torch.from_numpy(clean), strict=True)
    return float(np.mean([metrics.psnr(one, true, peak) for one, true in pairs]))


def interval(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The central 90 % interval of draws (n, ...)."""
    return metrics.interval(draws, LEVEL)


def coverage(draws: np.ndarray, truth: np.ndarray) -> float:
    """How often the truth lies within the central 90 % interval of draws (n, ...)."""
    low, high = interval(draws)
    return float(((truth >= low) & (truth <= high)).mean())


def images(name, rows, titles, labels, ranges, bars=None, cmap="gray") -> None:
    """Saves rows of images, each row in one range (low, high) of colours. NaN stands out. `bars`: units of colour bars."""
    colours = plt.get_cmap(cmap).with_extremes(bad="tab:blue" if cmap == "gray" else "0.6")
    size = (1.5 * len(titles) + 0.9, 1.5 * len(rows) + 0.4)
    figure, axes = plt.subplots(len(rows), len(titles), figsize=size, squeeze=False, layout="constrained")
    for i, row in enumerate(rows):
        for ax, image, title in zip(axes[i], row, titles, strict=True):
            shown = ax.imshow(image, colours, vmin=ranges[i][0], vmax=ranges[i][1], interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_title(title if i == 0 else "", fontsize=9)
        axes[i, 0].set_ylabel(labels[i], fontsize=9)
        if bars:
            figure.colorbar(shown, ax=axes[i], shrink=0.8).set_label(bars[i], fontsize=9)
    save(name, figure)


def save(name: str, figure: plt.Figure) -> None:
    figure.savefig(ROOT / "docs" / f"gallery-{name}.png", dpi=100)
    plt.close(figure)


def write(name: str, figures: dict[str, dict[str, float]], **facts) -> None:
    """Writes benchmarks/results/gallery/NAME.json: {figure: {method: value}}, and where it comes from."""
    from compare import about

    result = {"example": name, **about(f"python examples/{name}.py"), **facts, "figures": figures}
    # a run that is finished is not repeated: its own seconds
    runs = (ROOT / "runs" / "gallery" / name).rglob("metrics.jsonl")
    rows = [json.loads(line) for run in runs for line in run.read_text().splitlines()]
    result["seconds"] = round(sum(row["seconds"] for row in rows) or time.monotonic() - BEGAN)
    file = ROOT / "benchmarks" / "results" / "gallery" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
