"""The decisions that validation observations make, on scores that are made up."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffem.diagnostics import Score
from diffem.selection import GATE, Selection, to_start

N = 64
NOISE = torch.randn(N, generator=torch.Generator().manual_seed(0))
NOISE = (NOISE - NOISE.mean()) / NOISE.std()


def box(mean: float, noise: float = 0.0) -> Score:
    """Of a black box: no spread, so that the criterion is the mean; its standard error is noise / 8."""
    return Score("energy_distance", mean + noise * NOISE)


def scored(crps: float, ratio: float = 0.9, noise: float = 0.0) -> Score:
    """A score whose criterion is known: log CRPS + (log ratio + 1 / ratio) / 2, for V = ratio, E = 1, C = 0."""
    ones = torch.ones(N)
    return Score("crps", crps * (1 + noise * NOISE), ratio * ones, ones, 0 * ones)


def selection(start: Score, guard: bool = True, patience: int = 0) -> Selection:
    return Selection.begin(guard, patience, start)


def test_made_up_scores_have_the_error_that_they_say():
    assert box(0.3, 0.08).criterion == pytest.approx(0.3)
    assert box(0.3, 0.08).criterion_difference(box(0.2))[1] == pytest.approx(0.01)
    assert scored(0.4, 0.5).criterion == pytest.approx(-0.9163 + (-0.6931 + 2) / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("mean", "accepted", "best"),
    [(0.38, True, True), (0.3999, True, True), (0.4001, True, False), (0.4199, True, False), (0.4201, False, False)],
)
def test_accepted_within_two_standard_errors_and_best_if_smaller(mean, accepted, best):
    found = selection(box(0.4))
    verdict = found.decide(box(mean, noise=0.08))  # the difference has a standard error of 0.01
    assert GATE == 2
    assert (verdict["accepted"], verdict["best"]) == (accepted, best)
    assert verdict["criterion_delta"] == pytest.approx(mean - 0.4, abs=1e-6)
    assert verdict["criterion_delta_se"] == pytest.approx(0.01, rel=1e-4)
    assert found.best.mean == pytest.approx(mean if best else 0.4)
    assert set(verdict) == {
        *("accepted", "best", "criterion_delta", "criterion_delta_se", "start_delta", "start_delta_se")
    }


def test_the_error_is_that_of_pairs():
    # both vary by far more than they differ, but by the same amounts
    found = selection(box(0.4, noise=1.0))
    assert not found.decide(box(0.401, noise=1.0001))["accepted"]
    assert found.decide(box(0.401, noise=-1.0))["accepted"]


def test_the_start_is_the_first_to_beat():
    found = selection(box(0.3))
    verdicts = [
        found.decide(box(mean, noise)) for mean, noise in ((0.315, 0.08), (0.301, 0.08), (0.299, 0.08), (0.3, 0.1))
    ]
    assert [v["accepted"] for v in verdicts] == [True] * 4
    assert [v["best"] for v in verdicts] == [False, False, True, False]
    assert found.first.mean == pytest.approx(0.3)


def test_the_best_is_the_one_to_compare_with_and_the_start_is_remembered():
    found = selection(box(0.5))
    found.decide(box(0.4))
    found.decide(box(0.45, noise=1.0))  # accepted, but no better: the next one is not compared with it
    verdict = found.decide(box(0.39, noise=0.16))
    assert verdict["criterion_delta"] == pytest.approx(-0.01, abs=1e-6)
    assert verdict["start_delta"] == pytest.approx(-0.11, abs=1e-6)
    assert verdict["start_delta_se"] == pytest.approx(0.02, rel=1e-4)


def test_small_steps_add_up():
    # 0.01 worse each, within the error of 0.02 of the one before; the best before all of them decides
    found = selection(box(0.4))
    verdicts = [found.decide(box(0.4 + k / 100, noise=0.16))["accepted"] for k in range(1, 7)]
    assert verdicts == [True, True, True, True, False, False]


def test_draws_that_are_too_narrow_are_refused_although_their_crps_is_less():
    found = selection(scored(0.5, ratio=0.8))
    narrow = found.decide(scored(0.48, ratio=0.3, noise=0.08))
    assert narrow["start_delta"] == pytest.approx(-0.02, abs=1e-6)  # of the score
    assert narrow["criterion_delta"] == pytest.approx(scored(0.48, 0.3).criterion - scored(0.5, 0.8).criterion)
    assert (narrow["accepted"], narrow["best"]) == (False, False)
    assert found.decide(scored(0.48, ratio=0.9))["best"]


def test_start_delta_is_that_of_the_score():
    other = scored(0.4, ratio=0.5, noise=0.1)
    verdict = selection(scored(0.5)).decide(other)
    assert verdict["start_delta"] == pytest.approx(-0.1, abs=1e-6)
    assert verdict["start_delta_se"] == pytest.approx(0.4 * 0.1 / 8, rel=1e-4)
    assert to_start(other, scored(0.5)) == {k: verdict[k] for k in ("start_delta", "start_delta_se")}


def test_patience_counts_iterations_since_the_best():
    found, over, accepted = selection(box(0.5), patience=3), [], []
    for mean, noise in (
        (0.6, 0.0),
        (0.6, 0.0),
        (0.4, 0.0),
        (0.6, 0.0),
        (0.401, 0.08),
        (0.399, 0.0),
        (0.6, 0.0),
        (0.4, 0.08),
        (0.4, 0.08),
    ):
        accepted.append(found.decide(box(mean, noise))["accepted"])
        over.append(found.over)
    assert accepted == [False, False, True, False, True, True, False, True, True]
    assert over == [False] * 8 + [True]  # accepted or not: what counts is the best


def test_no_patience_never_ends():
    found = selection(box(0.5), patience=0)
    for _ in range(50):
        assert not found.decide(box(0.9))["accepted"]
        assert not found.over
    assert found.stale == 50


def test_without_a_guard_all_are_accepted_and_the_last_is_the_best():
    found = selection(box(0.4), guard=False, patience=1)
    for k in range(1, 9):
        verdict = found.decide(box(0.4 + k))
        assert (verdict["accepted"], verdict["best"], found.over) == (True, True, False)
        assert verdict["criterion_delta"] == pytest.approx(0.4 + k - (0.4 if k == 1 else k - 0.6), abs=1e-5)
        assert verdict["start_delta"] == pytest.approx(k, abs=1e-5)
    assert found.best.mean == pytest.approx(8.4)


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("make", [box, scored])
def test_invariant_5_a_criterion_that_is_not_a_number_is_refused(make, guard):
    found = selection(make(0.4), guard=guard)
    one = make(0.3).items.clone()
    one[5] = torch.nan  # of a single observation
    nothing = {k: v * torch.nan for k, v in make(0.3).tensors.items()}
    for k, parts in enumerate(({"items": one}, nothing), 1):
        verdict = found.decide(dataclasses.replace(make(0.3), **parts))
        assert (verdict["accepted"], verdict["best"], found.stale) == (False, False, k)
        assert verdict["criterion_delta"] != verdict["criterion_delta"]
    assert found.best.mean == pytest.approx(0.4)


@pytest.mark.parametrize("make", [box, scored])
def test_it_is_rebuilt_from_what_a_checkpoint_holds(make):
    found = selection(make(0.5, noise=0.3), patience=4)
    for mean in (0.4, 0.45, 0.48):
        found.decide(make(mean, noise=0.2))
    assert found.stale == 2
    again = Selection.load(True, 4, dict(found.facts), {"network.weight": torch.ones(2), **found.tensors})
    assert (again.guard, again.patience, again.stale) == (True, 4, 2)
    for which in ("first", "best"):
        one, two = getattr(found, which), getattr(again, which)
        assert one.name == two.name
        assert one.tensors.keys() == two.tensors.keys() == ({"items"} if make is box else set(one.tensors))
        assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors)
    assert len(found.tensors) == (2 if make is box else 8)
    for mean in (0.43, 0.39, 0.5):
        assert again.decide(make(mean, noise=0.1)) == found.decide(make(mean, noise=0.1))
        assert (again.stale, again.over) == (found.stale, found.over)


def test_a_finite_score_beats_a_start_that_has_none():
    found = selection(box(torch.nan))
    assert not found.decide(box(torch.nan))["best"]
    verdict = found.decide(box(0.9))
    assert (verdict["accepted"], verdict["best"]) == (True, True)
    assert not found.decide(box(1.0))["best"]  # and is what later ones are compared with


def test_draws_that_agree_and_are_wrong_have_the_worst_criterion():
    same = Score("crps", 0.3 * torch.ones(N), torch.zeros(N), torch.ones(N), torch.zeros(N))
    assert same.criterion == torch.inf
    found = selection(same)
    assert not found.decide(same)["best"]
    assert found.decide(scored(5.0))["best"]
    assert not found.decide(same)["accepted"]
