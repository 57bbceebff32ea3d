"""Slices of a brain from a third of k-space, and from ten projections, without one complete slice.

The T1 volume ch2bet of MRIcron (Debian package mricron-data), cut in its three directions into slices of 32 x 32 pixels
of 6 mm. Each slice has k-space lines of its own; the projections are ten angles out of thirty, others for each slice.
`python examples/mri.py`: minutes on two cores.
"""

import nibabel
import numpy as np
import torch
from gallery import DRAWS, coverage, images, need, psnr, write

import diffem

FILE, SIZE, PIXEL = "/usr/share/mricron/templates/ch2bet.nii.gz", 32, 6
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


def angles(n: int, rng: np.random.Generator) -> np.ndarray:
    """Every third of thirty angles, (N, 1, 30, 1), from the first, the second, or the third on."""
    return (np.arange(30) % 3 == rng.integers(0, 3, (n, 1)))[:, None, :, None]


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


def filtered(corruption, y: torch.Tensor, params: dict) -> torch.Tensor:
    """Filtered back projection; its scale is that which fits y best."""
    ramp = torch.fft.rfftfreq(2 * y.shape[-1])
    x = corruption.adjoint(torch.fft.irfft(torch.fft.rfft(y, 2 * y.shape[-1]) * ramp)[..., : y.shape[-1]], params)
    again = corruption.forward(x, params)
    return x * (again * y).sum((1, 2, 3), keepdim=True) / again.square().sum((1, 2, 3), keepdim=True)


def study(name: str, x: torch.Tensor, corruption, mask: np.ndarray, direct) -> tuple[dict, dict]:
    """The figures of one kind of measurement, and pictures by title; `direct` is the usual inversion."""
    params = {"mask": torch.from_numpy(mask)}
    y = corruption.apply(x, params, torch.Generator().manual_seed(0))
    observations = diffem.Observations(y.numpy(), corruption, {"mask": mask}, range=(0, 1), axes="NCHW")
    for row in diffem.DiffEM(diffem.load_config(None, SETTINGS), observations, f"runs/gallery/{name}").iterate():
        print(name, row["iteration"], row["accepted"], row["score"], row["ratio"], flush=True)
    rows = np.arange(0, len(x), 4)
    posterior = diffem.from_pretrained(f"runs/gallery/{name}/posterior")
    draws = posterior.reconstruct(observations, rows, DRAWS).numpy()

    clean, y, params = x[rows].numpy(), y[rows], {"mask": params["mask"][rows]}
    simple = direct(corruption, y, params)
    smooth = [total_variation(corruption, y, params, simple, weight).numpy() for weight in WEIGHTS]
    best = max(smooth, key=lambda a: psnr(a, clean, 1.0))  # its weight is chosen on the clean slices: a favour to it
    estimates = {"diffem": draws.mean(0), "direct inversion": simple.numpy(), "total variation": best}
    brain = clean > 0
    figures = {
        f"PSNR, {name} [dB]": {method: psnr(a, clean, 1.0) for method, a in estimates.items()},
        f"coverage of 90 % intervals in the brain, {name}": {"diffem": coverage(draws[:, brain], clean[brain])},
    }
    pictures = [clean, simple.numpy(), best, draws.mean(0), *draws[:2], 3 * draws.std(0)]
    return figures, pictures


def main() -> None:
    x, rng = slices(nibabel.load(need(FILE, "mricron-data")).get_fdata()), np.random.default_rng(0)
    zero_filled = lambda corruption, y, params: corruption.adjoint(y, params)  # noqa: E731
    found = {
        "k-space": study("k-space", x, diffem.Fourier("real", 0.02), lines(len(x), rng), zero_filled),
        "projections": study("projections", x, diffem.Radon(30, noise=0.1), angles(len(x), rng), filtered),
    }
    figures = {k: v for part, _ in found.values() for k, v in part.items()}
    shown = {"k-space": (8, 40), "projections": (8, 40)}
    rows = [[a[i, 0] for a in found[name][1]] for name, which in shown.items() for i in which]
    labels = [name for name, which in shown.items() for _ in which]
    titles = ["truth", "zero-filled, FBP", "total variation", "mean of draws", "a draw", "another", "3 x std of draws"]
    images("mri", rows, titles, labels, ranges=[(0, 0.9)] * len(rows))
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
