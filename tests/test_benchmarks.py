"""The benchmarks: their tables are those of their results, and the methods are given equal budgets."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffem.config import load
from diffem.corruptions import GaussianBlur
from diffem.diagnostics import Score
from diffem.guard import Guard

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_tables_are_those_of_the_results(module, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["table.py", "--check"])
    assert module("table").main() == 0


def test_budgets_are_spent_and_not_exceeded(module):
    compare, n, budget = module("compare"), 1797, 1_200_000
    for name, method in compare.METHODS.items():
        if name == "start":
            continue
        settings = [*compare.TASKS["digits-mask75"].settings.items(), *method.settings.items()]
        settings = [(k, v) for k, v in settings if not v.startswith("{examples")]
        config = load("digits", settings)
        planned = load("digits", [*settings, *compare.plan(config, method, n, budget).items()])
        # what EM does: the first M-step, the others, an E-step each, and perhaps a last one over everything
        draw = planned.sampler.evaluations * n
        k, steps, first = planned.em.iterations, planned.m_step.steps, planned.m_step.first_steps
        anew = planned.m_step.reinitialise
        spent = 3 * planned.m_step.batch * ((1 + anew) * first + (k - 1 - anew) * steps) + k * planned.em.refresh * draw
        more = planned.e_step.ratio or planned.em.refresh < 1
        spent += draw if more and not method.single else 0
        another = planned.em.refresh * draw + 3 * planned.m_step.batch * (1 if method.single else steps)
        assert spent <= budget < spent + another + 2, name


def test_methods_come_after_those_that_they_go_on_from(module):
    compare = module("compare")
    assert compare._order(["em-mmps+diffem"]) == ["start", "em-mmps", "em-mmps+diffem"]
    assert compare._order(["diffem", "clean"]) == ["start", "clean", "diffem"]


def test_the_replay_of_patience_ends_where_the_guard_does(module):
    noise, ones, same = torch.randn(64, generator=torch.Generator().manual_seed(0)), torch.ones(64), torch.zeros(100)
    score = lambda crps, ratio: Score("crps", crps + 0.001 * noise, ratio * ones, ones, 0 * ones)  # noqa: E731
    ends = set()
    for seed in range(30):  # falls until some iteration, with steps up between
        crps = 0.4 + 0.05 * torch.rand(30, generator=torch.Generator().manual_seed(seed))
        crps = crps - 0.01 * torch.arange(30).clamp(max=seed)
        for patience in (2, 5):
            config = load(overrides=[("em.patience", str(patience)), ("e_step.sharp", "0")])
            endless = load(overrides=[("em.patience", "0"), ("e_step.sharp", "0")])
            start, points, best = score(0.45, 0.9), [{}], 0
            live, free = Guard.begin(config, start, same), Guard.begin(endless, start, same)
            for k, mean in enumerate(crps.tolist(), 1):
                current = score(mean, 0.7 + 0.2 * (k % 3 == 0))
                points.append({"iteration": k, "dispersion": 1.0, **free.decide(k, current, same)})
                if not live.over:
                    best = k if live.decide(k, current, same)["best"] else best
            assert module("table").patient(points, patience) == best
            ends.add(best)
    assert len(ends) > 10


def test_richardson_lucy_deblurs(module):
    """It sharpens a blurred image of points, which a wrong adjoint or a missing division would not."""

    class Judge:  # what richardson_lucy asks of the real one
        corruption = GaussianBlur(1.0, 1e-6)
        clean = 16 * (torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.8).float()
        held_out = np.arange(3)
        clean_held_out = clean / 8 - 1

        @property
        def observations(self):
            return self

        def batch(self, rows):
            return self.corruption.forward(self.clean, {}), {}

        def scale(self, x):
            return x / 8 - 1

    judge = Judge()
    blurred = judge.scale(judge.batch(None)[0]) - judge.clean_held_out
    before = -10 * float((blurred.square().mean() / 4).log10())
    assert module("compare").richardson_lucy(judge, 100) > before + 3
