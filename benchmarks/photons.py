"""Photographs with few photons, beside BM3D after a variance-stabilising transform.

    python benchmarks/photons.py                        # half an hour on one core; results/photons/

Two photographs of scikit-learn in grey, 30 photons in white, and read noise of half a photon (both known). diffem learns
from patches of the two noisy photographs, and draws them whole. BM3D (package `bm3d`, extra `benchmarks`) denoises after
the generalised Anscombe transform, with the closed form of the exact unbiased inverse. PSNR in dB, of values from 0 to
255; coverage of 90 % intervals by decile of the true brightness.

Reference:
    | Optimal inversion of the generalized Anscombe transformation for Poisson-Gaussian noise
    | (Mäkitalo & Foi, 2013)
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import bm3d
import numpy as np
import torch
from compare import about
from sklearn.datasets import load_sample_images

from diffem.clean import metrics
from diffem.config import load_config
from diffem.corruptions import PoissonGaussian
from diffem.data import Observations
from diffem.em import DiffEM
from diffem.posterior import from_pretrained

HERE = Path(__file__).parent
WHITE, PHOTONS, READ = 255.0, 30, 0.5  # photons in white; read noise in photons
GAIN, PATCH = WHITE / PHOTONS, 32
DRAWS, LEVEL, DECILES = 39, 0.9, 10  # with 39 draws, 90 % is a whole number of ranks
SETTINGS = {
    "start.components": [1, 8],
    "start.ranks": [32],
    "start.items": 8192,
    "start.tolerance": 1.0,
    "network.channels": [16, 32, 64],
    "network.blocks": [1, 1, 1],
    "sampler.steps": 6,
    "m_step.batch": 64,
    "m_step.first_steps": 1500,
    "m_step.steps": 300,
    "em.iterations": 4,
    "prior.steps": 1,
}


def photographs() -> np.ndarray:
    """Clean images (2, 1, H, W), from 0 to 255."""
    images = np.stack(load_sample_images().images).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return images[:, None]


def transform(y: np.ndarray) -> np.ndarray:
    """The generalised Anscombe transform: noise of variance 1."""
    return 2 * np.sqrt(np.maximum(y / GAIN + 3 / 8 + READ**2, 0))


def inverse(z: np.ndarray) -> np.ndarray:
    """The exact unbiased inverse of the transform, in closed form."""
    z = np.maximum(z, transform(np.zeros(())))
    photons = z**2 / 4 + np.sqrt(1.5) / 4 / z - 11 / 8 / z**2 + 5 / 8 * np.sqrt(1.5) / z**3 - 1 / 8 - READ**2
    return GAIN * np.maximum(photons, 0)


def psnr(estimate: np.ndarray, clean: np.ndarray) -> float:
    return metrics.psnr(torch.from_numpy(estimate), torch.from_numpy(clean), WHITE)


def main() -> None:
    rng, clean, began = np.random.default_rng(0), photographs(), time.monotonic()
    y = GAIN * (rng.poisson(clean / GAIN) + READ * rng.normal(size=clean.shape)).astype(np.float32)
    bm = np.stack([inverse(bm3d.bm3d(transform(image[0]), sigma_psd=1.0))[None] for image in y])
    found: dict = {"psnr": {"y": psnr(y, clean), "BM3D": psnr(bm, clean)}}
    print(found, flush=True)
    observations = Observations(y, PoissonGaussian(GAIN, GAIN * READ), range=(0, WHITE), patch=PATCH)
    folder = Path("runs/photons")
    for row in DiffEM(load_config(None, SETTINGS), observations, folder).iterate():
        print(row["iteration"], row["accepted"], row["score"], row["ratio"], flush=True)
    draws = from_pretrained(folder / "posterior").reconstruct(observations.images, np.arange(2), DRAWS).numpy()
    low, high = metrics.interval(draws, LEVEL)
    inside, parts = (clean >= low) & (clean <= high), np.array_split(np.argsort(clean.ravel()), DECILES)
    found["psnr"] |= {"diffem": psnr(draws.mean(0), clean), "of 4 draws": psnr(draws[:4].mean(0), clean)}
    found["coverage"] = float(inside.mean())
    found["coverage_by_decile"] = [float(inside.ravel()[part].mean()) for part in parts]
    found |= {**about("python benchmarks/photons.py"), "seconds": round(time.monotonic() - began)}
    print(json.dumps(found, indent=1))
    file = HERE / "results" / "photons" / "photographs.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
