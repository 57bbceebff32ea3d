"""Half of the pixels of 1,797 handwritten digits are missing; learn to fill them in without a clean digit."""

import torch
from sklearn.datasets import load_digits

import diffem

# here clean digits x are corrupted to make observations y; with your own data you have y and the mask already
x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]  # (N, channels, height, width)
corruption = diffem.RandomMask(rate=0.5, noise=0.08)  # noise: a standard deviation, in the units of y
y, params = corruption.observe(x, torch.Generator().manual_seed(0))  # params: {"mask": true where observed}

observations = diffem.Observations(y.numpy(), corruption, {"mask": params["mask"].numpy()}, range=(0, 16))
# this runs no check of the data: for your own, run `diffem check` first
for row in diffem.DiffEM("demo", observations, "runs/ten-lines").iterate():
    print(row["iteration"], row["accepted"], row["score"], row["ratio"])
draws = diffem.from_pretrained("runs/ten-lines/posterior").sample(
    y[:8], {"mask": params["mask"][:8]}, n=4
)  # (4, 8, 1, 8, 8)
new = diffem.from_pretrained("runs/ten-lines/prior").sample_prior(64)  # (64, 1, 8, 8)
