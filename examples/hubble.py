"""Bad and saturated pixels of a real exposure of the Hubble Space Telescope, filled in.

The globular cluster 47 Tucanae, 60 s with ACS/HRC (Debian package python-drizzle-testdata), planes SCI, ERR and DQ. No
truth exists: 10 % of the good pixels are hidden, and every method predicts them.
`python examples/hubble.py`: minutes on two cores.
"""

import numpy as np
from astropy.io import fits
from gallery import DRAWS, coverage, images, need, rmse, write
from scipy.interpolate import griddata

import diffem

FILE, SIZE = "/usr/share/python-drizzle/test_data/j8bt06nyq_flt.fits", 32
SOFT = 50.0  # electrons; asinh(SCI / SOFT) is a logarithm for stars, and linear for the sky: stars span four decades


def planes(file) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """asinh(SCI / SOFT), its standard deviation, and which pixels are good; without the edges that nothing reaches."""
    with fits.open(file) as exposure:
        sci, err = (exposure[name, 1].data[16:1008].astype(np.float32) for name in ("SCI", "ERR"))
        good = (exposure["DQ", 1].data[16:1008] == 0) & (err > 0)
    return np.arcsinh(sci / SOFT), err / np.hypot(sci, SOFT), good


def patches(a: np.ndarray) -> np.ndarray:
    """(H, W) as (N, 1, SIZE, SIZE)."""
    height, width = a.shape
    return a.reshape(height // SIZE, SIZE, width // SIZE, SIZE).swapaxes(1, 2).reshape(-1, 1, SIZE, SIZE)


def median(y: np.ndarray) -> np.ndarray:
    """Each missing pixel becomes the median of the good ones in the smallest square around it that has any."""
    out, radius = y.copy(), 1
    while len(holes := np.argwhere(np.isnan(out))):
        padded = np.pad(y, radius, constant_values=np.nan)
        squares = np.lib.stride_tricks.sliding_window_view(padded, (2 * radius + 1,) * 2)[tuple(holes.T)]
        some = np.isfinite(squares).any((1, 2))
        out[tuple(holes[some].T)] = np.nanmedian(squares[some], (1, 2))
        radius += 1
    return out


def linear(y: np.ndarray) -> np.ndarray:
    """Missing pixels interpolated linearly between the good ones."""
    good, out = np.isfinite(y), y.copy()
    out[~good] = griddata(np.argwhere(good), y[good], np.argwhere(~good))
    return np.where(np.isfinite(out), out, median(y))


def main() -> None:
    z, noise, good = planes(need(FILE, "python-drizzle-testdata"))
    rng = np.random.default_rng(0)
    hidden = good & (rng.random(z.shape) < 0.1)
    y = np.where(good & ~hidden, z, np.nan)
    known = np.where(np.isnan(y), np.median(noise), noise)  # ERR of a hidden pixel would tell its brightness

    params = {"mask": np.isfinite(patches(y)), "noise": patches(known)}
    observations = diffem.Observations(patches(y), diffem.Mask(), params, axes="NCHW")
    for row in diffem.DiffEM(diffem.load_config(None, SETTINGS), observations, "runs/gallery/hubble").iterate():
        print(row["iteration"], row["accepted"], row["score"], row["ratio"], flush=True)
    rows = np.arange(0, len(observations.y), 8)
    posterior = diffem.from_pretrained("runs/gallery/hubble/posterior")
    draws = posterior.reconstruct(observations, rows, DRAWS).numpy()

    where, error = patches(hidden)[rows], patches(noise)[rows]
    truth, seen = patches(z)[rows], patches(y)[rows]
    estimates = {"diffem": np.median(draws, 0)}  # draws are skewed near stars: the median, not the mean
    estimates |= {name: patches(f(y))[rows] for name, f in {"median filter": median, "linear": linear}.items()}
    electrons, err = SOFT * np.sinh(truth), error * np.hypot(SOFT * np.sinh(truth), SOFT)
    off = {name: (np.abs(SOFT * np.sinh(a) - electrons) / err)[where] for name, a in estimates.items()}
    again = draws + error * rng.normal(size=draws.shape)  # what was hidden has noise: so must have what predicts it
    figures = {
        "error in units of ERR: median": {name: float(np.median(a)) for name, a in off.items()},
        "error in units of ERR: 90th percentile": {name: float(np.percentile(a, 90)) for name, a in off.items()},
        "RMSE of asinh(SCI / 50)": {name: rmse((a - truth)[where]) for name, a in estimates.items()},
        "coverage of 90 % intervals": {"diffem": coverage(again[:, where], truth[where])},
    }

    shown = np.argsort(-np.isnan(seen).sum((1, 2, 3)))[[0, 3, 30, 60]]  # patches with much missing
    low, high = (f(seen, (1, 2, 3), keepdims=True) for f in (np.nanmin, np.nanmax))
    spread = low + 5 * draws.std(0)  # 0 is black
    columns = [seen, estimates["median filter"], estimates["linear"], estimates["diffem"], *draws[:2], spread]
    titles = ["measured", "median filter", "linear", "median of draws", "a draw", "another", "5 x std of draws"]
    ranges = [(low[i].item(), high[i].item()) for i in shown]
    images("hubble", [[a[i, 0] for a in columns] for i in shown], titles, [""] * len(shown), ranges=ranges)
    write("hubble", figures, observations=len(observations.y), hidden=int(hidden.sum()))


SETTINGS = {
    "network.channels": [16, 32],
    "network.blocks": [1, 2],
    "start.components": [1, 4],
    "start.ranks": [16],
    "sampler.steps": 8,
    "m_step.batch": 64,
    "m_step.first_steps": 200,
    "m_step.steps": 80,
    "em.iterations": 6,
    "prior.steps": 1,
}

if __name__ == "__main__":
    main()
