"""Handwritten digits after JPEG, in four grey levels, cut off at 60 % of the range, and with at most five photons.

The 1,797 digits of scikit-learn (8 x 8 pixels), from 0 to 255. None of these corruptions is linear; the first two are
not even random. Each has a run of its own, with the settings of the preset `demo` and fewer iterations.
`python examples/digits.py`: about three minutes each on two cores.
"""

import numpy as np
import torch
from gallery import DRAWS, coverage, images, rmse, write
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

import diffem
from diffem.clean import metrics
from diffem.diagnostics.diagnose import diagnose

WHITE, PHOTONS, LEVEL = 255.0, 5, 0.6
CASES = {
    "JPEG, quality 20": diffem.JPEG(20),
    "4 grey levels": diffem.Quantise(4, 0, WHITE),
    "cut off at 60 %": diffem.Saturate(LEVEL * WHITE),
    "5 photons": diffem.PoissonGaussian(WHITE / PHOTONS),
}
WIDTHS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # of Gaussian smoothing, in pixels


def smoothed(y: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Images (N, 1, 8, 8) smoothed by the Gaussian that brings them nearest to the clean ones: a favour to this method."""
    tried = [gaussian_filter(y, (0, 0, width, width)) for width in WIDTHS]
    return min(tried, key=lambda a: rmse(a - clean))


def usual(name: str, y: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """A usual estimate, with its parameter chosen on the clean digits."""
    if name == "cut off at 60 %":  # the mean of what is cut off
        cut = y >= LEVEL * WHITE
        return np.where(cut, clean[cut].mean(), y)
    if name == "5 photons":  # smoothed where the noise is nearly the same everywhere (Anscombe, 1948)
        z = smoothed(2 * np.sqrt(y * PHOTONS / WHITE + 3 / 8), 2 * np.sqrt(clean * PHOTONS / WHITE + 3 / 8))
        return (z**2 / 4 - 1 / 8).clip(0) * WHITE / PHOTONS
    return smoothed(y, clean)


def features(clean: np.ndarray, labels: np.ndarray):
    """Features of digits (N, 1, 8, 8): those of a classifier that was trained on the clean ones."""
    from judge import classifier

    unit = lambda x: torch.as_tensor(x, dtype=torch.float32) / (WHITE / 2) - 1  # noqa: E731
    model = classifier(unit(clean), torch.from_numpy(labels))
    return lambda x: model[:-1](unit(x)).detach()


def main() -> None:
    clean, labels = (load_digits().images[:, None] * (WHITE / 16)).astype(np.float32), load_digits().target
    seen, rows, others = features(clean, labels), np.arange(0, len(clean), 2), np.arange(1, len(clean), 2)
    frechet = lambda x: metrics.frechet_distance(seen(x), seen(clean[others]))  # noqa: E731
    figures, pictures, told = {}, [], {}
    for name, corruption in CASES.items():
        y = corruption.apply(torch.from_numpy(clean), {}, torch.Generator().manual_seed(0)).numpy()
        observations = diffem.Observations(y, corruption, range=(0, WHITE))
        out = f"runs/gallery/digits/{name.replace(' ', '-')}"
        run = diffem.DiffEM(diffem.load_config("demo", SETTINGS), observations, out)
        for row in run.iterate():
            print(name, row["iteration"], row["accepted"], row["best"], row["score"], row["ratio"], flush=True)
        warnings = [text for text in diagnose(out, observations)["warnings"] if "prior" not in text]  # not trained here
        told[name] = {"iteration": run.rows[-1]["final"], "warnings": warnings}
        draws = diffem.from_pretrained(f"{out}/posterior").reconstruct(observations, rows, DRAWS).numpy()

        truth, y = clean[rows], y[rows]
        estimates = {"diffem": draws.mean(0), "y": y, "usual": usual(name, y, truth)}
        shown = {"diffem": draws[0], "y": y, "usual": estimates["usual"], "other digits": truth}
        figures |= {
            f"{name}: Frechet distance": {method: frechet(a) for method, a in shown.items()},
            f"{name}: RMSE [% of the range]": {m: 100 * rmse(a - truth) / WHITE for m, a in estimates.items()},
            f"{name}: coverage of 90 % intervals": {"diffem": coverage(draws, truth)},
        }
        columns = [truth, y, estimates["usual"], draws.mean(0), *draws[:2], 3 * draws.std(0)]
        pictures.append([a[5, 0] for a in columns])

    titles = ["truth", "y", "usual method", "mean of draws", "a draw", "another", "3 x std of draws"]
    images("digits", pictures, titles, list(CASES), ranges=[(0, WHITE)] * len(CASES))
    write("digits", figures, observations=len(clean), runs=told)


SETTINGS = {"em.iterations": 6, "prior.steps": 1}

if __name__ == "__main__":
    main()
