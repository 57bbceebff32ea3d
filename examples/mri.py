"""Slices of a brain from a third of k-space, without one complete slice.

The T1 volume ch2bet of MRIcron (Debian package mricron-data), cut in its three directions into slices of 32 x 32 pixels
of 6 mm. Each slice has k-space lines of its own.
`python examples/mri.py`: minutes on two cores.
"""

import nibabel
import numpy as np
import torch
from gallery import DRAWS, coverage, images, need, psnr, write

import diffem

FILE, SIZE, PIXEL = "/usr/share/mricron/templates/ch2bet.nii.gz", 32, 6
NOISE = 0.02  # of each real and imaginary part; images reach from 0 to 1
WEIGHTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of total variation


def slices(volume: np.ndarray) -> torch.Tensor:
    """Square slices in the three directions, (N, 1, SIZE, SIZE), from 0 to 1, those that show enough brain."""
    box = [slice(at.min(), at.max() + 1) for at in np.nonzero(volume)]
    volume, side = volume[tuple(box)].astype(np.float32), SIZE * PIXEL
    found = []
    for axis in range(3):
        stack = np.moveaxis(volume, axis, 0)[:, :side, :side]
        before = [(side - n) // 2 for n in stack.shape[1:]]
        pad = [(0, 0), *((b, side - n - b) for b, n in zip(before, stack.shape[1:], strict=True))]
        means = np.pad(stack, pad).reshape(-1, SIZE, PIXEL, SIZE, PIXEL).mean((2, 4))
        found.append(np.rot90(means[(means > 0).mean((1, 2)) > 0.15], axes=(1, 2)))
    x = np.concatenate(found)[:, None]
    return torch.from_numpy(x / x.max())


def lines(n: int, rng: np.random.Generator) -> np.ndarray:
    """A third of the lines of k-space, (N, 1, 1, SIZE): the middle five, and others at random."""
    chance = rng.random((n, SIZE))
    chance[:, SIZE // 2 - 2 : SIZE // 2 + 3] = 2
    return (chance >= np.sort(chance, 1)[:, [-SIZE // 3]])[:, None, None]


def total_variation(corruption, y: torch.Tensor, params: dict, start: torch.Tensor, weight: float) -> torch.Tensor:
    """The image with the smallest |A x - y|^2 / 2 + weight * TV(x), by gradient descent."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], 0.02)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 300)
        down, right = x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]
        misfit = (corruption.forward(x, params) - y).square().sum() / 2
        loss = misfit + weight * (down.square() + right.square() + 1e-6).sqrt().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return x.detach()


def main() -> None:
    x, rng = slices(nibabel.load(need(FILE, "mricron-data")).get_fdata()), np.random.default_rng(0)
    corruption, mask = diffem.Fourier("real", NOISE), lines(len(x), rng)
    y = corruption.apply(x, {"mask": torch.from_numpy(mask)}, torch.Generator().manual_seed(0))

    observations = diffem.Observations(y.numpy(), corruption, {"mask": mask}, range=(0, 1), axes="NCHW")
    for row in diffem.DiffEM(diffem.load_config(None, SETTINGS), observations, "runs/gallery/mri").iterate():
        print(row["iteration"], row["accepted"], row["score"], row["ratio"], flush=True)
    rows = np.arange(0, len(x), 4)
    posterior = diffem.from_pretrained("runs/gallery/mri/posterior")
    draws = posterior.reconstruct(observations, rows, DRAWS).numpy()

    clean, y, params = x[rows].numpy(), y[rows], {"mask": torch.from_numpy(mask[rows])}
    zero_filled = corruption.adjoint(y, params)
    smooth = [total_variation(corruption, y, params, zero_filled, weight).numpy() for weight in WEIGHTS]
    best = max(smooth, key=lambda a: psnr(a, clean, 1.0))  # its weight is chosen on the clean slices: a favour to it
    estimates = {"diffem": draws.mean(0), "zero-filled": zero_filled.numpy(), "total variation": best}
    brain = clean > 0
    figures = {
        "PSNR [dB]": {method: psnr(a, clean, 1.0) for method, a in estimates.items()},
        "coverage of 90 % intervals in the brain": {"diffem": coverage(draws[:, brain], clean[brain])},
    }

    titles = ["truth", "zero-filled", "total variation", "mean of draws", "a draw", "another", "5 x std of draws"]
    columns = [clean, zero_filled.numpy(), best, draws.mean(0), *draws[:2], 5 * draws.std(0)]
    pictures = [[a[i, 0] for a in columns] for i in (12, 50, 80)]
    images("mri", pictures, titles, ["axis 0", "axis 1", "axis 2"], ranges=[(0, 0.9)] * 3)
    write("mri", figures, observations=len(x))


SETTINGS = {
    "network.channels": [16, 32, 64],
    "network.blocks": [1, 1, 2],
    "denoiser.observation_dropout": 0,
    "sampler.steps": 8,
    "m_step.batch": 64,
    "m_step.first_steps": 200,
    "m_step.steps": 80,
    "em.iterations": 6,
    "prior.steps": 1,
}

if __name__ == "__main__":
    main()
