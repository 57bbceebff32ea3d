"""Compares the posterior and the prior of a benchmark run with the truth: clean items, and a feature space.

    python benchmarks/judge.py runs/digits --bound runs/digits-bound --out benchmarks/results/digits.json

prints the columns of the start, the run and (with --bound) the network trained on the clean data. Scores use at most 512
test observations, which were not used for selection, each split 8 times, with 4 draws per split. Scores, energy
distance and PSNR are in model units (half the range of the data is 1). `psnr_mean` is the PSNR of the mean of 32 draws.
`frechet`, `precision`, `recall`, `density` and `coverage` compare reconstructions of training observations with the
clean items of others, in the features of a classifier trained on clean items (digits, Fashion-MNIST), or, on the
manifold, in the coordinates. For the manifold there are also, in the units of the data, `to_curve` (mean distance of a
draw to the curve), `from_curve` (of a point of the curve to the nearest draw), `residual` (root mean square of A x - y
over the noise) and `sinkhorn` (the paper's divergence, lambda 1e-3, 4,096 points). Names that begin with `prior_` refer
to samples of the prior.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn

import diffem.rivals  # noqa: F401 - registers their samplers, which are judged, too
from diffem import seeding
from diffem.clean import metrics
from diffem.clean.datasets import manifold_curve
from diffem.corruptions import Params
from diffem.data import Dataset, Items, Observations, evenly
from diffem.diagnostics import Score, final_splits, score
from diffem.errors import DiffemError
from diffem.posterior import Posterior, from_pretrained
from diffem.samplers import draw_from, draw_many, prior_samples

DRAWS = 4
MEAN = 32  # draws for a posterior mean
ITEMS = 4096  # reconstructions and prior samples that are compared with clean items
SCORED = 512  # test observations at most


def classifier(x: Tensor, labels: Tensor, steps: int = 400) -> nn.Sequential:
    """A small convolutional classifier of images (N, C, H, W); its features are all but the last layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(x.shape[1], 32, 3, padding=1), nn.SiLU()]
        size = x.shape[-1]
        while size > 4:
            layers += [nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.SiLU()]
            size = -(-size // 2)
        head = [nn.Flatten(), nn.Linear(32 * size * size, 64), nn.SiLU(), nn.Linear(64, int(labels.max()) + 1)]
        model = nn.Sequential(*layers, *head)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        for _ in range(steps):
            i = torch.randint(0, len(x), (128,))
            loss = nn.functional.cross_entropy(model(x[i] + 0.1 * torch.randn_like(x[i])), labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def distribution(x: Tensor, clean: Tensor, features: metrics.Features) -> dict[str, float]:
    """Distances between the distributions of items (N, *) and of other, clean items (M, *): in pixels, and in
    features."""
    a, b = features(x), features(clean)
    column = {"frechet": metrics.frechet_distance(a, b), "energy_distance": metrics.energy_distance(x, clean)}
    return column | metrics.manifold_overlap(a, b)


def means(each: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each distance over several draws."""
    return {name: float(np.mean([found[name] for found in each])) for name in each[0]}


class Judge:
    """Compares models with the clean items, and with their labels if there are any.

    Arguments:
        folder: Observations, with clean.npy and perhaps labels.npy in the same folder.
        seed: The seed of the runs; it determines the held-out split.
        data_seed: The seed of the observations; on the manifold it determines the curve.
    """

    def __init__(self, folder: Path, seed: int = 0, data_seed: int = 0) -> None:
        self.observations, self.seed = Observations.load(folder), seed
        self.observations.formula = True  # hides the same entries as in all earlier results
        self.train, _, test = self.observations.split(seed)
        self.test = evenly(test, SCORED)
        self.data = Dataset(self.observations, self.observations.units(self.train))
        self.units = self.data.units
        raw = Items(np.load(folder / "clean.npy", mmap_mode="r"), self.units)
        rows = evenly(self.train, 2 * ITEMS)  # the draw for a row is not compared with the clean item of that row
        self.rows, others = rows[::2], rows[1::2]
        self.clean, self.clean_test = raw[others], raw[self.test]
        self.curve: Tensor | None = None
        self.model: nn.Sequential | None = None
        if (folder / "labels.npy").exists() and self.clean.ndim == 4:
            labels = torch.from_numpy(np.load(folder / "labels.npy"))
            self.labels = labels[self.test]
            self.model = classifier(raw[rows], labels[rows])
        elif self.clean.ndim == 2:
            self.curve = torch.as_tensor(manifold_curve(data_seed, 32_768), dtype=torch.float32)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Features of items in model units, shape (N, f)."""
        return x.flatten(1) if self.model is None else torch.cat([self.model[:-1](part) for part in x.split(1024)])

    def distribution(self, x: Tensor) -> dict[str, float]:
        """Distances between the distributions of items, in model units, and of the clean items."""
        column = distribution(x, self.clean, self.features)
        if self.curve is not None:
            points = self.units.restore(x)
            column["to_curve"] = metrics.nearest(points, self.curve).mean().item()
            column["from_curve"] = metrics.nearest(self.curve[::8], points).mean().item()
        return column

    def score(self, posterior: Posterior) -> Score:
        """The score of a posterior."""
        return score(posterior.sampler, self.data, self.test, self.seed, DRAWS, final_splits(len(self.test)))

    def posterior(self, posterior: Posterior, first: Score | None = None) -> dict:
        """The columns of a posterior; `first` is the score of the start, for a paired difference."""
        current, sampler = self.score(posterior), posterior.sampler
        column: dict = {"crps": current.mean, "crps_se": current.standard_error, "ratio": current.ratio}
        if first is not None:
            column["delta"], column["delta_se"] = current.difference(first)
        x = draw_many(sampler, self.data, self.rows, 1, self.seed, "e_step")[0]
        column |= self.distribution(x)
        draws = draw_many(sampler, self.data, self.test, MEAN, self.seed)
        column["psnr"] = metrics.psnr(draws, self.clean_test.expand_as(draws), 2.0)
        column["psnr_mean"] = metrics.psnr(draws.mean(0), self.clean_test, 2.0)
        if self.model is not None:
            column["accuracy"] = self.accuracy(posterior)
        if self.curve is not None:
            column["sinkhorn"] = metrics.sinkhorn_divergence(self.units.restore(x), self.units.restore(self.clean))
            y, params = self.data.batch(self.rows)
            residual = self.data.corruption.forward(x, params) - y
            column["residual"] = (residual.square().mean().sqrt() / float(self.data.corruption.noise)).item()
        return column

    def psnr_of(self, estimate: Callable[[Tensor, Params], Tensor]) -> float:
        """PSNR of an estimate of test items from their observations, in model units."""
        return metrics.psnr(estimate(*self.data.batch(self.test)), self.clean_test, 2.0)

    @torch.no_grad()
    def accuracy(self, posterior: Posterior) -> float:
        """How often the classifier is right on single draws, given the thinned test observations."""
        assert self.model is not None
        generator = seeding.generator(self.seed, 0, "score")
        split = self.data.corruption.thin(*self.data.batch(self.test), generator)
        assert split is not None
        hits = []
        for j in range(DRAWS):
            x = draw_from(posterior.sampler, *split[0], seeding.item_seeds(self.seed, j, "score", self.test))
            hits.append(self.model(x).argmax(1) == self.labels)
        return torch.stack(hits).float().mean().item()

    def prior(self, prior: Posterior) -> dict[str, float]:
        """The columns of a prior."""
        x = prior_samples(prior.sampler, len(self.rows), self.seed)
        return {f"prior_{k}": v for k, v in self.distribution(x).items()}


def cost(run: Path) -> dict:
    """The cost of a run: seconds, evaluations of the network, and the numbers of iterations made and kept."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    iterations, prior = [row for row in rows if row["loss"] is not None], run / "prior.json"
    last = json.loads(prior.read_text()) if prior.exists() else {"seconds": 0}
    return {
        "seconds": sum(row["seconds"] for row in rows) + last["seconds"],
        "score_seconds": sum(row["score_seconds"] for row in rows),
        "evaluations": sum(row["network_evaluations"] for row in rows) + 3 * last.get("examples", 0),
        "iterations": len(iterations),
        "accepted": sum(row["accepted"] for row in iterations),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--bound", type=Path, help="a run of `bound.py` on the same observations")
    parser.add_argument("--out", type=Path, help="a JSON file; printed otherwise")
    arguments = parser.parse_args()
    if not (arguments.run / "config.yaml").exists():
        raise DiffemError(f"{arguments.run}: is not a run folder")
    seed = yaml.safe_load((arguments.run / "config.yaml").read_text())["em"]["seed"]
    judge = Judge(arguments.run / "observations", seed, seed)
    start = from_pretrained(arguments.run / "start")
    first = judge.score(start)
    columns = {"start": judge.posterior(start)}
    columns["diffem"] = judge.posterior(from_pretrained(arguments.run / "posterior"), first)
    columns["diffem"] |= judge.prior(from_pretrained(arguments.run / "prior"))
    if arguments.bound:
        columns["clean bound"] = judge.posterior(from_pretrained(arguments.bound / "posterior"), first)
    command = f"diffem train {arguments.run.name}; python benchmarks/judge.py"
    text = json.dumps({"command": command, **cost(arguments.run), "columns": columns}, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
