"""The benchmarks: their tables are those of their results, and the methods are given equal budgets."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffem.config import load_config
from diffem.corruptions import GaussianBlur, RandomMask
from diffem.data import Observations
from diffem.samplers import trained_kind
from diffem.units import Units

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
        config = load_config("digits", settings)
        planned = load_config("digits", [*settings, *compare.plan(config, method, n, budget).items()])
        # what EM does: the first M-step, the others, an E-step each, and perhaps a last one over everything
        kind, renoise = trained_kind(planned.sampler), planned.em.renoise
        draw, renoised = (kind.evaluations(planned.sampler, later) * n for later in (False, renoise))
        k, steps, first = planned.em.iterations, planned.m_step.steps, planned.m_step.first_steps
        spent = 3 * planned.m_step.batch * (first + (k - 1) * steps)
        spent += planned.em.refresh * (draw + (k - 1) * renoised)
        spent += draw if (planned.em.guard or planned.em.refresh < 1 or renoise) and not method.single else 0
        another = planned.em.refresh * renoised + 3 * planned.m_step.batch * (1 if method.single else steps)
        if name == "paper":  # one iteration of it takes more than the budget
            assert k == 1
            assert planned.m_step.batch * steps == pytest.approx(256 * n, abs=planned.m_step.batch)
        else:
            assert spent <= budget < spent + another + 2, name


def test_methods_come_after_those_that_they_go_on_from(module):
    compare = module("compare")
    assert compare._order(["em-mmps+diffem"]) == ["start", "em-mmps", "em-mmps+diffem"]
    assert compare._order(["splitting", "diffem", "clean"]) == ["start", "clean", "diffem", "splitting"]


def test_evaluations_to_the_quality_of_plain_em(module):
    def result(seed, *points):
        return {"seed": seed, "curve": [{"crps": c, "evaluations": e, "last": last} for c, e, last in points]}

    end = (0.1, 90, True)  # what a run ends with is scored on other observations
    runs = {
        "lambda1": [
            result(0, (5, 0, False), (4, 40, False), (3, 80, False), end),
            result(1, (5, 0, False), (2, 100, False)),
        ],
        "diffem": [result(0, (5, 0, False), (2.9, 20, False)), result(1, (5, 0, False), (2.1, 20, False), end)],
        "worse": [result(0, (5, 0, False), (3.1, 80, False), end)],
        "splitting": [{"seed": 0, "curve": []}],
    }
    assert module("table").reached(runs) == ["1.00", "0.25 (1 of 2)", "never", "–"]


def test_way_from_start_to_clean(module):
    columns = {"start": {"crps": 0.2}, "half": {"crps": 0.15}, "clean": {"crps": 0.1}, "none": {}}
    assert module("table").way(columns, "crps") == ["0 %", "50 %", "100 %", "–"]


def test_splitting_learns_the_mean_of_what_is_hidden(module, monkeypatch):
    """Two pixels that are always equal: E[x | y] of a hidden one is the other, which only a network that was scored on hidden
    pixels knows."""
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.rand(400, 1, generator=generator) - 1).expand(-1, 8).clone()
    mask = torch.rand(400, 8, generator=generator) < 0.5
    data = Observations(np.where(mask, x, 0).astype("f"), RandomMask(0.5, 0.0), {"mask": mask.numpy()}, (-1, 1))
    config = load_config("digits", [("network.kind", "mlp"), ("network.width", "64"), ("m_step.batch", "64")])
    estimate = module("splitting").train(data, config, seed=0, budget=3 * 64 * 400)
    *_, test = data.split(0)
    y, params = data.batch(test)
    found, hidden = estimate(y, params), ~params["mask"] & params["mask"].any(1, keepdim=True)
    assert (found - x[test])[hidden].square().mean() < 0.1 * x[test][hidden].square().mean()


def test_richardson_lucy_deblurs(module):
    """It sharpens a blurred image of points, which a wrong adjoint or a missing division would not."""

    class Judge:  # what richardson_lucy asks of the real one
        corruption = GaussianBlur(1.0, 1e-6)
        clean = 16 * (torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.8).float()
        test = np.arange(3)
        clean_test, units = clean / 8 - 1, Units(8.0, 8.0)

        @property
        def observations(self):
            return self

        def batch(self, rows):
            return self.corruption.forward(self.clean, {}), {}

    judge = Judge()
    blurred = judge.units.scale(judge.batch(None)[0]) - judge.clean_test
    before = -10 * float((blurred.square().mean() / 4).log10())
    assert module("compare").richardson_lucy(judge, 100) > before + 3
