"""Files of strangers: each is refused in one line that names it, or read as plain data; nothing in it is run, nothing outside of
its folder is written, and it takes no more memory than :data:`MOST`."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import test_em
import torch
from safetensors.torch import load_file, save_file

from diffem import files, tensors
from diffem.cli import main
from diffem.data.readers.exporting import Export
from diffem.errors import DiffemError
from diffem.posterior import from_pretrained
from diffem.run import Run

MOST = 256 * 2**20  # bytes by which the memory of the process may grow
TRACE = "diffem_hostile_was_here"  # the name of the file that code in a hostile file would make


class Evil:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {TRACE}",)


@pytest.fixture(scope="module")
def model_run(tmp_path_factory) -> Path:
    """A finished run, with the observations in its folder."""
    out = tmp_path_factory.mktemp("hostile") / "run"
    test_em.train(out, em={"iterations": 1}, prior={"steps": 2})
    test_em.observations().save(out / "observations")
    return out


@pytest.fixture
def here(model_run, tmp_path, monkeypatch) -> Path:
    """An empty folder with a copy of the run, and of its observations, to be made hostile."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_run, "run")
    shutil.copytree("run/observations", "obs")
    return tmp_path


def everything(folder: Path) -> dict[str, bytes | str]:
    """All files, and where links lead."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in folder.rglob("*")
        if p.is_symlink() or p.is_file()
    }


def refused(capsys, *argv: str, names: str = "", changes: bool = False) -> str:
    """The line by which a command refuses; it names a file, and nothing else has happened."""
    folder = Path.cwd()
    before, peak = everything(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = main(argv)
    out, line = capsys.readouterr()
    assert status == 2, out
    assert line.count("\n") == 1, line
    assert line[:-1].isprintable(), line
    assert len(line) < 1500, line
    assert names in line, line
    assert changes or everything(folder) == before
    assert not Path(TRACE).exists()
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) < MOST
    return line


# --- model.safetensors ---------------------------------------------------------------------------------


def forged(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list, start: int, stop: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


FORGED = {
    "nothing": b"",
    "eight bytes": b"\0" * 8,
    "a header of 2^63 bytes": forged({}, length=2**63),
    "a header longer than the file": forged({}, length=2**20),
    "a header that is no JSON": forged(b"{"),
    "a header that is a list": forged([1]),
    "a header nested a million deep": forged(b"[" * 10**6),
    "offsets beyond the end": forged({"a": tensor([2**40], 0, 2**42)}),
    "offsets that overlap": forged({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, b"\0" * 12),
    "offsets with a hole": forged({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, b"\0" * 12),
    "offsets that go back": forged({"a": tensor([1], 8, 4)}, b"\0" * 8),
    "a shape that overflows": forged({"a": tensor([2**33, 2**33], 0, 8)}, b"\0" * 8),
    "a negative shape": forged({"a": tensor([-1, -4], 0, 16)}, b"\0" * 16),
    "a shape of fractions": forged({"a": tensor([1.5], 0, 6)}, b"\0" * 6),
    "a dtype that is none": forged({"a": tensor([1], 0, 8, "OBJECT")}, b"\0" * 8),
    "no values in a shape of 2^62": forged({"a": tensor([2**31, 0, 2**31], 0, 0)}),
    "other tensors": forged({"a": tensor([1], 0, 4)}, b"\0" * 4),
    "a pickle": pickle.dumps(Evil()),
    "HTML": b"<html><script>alert(1)</script>",
}


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED)
def test_forged_weights(content, here, capsys):
    (here / "run" / "prior" / "model.safetensors").write_bytes(content)
    refused(capsys, "sample", "run", "--out", "new.npy", names="run/prior")


def test_weights_that_torch_pickled(here, capsys):
    torch.save({"a": Evil()}, here / "run" / "prior" / "model.safetensors")
    refused(capsys, "sample", "run", "--out", "new.npy", names="run/prior/model.safetensors: is damaged: ")


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], None]:
    def apply(weights: dict) -> None:
        name = next(k for k in weights if k.endswith("weight"))
        weights[name] = change(weights[name])

    return apply


WEIGHTS = {
    "NaN": changed(lambda v: v * torch.nan),
    "infinite": changed(lambda v: v + torch.inf),
    "float64": changed(lambda v: v.double()),
    "float16": changed(lambda v: v.half()),
    "int64": changed(lambda v: v.long()),
    "complex": changed(lambda v: v.to(torch.complex64)),
    "eight bits": changed(lambda v: v.to(torch.float8_e4m3fn)),
    "transposed": changed(lambda v: v.T.contiguous()[:, :1]),
    "a mixture of whole numbers": lambda weights: weights.update(
        {k: v.long() for k, v in weights.items() if "reference" in k}
    ),
    "a mixture of nothing": lambda weights: weights.update({k: v[:0] for k, v in weights.items() if "reference" in k}),
    "one more": lambda weights: weights.update(more=torch.ones(3)),
    "one less": lambda weights: weights.pop(next(iter(weights))),
    "an example that is none": lambda weights: weights.update({"example.os": torch.ones(3)}),
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_do_not_fit(change, here, capsys):
    file = here / "run" / "posterior" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, file)
    refused(capsys, "reconstruct", "run", "--observations", "obs", "--out", "rec", names="run/posterior")


# --- config.json -----------------------------------------------------------------------------------------

CONFIGS: dict[str, dict] = {
    "the name of code": {"corruption": {"name": "BlackBox", "function": "os:system"}, "kind": "os.system"},
    "a corruption of code": {"corruption": {"name": "os.system", "rate": 0.5}},
    "a corruption that is a list": {"corruption": ["RandomMask", 0.5]},
    "a corruption of a corruption": {"corruption": {"name": "Compose", "chain": [{"name": {"name": "Blur"}}]}},
    "a rate beyond one": {"corruption": {"name": "RandomMask", "rate": 1e300}},
    "a huge blur": {"corruption": {"name": "GaussianBlur", "std": 1e12, "noise": 0.1}},
    "a huge shape": {"shape": [10**9, 10**9, 10**9]},
    "a shape that overflows": {"shape": [10**30]},
    "a negative shape": {"shape": [-1, -4, -4]},
    "a shape of text": {"shape": "444"},
    "a deep shape": {"shape": [[[4]]]},
    "units of nothing": {"scaling": [0.0, 0.0]},
    "units that are not finite": {"scaling": [float("nan"), float("inf")]},
    "units of text": {"scaling": ["a", "b"]},
    "units of nothing at all": {"scaling": [[[]], 1.0]},
    "units of another shape": {"scaling": [[0.0] * 8, 1.0]},
    "units beyond single precision": {"scaling": [1e308, 1.0]},
    "a noise level without end": {"denoiser": {"sigma_max": 1e308}},
    "a network of 5,000 levels": {"network": {"channels": [1] * 5000, "blocks": [1] * 5000}},
    "tomography from everywhere": {"corruption": {"name": "Radon", "angles": 100_000, "noise": 0.1}},
    "complex by a number": {"item_layout": ["NCHW", -1]},
    "scores that are none": {"scores": [1]},
    "a score of text": {"scores": {"score_name": "crps", "score": "0"}},
    "a score too many": {"scores": {"score_name": "crps", "score": 0.1, "more": 1.0}},
    "a score without end": {"scores": {"score_name": "crps", "score": 10**400}},
    "a network of 2^40": {"network": {"width": 2**40}},
    "a network of lists": {"network": {"channels": [[1], {}]}},
    "a network that is a function": {"network": "os.system"},
    "a sampler of 10^9 steps": {"sampler": {"steps": 10**9}},
    "a layout of code": {"layout": ["os.system", "N"], "item_layout": {"axes": "x"}},
    "control characters": {"kind": "\x1b[2J\x1b]0;owned\x07\n\r", "version": "\u202e\x1b[31m"},
    "a long text": {"kind": "x" * 10**6},
}


def merged(config: dict, change: dict) -> dict:
    both = lambda k, v: isinstance(v, dict) and isinstance(config.get(k), dict) and k != "corruption"  # noqa: E731
    return {**config, **{k: {**config[k], **v} if both(k, v) else v for k, v in change.items()}}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_configurations_of_models(change, here, capsys):
    file = here / "run" / "posterior" / "config.json"
    file.write_text(json.dumps(merged(json.loads(file.read_text()), change)))
    refused(capsys, "reconstruct", "run", "--observations", "obs", "--out", "rec", names="run/posterior: ")


JSON = {
    "deep": b"[" * 10**6,
    "a long number": b'{"kind": ' + b"9" * 10**5 + b"}",
    "UTF-16": b"\xff\xfe{\0}\0",
    "NUL": b"\0",
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("run/posterior/config.json", "reconstruct run --observations obs --out rec"),
        ("run/posterior/model.safetensors", "reconstruct run --observations obs --out rec"),
        ("run/config.yaml", "reconstruct run --observations obs --out rec"),
        ("run/checkpoint.safetensors", "status run"),
        ("run/metrics.jsonl", "status run"),
        ("run/metrics.jsonl", "report run"),
        ("run/run.json", "status run"),
        ("obs/corruption.yaml", "check obs"),
    ],
)
def test_what_is_no_regular_file(name, command, kind, here, capsys):
    """A pipe would be read for ever, and a device may be."""
    (here / name).unlink()
    if kind == "pipe":
        os.mkfifo(here / name)
    elif kind == "device":
        (here / name).symlink_to("/dev/zero")
    else:
        (here / name).mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(command.split()) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert Path(name).name in line
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("progress.json", "[1]"),
        ("progress.json", "[" * 10**6),
        ("run.json", "[]"),
        ("metrics.jsonl", '{"iteration": 1, "score": 0.5}'),
        ("metrics.jsonl", '{"iteration": 1, "score": "x", "best": true, "loss": 1}'),
        ("checkpoint.safetensors", forged({"__metadata__": {"diffem": "[]"}})),
        ("checkpoint.safetensors", forged({"__metadata__": {"diffem": "[" * 10**6}})),
        ("checkpoint.safetensors", forged({"__metadata__": {"diffem": '{"seconds": "a"}'}})),
    ],
)
def test_status_of_a_damaged_run(name, content, here, capsys):
    (here / "run" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    status = main(["status", "run"])
    out, line = capsys.readouterr()
    if name == "progress.json":  # it is not needed
        assert (status, line) == (0, "")
    else:
        assert (status, out, line.count("\n")) == (2, "", 1)
        assert name in line


@pytest.mark.parametrize("content", JSON.values(), ids=JSON)
def test_configurations_that_are_no_json(content, here, capsys):
    (here / "run" / "prior" / "config.json").write_bytes(content)
    refused(capsys, "sample", "run", "--out", "new.npy", names="run/prior: ")


@pytest.mark.parametrize("trained_on", [{}, [], "x", {"observations": [1], "seed": {}}])
def test_a_start_that_was_trained_on_nothing(trained_on, here, capsys):
    file = here / "run" / "posterior" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trained_on": trained_on}))
    argv = ["--observations", "obs", "--out", "new", "--start.kind", "run", "--start.run", "run", "--force"]
    refused(capsys, "train", *argv, names="run")


# --- arrays ----------------------------------------------------------------------------------------------


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = (header + "\n").encode("latin1")
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def described(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


def pickled() -> bytes:
    return npy(described("(60, 1)", "'|O'"), pickle.dumps(np.array([Evil()], dtype=object)))


ARRAYS = {
    "a pickle": pickle.dumps(Evil()),
    "pickled objects": pickled(),
    "a shape of 2^60": npy(described(f"({2**58}, 4)"), b"\0" * 64),
    "a shape that overflows": npy(described(f"({2**62}, {2**62})"), b"\0" * 64),
    "a shape beyond all numbers": npy(described(f"({10**30},)"), b"\0" * 64),
    "a negative shape": npy(described("(-4, -4)"), b"\0" * 64),
    "a shape of text": npy(described("('a',)"), b"\0" * 64),
    "a header of code": npy(f"__import__('os').system('touch {TRACE}')", b"\0" * 64),
    "a deep header": npy("(" * 9000, b"\0" * 64),
    "a long header": npy(described("(60,)") + " " * 10**6, b"\0" * 64, version=2),
    "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "a version to come": npy(described("(60,)"), b"\0" * 240, version=9),
    "less than it says": npy(described("(60, 1, 4, 4)"), b"\0" * 64),
    "text": npy(described("(60, 4)", "'<U4'"), b"\0" * 3840),
    "dates": npy(described("(60, 4)", "'<M8[s]'"), b"\0" * 1920),
    "records": npy(described("(60, 4)", "[('a', '<f4'), ('b', '|O')]"), b"\0" * 2880),
    "nothing of much": npy(described(f"(0, {2**40})")),
    "an archive": b"PK\x03\x04" + b"\0" * 64,
    "nothing": b"",
}


@pytest.mark.parametrize("name", ["y.npy", "mask.npy", "held_out.npy"])
@pytest.mark.parametrize("content", ARRAYS.values(), ids=ARRAYS)
def test_arrays(content, name, here, capsys):
    (here / "obs" / name).write_bytes(content)
    refused(capsys, "check", "obs", names=name.removesuffix(".npy") if name != "held_out.npy" else "held_out.npy")


@pytest.mark.parametrize(
    "content", [pickled(), npy(described("(60, 1, 4, 5)"), b"\0" * 4800)], ids=["objects", "shape"]
)
def test_clean_items_and_reconstructions(content, here, capsys):
    (here / "clean.npy").write_bytes(content)
    refused(capsys, "evaluate", "run", "--reference", "clean.npy", names="clean.npy")
    np.save("right.npy", np.zeros((60, 1, 4, 4), "f"))
    (here / "run" / "reconstructions.npy").write_bytes(content)
    refused(capsys, "evaluate", "run", "--reference", "right.npy")


def bomb(file: Path, name: str, size: int) -> None:
    """An archive of little size that holds an array of much."""
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open(name, "w") as stream,
    ):
        stream.write(npy(described(f"({size // 64}, 16)")))
        for _ in range(size // 2**22):
            stream.write(b"\0" * 2**22)


def test_an_archive_that_bursts(here, capsys):
    bomb(here / "run" / "pictures.npz", "mean.npy", 2**29)
    assert (here / "run" / "pictures.npz").stat().st_size < 2**20
    refused(capsys, "report", "run", names="run/pictures.npz: declares ")


@pytest.mark.parametrize("name", ["../y.npy", "/y.npy", "y"])
def test_an_archive_with_other_names_and_objects(name, here, capsys):
    with zipfile.ZipFile("a.npz", "w") as archive:
        archive.writestr(name, pickled())
    refused(capsys, "import", "a.npz", "--out", "new", names="a.npz")
    shutil.copy("a.npz", "run/pictures.npz")
    refused(capsys, "report", "run", names="run/pictures.npz")


# --- YAML ------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [1, 1]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 40))
YAML = {
    "a call": f"name: RandomMask\nrate: !!python/object/apply:os.system ['touch {TRACE}']\n",
    "an object": "name: !!python/object/new:os.system [x]\n",
    "a name": "name: !!python/name:os.system\n",
    "a module": "name: !!python/module:antigravity\n",
    "a black box": "name: BlackBox\nfunction: os:system\n",
    "a class": "name: os.system\n",
    "a name that is a list": "name: [RandomMask]\n",
    "a billion laughs": f"{LAUGHS}name: RandomMask\nrate: *a39\n",
    "a billion laughs and an error": f"name: RandomMask\nrate: 0.5\n{LAUGHS}".replace("a39: ", "noise: "),
    "a circle": "name: &a [*a]\n",
    "a merge": "base: &b {rate: 0.5}\nname: RandomMask\n<<: *b\n",
    "deep lists": "rate: " + "[" * 10**5,
    "deep maps": "\n".join(" " * k + "a:" for k in range(1000)),
    "two megabytes": "name: RandomMask\nrate: 0.5\n" + "# \n" * 700_000,
    "a date that is none": "name: RandomMask\nrate: 2001-99-99\n",
    "a long number": "name: RandomMask\nrate: " + "9" * 10**5,
    "a number of 10^400": "name: RandomMask\nrate: 0.5\nnoise: 1" + "0" * 400,
    "a bool that is none": "name: RandomMask\nrate: !!bool maybe\n",
    "an int that is none": "name: RandomMask\nrate: !!int ''\n",
    "a time that is none": "name: RandomMask\nrate: !!timestamp x\n",
    "a key that is a list": "? [a]\n: b\n",
    "a key that is a number": "name: RandomMask\nrate: 0.5\n3: 4\n",
    "a chain of code": "name: Compose\nchain: [{name: BlackBox, function: os:system}]\n",
    "a chain of a chain": "name: Compose\nchain: " + "[{name: Compose, chain: " * 40 + "[]" + "}]" * 40,
    "a chain of numbers": "name: Compose\nchain: [1, 2]\n",
    "noise of NaN": "name: RandomMask\nrate: 0.5\nnoise: .nan\n",
    "noise of infinity": "name: RandomMask\nrate: 0.5\nnoise: .inf\n",
    "a range of NaN": "name: RandomMask\nrate: 0.5\nrange: [.nan, .nan]\n",
    "a range of infinity": "name: RandomMask\nrate: 0.5\nrange: [-.inf, .inf]\n",
    "a range of dates": "name: RandomMask\nrate: 0.5\nrange: [2001-01-01, 2002-01-01]\n",
    "a shape of text": "name: RandomMask\nrate: 0.5\nshape: abc\n",
    "a shape of 10^18": "name: RandomMask\nrate: 0.5\nshape: [1000000, 1000000, 1000000]\n",
    "a shape of maps": "name: RandomMask\nrate: 0.5\nshape: {a: 1}\n",
    "a negative shape": "name: RandomMask\nrate: 0.5\nshape: [-1, 4, 4]\n",
    "a shape of infinity": "name: RandomMask\nrate: 0.5\nshape: [.inf, 4, 4]\n",
    "a patch of 10^18": "name: RandomMask\nrate: 0.5\npatch: 1000000000000000000\n",
    "a patch of text": "name: RandomMask\nrate: 0.5\npatch: abc\n",
    "a patch of nothing": "name: RandomMask\nrate: 0.5\npatch: 0\n",
    "axes of code": "name: RandomMask\nrate: 0.5\naxes: [os.system]\n",
    "axes of much": "name: RandomMask\nrate: 0.5\naxes: " + "N" * 10**5,
    "a huge blur": "name: GaussianBlur\nstd: 1.0e+12\nnoise: 0.1\n",
    "a blur of infinity": "name: GaussianBlur\nstd: .inf\nnoise: 0.1\n",
    "a reduction of 10^18": "name: Downsample\nfactor: 1000000000000000000\nnoise: 0.1\n",
    "a reduction of a fraction": "name: Downsample\nfactor: 1.5\nnoise: 0.1\n",
    "NUL": "name: \0",
    "control characters": 'name: "\\e[2J\\e]0;owned\\a"\n',
    "other letters": "name: \u202eksaMmodnaR\n",
    "a number": "3\n",
    "nothing but a comment": "# name: RandomMask\n",
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_corruptions(text, here, capsys):
    (here / "obs" / "mask.npy").unlink()
    (here / "obs" / "corruption.yaml").write_text(text)
    refused(capsys, "check", "obs", names="obs")


@pytest.mark.parametrize("name", ["a call", "a billion laughs", "deep lists", "two megabytes", "a circle"])
def test_presets_and_settings_of_runs(name, here, capsys):
    (here / "mine.yaml").write_text(YAML[name])
    refused(capsys, "train", "mine.yaml", "--observations", "obs", "--out", "new", names="mine.yaml: ")
    (here / "run" / "config.yaml").write_text(YAML[name])
    refused(capsys, "diagnose", "run", names="run/config.yaml: ")
    refused(capsys, "evaluate", "run", "--reference", "obs/y.npy", names="run/config.yaml: ")


def test_a_setting_on_the_command_line(here, capsys):
    call = f"!!python/object/apply:os.system ['touch {TRACE}']"
    refused(capsys, "train", "--observations", "obs", "--out", "new", "--em.seed", call, names="--em.seed: is not YAML")


# --- the folder of a run -----------------------------------------------------------------------------------

SCRIPT = "<script>alert(1)</script>"


def texts_of_strangers(run: Path) -> None:
    """Scripts in every text that a report shows."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"score_name": SCRIPT + "$\\frac{", "clean": {SCRIPT: 1.0}, "accepted": SCRIPT, "width": SCRIPT}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "start.json").write_text(json.dumps({"kind": SCRIPT, "components": SCRIPT, "rank": SCRIPT}))
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + f"# {SCRIPT}\n")
    collapse = {SCRIPT: {"value": 1.0, "error": 0.1, "warning": SCRIPT, "healthy": 1.0, "meaning": SCRIPT}}
    found = {"iteration": rows[-1]["final"], "warnings": [SCRIPT], "collapse": collapse}
    (run / "diagnostics.json").write_text(json.dumps(found))


def test_a_report_shows_scripts_as_text(here, capsys):
    (here / "run").rename(here / SCRIPT.replace("/", "|"))
    run = here / SCRIPT.replace("/", "|")
    texts_of_strangers(run)
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


DIAGNOSTICS = [
    '{"warnings": 3}',
    '{"warnings": [], "collapse": 3}',
    '{"warnings": [], "collapse": {"a": {}}}',
    '{"warnings": [], "divergence": {"a": {}}}',
    '{"warnings": [], "divergence": [1]}',
    '{"warnings": [], "coverage": {"ranks": "x"}}',
    '{"warnings": [], "coverage": {"ranks": [1e308, null]}}',
    '{"warnings": [], "self_consistency": {}}',
    "[" * 10**5,
]


@pytest.mark.parametrize("text", DIAGNOSTICS)
def test_diagnostics(text, here, capsys):
    last = json.loads((here / "run" / "metrics.jsonl").read_text().splitlines()[-1])["final"]
    (here / "run" / "diagnostics.json").write_text(text.replace("{", f'{{"iteration": {last}, ', 1))
    refused(capsys, "report", "run", names="run/diagnostics.json: ")


@pytest.mark.parametrize("name", ["start.json", "prior.json"])
@pytest.mark.parametrize("text", ["[1]", "[" * 10**5, "\0", '{"components": [1, 2], "seconds": "x"}'])
def test_notes_of_a_run(name, text, here, capsys):
    (here / "run" / name).write_text(text)
    if name == "start.json" and text.startswith("{"):
        assert main(["report", "run"]) == 0  # shown as it is
        return
    refused(capsys, "report", "run", names=f"run/{name}: ")


METRICS = [
    "[1]",
    "{" * 10**5,
    '{"iteration": true}',
    '{"iteration": "1", "score": 1}',
    "9" * 10**5,
    '{"score": 1}',
    "\0",
]


@pytest.mark.parametrize("text", METRICS)
def test_metrics(text, here, capsys):
    file = here / "run" / "metrics.jsonl"
    file.write_text(text + "\n" + file.read_text())
    refused(capsys, "report", "run", names="run/metrics.jsonl: line 1 ")
    refused(capsys, "diagnose", "run", names="run/metrics.jsonl: line 1 ")


CHECKPOINTS: dict[str, Callable[[dict, dict], object]] = {
    "a step of code": lambda weights, state: state.update(step="__class__"),
    "a batch of 10^18": lambda weights, state: state.update(batch=10**18),
    "a batch of text": lambda weights, state: state.update(batch="os.system"),
    "rows of nothing": lambda weights, state: state.update(rows=[]),
    "rows of numbers": lambda weights, state: state.update(rows=[1, 2]),
    "a final model that is none": lambda weights, state: state.update(final={"a": 1}, step="judge"),
    "updates of text": lambda weights, state: state.update(updates="many"),
    "weights of another shape": lambda weights, state: weights.update({k: v[None] for k, v in weights.items()}),
    "a state that is a list": lambda weights, state: state.clear(),
}


@pytest.mark.parametrize("change", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoints(change, here, capsys):
    file = here / "run" / "checkpoint.safetensors"
    weights, text = tensors.load(file)
    state = {**json.loads(text), "step": "m_step", "final": None}
    change(weights, state)
    tensors.save(file, weights, json.dumps(state or [1]))
    config = here / "mine.yaml"
    settings = (here / "run" / "config.yaml").read_text().partition("facts:")[0]
    config.write_text(settings)
    argv = ["train", "mine.yaml", "--observations", "obs", "--out", "run", "--batch", "16", "--device", "cpu"]
    refused(capsys, *argv, names="run/", changes=True)


# --- source.json ---------------------------------------------------------------------------------------------


@pytest.fixture
def imported(here, capsys) -> Path:
    from PIL import Image

    (here / "images").mkdir()
    for k in range(60):
        Image.fromarray(np.full((4, 4), k, np.uint8)).save(here / "images" / f"{k}.png")
    assert main(["import", "images", "--out", "data", "--name", "GaussianNoise", "--noise", "10"]) == 0
    capsys.readouterr()
    (here / "outside.npy").write_text("mine")
    return here / "data" / "source.json"


def named(name: str) -> Callable[[dict], object]:
    return lambda about: about["files"][0].update(name=name)


SOURCES: dict[str, Callable[[dict], object]] = {
    "an absolute path": named("/tmp/owned.png"),
    "a path upwards": named("../../owned.png"),
    "a path upwards in the middle": named("a/../../owned.png"),
    "a path of Windows": named("..\\owned.png"),
    "a path with NUL": named("a\0b.png"),
    "no path": named(""),
    "a path that is a number": named(3),  # type: ignore[arg-type]
    "a dtype of objects": lambda about: about.update(dtype="O"),
    "a dtype of code": lambda about: about.update(dtype="os.system"),
    "no dtype": lambda about: about.pop("dtype"),
    "a patch of nothing": lambda about: about.update(patch=0),
    "a patch of text": lambda about: about.update(patch="x"),
    "10^12 items": lambda about: about["files"][0].update(items=[[10**12, [1, 4, 4]]]),
    "too few items": lambda about: about["files"].pop(),
    "items that are none": lambda about: about["files"][0].update(items="x"),
    "a list": lambda about: about.clear(),
    "no files": lambda about: about.update(files=None),
    "a family of code": lambda about: about.update(family=["os"], files=[{"name": "x"}]),
}


@pytest.mark.parametrize("change", SOURCES.values(), ids=SOURCES)
def test_sources(change, imported, here, capsys):
    about = json.loads(imported.read_text())
    change(about)
    imported.write_text(json.dumps(about or [1]))
    before = everything(here)
    with pytest.raises(DiffemError, match=r"source\.json") as caught:
        Export("data", "png", (1, 4, 4), (0, 255)).write(np.zeros((60, 1, 4, 4), "f"), here / "out")
    assert "\n" not in str(caught.value)
    assert {k: v for k, v in everything(here).items() if not k.startswith("out/")} == before


@pytest.mark.parametrize("arrays", [["../outside.npy"], ["/etc/passwd"], [".."], ["notes.txt"], 3, [[1]], None])
def test_an_import_removes_only_its_own_arrays(arrays, imported, here, capsys):
    (here / "data" / "notes.txt").write_text("mine")
    imported.write_text(json.dumps({**json.loads(imported.read_text()), "arrays": arrays}))
    status = main(["import", "images", "--out", "data", "--overwrite"])
    err = capsys.readouterr().err
    assert (status, err.count("\n")) in ((0, 0), (2, 1))
    assert (here / "outside.npy").read_text() == (here / "data" / "notes.txt").read_text() == "mine"


# --- links -----------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(here) -> Path:
    (here / "outside").mkdir()
    (here / "outside" / "thesis.txt").write_text("mine")
    return here / "outside" / "thesis.txt"


@pytest.mark.parametrize("name", ["report.html", "diagnostics.json"])
def test_a_file_that_is_a_link_is_replaced_not_written_through(name, outside, here, capsys):
    file = here / "run" / name
    file.unlink(missing_ok=True)
    file.symlink_to(outside)
    assert main(["diagnose", "run", "--observations", "obs"]) == 0
    assert outside.read_text() == "mine"
    assert not file.is_symlink()


def test_a_checkpoint_that_is_a_link_is_replaced(outside, tmp_path):
    file, run = tmp_path / "new" / "checkpoint.safetensors", Run(tmp_path / "new", {})
    file.parent.mkdir()
    file.symlink_to(outside)
    run.save_checkpoint({"a": torch.ones(3)}, {})
    assert outside.read_text() == "mine"
    assert tensors.load(file)[0].keys() == {"a"}


def test_a_temporary_file_that_is_a_link_is_not_written_through(outside, tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "01234567")  # as if it could be guessed
    (tmp_path / ".a.json.01234567.tmp").symlink_to(outside)
    with pytest.raises(FileExistsError):
        files.replace(tmp_path / "a.json", b"theirs")
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("name", ["partial", "posterior", "prior", "start", "run.json"])
def test_a_folder_of_a_run_that_is_a_link(name, outside, here, capsys):
    (here / "new").mkdir()
    (here / "new" / "run.json").write_text('{"run": "diffem"}')
    file = here / "new" / name
    file.unlink(missing_ok=True)
    file.symlink_to(here / "run" / "run.json" if name == "run.json" else outside.parent)
    argv = ["train", "--observations", "obs", "--out", "new", "--force"]
    refused(capsys, *argv, names=f"new/{name}: is a link to ")


@pytest.mark.parametrize("name", ["next", "current"])
def test_an_array_that_is_a_link_is_not_written_through(name, outside, here):
    np.save(here / "outside" / "other.npy", np.zeros((5, 2), "f"))
    before = (here / "outside" / "other.npy").read_bytes()
    (here / "new" / "partial").mkdir(parents=True)
    (here / "new" / f"{name}.npy").symlink_to(here / "outside" / "other.npy")
    (here / "new" / "partial" / f"1-{name}.json").write_text("2")
    (here / "new" / "run.json").write_text("")
    run = Run(here / "new", {})
    array, done = run.growing(name, (5, 2), 1)
    array[:] = 7
    array.flush()
    assert done == 0
    assert (here / "outside" / "other.npy").read_bytes() == before


def test_a_model_behind_links_is_read(here):
    """As caches of models keep them."""
    (here / "cache").mkdir()
    for file in (here / "run" / "posterior").iterdir():
        (here / "cache" / file.name).symlink_to(file)
    assert from_pretrained(here / "cache").shape == (1, 4, 4)


def test_an_import_follows_no_links(imported, outside, here, capsys):
    (here / "images" / "z.png").symlink_to(outside)
    refused(capsys, "import", "images", "--out", "new", names="images/z.png: is a link to ")


# --- names -------------------------------------------------------------------------------------------------------

NAMES = ["a\nb", "\x1b[2J\x1b]0;owned\x07", "\r\n", "\u202egnp", os.fsdecode(b"\xff\xfe"), "\x7f\x9b31m"]


@pytest.mark.skipif(sys.platform != "linux", reason="such names")
@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_in_errors(name, imported, here, capsys):
    refused(capsys, "check", name)
    refused(capsys, "report", name)
    refused(capsys, "train", name)
    folder = here / f"x{name}"
    folder.mkdir()
    refused(capsys, "sample", folder.name, "--out", "new.npy")
    (here / "images" / f"{name}.png").write_bytes(b"no image")
    refused(capsys, "import", "images", "--out", "new")
    (folder / "run.json").mkdir()  # an error of the file system
    refused(capsys, "train", "--observations", "obs", "--out", folder.name, "--force")


def test_names_of_files_in_what_is_said(imported, here, capsys):
    (here / "images" / "\x1b[2Jx\ny.txt").write_text("")
    assert main(["import", "images", "--out", "new"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "left out: \\x1b[2Jx" in out
