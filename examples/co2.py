"""Gaps in the weekly carbon dioxide at Mauna Loa, 1958-2001 (statsmodels), filled in with error bars.

One series becomes many items: windows of two years, every four weeks. A smooth trend is subtracted first. Gaps of 8 to
20 weeks are hidden, in all windows, and every method predicts them.
`python examples/co2.py`: minutes on one core.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
from gallery import DRAWS, coverage, interval, rmse, save, write

import diffem

LENGTH, STRIDE = 104, 4  # weeks


def series() -> np.ndarray:
    """Weekly means in ppm, NaN in the gaps."""
    try:
        from statsmodels.datasets import co2
    except ImportError:
        sys.exit("statsmodels: not found; pip install 'diffem-torch[benchmarks]'")
    return co2.load_pandas().data["co2"].to_numpy(np.float64)


def gaps(n: int, rng: np.random.Generator) -> np.ndarray:
    """A gap of 8 to 20 weeks in each two years, away from each other."""
    hidden = np.zeros(n, bool)
    for begin in range(0, n - LENGTH, LENGTH):
        at = begin + rng.integers(0, LENGTH - 30)
        hidden[at : at + rng.integers(8, 21)] = True
    return hidden


def trend(y: np.ndarray) -> np.ndarray:
    """The parabola that fits the known weeks best."""
    week, known = np.linspace(-1, 1, len(y)), np.isfinite(y)
    return np.polyval(np.polyfit(week[known], y[known], 2), week)


def line(y: np.ndarray) -> np.ndarray:
    known = np.flatnonzero(np.isfinite(y))
    return np.interp(np.arange(len(y)), known, y[known])


def climatology(y: np.ndarray) -> np.ndarray:
    """The mean of each week of the year."""
    season = (np.arange(len(y)) % 52.1775).astype(int)
    return np.array([np.nanmean(y[season == week]) for week in range(53)])[season]


def main() -> None:
    measured, rng = series(), np.random.default_rng(0)
    hidden = gaps(len(measured), rng) & np.isfinite(measured)
    y = np.where(hidden, np.nan, measured)
    smooth = trend(y)
    y -= smooth
    jumps = np.diff(y, 2)  # of a smooth curve they would be noise alone
    noise = float(1.48 * np.nanmedian(np.abs(jumps)) / np.sqrt(6))

    starts = np.arange(0, len(y) - LENGTH + 1, STRIDE)
    windows = y[starts[:, None] + np.arange(LENGTH)].astype(np.float32)
    held_out = starts // LENGTH % 10 == 5  # neighbours overlap: whole years are held out, not windows at random
    observations = diffem.Observations(windows, diffem.Mask(noise), axes="NT", held_out=held_out)
    for row in diffem.DiffEM(diffem.load_config(None, SETTINGS), observations, "runs/gallery/co2").iterate():
        print(row["iteration"], row["accepted"], row["score"], row["ratio"], flush=True)

    # each hidden week from the window in whose middle it is
    weeks = np.flatnonzero(hidden)
    nearest = np.abs(starts - (weeks[:, None] - LENGTH // 2)).argmin(1)
    rows, of = np.unique(nearest, return_inverse=True)
    posterior = diffem.from_pretrained("runs/gallery/co2/posterior")
    draws = posterior.reconstruct(observations, rows, DRAWS).numpy()[:, of, weeks - starts[nearest]] + smooth[weeks]

    normal = climatology(y)
    usual = {
        "linear interpolation": line(y),
        "seasonal mean": normal,
        "seasonal mean + line": normal + line(y - normal),
    }
    estimates = {"diffem": draws.mean(0)} | {name: (a + smooth)[weeks] for name, a in usual.items()}
    again = draws + noise * rng.normal(size=draws.shape)  # what was hidden has noise: so must have what predicts it
    figures = {
        "RMSE in the gaps [ppm]": {name: rmse(a - measured[weeks]) for name, a in estimates.items()},
        "coverage of 90 % intervals": {"diffem": coverage(again, measured[weeks])},
    }

    low, high = interval(again)
    date = lambda week: 1958.24 + np.asarray(week) / 52.1775  # noqa: E731
    figure, axes = plt.subplots(2, 1, figsize=(9, 4.6), layout="constrained")
    for ax, begin in zip(axes, (520, 1560), strict=True):
        shown = np.arange(begin, begin + 6 * 52)
        ax.plot(date(shown), (y + smooth)[shown], "k.", ms=2, label="known")
        parts = [p for p in np.split(weeks, np.flatnonzero(np.diff(weeks) > 4) + 1) if p[0] in shown and p[-1] in shown]
        for k, part in enumerate(parts):
            at, name = np.isin(weeks, part), (lambda text, k=k: text if k == 0 else None)
            ax.fill_between(date(part), low[at], high[at], color="tab:orange", alpha=0.3, label=name("90 % interval"))
            ax.plot(date(part), measured[part], "o", color="0.5", mfc="none", ms=3, label=name("hidden"))
            ax.plot(date(part), draws.mean(0)[at], color="tab:orange", label=name("diffem"))
            ax.plot(date(part), (line(y) + smooth)[part], color="tab:blue", lw=1, label=name("linear interpolation"))
        ax.set_ylabel("CO$_2$ [ppm]", fontsize=9)
    axes[0].legend(fontsize=7, ncols=5)
    save("co2", figure)
    write("co2", figures, observations=len(starts), hidden=len(weeks), noise=noise)


SETTINGS = {
    "network.channels": [16, 32, 64],
    "network.blocks": [1, 1, 2],
    "start.components": [1, 4],
    "m_step.batch": 64,
    "m_step.first_steps": 300,
    "m_step.steps": 100,
    "em.iterations": 8,
    "prior.steps": 1,
}

if __name__ == "__main__":
    main()
