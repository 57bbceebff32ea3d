"""The columns of the digits benchmarks that need clean digits: a classifier's view of the reconstructions.

    python benchmarks/digits.py runs/digits --bound runs/digits-bound --out benchmarks/results/digits.json

Held-out scores use every held-out observation and 8 draws. `accuracy` is that of single draws given the thinned
held-out observations; `frechet` is the distance between reconstructions and clean digits in the features of a
classifier trained on clean digits (it is not 0 between two halves of the clean data: see `floor`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import parse, publish, scored
from sklearn.datasets import load_digits
from torch import Tensor, nn

from diffem import metrics, seeding
from diffem.diagnostics import score
from diffem.observations import Observations
from diffem.posteriors import PosteriorSampler, draw_many, from_pretrained

DRAWS = 8


def classifier(x: Tensor, labels: Tensor) -> nn.Sequential:
    """A small convolutional classifier of 8x8 digits; its features are all but the last layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.SiLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 64), nn.SiLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(400):
        i = torch.randint(0, len(x), (128,))
        loss = nn.functional.cross_entropy(model(x[i] + 0.1 * torch.randn_like(x[i])), labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


class Judge:
    """Knows the clean digits and their labels."""

    def __init__(self, run: Path) -> None:
        self.observations = Observations.load(run / "observations")
        self.train, self.held_out = self.observations.split(0)
        self.clean = self._scale(np.load(run / "observations" / "clean.npy"))
        self.labels = torch.from_numpy(load_digits().target)
        self.model = classifier(self.clean[self.train], self.labels[self.train])

    @staticmethod
    def _scale(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(x, dtype=np.float32)) / 8 - 1

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.model[:-1](x)

    @torch.no_grad()
    def accuracy(self, sampler: PosteriorSampler) -> float:
        y, params = self.observations.batch(self.held_out)
        split = sampler.corruption.thin(y, params, seeding.generator(0, 0, "score"))
        assert split is not None
        hits = []
        for j in range(DRAWS):
            x = self._scale(sampler.sample(*split[0], seeding.item_seeds(0, j, "score", self.held_out)).numpy())
            hits.append(self.model(x).argmax(1) == self.labels[self.held_out])
        return torch.stack(hits).float().mean().item()

    def column(self, sampler: PosteriorSampler, x: np.ndarray, first=None) -> tuple[dict, object]:
        """The metrics of a sampler and its reconstructions of all observations, and its score."""
        z = self._scale(x)
        current = score(sampler, self.observations, self.held_out, 0, DRAWS)
        column = scored(current, first)
        column["frechet"] = metrics.frechet_distance(
            self.features(z[self.train]), self.features(self.clean[self.train])
        )
        column["accuracy"] = self.accuracy(sampler)
        column["energy_distance"] = metrics.energy_distance(*metrics.apart(z, self.clean))
        column["psnr"] = metrics.psnr(z, self.clean, 2.0)
        return column, current

    def drawn(self, sampler: PosteriorSampler) -> np.ndarray:
        """Reconstructions of all observations by a sampler."""
        rows = np.arange(len(self.observations))
        return draw_many(sampler, self.observations, rows, 1, 0, "e_step")[:, 0].numpy()


def main() -> None:
    arguments = parse(__doc__)
    judge = Judge(arguments.run)
    start = from_pretrained(arguments.run / "start")
    table: dict[str, dict] = {}
    table["start"], first = judge.column(start, judge.drawn(start))
    reconstructions = np.load(arguments.run / "reconstructions.npy")
    table["diffem"], _ = judge.column(from_pretrained(arguments.run / "posterior"), reconstructions, first)
    if arguments.bound:
        bound = from_pretrained(arguments.bound / "posterior")
        table["clean bound"], _ = judge.column(bound, judge.drawn(bound), first)
    train, held = (judge.features(judge.clean[rows]) for rows in (judge.train, judge.held_out))
    publish(arguments, "digits.py", table, floor=metrics.frechet_distance(train, held))


if __name__ == "__main__":
    main()
