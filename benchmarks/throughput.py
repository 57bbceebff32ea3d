"""Throughput of the M-step and the E-step, beside bare loops of the same network on the same batch.

    python benchmarks/throughput.py --networks digits fashion --threads 2
    python benchmarks/throughput.py --networks cifar10 --threads 2 --variants float32 bfloat16     # the paper's U-Net
    python benchmarks/throughput.py --networks digits cifar10 --processes 2     # two processes of one thread against one

The M-step is that of a run: it chooses rows, corrupts them anew, and updates. The bare one is forward, a loss, backward,
clipping, Adam and the average, on prepared inputs. The E-step is a draw as in a run, with few steps; the bare one is as
many evaluations of the network, with a step of the sampler between them. A run draws with more steps, so that what comes
once for each draw weighs less there.

All is timed in turn, in every round; ratios are medians over the rounds of pairs that were timed one after the other, since a
machine is rarely idle; their error is the standard error of a median. The matrix rate is that of one large product in
the same precision. Memory is what an update takes beyond weights and optimiser. One JSON for each network is written to
`results/throughput/`; `table.py` makes the table.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from compare import about
from torch.utils.flop_counter import FlopCounterMode

from diffem import distributed
from diffem.config import load_config
from diffem.corruptions import RandomMask
from diffem.data import Observations
from diffem.em import DiffEM, e_step, start, train_network
from diffem.loop import alone
from diffem.samplers import draw_many

HERE = Path(__file__).parent
N = 64  # observations; their values do not matter
LAYOUTS = {"contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Case:
    """The network of a preset, and how much of it one timing takes on a CPU.

    Attributes:
        preset: The preset.
        shape: The shape of an item.
        batch: Items per update and per draw.
        updates: Updates per timing.
        steps: Steps per draw.
    """

    preset: str
    shape: tuple[int, ...]
    batch: int
    updates: int = 1
    steps: int = 1


NETWORKS = {
    "digits": Case("digits", (1, 8, 8), 128, updates=2, steps=15),
    "fashion": Case("fashion-mask75", (1, 28, 28), 128, steps=5),
    "cifar10": Case("cifar10-mask75", (3, 32, 32), 8),
    "celeba": Case("celeba-mask50", (3, 64, 64), 4),
}
VARIANTS = [f"{p}{how}" for p in ("float32", "bfloat16") for how in ("", " contiguous", " compiled")]


def observe(name: str, folder: Path) -> None:
    """Writes observations of noise, each with its own mask."""
    random, shape = np.random.default_rng(0), NETWORKS[name].shape
    mask = random.random((N, 1, *shape[1:])) < 0.5
    y = np.where(mask, random.uniform(0, 255, (N, *shape)), 0)
    Observations(y, RandomMask(0.5, 1.0), {"mask": mask}, (0, 255)).save(folder / "observations")


def build(
    stack: contextlib.ExitStack, name: str, folder: Path, variant: str, batch: int, device: str = "cpu"
) -> DiffEM:
    """A run that is about to begin its first M-step."""
    case, (precision, _, how) = NETWORKS[name], variant.partition(" ")
    few = {
        "start.components": "[1]",
        "start.ranks": "[8]",
        "sampler.steps": str(case.steps),
        "m_step.batch": str(batch),
    }
    config = load_config(case.preset, [*few.items(), ("em.guard", "false")])
    observations = Observations.load(folder / "observations")
    place = {"device": device, "precision": precision, "compile": how == "compiled"}
    em = DiffEM(config, observations, folder / variant, batch=batch, checkpoint_minutes=math.inf, **place)
    distributed.shared(lambda: stack.enter_context(em.run.open()))
    alone(em, lambda: start(em))
    distributed.shared(lambda: em.run.array("current", em.data.array_shape).fill(100))
    em.state.iteration, em.state.width, em.state.step = 1, config.sampler.width, "m_step"
    if how in LAYOUTS:
        network = em.trainer.denoiser.network
        network.layout = LAYOUTS[how]
        network.to(memory_format=LAYOUTS[how])
        em.trainer.restart()
    return em


class Timed:
    """The steps of a run and their bare loops.

    Attributes:
        updates, draws: What they are in items: of updates, and of evaluations of the network.
    """

    def __init__(self, name: str, em: DiffEM) -> None:
        case, self.em, self.batch = NETWORKS[name], em, em.config.m_step.batch
        self.count, self.sampler = case.updates, em.diffusion()
        self.rows, self.evaluations = np.resize(em.train, self.batch), self.sampler.evaluations(em.config.sampler)
        self.updates, self.draws = self.batch * case.updates, self.batch * self.evaluations
        denoiser, device = em.trainer.denoiser, em.device
        y, params = em.data.batch(self.rows, device)
        with torch.no_grad():
            x, no = em.items("current")[self.rows].to(device), torch.zeros(self.batch, dtype=torch.bool, device=device)
            self.inputs = denoiser._inputs(x, torch.ones(self.batch, device=device), y, params, no)[1]
        self.level = torch.zeros(self.batch, device=device)
        self.weights = [*denoiser.network.parameters()]
        self.optimizer = torch.optim.Adam(self.weights, lr=1e-4, fused=True)
        self.average = [p.detach().clone() for p in self.weights]

    def network(self, denoiser, inputs, level):
        with torch.autocast(level.device.type, denoiser.precision, enabled=denoiser.precision != torch.float32):
            return (denoiser.compiled or denoiser.network)(inputs, level)

    def m_step(self) -> None:
        self.em.state.updates, self.em.state.loss_sum = 0, 0.0
        assert train_network(self.em, self.count, self.em.config.denoiser.observation_dropout)

    def bare_m_step(self) -> None:
        for _ in range(self.count):
            self.optimizer.zero_grad()
            mean, variance = self.network(self.em.trainer.denoiser, self.inputs, self.level)
            (mean.float().square().mean() + variance.float().square().mean()).backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.weights, 0.01)

    def e_step(self) -> None:
        draw_many(self.sampler, self.em.data, self.rows, 1, 0, batch=self.batch)

    @torch.no_grad()
    def bare_e_step(self) -> None:
        x, one = torch.randn_like(self.inputs[0]), torch.ones_like(self.level)
        for _ in range(self.evaluations):
            mean, _variance = self.network(self.em.trainer.averaged, [x, *self.inputs[1:]], one)
            x = x - 0.5 * (x - mean.float()) + 0.1 * torch.randn_like(x)

    def work(self) -> tuple[float, float]:
        """Operations of one item in an update and in an evaluation, as torch counts them: products and convolutions."""
        denoiser, found = self.em.trainer.denoiser, []
        for update in (True, False):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(update):
                mean, variance = denoiser.network([v[:1] for v in self.inputs], self.level[:1])
                if update:
                    (mean.sum() + variance.sum()).backward()
            found.append(counter.get_total_flops())
        return found[0], found[1]

    def memory(self) -> float | None:
        """GB that an update takes beyond what is there before it; None where that is not told."""
        self.optimizer.zero_grad()
        self.em.trainer.optimizer.zero_grad()
        if self.em.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.em.device)
            torch.cuda.reset_peak_memory_stats(self.em.device)
            self.m_step()
            return (torch.cuda.max_memory_allocated(self.em.device) - before) / 1e9
        try:
            ctypes.CDLL(None).malloc_trim(0)  # gives memory that is only kept back to the system
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = _resident("VmRSS")
            self.m_step()
            return (_resident("VmHWM") - before) / 1e9
        except (OSError, AttributeError):
            return None


def _resident(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


class MatrixRate:
    """The products of two large matrices that are timed in between."""

    def __init__(self, device: torch.device, precision: torch.dtype) -> None:
        self.size = 8192 if device.type == "cuda" else 2048
        self.matrix = torch.randn(self.size, self.size, device=device).to(precision)

    def __call__(self) -> None:
        self.matrix @ self.matrix


def seconds(work: Callable[[], object], device: torch.device) -> float:
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    settle()
    began = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - began


def middle(values: list[float]) -> list[float]:
    """The median and its standard error (that of a normal distribution, from the median deviation)."""
    median = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(v - median) for v in values)
    return [median, 1.2533 * spread / len(values) ** 0.5]


def measure(
    stack: contextlib.ExitStack, name: str, folder: Path, variants: list[str], rounds: int, batch: int, device: str
) -> dict:
    """Rates and ratios of one network, by variant."""
    observe(name, folder)
    timed, startup = {}, {}
    for variant in variants:
        em = build(stack, name, folder, variant, batch, device)
        one = timed[variant] = Timed(name, em)
        # the first calls take longer than later ones: torch.compile translates, others choose their algorithms
        first = sum(seconds(step, em.device) for step in (one.m_step, one.e_step))
        startup[variant] = first - sum(seconds(step, em.device) for step in (one.m_step, one.e_step))
        one.bare_m_step(), one.bare_e_step()
    matrix = {v: MatrixRate(t.em.device, t.em.precision) for v, t in timed.items()}
    kinds = ("m_step", "bare_m_step", "e_step", "bare_e_step")
    times: dict[str, dict[str, list[float]]] = {v: {k: [] for k in (*kinds, "matrix")} for v in variants}
    for turn in range(rounds):
        for variant, one in timed.items():
            times[variant]["matrix"].append(seconds(matrix[variant], one.em.device))
            for pair in (kinds[:2], kinds[2:]):
                for kind in pair[:: 1 if turn % 2 else -1]:
                    times[variant][kind].append(seconds(getattr(one, kind), one.em.device))
    some = next(iter(timed.values()))
    update, evaluation = some.work()
    found: dict[str, dict] = {}
    for variant, one in timed.items():
        of, row = times[variant], found.setdefault(variant, {})
        for kind, items, work in (("m_step", one.updates, update), ("e_step", one.draws, evaluation)):
            row[kind] = items / statistics.median(of[kind])
            row[f"bare_{kind}"] = items / statistics.median(of[f"bare_{kind}"])
            row[f"{kind}_of_bare"] = middle([b / a for a, b in zip(of[kind], of[f"bare_{kind}"], strict=True)])
            rates = [2 * matrix[variant].size ** 3 / t for t in of["matrix"]]
            row[f"{kind}_of_matrix"] = middle([items * work / t / r for t, r in zip(of[kind], rates, strict=True)])
            if variants[0] == "float32":  # what a variant gains, and how far it is from the bare loop in float32
                base = times["float32"]
                row[f"{kind}_gain"] = middle([a / b for a, b in zip(base[kind], of[kind], strict=True)])
                bare = base[f"bare_{kind}"]
                row[f"{kind}_of_bare_float32"] = middle([a / b for a, b in zip(bare, of[kind], strict=True)])
        row["matrix_rate"] = 2 * matrix[variant].size ** 3 / statistics.median(of["matrix"])
        row["memory_gb"], row["startup_seconds"] = one.memory(), startup[variant]
    parameters = sum(p.numel() for p in some.weights)
    sizes = {"batch": batch, "parameters": parameters, "update": update, "evaluation": evaluation}
    return {**sizes, "device": _device(some.em.device), "rounds": rounds, "variants": found}


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or device.type


# --- several processes -----------------------------------------------------------------------------------


@contextlib.contextmanager
def single() -> Iterator[None]:
    """The first process works as if there were no others."""
    with mock.patch.multiple(distributed, size=lambda: 1, rank=lambda: 0):
        yield


def worker(name: str, rounds: int, batch: int, folder: Path) -> None:
    """One of the processes: the steps of a run, by the first process alone and by all of them, in turn."""
    distributed.begin()
    torch.set_num_threads(1)
    size = distributed.size()
    distributed.shared(lambda: observe(name, folder))
    em = build(contextlib.ExitStack(), name, folder, "float32", batch)
    em.batch = N // (2 * size)  # an E-step is shared by chunks: two for each process
    em.next = lambda *step, **changes: None  # each step is done again and again
    times: dict[str, list[float]] = {f"{step}{who}": [] for step in ("m_step", "e_step") for who in ("", "_alone")}

    def m_step() -> None:
        em.state.updates, em.state.loss_sum = 0, 0.0
        assert train_network(em, NETWORKS[name].updates, em.config.denoiser.observation_dropout)

    for _ in range(rounds + 1):  # the first one is not counted
        for kind, step in (("m_step", m_step), ("e_step", lambda: e_step(em))):
            distributed.wait()
            if distributed.first():
                with single():
                    times[f"{kind}_alone"].append(seconds(step, em.device))
            distributed.wait()
            times[kind].append(seconds(step, em.device))
    if distributed.first():
        (folder / "times.json").write_text(json.dumps({k: v[1:] for k, v in times.items()}))
    distributed.wait()
    os._exit(0)  # without the end of the run, which would be told


def together(name: str, processes: int, rounds: int, batch: int, folder: Path) -> dict:
    """How much faster several processes are than one, each with one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [__file__, "--networks", name, "--rounds", str(rounds), "--batch", str(batch), "--worker", str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    times = json.loads((folder / "times.json").read_text())
    found: dict = {"processes": processes, "batch": batch, "rounds": rounds}
    for kind in ("m_step", "e_step"):
        found[kind] = middle([a / b for a, b in zip(times[f"{kind}_alone"], times[kind], strict=True)])
    return {**found, "device": _device(torch.device("cpu"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["digits", "fashion", "cifar10"])
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="float32 first, to compare with"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, help="items per update and per draw (default: few, as a CPU takes)")
    parser.add_argument("--processes", type=int, metavar="P", help="P processes of one thread against one, instead")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.worker:
        worker(given.networks[0], given.rounds, given.batch, given.worker)
    out = HERE / "results" / "throughput"
    out.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/throughput.py " + " ".join(sys.argv[1:])
    for name in given.networks:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            batch = given.batch or NETWORKS[name].batch
            if given.processes:
                found = together(name, given.processes, given.rounds, batch, Path(folder))
                kind = f"processes{given.processes}"
            else:
                found = measure(stack, name, Path(folder), given.variants, given.rounds, batch, given.device)
                found["threads"], kind = given.threads, "cuda" if torch.cuda.is_available() else "cpu"
        result = {"about": about(command), "network": name, **found}
        (out / f"{name}-{kind}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
