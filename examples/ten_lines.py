"""Half of the pixels of 1,797 handwritten digits are missing; learn to fill them in without a clean digit."""

import torch
from sklearn.datasets import load_digits

from diffem import DiffEM, Observations, from_pretrained
from diffem.config import load
from diffem.corruptions import RandomMask
from diffem.seeding import item_seeds

x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]  # (N, channels, height, width)
corruption = RandomMask(rate=0.5, noise=0.08)
params = corruption.draw(len(x), (1, 8, 8), torch.Generator().manual_seed(0))
y = corruption.apply(x, params, torch.Generator().manual_seed(1))

observations = Observations(y.numpy(), corruption, {"mask": params["mask"].numpy()}, range=(0, 16))
for row in DiffEM(load("demo"), observations, "runs/ten-lines").iterate():
    print(row["iteration"], row["accepted"], row["score"], row["ratio"])
draws = from_pretrained("runs/ten-lines/posterior").sample(
    *observations.batch(range(8)), item_seeds(0, 0, "user", range(8))
)
