"""The command line: the whole way from clean data to a report, and one line for every mistake of the user's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from diffem.cli import main

TINY = [
    "--em.iterations",
    "1",
    "--em.score_draws",
    "2",
    "--m_step.steps",
    "3",
    "--m_step.first_steps",
    "3",
    "--m_step.batch",
    "16",
    "--sampler.steps",
    "3",
    "--start.components",
    "[1]",
    "--start.ranks",
    "[2]",
    "--start.iterations",
    "10",
    "--network.kind",
    "mlp",
    "--network.width",
    "16",
    "--network.depth=1",
    "--network.embedding",
    "16",
]
N, SHAPE = 60, (1, 4, 4)


def clean() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 2)) @ rng.normal(size=(2, 16)) + 0.1 * rng.normal(size=(N, 16))
    return x.reshape(N, *SHAPE).astype(np.float32)


def write(folder: Path, y: np.ndarray, mask: np.ndarray, **config) -> Path:
    folder.mkdir()
    np.save(folder / "y.npy", y)
    np.save(folder / "mask.npy", mask)
    (folder / "corruption.yaml").write_text(
        yaml.safe_dump({"name": "RandomMask", "rate": 0.5, "noise": 0.05, **config})
    )
    return folder


def random_mask() -> np.ndarray:
    return np.random.default_rng(1).random((N, *SHAPE)) > 0.5


def snapshot(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(here: Path, capsys, *argv: str) -> str:
    """The one line that an error prints; nothing on disk has changed."""
    before = snapshot(here)
    capsys.readouterr()
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("diffem: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert snapshot(here) == before
    return err


@pytest.mark.parametrize(
    ("argv", "texts"),
    [
        (["train", "--observations", "nowhere", "--out", "run"], ["nowhere: no such folder"]),
        (["train", "digit", "--out", "run"], ["digit: unknown preset", "did you mean 'digits'?"]),
        (["train", "digits", "--em.iteration", "3"], ["em.iteration: unknown field", "did you mean 'iterations'?"]),
        (["train", "digits", "--mstep.steps", "3"], ["mstep: unknown section", "did you mean 'm_step'?"]),
        (["train", "digits", "--em.iterations", "many"], ["em.iterations: must be of type int, got 'many'"]),
        (["train", "digits", "--em.iterations", "2.5"], ["em.iterations: must be of type int, got 2.5"]),
        (["train", "digits", "--network.channels", "[a]"], ["network.channels: must be of type int, got 'a'"]),
        (["train", "digits", "--em.iterations", "[1"], ["--em.iterations: is not YAML"]),
        (["train", "digits", "--em", "3"], ["em"]),
        (["train", "digits", "--em.iterations"], ["--em.iterations: needs a value"]),
        (["train", "digits", "--em.iterations", "--out", "run"], ["--em.iterations: needs a value"]),
        (["train", "digits", "stray"], ["stray"]),
        (["train", "digits", "--corruption", "no_such_module:f"], ["no_such_module"]),
        (["train", "digits", "--corruption", "math:no_such_function"], ["no_such_function"]),
        (["train", "digits", "--corruption", "nocolon"], ["nocolon"]),
        (["train", "--out", "run"], ["--observations: give a folder"]),
        (["reconstruct", "nowhere", "--observations", "obs", "--out", "rec"], ["nowhere: is not a run folder"]),
        (["sample", "nowhere", "--out", "x.npy"], ["nowhere: is not a run folder"]),
        (["evaluate", "nowhere", "--reference", "x.npy"], ["nowhere: is not a run folder"]),
        (["report", "nowhere"], ["nowhere"]),
        (["corrupt", "digit", "--name", "RandomMask", "--rate", "0.5", "--noise", "0", "--out", "obs2"], ["digit"]),
        (["corrupt", "digits", "--name", "RandomMusk", "--out", "obs2"], ["RandomMusk", "'RandomMask'"]),
        (["sample", "nowhere", "--out", "x.npy", "--m", "3"], ["--m"]),
        (["tarin"], ["tarin"]),
        ([], ["command"]),
    ],
)
def test_mistakes(argv, texts, here, capsys):
    line = refused(here, capsys, *argv)
    assert all(text in line for text in texts), line


@pytest.mark.parametrize("content", ["em: [1", "3", "em: 3", "- em"])
def test_broken_preset_file(content, here, capsys):
    (here / "mine.yaml").write_text(content)
    assert "mine.yaml: " in refused(here, capsys, "train", "mine.yaml", "--out", "run")


def test_unobserved_pixel(here, capsys):
    mask = random_mask()
    mask[:, 0, 2, 1] = False
    write(here / "obs", clean(), mask)
    line = refused(here, capsys, "train", "--observations", "obs", "--out", "run", *TINY)
    assert "obs: mask.npy: no observation shows entry [0, 2, 1], so it cannot be learned; --allow-unobserved" in line
    assert main(["train", "--observations", "obs", "--out", "run", "--allow-unobserved", *TINY]) == 0


def test_mask_of_another_shape(here, capsys):
    write(here / "obs", clean(), random_mask()[:, :, :3])
    line = refused(here, capsys, "train", "--observations", "obs", "--out", "run", *TINY)
    assert "obs: mask.npy: shape (60, 1, 3, 4) does not broadcast against y's (60, 1, 4, 4)" in line


def test_observed_nan(here, capsys):
    y = clean()
    y[7, 0, 1, 1] = np.nan
    mask = random_mask()
    mask[7, 0, 1, 1] = True
    write(here / "obs", y, mask)
    line = refused(here, capsys, "train", "--observations", "obs", "--out", "run", *TINY)
    assert "entry [7, 0, 1, 1] is not finite" in line


def test_corrupt_to_report(here, capsys):
    np.save("clean.npy", clean())
    assert (
        main(
            [
                "corrupt",
                "clean.npy",
                "--name",
                "RandomMask",
                "--rate",
                "0.5",
                "--noise",
                "0.05",
                "--keep-clean",
                "--out",
                "obs",
            ]
        )
        == 0
    )
    assert {p.name for p in (here / "obs").iterdir()} >= {"y.npy", "mask.npy", "corruption.yaml", "clean.npy"}
    assert np.load("obs/y.npy").shape == (N, *SHAPE)

    train = ["train", "--observations", "obs", "--out", "run", *TINY]
    assert main(train) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "iteration   0 start" in out
    assert "iteration   1 " in out
    run = here / "run"
    for name in ("config.yaml", "checkpoint.safetensors", "start.json", "report.html", "reconstructions.npy"):
        assert (run / name).is_file(), name
    for name in ("posterior", "prior", "start"):
        assert (run / name / "model.safetensors").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert np.load(run / "reconstructions.npy").shape == (N, *SHAPE)
    assert main(train) == 0  # again: nothing is left to do
    refused(here, capsys, *train, "--m_step.batch", "17")

    assert main(["reconstruct", "run", "--observations", "obs", "--draws", "3", "--out", "deep"]) == 0
    draws, mean, std = (np.load(here / "deep" / f"{name}.npy") for name in ("draws", "mean", "std"))
    assert draws.shape == (N, 3, *SHAPE)
    np.testing.assert_allclose(draws.mean(1), mean, atol=1e-5)
    np.testing.assert_allclose(draws.std(1, ddof=1), std, atol=1e-5)
    assert std.max() > 0
    assert not (here / "deep.tmp").exists()

    assert main(["sample", "run", "--n", "5", "--seed", "1", "--out", "samples.npy"]) == 0
    assert main(["sample", "run", "--n", "7", "--seed", "1", "--out", "more.npy"]) == 0
    samples = np.load("samples.npy")
    assert samples.shape == (5, *SHAPE)
    np.testing.assert_allclose(samples, np.load("more.npy")[:5], atol=1e-5)

    capsys.readouterr()
    assert main(["evaluate", "run", "--reference", "clean.npy", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["items"] == N
    assert result["psnr"] > 5
    assert np.isfinite(result["energy_distance"])

    (run / "report.html").unlink()
    assert main(["report", "run"]) == 0
    assert "<html" in (run / "report.html").read_text()

    np.save("other.npy", clean()[:5])
    assert "other.npy: shape (5, 1, 4, 4)" in refused(here, capsys, "evaluate", "run", "--reference", "other.npy")
    write(here / "wide", np.zeros((4, 1, 4, 5), np.float32), np.ones((4, 1, 4, 5), bool))
    for command in (
        "reconstruct run --observations wide --out rec",
        "reconstruct run --observations obs --draws 0 --out rec",
    ):
        refused(here, capsys, *command.split())


def test_black_box(here, capsys, monkeypatch):
    (here / "my_box.py").write_text("def clip(x):\n    return x.clamp(-1, 1)\n")
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    np.save("clean.npy", clean())
    assert main(["corrupt", "clean.npy", "--corruption", "my_box:clip", "--out", "obs"]) == 0
    train = ["train", "--observations", "obs", "--corruption", "my_box:clip", "--out", "run", *TINY]
    assert main(train) == 0
    assert main(["reconstruct", "run", "--observations", "obs", "--draws", "2", "--out", "rec"]) == 0
    assert np.load("rec/draws.npy").shape == (N, 2, *SHAPE)
