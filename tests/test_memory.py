"""Memory: an E-step takes as much of it for many observations as for few, and what does not fit is said before it is tried."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from diffem import cli, files, memory
from diffem import config as configuration
from diffem import em as em_module
from diffem.corruptions import GaussianNoise
from diffem.data import Observations
from diffem.denoiser import Denoiser, DenoiserConfig
from diffem.diagnostics import diagnose
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.loop import State
from diffem.networks import NetworkConfig
from diffem.posterior import from_pretrained
from diffem.samplers import Sampler

SHAPE = (3, 32, 32)


def resident(of: str) -> float:
    """Memory of this process in MB: `RssFile`, pages of files, or `RssAnon`, memory that no file stands behind."""
    line = next(v for v in Path("/proc/self/status").read_text().splitlines() if v.startswith(f"{of}:"))
    return int(line.split()[1]) / 1024


class Identity(Sampler):
    def draw(self, y, params, seeds, withheld=None):
        return y


class Drawing(DiffEM):
    """A run of an E-step alone, whose draws are the observations."""

    @property
    def sampler(self):
        return Identity(self.data.corruption, self.data.shape)

    def next(self, step, **changes):
        self.after = step, changes


def e_step(folder: str, n: int) -> None:
    """Run by a process of its own: prints the peak."""
    torch.set_num_threads(1)
    y = np.lib.format.open_memmap(Path(folder) / "y.npy", "w+", np.uint8, (n, *SHAPE))  # zeros that take no space
    y[n - 1] = 255
    peak = []
    em = Drawing(
        configuration.Config(),
        Observations(np.load(Path(folder) / "y.npy", mmap_mode="r"), GaussianNoise(10.0)),
        Path(folder) / "run",
        progress=lambda progress: peak.append(resident("RssAnon")),
    )
    with em.run.open():
        em_module.e_step(em)
    assert em.after == ("judge", {"evaluations": 0})
    out = em.run.array("next")
    assert out.shape == (n, *SHAPE)
    assert (out[0] == 0).all()
    assert (out[n - 1] == 255).all()
    assert len(peak) == -(-n // 256)
    print(json.dumps(max(peak)))


def in_a_process(function: str, folder: Path, n: int):
    """What a function of this file prints as JSON, run in a process of its own and in a new folder."""
    folder.mkdir()
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_memory; test_memory.{function}({str(folder)!r}, {n})"
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    shutil.rmtree(folder)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_invariant_6_memory_does_not_grow_with_the_observations(tmp_path):
    if shutil.disk_usage(tmp_path).free < 6e9:
        pytest.skip("needs 3 GB of disk")
    found = {n: in_a_process("e_step", tmp_path / str(n), n) for n in (2_000, 200_000)}
    print(found)
    assert found[200_000] < found[2_000] + 200


class Enough(Exception):
    """A slice of a step is done."""


def slices(folder: str, n: int) -> None:
    """Run by a process of its own: opens n observations, and makes slices of both steps; prints for each the peak of the
    memory that no file stands behind, and the pages of files at its end."""
    torch.set_num_threads(1)
    where, shape = Path(folder), (3, 16, 16)
    y = np.lib.format.open_memmap(where / "y.npy", "w+", np.float16, (n, *shape))  # zeros that take no space
    mask = np.lib.format.open_memmap(where / "mask.npy", "w+", np.uint8, (n, *shape))
    y[0], mask[0] = 1, 1
    del y, mask
    (where / "corruption.yaml").write_text("name: Mask\nnoise: 0.1\n")
    settings = [("start.kind", "observation"), ("network.channels", "[4]"), ("network.blocks", "[1]")]
    config = configuration.load_config(None, [*settings, ("m_step.first_steps", "20")])
    found, peak, done = {}, [0.0], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident("RssAnon"))

    def note(step: str) -> None:
        found[step], peak[0] = (peak[0], resident("RssFile")), 0.0

    looking = threading.Thread(target=look)
    looking.start()

    def slice_of(progress) -> None:
        if progress.step == "e_step" and progress.done >= 1024:
            raise Enough

    observations = Observations.load(where)
    note("load")
    em = DiffEM(config, observations, where / "run", progress=slice_of, batch=256)  # splits, and estimates the units
    note("split")
    with em.run.open():
        em_module.start(em)
        for step, row in (("e_step", 0), ("m_step", 1), ("e_step", 1)):
            em.state = State(step, row, width=1.0 if row else None)
            with contextlib.suppress(Enough):
                em.steps[step](em)
            if (where / "run" / "next.npy").exists():
                os.replace(where / "run" / "next.npy", where / "run" / "current.npy")
            note(f"{step} {row}")
    done.set()
    looking.join()
    print(json.dumps(found))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_invariant_6_neither_opening_nor_steps_copy_the_observations(tmp_path):
    """A copy of y would take 300 MB; so would the pages of its file, if they were kept."""
    if shutil.disk_usage(tmp_path).free < 3e9:
        pytest.skip("needs 1 GB of disk")
    found = {n: in_a_process("slices", tmp_path / str(n), n) for n in (2_000, 200_000)}
    print(found)
    for step, sizes in found[200_000].items():
        assert all(size < few + 100 for size, few in zip(sizes, found[2_000][step], strict=True)), step


def settings(**more: str) -> list[str]:
    """The options of a run of seconds."""
    given = {"em.iterations": "1", "m_step.first_steps": "3", "prior.steps": "2", "sampler.steps": "2"}
    given |= {"network.kind": "mlp", "start.ranks": "[1]", "start.components": "[1]", **more}
    return [word for name, value in given.items() for word in (f"--{name}", value)]


def test_observations_are_read_as_they_are_stored(tmp_path):
    """The same numbers in other types: bitwise the same run."""
    y = np.random.default_rng(0).integers(0, 256, (60, 1, 4, 4))  # float16 holds them exactly
    found = {}
    for dtype in ("uint8", "float16", "float32"):
        folder, run = tmp_path / dtype, tmp_path / f"{dtype}-run"
        folder.mkdir()
        np.save(folder / "y.npy", y.astype(dtype))
        (folder / "corruption.yaml").write_text("name: GaussianNoise\nnoise: 20\nrange: [0, 255]\n")
        opened = Observations.load(folder).y
        assert isinstance(opened, np.memmap)
        assert opened.dtype == dtype
        command = ["train", "--observations", str(folder), "--out", str(run), "--force", *settings()]
        assert cli.main(command) == 0
        found[dtype] = np.load(run / "reconstructions.npy")
        assert np.isfinite(found[dtype]).all()
    assert np.array_equal(found["uint8"], found["float16"])
    assert np.array_equal(found["uint8"], found["float32"])


def test_values_that_are_all_finite_are_read_once(monkeypatch):
    passes: list[int] = []
    chunks = Observations.chunks
    monkeypatch.setattr(Observations, "chunks", lambda self, *given: passes.append(1) or chunks(self, *given))
    Observations(np.zeros((10, 3), np.float32), GaussianNoise(0.1))
    assert len(passes) == 1
    Observations(np.zeros((10, 3), np.uint8), GaussianNoise(0.1))
    assert len(passes) == 1


@pytest.mark.parametrize("mode", ["r+", "c"])
def test_releasing_memory_loses_no_value(tmp_path, mode):
    np.save(tmp_path / "a.npy", np.zeros(5000))
    array = np.load(tmp_path / "a.npy", mmap_mode=mode)
    array[:] = 7
    files.release(array)
    files.release(array[:10])
    files.release(array + 1)
    assert (array == 7).all()


def denoiser(channels: tuple[int, ...], size: int) -> Denoiser:
    network = NetworkConfig(channels=channels, blocks=(1,) * len(channels))
    return Denoiser(GaussianNoise(0.1), (1, size, size), DenoiserConfig(precondition="plain"), network)


@pytest.mark.parametrize("batch", [1, 7])
def test_what_an_update_keeps_grows_with_its_items(batch):
    """Every item keeps as much; the rest, of the weights, does not depend on their number."""
    of = denoiser((8, 8), 16)

    def kept(n: int) -> int:
        with memory.of_update(of.network) as total:
            of.loss(torch.zeros(n, 1, 16, 16), torch.zeros(n, 1, 16, 16), {}, torch.Generator().manual_seed(0))
        return total[0]

    assert kept(1 + batch) - kept(1) == pytest.approx(batch * kept(1), rel=0.05)


def test_what_one_layer_keeps_is_its_input():
    layer = torch.nn.Linear(100, 10)
    with memory.of_update(layer) as kept:
        layer(torch.zeros(7, 100)).sum()
    assert kept[0] == 7 * 100 * 4


def test_the_batch_is_what_fits(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 4 * 1000)
    found = [memory.batch(item, torch.device("cpu")) for item in (1, 10, 100, 250, 1001, 10**9)]
    assert found == [256, 64, 8, 4, 1, 1]


def test_invariant_6_no_step_handles_more_items_than_the_batch(tmp_path, monkeypatch):
    sizes: list[int] = []
    predict = Denoiser.predict

    def listen(self, x_t, *rest):
        if not torch.is_grad_enabled():
            sizes.append(len(x_t))
        return predict(self, x_t, *rest)

    monkeypatch.setattr(Denoiser, "predict", listen)
    y = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).numpy()
    observations = Observations(y, GaussianNoise(0.3))
    settings = [("em.iterations", "1"), ("em.guard", "false"), ("m_step.first_steps", "2"), ("prior.steps", "2")]
    config = configuration.load_config("digits", [*settings, ("network.kind", "mlp"), ("start.ranks", "[1]")])
    em = DiffEM(config, observations, tmp_path, batch=7)
    list(em.iterate())
    diagnose(tmp_path, observations, full=True, batch=7)
    posterior = from_pretrained(tmp_path / "posterior")
    posterior.sample(y[:20], n=3, batch=7)
    posterior.reconstruct(observations, np.arange(20), 3, batch=7)
    posterior.generate(20, batch=7)
    assert max(sizes) == 7


def test_an_update_that_does_not_fit_is_refused_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda device: 2**20)
    y = np.random.default_rng(0).standard_normal((60, 1, 16, 16)).astype(np.float32)
    observations = Observations(y, GaussianNoise(0.1))
    with pytest.raises(DiffemError) as caught:
        next(DiffEM("digits", observations, tmp_path / "run").iterate())
    found = re.fullmatch(
        r"m_step: an update of 128 items takes about (\d+) MB of memory, 1 MB are free; use --m_step.micro_batch (\d+)",
        str(caught.value),
    )
    assert found
    assert int(found[1]) > 10
    observations.save(tmp_path / "obs")
    assert cli.main(["check", str(tmp_path / "obs"), "digits"]) == 1
    assert f"problem  memory: {caught.value}" in capsys.readouterr().out


def test_the_batch_of_a_run_is_chosen_once(tmp_path, monkeypatch):
    y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).numpy()
    settings = [("em.iterations", "1"), ("m_step.first_steps", "2"), ("prior.steps", "2"), ("start.ranks", "[1]")]
    config = configuration.load_config("digits", [*settings, ("network.kind", "mlp")])
    em = DiffEM(config, Observations(y, GaussianNoise(0.3)), tmp_path)
    next(em.iterate())
    assert em.batch == 256
    monkeypatch.setattr(memory, "batch", lambda *given: pytest.fail("is chosen again"))
    again = DiffEM(config, Observations(y, GaussianNoise(0.3)), tmp_path)
    list(again.iterate())
    assert again.batch == 256


def test_large_items_are_held_in_smaller_numbers():
    assert memory.at_once(64, 256) == 256
    assert memory.at_once(64**3, 256) == 128
    assert memory.at_once(10**12, 256) == 1
    assert memory.at_once(100, 256, limit=1000) == 10


LARGE = """
import sys
import numpy as np
from diffem.corruptions import RandomMask
from diffem.data import Dataset, Observations
from diffem.posterior import Posterior
from diffem.samplers import MixtureSampler, SamplerConfig
from diffem.starts import StartConfig, fit
from diffem import tiles

generator = np.random.default_rng(0)
y = generator.normal(size=(1, 1, 1024, 1024)).astype(np.float32)
observations = Observations(y, RandomMask(0.0, 0.5), {"mask": np.ones((1, 1, 1024, 1024), bool)}, patch=64)
train, _, _ = observations.split(0)
data = Dataset(observations, observations.units(train), train)
mixture, _ = fit(StartConfig(ranks=(2,), components=(1,), iterations=1, items=64), data, train, 0)
sampler = tiles.untrained(MixtureSampler(data.corruption, data.shape, mixture))
sampler.settings = SamplerConfig(steps=1)
posterior = Posterior(sampler, observations.corruption, data.units)
draws = posterior.reconstruct(observations.images, np.array([0]))
assert draws.shape == (1, 1, 1, 1024, 1024)
# not ru_maxrss, which begins with the memory of the process that started this one
print(next(int(v.split()[1]) for v in open('/proc/self/status') if v.startswith('VmHWM:')) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_large_image_is_learned_and_drawn_within_two_gigabytes():
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2
