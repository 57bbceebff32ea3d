"""The documentation's code runs as it is printed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import house
import numpy as np
import pandas as pd
import torch

import diffem
from diffem import samplers, tables
from diffem.config import load_config
from diffem.corruptions import REGISTRY, Corruption

ROOT = Path(__file__).parents[1]
SMALL = [
    ("em.iterations", "1"),
    ("em.guard", "false"),
    ("m_step.steps", "3"),
    ("m_step.first_steps", "3"),
    ("prior.steps", "3"),
    ("prior.sampler_steps", "3"),
    ("sampler.steps", "3"),
    ("start.ranks", "[2]"),
    ("start.components", "[1]"),
]


def blocks(section: str) -> list[str]:
    """The code of a section of the page."""
    text = (ROOT / "docs" / "your-own.md").read_text()
    part = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", part, re.DOTALL)


def digits(corruption: diffem.Corruption) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    generator = torch.Generator().manual_seed(0)
    y, params = corruption.observe(16 * torch.rand(80, 1, 8, 8, generator=generator), generator)
    return y.numpy(), {k: v.numpy() for k, v in params.items()}


def masked() -> diffem.Observations:
    corruption = diffem.RandomMask(0.5, 0.08)
    y, params = digits(corruption)
    return diffem.Observations(y, corruption, params, range=(0, 16))


def draws(posterior: diffem.Posterior, observations: diffem.Observations) -> torch.Tensor:
    return posterior.sample(*observations.batch(range(5)), n=2, generator=torch.Generator().manual_seed(1))


def test_a_corruption(tmp_path):
    names: dict = {}
    code, use = blocks("A corruption")
    exec(code, names)
    y, _ = digits(names["corruption"])
    assert y.max() == 12
    names |= {"y": y, "config": load_config("demo", SMALL), "out": str(tmp_path / "run")}
    exec(use, names)
    assert draws(names["posterior"], names["observations"]).shape == (2, 5, 1, 8, 8)
    exec(use, names)  # a finished run does nothing


def test_a_network(tmp_path):
    names: dict = {"diffem": diffem}
    code, use = blocks("A network")
    exec(code, names)
    names |= {"observations": masked(), "config": load_config("demo", SMALL), "out": str(tmp_path / "run")}
    exec(use, names)
    assert type(names["posterior"].sampler.denoiser.network.module).__name__ == "Small"
    assert draws(names["posterior"], names["observations"]).isfinite().all()
    exec(use, names)


def test_a_sampler(tmp_path, monkeypatch):
    monkeypatch.setattr(samplers, "SAMPLERS", dict(samplers.SAMPLERS))
    names: dict = {"diffem": diffem}
    code, use = blocks("A sampler")
    exec(code, names)
    exec(use, names)
    assert names["config"].sampler.kind == "clipped"
    config, out = load_config("demo", [*SMALL, ("sampler.kind", "clipped")]), str(tmp_path / "run")
    observations = masked()
    for _ in range(2):
        assert [row["iteration"] for row in diffem.DiffEM(config, observations, out).iterate()] == [0, 1, 2]
    posterior = diffem.from_pretrained(f"{out}/prior")
    assert type(posterior.sampler) is names["Clipped"]
    x = posterior.sample_prior(5)
    assert (x.min(), x.max()) >= (0, 0)
    assert x.max() <= 16


def test_a_hook(tmp_path):
    names: dict = {"diffem": diffem}
    code, use = blocks("A hook")
    exec(code, names)
    names |= {"observations": masked(), "config": load_config("demo", SMALL), "out": str(tmp_path / "run")}
    exec(use, names)
    assert all(0 < row["brightness"] < 16 for row in names["rows"])


def test_tables(monkeypatch):
    monkeypatch.setattr(tables, "load_config", lambda name, given: load_config(name, {**given, **dict(SMALL)}))
    rng = np.random.default_rng(0)
    height, visits = rng.normal(170, 10, 40), rng.integers(0, 5, 40).astype(float)
    table = pd.DataFrame({"height": height, "visits": visits, "town": ["Ulm", "Bonn"] * 20}).mask(
        rng.random((40, 3)) < 0.2
    )
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tables.md").read_text(), re.DOTALL)
    names: dict = {"table": table}
    exec(first, names)
    exec(second, names)
    assert not names["filled"].isna().any().any()
    assert len(set(names["means"])) == 20


def test_the_shelf_is_open(tmp_path, monkeypatch):
    monkeypatch.setitem(REGISTRY, "Saturation", Corruption)  # so that it is not known to the tests that follow
    code = blocks("A corruption")[0].replace("class Saturation", "@diffem.register_corruption\nclass Saturation")
    names: dict = {}
    exec(code, names)
    np.save(tmp_path / "y.npy", digits(names["corruption"])[0])
    (tmp_path / "corruption.yaml").write_text("name: Saturation\nlevel: 12\nnoise: 0.5\nrange: [0, 16]\n")
    assert type(diffem.Observations.load(tmp_path).corruption) is names["Saturation"]


def test_the_page_of_public_names_is_that_of_today():
    page = house.api()
    assert (ROOT / "docs" / "api.md").read_text() == page  # python tests/house.py --api > docs/api.md
    for name in diffem.__all__:
        assert f"| `{name}` | " in page
    assert "| |" not in page.replace("| | |", "")  # each has a sentence
    assert not [line for line in page.splitlines() if line.endswith("|  |")]


def test_the_page_of_corruptions_lists_each_as_it_is():
    lines = (ROOT / "docs" / "corruptions.md").read_text().splitlines()
    table = {
        line.split("|")[1].strip(" `"): line.split("|")
        for line in lines
        if line.startswith("| `") and line.count("|") == 7
    }
    shelf = {name: kind for name, kind in REGISTRY.items() if kind.__module__.startswith("diffem.corruptions")}
    assert set(table) == set(shelf)
    for name, kind in shelf.items():
        arguments = ", ".join(f"`{k}`" for k in inspect.signature(kind).parameters)
        assert set(table[name][3].strip().split(", ")) == set(arguments.split(", ")), name
        for file in (f"{k}.npy" for k in kind.parameters or () if k != "noise"):
            assert file in table[name][4], name
        assert (table[name][6].strip() == "yes") == (kind.thin is not Corruption.thin), name
