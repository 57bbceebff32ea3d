"""The command line: the whole way from clean data to a report, and one line for every mistake of the user's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

import diffem
from diffem import samplers, seeding, tracking
from diffem.clean.evaluation import as_text
from diffem.cli import main
from diffem.cli.console import ProgressBar
from diffem.corruptions import REGISTRY
from diffem.data import Observations
from diffem.em import DiffEM
from diffem.loop import Progress
from diffem.posterior import from_pretrained
from diffem.report import page
from diffem.watch import status

TINY = [
    "--em.guard",
    "false",
    "--em.iterations",
    "1",
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
    "--prior.steps",
    "3",
    "--prior.sampler_steps",
    "3",
]
N, SHAPE = 60, (1, 4, 4)


def clean(n: int = N) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 2)) @ rng.normal(size=(2, 16)) + 0.1 * rng.normal(size=(n, 16))
    return x.reshape(n, *SHAPE).astype(np.float32)


def write(folder: Path, y: np.ndarray, mask: np.ndarray, **config) -> Path:
    folder.mkdir()
    np.save(folder / "y.npy", y)
    np.save(folder / "mask.npy", mask)
    (folder / "corruption.yaml").write_text(
        yaml.safe_dump({"name": "RandomMask", "rate": 0.5, "noise": 0.05, **config})
    )
    return folder


def random_mask(n: int = N) -> np.ndarray:
    return np.random.default_rng(1).random((n, *SHAPE)) > 0.5


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


def test_a_word_that_is_not_understood_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "y.npy", np.zeros((4, 1, 2, 2)))
    assert main(["train", ".", "--out", "run"]) == 2
    assert capsys.readouterr().err == "diffem: diffem train: .: is a folder of observations: --observations .\n"
    assert main(["train", "--observation", ".", "--out", "run"]) == 2  # no abbreviations
    assert "--observation: unknown option" in capsys.readouterr().err
    assert main(["train", "digits", "--noise", "3"]) == 2  # not em.renoise
    assert capsys.readouterr().err == (
        "diffem: diffem train: --noise: unknown option; settings are written --section.field value\n"
    )
    assert main(["train", "digits", "--checkpoint-minutes", "nan"]) == 2
    assert capsys.readouterr().err == (
        "diffem: diffem train: --checkpoint-minutes: must be a number of minutes >= 0, got nan\n"
    )
    assert main(["reconstruct", "run", "--observations", ".", "--out", "."]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["y.npy"]


@pytest.mark.parametrize(
    ("argv", "texts"),
    [
        (["train", "--observations", "nowhere", "--out", "run"], ["nowhere: no such folder"]),
        (["train", "digit", "--out", "run"], ["digit: unknown preset", "did you mean 'digits'?"]),
        (["train", "digits", "--em.iteration", "3"], ["em.iteration: unknown field", "did you mean 'iterations'?"]),
        (["train", "digits", "--mstep.steps", "3"], ["mstep: unknown section", "did you mean 'm_step'?"]),
        (["train", "digits", "--em.iterations", "many"], ["em.iterations: must be of type int, got 'many'"]),
        (["train", "digits", "--em.iterations", "2.5"], ["em.iterations: must be of type int, got 2.5"]),
        (["train", "digits", "--network.channels", "8,16"], ["network.channels: must be a list, [8,16], got '8,16'"]),
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
        (["diagnose", "nowhere"], ["nowhere: is not a run folder"]),
        (["report", "nowhere"], ["nowhere"]),
        (["corrupt", "digit", "--name", "RandomMask", "--rate", "0.5", "--noise", "0", "--out", "obs2"], ["digit"]),
        (["corrupt", "digits", "--name", "RandomMusk", "--out", "obs2"], ["RandomMusk", "'RandomMask'"]),
        (["sample", "nowhere", "--out", "x.npy", "--m", "3"], ["--m"]),
        (["tarin"], ["tarin"]),
        (["--out"], ["--out: give a command first; diffem --help lists them"]),
        (
            ["train", "digits", "--iterations", "2"],
            ["--iterations: unknown option; did you mean --", "--em.iterations?"],
        ),
        (
            ["train", "digits", "--learning-rate=1"],
            ["--learning-rate: unknown option; did you mean --m_step.learning_rate?"],
        ),
        (["train", "--epochs", "3"], ["--epochs: unknown option;"]),  # 3 would be a preset
        (["train", "digits", "--qqq", "2"], ["--qqq: unknown option; settings are written --section.field value"]),
        (["sample", "nowhere", "--n", "-3", "--out", "x.npy"], ["--n: must be at least 1, got -3"]),
        (["train", "digits", "--batch", "0"], ["--batch: must be at least 1, got 0"]),
    ],
)
def test_invariant_8_an_error_is_one_line_and_changes_nothing(argv, texts, here, capsys):
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

    assert main(["train", "--observations", "obs", "--out", "none", *TINY, "--em.iterations", "0"]) == 0
    assert "this run gives\n" in capsys.readouterr().out  # the start, which is a prior, too

    train = ["train", "--observations", "obs", "--out", "run", *TINY]
    assert main(train) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "iteration   0 start" in out
    assert "iteration   1 " in out
    assert "iteration   1 final " in out
    assert "warning: 3 test observations are too few" in out
    run = here / "run"
    for name in (
        "config.yaml",
        "checkpoint.safetensors",
        "start.json",
        "diagnostics.json",
        "report.html",
        "reconstructions.npy",
    ):
        assert (run / name).is_file(), name
    for name in ("posterior", "prior", "start"):
        assert (run / name / "model.safetensors").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert np.load(run / "reconstructions.npy").shape == (N, *SHAPE)
    assert main(train) == 0  # again: nothing is left to do
    refused(here, capsys, *train, "--m_step.batch", "17")

    assert main(["reconstruct", "run", "--observations", "obs", "--draws", "3", "--out", "deep"]) == 0
    draws, mean, std = (np.load(here / "deep" / f"{name}.npy") for name in ("draws", "mean", "std"))
    assert draws.shape == (N, 3, *SHAPE)
    np.testing.assert_allclose(draws.mean(1), mean, atol=1e-5)
    np.testing.assert_allclose(draws.std(1), std, atol=1e-5)
    assert std.max() > 0
    assert not (here / "deep.tmp").exists()

    assert main(["sample", "run", "--n", "5", "--seed", "1", "--out", "samples.npy"]) == 0
    assert main(["sample", "run", "--n", "7", "--seed", "1", "--out", "more.npy"]) == 0
    samples = np.load("samples.npy")
    assert samples.shape == (5, *SHAPE)
    np.testing.assert_allclose(samples, np.load("more.npy")[:5], atol=1e-5)

    capsys.readouterr()
    assert main(["evaluate", "run", "--reference", "clean.npy", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert list(table) == ["start", "reconstructions", "prior"]  # the observations are where they were
    assert table["reconstructions"]["psnr"] > 5
    assert main(["evaluate", "run", "--reference", "clean.npy", "--observations", "obs", "--json"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert list(more) == ["start", "reconstructions", "prior"]
    assert more["prior"] == table["prior"]
    assert more["reconstructions"] == {**table["reconstructions"], "residual": more["reconstructions"]["residual"]}
    assert main(["evaluate", "run", "--reference", "clean.npy", "--observations", "obs"]) == 0
    assert capsys.readouterr().out == as_text(more) + "\n"

    (run / "report.html").unlink()
    assert main(["report", "run"]) == 0
    assert "<html" in (run / "report.html").read_text()

    np.save("other.npy", clean()[:5])
    assert "other.npy: shape (5, 1, 4, 4)" in refused(here, capsys, "evaluate", "run", "--reference", "other.npy")
    write(here / "wide", np.zeros((4, 1, 4, 3), np.float32), np.ones((4, 1, 4, 3), bool))
    for command in (
        "reconstruct run --observations wide --out rec",
        "reconstruct run --observations obs --draws 0 --out rec",
    ):
        refused(here, capsys, *command.split())


def test_device_precision_and_reference(here, capsys):
    write(here / "obs", clean(), random_mask())
    np.save("clean.npy", clean())
    np.save("other.npy", clean()[:5])
    (here / "text.npy").write_text("no array")
    train = ["train", "--observations", "obs", "--out", "run", *TINY]
    with pytest.raises(RuntimeError) as reason:
        torch.device("gpu9")
    device = f"diffem: --device: gpu9 cannot be used: {' '.join(str(reason.value).splitlines()[0].split())}\n"
    precision = "diffem: --precision: must be auto, float32, bfloat16, got 'half'\n"
    missing = "diffem: --reference: none.npy: no such file; it is a .npy of clean items\n"
    assert refused(here, capsys, *train, "--device", "gpu9") == device
    assert refused(here, capsys, *train, "--precision", "half") == precision
    assert refused(here, capsys, *train, "--reference", "none.npy") == missing
    assert refused(here, capsys, *train, "--reference", "other.npy") == (
        "diffem: reference: shape (5, 1, 4, 4), but the reconstructions have (60, 1, 4, 4)\n"
    )
    assert main([*train, "--device", "cpu", "--precision", "float32", "--reference", "clean.npy"]) == 0
    rows = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    columns = {"psnr", "energy_distance", "precision", "recall", "density", "coverage"}
    assert [row["clean"].keys() for row in rows] == [columns] * 3

    cpu = ["--device", "cpu", "--precision", "float32"]
    assert main(["sample", "run", "--n", "5", "--out", "x.npy", *cpu]) == 0
    prior = from_pretrained("run/prior")
    drawn = samplers.sample_prior(prior.sampler, seeding.item_seeds(0, 0, "prior", range(5)))
    assert np.array_equal(np.load("x.npy"), prior.units.restore(drawn).numpy())
    assert main(["reconstruct", "run", "--observations", "obs", "--draws", "1", "--out", "rec", *cpu]) == 0
    y, params = Observations.load("obs").batch(range(N))
    draws = from_pretrained("run/posterior").sample(y, params, seeds=seeding.item_seeds(0, 0, "user", range(N)))
    assert np.array_equal(np.load("rec/draws.npy")[:, 0], draws[0].numpy())
    for command in (["sample", "run", "--out", "z.npy"], ["reconstruct", "run", "--observations", "obs", "--out", "z"]):
        assert refused(here, capsys, *command, "--device", "gpu9") == device
        assert refused(here, capsys, *command, "--precision", "half") == precision

    assert main(["train", "--observations", "obs", "--out", "half", "--precision", "bfloat16", *TINY]) == 0
    whole, half = (from_pretrained(here / name / "posterior") for name in ("run", "half"))
    pairs = zip(*(posterior.sampler.denoiser.network.parameters() for posterior in (whole, half)), strict=True)
    apart = max((a - b).abs().max().item() for a, b in pairs)
    assert 0 < apart < 0.01


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_reference_that_is_no_array(command, here, capsys):
    write(here / "obs", clean(), random_mask())
    assert main(["train", "--observations", "obs", "--out", "run", *TINY]) == 0
    (here / "text.npy").write_text("no array")
    (here / "empty.npy").write_text("")
    argv = ["train", "--observations", "obs", "--out", "run", *TINY] if command == "train" else ["evaluate", "run"]
    for name in ("text.npy", "empty.npy"):
        line = refused(here, capsys, *argv, "--reference", name)
        assert f"{name}: is not a complete .npy array: " in line


LIMITED = """
import resource, sys
from diffem.cli import main
from diffem.corruptions import REGISTRY
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))  # no file may grow beyond it, as on a full disk
sys.exit(main({argv!r}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
@pytest.mark.parametrize("fails", ["metrics.jsonl", "checkpoint.safetensors", "next.npy"])
def test_full_disk(fails, here, capsys, monkeypatch):
    n = 4000
    write(here / "obs", clean(n), random_mask(n))
    train = ["train", "--observations", "obs", *TINY, "--em.iterations", "2"]
    m_step = DiffEM.steps["m_step"]

    def stop(em):
        if em.state.iteration == 2:
            raise KeyboardInterrupt
        m_step(em)

    assert main([*train, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setitem(DiffEM.steps, "m_step", stop)
        assert main([*train, "--out", "run"]) == 130
    assert capsys.readouterr().err == "diffem: stopped; run the same command to go on\n"

    run = here / "run"
    size = (run / "checkpoint.safetensors").stat().st_size
    limit = {"metrics.jsonl": 100, "checkpoint.safetensors": size - 1, "next.npy": 2 * size}[fails]
    assert 100 < size < 2 * size < (run / "reconstructions.npy").stat().st_size
    before = snapshot(run)
    process = subprocess.run(
        [sys.executable, "-c", LIMITED.format(limit=limit, argv=[*train, "--out", "run"])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2, process.stderr
    after = snapshot(run)
    changed = {name for name in before if before[name] != after.get(name)} - {"progress.json", "report.html"}
    assert changed <= ({"checkpoint.safetensors", "previous.safetensors"} if fails == "next.npy" else set())
    assert process.stderr == f"diffem: run/{fails}: File too large\n"
    assert not [name for name in after if name.endswith(".tmp")]  # they would fill the disk

    assert main([*train, "--out", "run"]) == 0
    for name in ("posterior/model.safetensors", "prior/model.safetensors", "reconstructions.npy"):
        assert (run / name).read_bytes() == (here / "whole" / name).read_bytes(), name
    assert snapshot(run).keys() == snapshot(here / "whole").keys()


def test_black_box(here, capsys, monkeypatch):
    (here / "my_box.py").write_text("def clip(x):\n    return x.clamp(-1, 1)\n")
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    np.save("clean.npy", clean(400))
    assert main(["corrupt", "clean.npy", "--corruption", "my_box:clip", "--out", "obs"]) == 0
    train = ["train", "--observations", "obs", "--corruption", "my_box:clip", "--out", "run", *TINY]
    assert main([*train, "--em.guard", "true"]) == 0
    assert main(["reconstruct", "run", "--observations", "obs", "--draws", "2", "--out", "rec"]) == 0
    assert np.load("rec/draws.npy").shape == (400, 2, *SHAPE)
    found = json.loads((here / "run" / "diagnostics.json").read_text())
    assert found["items"] == 20
    assert set(found["collapse"]) == {"diversity", "outside"}  # nothing beat the start, which has no prior
    assert "coverage" not in found  # it cannot be split
    diagnose = ["diagnose", "run", "--observations", "obs"]
    assert "give it as MODULE:NAME" in refused(here, capsys, *diagnose)
    assert main([*diagnose, "--corruption", "my_box:clip", "--json"]) == 0
    assert {**json.loads(capsys.readouterr().out), "seconds": 0} == {**found, "seconds": 0}


def test_alone_it_prints_its_help(capsys):
    assert main([]) == 0
    assert "usage: diffem" in capsys.readouterr().out


def test_nothing_is_overwritten_unless_it_is_asked_for(here, capsys):
    write(here / "obs", clean() * random_mask(), random_mask())
    assert main(["train", "--observations", "obs", "--out", "run", *TINY]) == 0
    commands = (
        (["reconstruct", "run", "--observations", "obs", "--draws", "2", "--out", "rec"], "rec/draws.npy"),
        (
            ["sample", "run", "--n", "3", "--out", "x.npy"],
            "x.npy",
        ),
    )
    for command, file in commands:
        assert main([*command]) == 0
        said = refused(here, capsys, *command)
        assert said == f"diffem: diffem {command[0]}: --out: {file} is there already; --overwrite replaces it\n"
        before = (here / file).read_bytes()
        assert main([*command, "--seed", "1", "--overwrite"]) == 0
        assert (here / file).read_bytes() != before
    assert not list(here.rglob("*.tmp"))


def test_reconstruct_touches_nothing_beside_its_files(here):
    write(here / "obs", clean() * random_mask(), random_mask())
    assert main(["train", "--observations", "obs", "--out", "run", *TINY]) == 0
    (here / "rec.tmp").mkdir()
    (here / "rec.tmp" / "thesis.tex").write_text("mine")
    for out in ("rec", "."):
        assert main(["reconstruct", "run", "--observations", "obs", "--draws", "2", "--out", out]) == 0
        assert {"draws.npy", "mean.npy", "std.npy"} <= {p.name for p in (here / out).iterdir()}
    assert (here / "rec.tmp" / "thesis.tex").read_text() == "mine"
    assert not list(here.glob(".diffem-*"))


def test_a_reconstruction_that_fails_leaves_nothing(here, monkeypatch):
    write(here / "obs", clean() * random_mask(), random_mask())
    assert main(["train", "--observations", "obs", "--out", "run", *TINY]) == 0

    def fail(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(samplers.DiffusionSampler, "draw", fail)
    monkeypatch.setattr(samplers.MixtureSampler, "draw", fail)
    assert main(["reconstruct", "run", "--observations", "obs", "--out", "rec"]) == 130
    assert not (here / "rec").exists()
    assert not list(here.rglob("*.tmp"))


def started(here: Path, *argv: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "diffem", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=here, env=environment, text=True, **options)


def test_training_goes_on_where_nobody_reads_any_more(here):
    write(here / "obs", clean() * random_mask(), random_mask())
    reader, writer = os.pipe()
    process = started(
        here, "train", "--observations", "obs", "--out", "run", *TINY, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    os.close(reader)  # as `| head -0` does
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    assert (here / "run" / "report.html").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_a_run_save(number, status, here):
    write(here / "obs", clean() * random_mask(), random_mask())
    argv = ["train", "--observations", "obs", "--out", "run", *TINY, "--m_step.first_steps", "100000"]
    process = started(here, *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("iteration   0")
    told, deadline = here / "run" / "progress.json", time.monotonic() + 60
    while not (told.exists() and '"step": "m_step"' in told.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.communicate()[1] == "diffem: stopped, and saved; run the same command to go on\n"
    assert process.returncode == status
    with safe_open(here / "run" / "checkpoint.safetensors", "pt") as stream:
        state = json.loads(stream.metadata()["diffem"])
    assert state["step"] == "m_step"
    assert 0 < state["updates"] < 100000


# --- problems are said before training, and observations of another kind are refused ------------------


def said(here: Path, capsys, *argv: str) -> str:
    return refused(here, capsys, *argv).removeprefix("diffem: ").removesuffix("\n")


def masked(folder: Path, **config) -> Path:
    mask = random_mask()
    write(folder, np.where(mask, clean(), 0).astype(np.float32), mask)
    (folder / "corruption.yaml").write_text(yaml.safe_dump({"name": "Mask", "noise": 0.01, **config}))
    return folder


def test_train_stops_at_a_problem(here, capsys):
    folder = masked(here / "data", noise=50.0)
    train = ["train", "--observations", str(folder), "--out", "run", *TINY]
    line = said(here, capsys, *train)
    assert line.startswith(f"{folder}: noise-too-large: declared noise 50, but ")
    assert line.endswith("; --force goes on all the same")
    assert not (here / "run").exists()
    assert main([*train, "--force"]) == 0


def test_reconstruct_refuses_observations_of_another_kind(here, capsys):
    folder = masked(here / "data", range=[-6, 6])
    assert main(["train", "--observations", str(folder), "--out", "run", *TINY]) == 0
    capsys.readouterr()
    draw = ["reconstruct", "run", "--out", "draws", "--draws", "2", "--overwrite", "--observations"]
    assert said(here, capsys, "reconstruct", "run/posterior", *draw[2:], str(folder)) == (
        "run/posterior: is a saved model; name the run, run"
    )
    assert main([*draw, str(masked(here / "another-rate", name="RandomMask", rate=0.9, range=[-6, 6]))]) == 0
    capsys.readouterr()
    for name, change, text in (
        (
            "noise",
            {"noise": 0.1},
            "noise 0.1 of Mask, but the model was trained for 0.01; train on these, or use observations of that kind",
        ),
        (
            "another",
            {"name": "GaussianNoise"},
            "are of GaussianNoise, but the model was trained for Mask",
        ),
        ("range", {"range": [0, 255]}, "range: [0, 255], but run was trained on [-6.0, 6.0]"),
        (
            "blur",
            {"name": "GaussianBlur", "std": 1.0},
            "mask.npy: GaussianBlur takes noise.npy; `name: Compose` takes it; put other files elsewhere",
        ),
    ):
        other = masked(here / name, **{"range": [-6, 6], **change})
        assert said(here, capsys, *draw, str(other)) == f"{other}: {text}".replace("[0, 255]", "[0.0, 255.0]")


def test_reconstruct_warns_of_values_in_other_units(here, capsys):
    folder = masked(here / "data")
    assert main(["train", "--observations", str(folder), "--out", "run", *TINY]) == 0
    for name, factor in (("same", 1.0), ("smaller", 1 / 255), ("larger", 255.0)):
        other = masked(here / name)
        y = np.load(other / "y.npy")
        np.save(other / "y.npy", (factor * y).astype(y.dtype))
        capsys.readouterr()
        assert main(["reconstruct", "run", "--observations", str(other), "--out", f"to-{name}", "--draws", "2"]) == 0
        out = capsys.readouterr().out
        assert ("; are they in the same units?" in out) == (factor != 1)
        assert (f"warning: {other}: its values are " in out) == (factor != 1)


OWN = '''
import torch
import diffem


class Dim(diffem.Corruption):
    """Half of the light is lost, and noise is added."""

    by_entry = True

    def __init__(self, factor, noise):
        self.factor, self.noise = factor, noise

    def apply(self, x, params, generator):
        return self.factor * x + self.noise * torch.randn(x.shape, generator=generator)

    def initial(self, y, params):
        return y / self.factor
'''


def test_a_class_of_the_users_own(here, capsys, monkeypatch):
    monkeypatch.setitem(REGISTRY, "Dim", diffem.Corruption)  # so that it is not known to the tests that follow
    monkeypatch.setattr(sys, "path", [*sys.path])
    (here / "dimmed.py").write_text(OWN)
    folder = here / "data"
    folder.mkdir()
    np.save(folder / "y.npy", 0.5 * clean())
    (folder / "corruption.yaml").write_text("factor: 0.5\nnoise: 0.1\nrange: [-6, 6]\n")
    own = ["--corruption", "dimmed:Dim"]
    assert main(["train", "--observations", str(folder), "--out", "run", *own, *TINY]) == 0
    assert main(["reconstruct", "run", "--observations", str(folder), "--out", "draws", "--draws", "2", *own]) == 0
    assert np.load(here / "draws" / "mean.npy").shape == clean().shape
    assert main(["sample", "run", "--n", "3", "--out", "new.npy", *own]) == 0
    assert main(["diagnose", "run", "--observations", str(folder), *own]) == 0
    (folder / "corruption.yaml").write_text("factor: 0.5\nnoise: 0.1\ngamma: 2\n")
    assert said(here, capsys, "check", str(folder), *own) == (
        f"{folder}/corruption.yaml: gamma: Dim has no such argument; (known: factor, noise)"
    )


def test_what_stands_beside_a_function_is_said(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (here / "half.py").write_text("def half(x):\n    return x / 2\n")
    folder = here / "data"
    folder.mkdir()
    np.save(folder / "y.npy", clean())
    (folder / "corruption.yaml").write_text("noise: 0.1\n")
    assert said(here, capsys, "check", str(folder), "--corruption", "half:half") == (
        f"{folder}/corruption.yaml: noise: is not used beside --corruption half:half; take it out"
    )


def test_diagnose_finds_the_observations_by_itself(here, capsys):
    folder = masked(here / "data")
    assert main(["train", "--observations", "data", "--out", "run", *TINY]) == 0
    assert main(["diagnose", "run"]) == 0
    folder.rename(here / "elsewhere")
    assert said(here, capsys, "diagnose", "run") == (
        "diffem diagnose: --observations: give the folder of observations that run was trained on"
    )
    assert (
        main(["train", "--observations", "elsewhere", "--out", "run", *TINY]) == 0
    )  # the same ones, and so the same run


def test_sample_makes_the_folder_it_is_told(here):
    masked(here / "data")
    assert main(["train", "--observations", "data", "--out", "run", *TINY]) == 0
    assert main(["sample", "run", "--n", "2", "--out", "new/folder/samples.npy"]) == 0
    assert np.load("new/folder/samples.npy").shape == (2, *SHAPE)


GAIN = "def gained(x, params):\n    return x * params['gain'].reshape(-1, 1, 1, 1)\n"


def test_a_function_with_a_number_for_each_observation(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (here / "gained.py").write_text(GAIN)
    folder, own = here / "data", ["--corruption", "gained:gained"]
    folder.mkdir()
    np.save(folder / "y.npy", clean())
    np.save(folder / "gain.npy", np.linspace(0.5, 1.5, N))
    assert main(["check", str(folder), *own]) == 0
    assert main(["train", "--observations", str(folder), "--out", "run", *own, *TINY, "--em.iterations", "0"]) == 0
    assert "no iteration was asked for: the start is what this run gives, and it has no prior" in (
        capsys.readouterr().out
    )
    assert (
        main(["reconstruct", "run", "--observations", str(folder), "--out", "draws"]) == 0
    )  # what was learned is saved
    assert said(here, capsys, "sample", "run", "--out", "new.npy") == (
        "run: has no prior: it is not finished, or no iteration was better than its start"
    )


def test_every_row_says_how_long_the_run_still_takes_and_the_report_is_written_anew(here, capsys, monkeypatch):
    masked(here / "data")
    written, write_page = [], page.write
    monkeypatch.setattr(page, "write", lambda run: written.append(status(run).finished) or write_page(run))
    train = ["train", "--observations", "data", "--out", "run", *TINY, "--em.iterations", "2"]
    assert main(train) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iteration")]
    assert [bool(re.search(r"\(\d+ s\); about \d+ seconds left$", line)) for line in lines] == [False, True, True, True]
    assert written == [0, 1, 2, 2, 2]  # after the start, the iterations, the final row, and the end
    assert main(train) == 0  # nothing is left to do, so there is no time left
    assert "left" not in capsys.readouterr().out
    assert len(written) == 7
    assert main(["status", "run"]) == 0
    assert capsys.readouterr().out.startswith("finished: 2 iterations\nbest: iteration 2, crps ")


def test_the_bar_says_how_long_the_run_still_takes(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = ProgressBar()
    bar.update(Progress("m_step", 2, 3, 5, 0.25, 150.0))
    assert bar.bar.desc == "iteration 2, m_step: loss 0.250; run: about 2 minutes left"
    bar.update(Progress("m_step", 2, 4, 5, 0.25))
    assert bar.bar.desc == "iteration 2, m_step: loss 0.250"
    assert bar.bar.n == 4
    bar.clear()


def test_track(here, capsys, monkeypatch):
    masked(here / "data")
    train = ["train", "--observations", "data", "--out", "run", *TINY, "--track"]
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert refused(here, capsys, *train, "trackio") == (
        "diffem: trackio is not installed: pip install 'diffem-torch[tracking]'\n"
    )
    assert refused(here, capsys, *train, "wandb") == (
        "diffem: track: unknown tracker 'wandb'; (known: tensorboard, trackio)\n"
    )
    found = []
    monkeypatch.setitem(tracking.TRACKERS, "trackio", lambda folder: lambda em, k, values: found.append((folder, k)))
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: name)
    assert main([*train, "trackio"]) == 0
    assert found == [(Path("run/trackio"), k) for k in range(3)]
