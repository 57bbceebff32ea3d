"""The benefit of each mechanism at equal cost: the loop as it is, and with one change.

    python benchmarks/ablation.py --tasks digits-mask75-long digits-mask90-long fashion-mask75 --seeds 11 12
    python benchmarks/table.py                            # the table

Momentum is for corruptions that measure all entries equally well: `--tasks digits-noise --arms default momentum`. Use
seeds that no comparison reports. Every arm has the same observations, start, network, budget of evaluations and number
of iterations, and is judged after the last iteration, at width 1. One JSON per task and seed, in results/ablation/.

Mechanisms that were removed from the package are kept here as subclasses, so that the table can be reproduced.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from azula import sample as azula_sample
from azula.denoise import Denoiser as AzulaDenoiser
from azula.denoise import DiracPosterior
from compare import TASKS, Method, about, inapplicable, plan
from judge import Judge
from torch import Tensor, nn

from diffem import networks, samplers, seeding, trainer
from diffem.clean.datasets import make_observations
from diffem.config import Config, load_config
from diffem.corruptions import Params
from diffem.data import Observations, evenly
from diffem.denoiser import Denoiser
from diffem.em import STEPS, DiffEM, m_step
from diffem.posterior import from_pretrained
from diffem.samplers import DiffusionSampler, Query, Sampler

HERE = Path(__file__).parent
BUDGETS = {
    "digits-mask75-long": 900_000,
    "digits-mask90-long": 900_000,
    "fashion-mask75": 300_000,
    "digits-noise": 900_000,
}
SMALLER = {"data.limit": "4096", "m_step.first_steps": "300", "m_step.steps": "100"}  # Fashion-MNIST
SETTINGS = {
    "em.guard": "false",
    "prior.kind": "joint",
    "denoiser.observation_dropout": "1e-9",
}  # the prior is not trained


def stop(em: DiffEM) -> None:
    """Replaces the step `end`: the last iteration is judged."""
    em.next_iteration("done")


class Arm(DiffEM):
    """Ends after its last iteration."""

    steps = {**STEPS, "end": stop}  # noqa: RUF012

    def final(self) -> Sampler:
        """The sampler that is judged."""
        return self.diffusion(width=1.0)


class ByFormula(Arm):
    """Simulated observations have masks drawn by the formula."""

    def __init__(self, config, observations, *args, **kwargs) -> None:
        observations.formula = True
        super().__init__(config, observations, *args, **kwargs)


class Sharp(Arm):
    """Plain DDPM in the first third of the iterations; then the residual variance is put back."""

    @property
    def sampler(self) -> Sampler:
        early = self.state.width is not None and 3 * self.state.iteration <= self.config.em.iterations
        return self.diffusion(width=0.0) if early else super().sampler


class Follows(Arm):
    """The width of an E-step follows the calibration ratio of the last iteration."""

    @property
    def sampler(self) -> Sampler:
        if self.state.width is None:
            return super().sampler
        before = [row["ratio"] for row in self.rows if 0 < row["iteration"] < self.state.iteration]
        return self.diffusion(width=self.state.width + 5 * max(0.9 - (before[-1] if before else 1.0), 0))


class Corrected(DiffusionSampler):
    """Predicted variances are corrected by factors c_t, one for observed entries and one for others."""

    correction: Tensor | None = None

    def measure(self, x: Tensor, y: Tensor, params: dict, seeds: Tensor) -> None:
        """Measures squared errors over predicted variances, on items and their observations."""
        correction = torch.ones(self.settings.steps + 1, 2)
        seen = self.corruption.seen(y, params).expand_as(x).flatten(1)
        for k, sigma in enumerate(self.sigmas):
            noise = seeding.normal(seeds, self.shape, stream=k)
            posterior, f, v = self.denoiser.predict(x + sigma * noise, sigma.expand(len(x)), y, params)
            error = (x.flatten(1) - posterior.mean - posterior.scale(f)).square()
            for group, where in enumerate((~seen, seen)):
                correction[k, group] = (error * where).sum() / (posterior.variance * v * where).sum()
        self.correction = correction

    def estimate(self, x: Tensor, sigma: Tensor, tau: Tensor, query: Query, stream: int) -> Tensor:
        assert self.correction is not None
        predict, k = self.denoiser.predict, (stream - 1) // 3
        seen = self.corruption.seen(query.y, query.params).expand_as(x).flatten(1).long()
        of_step = self.correction[k][seen]

        def corrected(*given):
            posterior, f, v = predict(*given)
            return posterior, f, v * of_step

        self.denoiser.predict = corrected  # type: ignore[method-assign]
        try:
            return super().estimate(x, sigma, tau, query, stream)
        finally:
            del self.denoiser.predict


class Measured(Arm):
    """c_t, measured in every iteration on re-corrupted reconstructions of validation observations."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sampler_class = Corrected

    @torch.no_grad()
    def diffusion(self, **changes) -> DiffusionSampler:
        sampler = super().diffusion(**changes)
        if not (self.run.folder / "current.npy").exists():
            return sampler
        rows = evenly(self.validation, 256)
        x = self.items("current")[rows]
        y, params = self.examples.simulate(x, seeding.generator(self.seed, self.state.iteration, "e_step"))
        sampler.measure(x, y, params, seeding.item_seeds(self.seed, self.state.iteration, "score", rows))
        return sampler


def with_new_weights(em: DiffEM) -> None:
    """Reinitialises the weights once, for the last third of the iterations; they again begin with 20 passes over real
    observations."""
    state, last = em.state, em.config.em.iterations
    if state.updates == 0 and state.iteration == last - last // 3:
        em.build()
    m_step(em)


class Reinitialised(Arm):
    """See :func:`with_new_weights`."""

    steps = {**Arm.steps, "m_step": with_new_weights}  # noqa: RUF012


class _Bound(AzulaDenoiser):
    """Our denoiser with its observation, in the interface of azula's samplers."""

    def __init__(self, denoiser: Denoiser, *given: object) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.given = denoiser, denoiser.schedule, given

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> DiracPosterior:
        return DiracPosterior(mean=self.denoiser(x_t, self.denoiser.schedule.sigma(t).expand(len(x_t)), *self.given))


class Heun(DiffusionSampler):
    """azula's deterministic second-order solver, with half as many steps."""

    @torch.no_grad()
    def draw(self, y: Tensor, params: Params, seeds: Tensor, withheld: Tensor | None = None) -> Tensor:
        bound = _Bound(self.denoiser, y, params, withheld)
        solver = azula_sample.HeunSampler(bound, steps=self.settings.steps // 2, silent=True, dtype=y.dtype)
        return solver(self.sigmas[0].to(y) * seeding.normal(seeds, self.shape))


class Solver(Arm):
    """E-steps by a deterministic solver."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sampler_class = Heun


class Fused(Denoiser):
    """The reference is N(0, I), given both x_t and y."""

    def posterior(self, x_t, sigma, y, params, withheld):
        likelihood = self.corruption.likelihood(y, params).withheld(withheld)
        return self.reference.posterior(likelihood.given(x_t.flatten(1), sigma[:, None]))


class FusedSampler(DiffusionSampler):
    denoiser_class = Fused


class Fuse(Arm):
    """`precondition: fuse`; with `plain` in the configuration."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sampler_class = FusedSampler


class Momentum(Arm):
    """E-steps with f_k + (f_k - f_k-1) / 2, where f is the network's correction; momentum restarts after a worse
    iteration.

    Every draw takes two evaluations instead of one.
    """

    before: nn.Module | None = None

    @property
    def sampler(self) -> Sampler:
        sampler = super().sampler
        if self.state.step == "e_step" and isinstance(sampler, DiffusionSampler):
            scores = [row["criterion"] for row in self.rows[-2:]]
            if len(scores) == 2 and scores[1] > scores[0]:
                self.before = None
            sampler.denoiser = Extrapolated(sampler.denoiser, self.before)
            self.before = copy.deepcopy(sampler.denoiser.now.network)
        return sampler


class Extrapolated(nn.Module):
    """A denoiser with momentum."""

    def __init__(self, now: Denoiser, before: nn.Module | None) -> None:
        super().__init__()
        self.now, self.before = now, before
        self.network, self.schedule, self.reference = now.network, now.schedule, now.reference
        self.device = now.device

    def predict(self, *given):
        posterior, f, v = self.now.predict(*given)
        if self.before is None:
            return posterior, f, v
        _, last, _ = self.now.with_network(self.before).predict(*given)
        return posterior, f + 0.5 * (f - last), v


@dataclass(frozen=True)
class Change:
    """One change to the loop.

    Attributes:
        what: Its description.
        algorithm: The class of the run.
        settings: Overrides of the task's settings.
        constants: Values for constants of modules, by module and name.
        draws: Evaluations per draw after the first E-step, relative to the unchanged loop.
    """

    what: str
    algorithm: type[Arm] = Arm
    settings: dict[str, str] = field(default_factory=dict)
    constants: dict[tuple[object, str], float] = field(default_factory=dict)
    draws: float = 1


ARMS = {
    "default": Change("the loop as it is"),
    "lambda1": Change("the paper's M-step: no weights, no split", settings={"m_step.imputed_weight": "1"}),
    "lambda01": Change("lambda 0.1 for 0.003", settings={"m_step.imputed_weight": "0.1"}),
    "no-split": Change("no real observations in the M-step", constants={(trainer, "PASSES"): 0.0}),
    "all-split": Change("real observations alone, in every iteration", constants={(trainer, "PASSES"): 1e9}),
    "detached": Change(
        "the variance head does not shape the features", constants={(networks, "VARIANCE_GRADIENT"): 0.0}
    ),
    "times": Change("training times of Beta(3, 3)", settings={"denoiser.time_beta": "3"}),
    "formula": Change("masks by the formula, for measured ones", ByFormula),
    "whole": Change("no simulated observation is thinned", settings={"m_step.thinned": "0"}),
    "plain": Change("plain preconditioning for the start's", settings={"denoiser.precondition": "plain"}),
    "fewer": Change("a sampler of 4 steps, for 16 on digits and 6 on garments", settings={"sampler.steps": "4"}),
    "refresh": Change("an E-step renews a third", settings={"em.refresh": "0.34"}),
    "sharp": Change("with a sharp part: plain DDPM in a third of the run", Sharp),
    "follows": Change("with a width that follows the ratio", Follows),
    "corrected": Change("with measured corrections c_t", Measured),
    "reinitialised": Change("with new weights once", Reinitialised),
    "fuse": Change("precondition fuse", Fuse, {"denoiser.precondition": "plain"}),
    "heun": Change("a deterministic solver (Heun)", Solver),
    "pure": Change("E-steps from pure noise", settings={"em.renoise": "false"}),
    "renoise4": Change("renoising in at least four steps, for two", constants={(samplers, "RENOISE_STEPS"): 4}),
    "momentum": Change("momentum on the denoiser", Momentum, draws=2),
}


def run(task: str, name: str, seed: int, runs: Path, root: str | None) -> dict:
    """The columns of an arm after its last iteration."""
    change = ARMS[name]
    folder, observed = runs / task / str(seed) / name, runs / task / str(seed) / "observations"
    smaller = SMALLER if task.startswith("fashion") else {}
    settings = {**TASKS[task].settings, **smaller, **SETTINGS, **change.settings, "em.seed": str(seed)}
    config: Config = load_config(TASKS[task].preset, list(settings.items()))
    if not (observed / "y.npy").exists():
        make_observations(config, task, observed, root)
    observations, start = Observations.load(observed), runs / task / str(seed) / "start"
    if not (start / "posterior").exists():
        list(DiffEM(replace(config, em=replace(config.em, iterations=0)), observations, start).iterate())
    settings |= inapplicable(observations, seed)
    config = load_config(TASKS[task].preset, list(settings.items()))
    planned = plan(config, Method(), len(observations), BUDGETS[task], change.draws)
    config = load_config(TASKS[task].preset, list({**settings, **planned}.items()))
    before = {key: getattr(*key) for key in change.constants}
    for (module, constant), value in change.constants.items():
        setattr(module, constant, value)
    try:
        arm = change.algorithm(config, observations, folder, start=from_pretrained(start / "posterior"))
        rows = list(arm.iterate())
        judge = Judge(observed, seed, seed)
        columns = judge.posterior(arm.posterior(arm.final()))
    finally:
        for (module, constant), value in before.items():
            setattr(module, constant, value)
    spent = 0.0
    for row in rows:  # the first E-step has no earlier reconstruction and no momentum
        training = 3 * row["examples"]
        spent += training + (change.draws if row["iteration"] > 1 else 1) * (row["network_evaluations"] - training)
    return {**columns, "evaluations": spent, "iterations": len(rows) - 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[11])
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / "ablation")
    parser.add_argument("--root", help="the folder of a data set that is not built in")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for task in arguments.tasks:
            file = arguments.results / f"{task}-{seed}.json"
            command = f"python benchmarks/ablation.py --tasks {task} --seeds {seed}"
            result = json.loads(file.read_text()) if file.exists() else {"task": task, "seed": seed, **about(command)}
            arms = result.setdefault("arms", {})
            for name in (a for a in arguments.arms if a not in arms):
                arms[name] = run(task, name, seed, arguments.runs, arguments.root)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(result, indent=1) + "\n")
                print(
                    f"{task} {seed} {name}: CRPS {arms[name]['crps']:.4f}, ratio {arms[name]['ratio']:.2f}", flush=True
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
