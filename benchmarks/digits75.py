"""The digits with 75 % of the pixels deleted, on a fixed split and with fixed hidden pixels.

    python benchmarks/digits75.py prepare runs/digits75
    diffem train digits --observations runs/digits75 --out runs/digits75-run
    python benchmarks/bound.py digits runs/digits75 runs/digits75-bound
    python benchmarks/digits75.py judge runs/digits75-run --bound runs/digits75-bound --out benchmarks/results/digits75.json

1,400 shuffled digits are for training, 397 are held out. Of the held-out digits, the same 30 % of the observed pixels
are hidden for every model, as in earlier work on these figures. There are 8 draws. `frechet` (of one draw of each
training item) and `accuracy` (of single draws, over all 8) use a classifier trained on the 1,400 clean digits. The
choice of hidden pixels changes the CRPS of 180 digits by 0.01, more than the difference between methods. So absolute
values are comparable on one such set only; differences between methods are comparable on any set.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from judge import classifier, cost
from sklearn.datasets import load_digits

from diffem import seeding
from diffem.clean import metrics
from diffem.corruptions import RandomMask
from diffem.data import Dataset, Observations
from diffem.diagnostics import crps
from diffem.posterior import from_pretrained
from diffem.samplers import draw_many

TRAIN, DRAWS, NOISE = 1400, 8, 0.01  # the noise in model units; data span [-1, 1]


def prepare() -> tuple[torch.Tensor, ...]:
    """Clean digits, labels, observations, masks, and the given pixels of the held-out digits."""
    data = load_digits()
    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(len(data.images), generator=generator)
    clean = (torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1)[order]
    masks, observed = [], []
    for part in (clean[:TRAIN], clean[TRAIN:]):
        mask = torch.rand(part.shape, generator=generator) > 0.75
        masks.append(mask)
        observed.append(mask * (part + NOISE * torch.randn(part.shape, generator=generator)))
    given = masks[1] & (torch.rand(masks[1].shape, generator=generator) > 0.3)
    return clean, torch.tensor(data.target)[order], torch.cat(observed), torch.cat(masks), given


def observations() -> Observations:
    """The observations that `prepare` writes."""
    clean, _labels, y, mask, _given = prepare()
    held_out = np.arange(len(clean)) >= TRAIN
    raw = ((y + 1) * 8).numpy()
    return Observations(raw, RandomMask(0.75, 8 * NOISE), {"mask": mask.numpy()}, (0, 16), held_out=held_out)


def judge(run: Path, bound: Path | None) -> dict:
    clean, labels, y, mask, given = prepare()
    held = np.arange(TRAIN, len(clean))
    model = classifier(clean[:TRAIN], labels[:TRAIN])
    hidden, target = mask[TRAIN:] & ~given, y[TRAIN:]
    observed = observations()
    columns: dict[str, dict] = {}
    first = None
    arms = {"start": run / "start", "diffem": run / "posterior"}
    if bound:
        arms["clean bound"] = bound / "posterior"
    for name, folder in arms.items():
        posterior = from_pretrained(folder)
        seeds = [seeding.item_seeds(0, j, "score", held) for j in range(DRAWS)]
        seen = given * (target + 1) * 8
        draws = torch.cat([posterior.sample(seen, {"mask": given}, seeds=s) for s in seeds]) / 8 - 1
        noise = torch.randn(draws.shape, generator=torch.Generator().manual_seed(0))
        values = (crps(draws + NOISE * noise, target) * hidden).flatten(1).sum(1) / hidden.flatten(1).sum(1).clamp(
            min=1
        )
        spread = (((1 + 1 / DRAWS) * draws.var(0) + NOISE**2) * hidden).sum()
        ratio = spread / ((draws.mean(0) - target).square() * hidden).sum()
        column = {"crps": values.mean(), "crps_se": values.std() / len(values) ** 0.5, "ratio": ratio}
        if first is not None:
            column |= {"delta": (values - first).mean(), "delta_se": (values - first).std() / len(values) ** 0.5}
        first = values if first is None else first
        data = Dataset(observed, posterior.units)
        x = posterior.units.restore(draw_many(posterior.sampler, data, np.arange(TRAIN), 1, 0, "e_step")[0]) / 8 - 1
        with torch.no_grad():
            column["frechet"] = metrics.frechet_distance(model[:-1](x), model[:-1](clean[:TRAIN]))
            right = torch.stack([model(draw).argmax(1) == labels[TRAIN:] for draw in draws]).float().mean(0)
        column["accuracy"], column["accuracy_se"] = right.mean(), right.std() / len(right) ** 0.5
        column["energy_distance"] = metrics.energy_distance(*metrics.apart(x, clean[:TRAIN]))
        column["psnr"] = metrics.psnr(x, clean[:TRAIN], 2.0)
        columns[name] = {k: float(v) for k, v in column.items()}
    command = "diffem train digits --observations runs/digits75; python benchmarks/digits75.py judge"
    return {"command": command, **cost(run), "columns": columns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("prepare", "judge"))
    parser.add_argument("folder", type=Path, help="of the observations to prepare, or of the run")
    parser.add_argument("--bound", type=Path, help="a run of `bound.py`, for `judge`")
    parser.add_argument("--out", type=Path, help="a JSON file; printed otherwise")
    arguments = parser.parse_args()
    if arguments.action == "prepare":
        clean, labels, *_ = prepare()
        observations().save(arguments.folder)
        np.save(arguments.folder / "clean.npy", ((clean + 1) * 8).numpy())
        np.save(arguments.folder / "labels.npy", labels.numpy())
        return
    text = json.dumps(judge(arguments.folder, arguments.bound), indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
