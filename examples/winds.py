"""Winds over the globe, seen only along the swaths of a satellite: 62 % of each monthly map are missing.

132 monthly maps of the US Navy (Debian package ferret-datasets), on a grid of 2.5 degrees, eastward and northward wind.
Each map is cut into 18 patches. `python examples/winds.py`: about ten minutes on one core.
"""

import numpy as np
from gallery import DRAWS, coverage, images, need, rmse, write
from scipy.interpolate import griddata
from scipy.io import netcdf_file

import diffem

FILE, SIZE, NOISE = "/usr/share/ferret-vis/data/monthly_navy_winds.cdf", 24, 0.3  # NOISE in m/s


def maps(file) -> np.ndarray:
    """Maps (months, 2, latitudes, longitudes) in m/s, north up, without the outermost rows."""
    with netcdf_file(file, mmap=False) as data:
        winds = np.stack([data.variables[name][:].astype(np.float32) for name in ("UWND", "VWND")], 1)
    return winds[:, :, winds.shape[2] % SIZE :][:, :, ::-1]


def swaths(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Slanted stripes, 6 of 16 grid points wide, at another place in each map; true where measured."""
    months, _, height, width = shape
    row, column = np.mgrid[:height, :width]
    slope, begin = rng.choice([-0.5, 0.5], (months, 1, 1)), rng.uniform(0, 16, (months, 1, 1))
    return ((column + slope * row + begin) % 16 < 6)[:, None]


def patches(a: np.ndarray) -> np.ndarray:
    """(months, C, H, W) as (patches, C, SIZE, SIZE)."""
    n, c, h, w = a.shape
    cut = a.reshape(n, c, h // SIZE, SIZE, w // SIZE, SIZE)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(-1, c, SIZE, SIZE)


def interpolated(y: np.ndarray) -> np.ndarray:
    """Each map (H, W) interpolated linearly between measured points; outside of them, the nearest one."""
    out = np.empty_like(y)
    for at in np.ndindex(y.shape[:2]):
        seen = np.isfinite(y[at])
        points, values, grid = np.argwhere(seen), y[at][seen], tuple(np.indices(seen.shape))
        linear = griddata(points, values, grid)
        out[at] = np.where(np.isfinite(linear), linear, griddata(points, values, grid, method="nearest"))
    return out


def main() -> None:
    truth, rng = maps(need(FILE, "ferret-datasets")), np.random.default_rng(0)
    y = np.where(swaths(truth.shape, rng), truth + NOISE * rng.normal(size=truth.shape), np.nan).astype(np.float32)

    # deviations from the mean of the months at each point, so that patches of all regions are alike
    mean = np.broadcast_to(np.nanmean(y, 0), y.shape)
    observations = diffem.Observations(patches(y - mean), diffem.Mask(NOISE), axes="NCHW")  # NaN marks the gaps
    config = diffem.load_config(None, SETTINGS)
    for row in diffem.DiffEM(config, observations, "runs/gallery/winds").iterate():
        print(row["iteration"], row["accepted"], row["score"], row["ratio"], flush=True)
    rows = np.arange(0, len(observations.y), 13)  # one of 13 patches is scored: 13 and 18 have no common divisor
    posterior = diffem.from_pretrained("runs/gallery/winds/posterior")
    draws = posterior.reconstruct(observations, rows, DRAWS).numpy() + patches(mean)[rows]

    # the usual methods, on whole maps: they see across the borders of patches
    clean, seen = patches(truth)[rows], patches(y)[rows]
    usual = {"mean of the months": mean, "linear interpolation": interpolated(y)}
    usual["mean + interpolated deviations"] = mean + interpolated(y - mean)
    estimates = {"diffem": draws.mean(0)} | {name: patches(a)[rows] for name, a in usual.items()}
    gaps = np.isnan(seen)
    figures = {
        "RMSE in the gaps [m/s]": {name: rmse((a - clean)[gaps]) for name, a in estimates.items()},
        "coverage of 90 % intervals": {"diffem": coverage(draws[:, gaps], clean[gaps])},
    }

    titles = ["truth", "measured", "linear", "mean + deviations", "mean of draws", "a draw", "another", "3 x std"]
    columns = [clean, seen, *list(estimates.values())[2:], draws.mean(0), *draws[:2], 3 * draws.std(0)]
    rows = [[a[i, part] for a in columns] for i, part in ((2, 0), (50, 0), (111, 1), (160, 0))]
    labels = ["eastward", "eastward", "northward", "eastward"]
    images("winds", rows, titles, labels, [(-12, 12)] * 4, ["m/s"] * 4, "RdBu_r")
    write("winds", figures, observations=len(observations.y))


SETTINGS = {
    "network.channels": [16, 32, 64],
    "network.blocks": [1, 1, 2],
    "start.components": [1, 4],
    "start.ranks": [16],
    "start.items": 2048,
    "sampler.steps": 8,
    "m_step.batch": 64,
    "m_step.first_steps": 300,
    "m_step.steps": 100,
    "em.iterations": 6,
    "prior.steps": 1,
}

if __name__ == "__main__":
    main()
