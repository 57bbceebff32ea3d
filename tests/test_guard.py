"""The guard's decisions on scores that are made up."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from diffem import config as configuration
from diffem.diagnostics import Score
from diffem.guard import WIDEST, Guard, compare

SAME = torch.zeros(100)


def scored(crps: float, ratio: float = 0.5, noise: float = 0.01) -> Score:
    """A score of many draws, whose paired differences have a standard error of their own."""
    generator = torch.Generator().manual_seed(round(1000 * crps))
    items, ones = crps * (1 + noise * torch.randn(64, generator=generator)), torch.ones(64)
    return Score("crps", items, ratio * ones, ones, 0 * ones)


def guard(first: Score, **sections) -> Guard:
    em = {"iterations": 20, "patience": 3, **sections.pop("em", {})}
    return Guard.begin(configuration.from_dict({"em": em, "e_step": sections}), first, SAME)


def test_accepted_within_two_standard_errors_of_the_least():
    found = guard(scored(0.5))
    verdict = found.decide(1, scored(0.4), SAME)
    assert (verdict["accepted"], verdict["best"]) == (True, True)
    assert (verdict["delta"], verdict["delta_se"]) == scored(0.4).difference(scored(0.5))
    assert (verdict["criterion_delta"], verdict["criterion_delta_se"]) == scored(0.4).criterion_difference(scored(0.5))
    assert (verdict["start_delta"], verdict["start_delta_se"]) == scored(0.4).difference(scored(0.5))
    for factor, accepted in ((1.004, True), (1.02, False), (1.25, False)):
        verdict = found.decide(2, scored(0.4 * factor), SAME)
        assert (verdict["accepted"], verdict["best"]) == (accepted, False)
        assert accepted == (verdict["delta"] <= 2 * verdict["delta_se"])
    assert found.lowest.mean == found.best.mean == pytest.approx(0.4, abs=0.005)


def test_the_start_is_the_best_until_an_iteration_is_no_worse():
    found = guard(scored(0.4))
    # twice worse than it, then within the error, then a smaller criterion, and one that is not smaller
    verdicts = [found.decide(k, scored(crps), SAME) for k, crps in enumerate((0.405, 0.404, 0.4006, 0.399, 0.4), 1)]
    assert [v["accepted"] for v in verdicts] == [False, False, True, True, True]
    assert [v["best"] for v in verdicts] == [False, False, True, True, False]


def of_mean(crps: float, spread: float) -> Score:
    """A score of that mean exactly, with an error of spread / 8."""
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(scored(crps, 0.9), items=crps + spread * (noise - noise.mean()))


def test_patience_counts_what_iterations_gain_on_each_other_not_on_the_start():
    found = guard(of_mean(0.4, spread=0.8), em={"patience": 2}, sharp=0.0)
    for k in range(1, 9):  # none undercuts the start, whose difference from them has an error of 0.1
        verdict = found.decide(k, of_mean(0.5 - k / 100, spread=0.0), SAME)
        assert (verdict["accepted"], verdict["best"], found.over) == (True, True, False)
        assert verdict["delta"] == pytest.approx(-0.01 if k > 1 else 0.09, abs=1e-6)
    for k in (9, 10):
        assert not found.decide(k, of_mean(0.42, spread=0.0), SAME)["best"]
    assert found.over


def test_against_the_start_the_best_iteration_needs_a_smaller_criterion():
    found, start = guard(scored(0.4)), of_mean(0.4, spread=0.02)
    for crps, better in ((0.39, True), (0.399, True), (0.401, False), (0.41, False)):
        assert found.outdoes(compare(of_mean(crps, spread=0.01), SAME, start, SAME)) == better
    far = torch.linspace(0.1, 0.2, 100)
    assert not found.outdoes(compare(of_mean(0.399, spread=0.01), far, start, SAME))
    free = guard(scored(0.4), em={"guard": False})
    assert free.outdoes(compare(of_mean(0.41, spread=0.01), SAME, start, SAME))


def outdoes(criterion: float, divergence: float, ratio: float) -> bool:
    """Whether an iteration outdoes the start, by differences in standard errors."""
    pairs = {"criterion": criterion, "divergence": divergence, "ratio": ratio}
    found = {f"{k}_delta_se": 0.01 for k in pairs} | {f"{k}_delta": 0.01 * v for k, v in pairs.items()}
    return guard(scored(0.4)).outdoes(found)


def test_against_the_start_criterion_and_divergence_decide_a_tie():
    # of a mask of 75 % and of 90 %, 43 iterations: the ratio is farther from 1, which the criterion knows of
    assert outdoes(-3.9, 1.4, 2.3)
    assert outdoes(-1.9, 1.4, 2.3)
    assert not outdoes(-0.2, 1.4, 0.2)
    assert outdoes(1.0, -1.1, 1.9)
    assert not outdoes(1.2, -1.1, 1.9)
    # of a mask of 90 % that was taken for 85: a smaller divergence does not speak for draws that are narrower
    assert outdoes(1.8, -3.0, 1.9)
    assert not outdoes(1.8, -3.0, 2.1)
    assert outdoes(-0.1, -3.0, 2.1)
    # what is worse by two errors cannot be made up for
    assert not outdoes(2.1, -9.0, 0.0)
    assert not outdoes(-1.9, 2.1, 0.0)
    assert outdoes(-2.1, 9.0, 9.0)


def test_narrow_draws_train_but_are_not_the_best_although_their_crps_is_less():
    found = guard(scored(0.5, ratio=0.8))
    narrow = found.decide(1, scored(0.48, ratio=0.3), SAME)
    assert narrow["start_delta"] < 0
    assert (narrow["accepted"], narrow["best"]) == (True, False)
    assert narrow["criterion_delta"] == pytest.approx(
        math.log(0.48 / 0.5) + (math.log(0.3 / 0.8) + 1 / 0.3 - 1 / 0.8) / 2, abs=0.005
    )
    wide = found.decide(2, scored(0.481, ratio=0.95), SAME)
    assert (wide["accepted"], wide["best"]) == (True, True)


def test_dispersion_is_none_at_first_and_then_what_the_ratio_asks_for():
    found = guard(scored(0.5), sharp=0.1, sharp_ratio=0.0, dispersion=1.0, ratio=0.9, gain=2.0)
    used = []
    for k, ratio in enumerate((0.3, 0.3, 0.5, 0.6, 1.5, 9.0, 0.1, 0.01, 0.01), 1):
        used.append(found.width(k))
        found.decide(k, scored(0.5 - k / 100, ratio), SAME)
    assert used == pytest.approx([0, 0, 1, 1.8, 1.6, 1, 1, 2.6, 2.78])


def test_a_low_ratio_ends_the_sharp_part():
    found = guard(scored(0.5), sharp=0.5, sharp_ratio=0.6)
    used = []
    for k, ratio in enumerate((0.8, 0.61, 0.59, 0.95, 0.95), 1):
        used.append(found.width(k))
        found.decide(k, scored(0.5 - k / 100, ratio), SAME)
    assert used == [0, 0, 0, 1, 1]
    assert found.sharp == 3


def test_dispersion_has_a_limit():
    found = guard(scored(0.5), sharp=0.0, gain=100.0)
    found.decide(1, scored(0.4, 0.1), SAME)
    assert found.width(2) == WIDEST


def test_gain_of_none_and_a_black_box_leave_the_dispersion():
    for score, gain in ((scored(0.4, 0.3), 0.0), (Score("energy_distance", torch.linspace(0, 1, 9)), 2.0)):
        found = guard(score, sharp=0.0, dispersion=0.7, gain=gain)
        found.decide(1, score, SAME)
        assert found.width(2) == 0.7


def test_a_black_box_is_judged_by_the_divergence_once_its_error_allows():
    generator = torch.Generator().manual_seed(0)

    def divergence(mean: float) -> torch.Tensor:  # with a standard error of 0.01, 0.014 in a difference
        noise = torch.randn(400, generator=generator)
        return mean + 0.2 * (noise - noise.mean())

    def box(mean: float) -> Score:
        return Score("energy_distance", mean + 0.01 * torch.randn(64, generator=generator))

    em = {"iterations": 20, "patience": 3}
    found = Guard.begin(configuration.from_dict({"em": em, "e_step": {"sharp": 0}}), box(0.1), divergence(0.5))
    verdicts = [found.decide(k, box(0.1), divergence(d)) for k, d in enumerate((0.4, 0.36, 0.35, 0.34, 0.38), 1)]
    assert [v["best"] for v in verdicts] == [True, True, False, False, False]
    assert found.over
    found.over, found.stale = False, 0
    assert found.decide(6, box(0.1), divergence(0.31))["best"]  # small steps add up
    assert not found.decide(7, box(0.2), divergence(0.2))["accepted"]


def test_patience_ends_the_sharp_part_and_then_the_run():
    found = guard(scored(0.5, 0.9), sharp=0.5, sharp_ratio=0.0, dispersion=1.0, gain=0.0)
    widths, over = [], []
    for k, crps in enumerate((0.45, 0.4, 0.45, 0.44, 0.43, 0.45, 0.45, 0.45), 1):
        widths.append(found.width(k))
        found.decide(k, scored(crps, 0.9), SAME)
        over.append(found.over)
    assert widths == [0.0] * 5 + [1.0] * 3  # the best was the second: 3, 4 and 5 were in vain
    assert over == [False] * 7 + [True]


def test_no_patience_goes_on():
    found = guard(scored(0.5), em={"patience": 0}, sharp=0.5, sharp_ratio=0.0)
    for k in range(1, 20):
        found.decide(k, scored(0.9 - k / 50), SAME)
        assert not found.over
    assert found.sharp == 10


def test_a_score_that_does_not_fall_twice_in_a_row_ends_the_sharp_part():
    found = guard(scored(0.3, 0.9), em={"patience": 0}, sharp=1.0, sharp_ratio=0.0)
    used = []
    for k, crps in enumerate(
        (0.5, 0.51, 0.49, 0.5, 0.5, 0.4), 1
    ):  # worse than the start, which is another kind of draw
        used.append(found.width(k))
        found.decide(k, scored(crps, 0.9), SAME)
    assert (used, found.sharp) == ([0, 0, 0, 0, 0, 1], 5)
    free = guard(scored(0.3, 0.9), em={"guard": False}, sharp=1.0)
    for k in range(1, 9):
        free.decide(k, scored(0.5, 0.9), SAME)
    assert free.sharp == 20


def test_a_sharp_part_that_ends_no_better_than_it_began_is_undone():
    def undone(*scores: float, **sections) -> list[bool]:
        found = guard(scored(0.3, 0.9), em={"patience": 0}, **{"sharp": 1.0, "sharp_ratio": 0.0, **sections})
        return [found.decide(k, scored(crps, 0.5), SAME)["undone"] for k, crps in enumerate(scores, 1)]

    assert undone(0.5, 0.51, 0.52, 0.4, 0.53) == [False, False, True, False, False]
    assert undone(0.5, 0.48, 0.49, 0.51) == [False, False, False, True]
    assert undone(0.5, 0.4, 0.41, 0.42) == [False] * 4  # it paid
    assert undone(0.5, 0.51, 0.52, sharp_ratio=0.6) == [True, False, False]
    assert not any(undone(0.5, 0.51, 0.52, sharp=0.0))


def test_without_a_guard_all_are_accepted_and_the_last_is_the_best():
    found = guard(scored(0.4, 0.9), em={"guard": False, "patience": 1})
    for k in range(1, 20):
        verdict = found.decide(k, scored(0.9, 0.2), SAME)
        assert (verdict["accepted"], verdict["best"], found.over) == (True, True, False)
    assert found.best.mean == pytest.approx(0.9, abs=0.01)


def test_it_is_rebuilt_from_what_a_checkpoint_holds():
    found = guard(scored(0.5))
    found.decide(1, scored(0.4), SAME)
    found.decide(2, scored(0.45), SAME)
    again = Guard.load(found.config, dict(found.facts), found.tensors)
    assert again.facts == found.facts
    assert again.decide(3, scored(0.43), SAME) == found.decide(3, scored(0.43), SAME)
    box = Guard.begin(found.config, Score("energy_distance", torch.ones(3)), SAME)
    again = Guard.load(box.config, dict(box.facts), box.tensors)
    assert (again.first.spread, again.lowest, again.best) == (None, None, None)
    assert set(found.facts) == {f.name for f in dataclasses.fields(Guard)} - {
        "config",
        "first",
        "first_divergence",
        "lowest",
        "best",
        "divergence",
    } | {"name"}


def test_reconstructions_that_could_not_be_observed_are_not_the_best_unless_the_posterior_is_better():
    far = torch.linspace(-1, 1, 100) + 0.3  # 0.3 +- 0.058
    found = Guard.begin(guard(scored(0.5)).config, scored(0.5), far)
    verdict = found.decide(1, scored(0.4), far - 0.2)
    assert verdict["best"]
    assert verdict["divergence_delta"] == pytest.approx(-0.2)
    noise = far.flip(0) - 0.3
    for shift, score, best in ((0.13, 0.399, False), (-0.1, 0.399, True), (0.13, 0.39, True)):
        verdict = found.decide(2, scored(score), found.divergence + shift + noise)
        assert verdict["divergence_delta"] == pytest.approx(shift, rel=1e-4)
        assert verdict["divergence_delta_se"] == pytest.approx(0.0586, rel=0.01)
        assert (verdict["accepted"], verdict["best"]) == (True, best)


@pytest.mark.parametrize("signs", list(itertools.product((-1, 0, 1), repeat=3)))
def test_differences_in_standard_errors_are_added_up_in_a_tie(signs):
    def better(**factors: float) -> bool:  # each by half of its standard error, or by a factor of it
        errors = {"criterion": 0.1, "divergence": 0.2, "ratio": 0.3}
        found = {f"{k}_delta_se": error for k, error in errors.items()}
        found |= {f"{k}_delta": e * factors.get(k, s / 2) for (k, e), s in zip(errors.items(), signs, strict=True)}
        return guard(scored(0.5))._better(found)

    assert better() == (sum(signs) < 0)
    assert better(criterion=-2.1)
    for name in ("criterion", "divergence", "ratio"):
        assert not better(**{name: 2.1})


def test_an_iteration_is_compared_with_the_best_before():
    for ratio, best in ((0.85, True), (1.1, True), (0.75, False), (1.3, False)):
        found = guard(scored(0.5, ratio=0.8))
        assert found.decide(1, scored(0.5, ratio=0.8), SAME)["best"]
        verdict = found.decide(2, scored(0.492, ratio=ratio, noise=0.5), SAME)
        assert abs(verdict["criterion_delta"]) < 2 * verdict["criterion_delta_se"]
        farther = max(abs(math.log(ratio)) - abs(math.log(0.9)), 0) - abs(math.log(0.8 / 0.9))
        assert verdict["ratio_delta"] == pytest.approx(farther, abs=1e-6)
        assert verdict["best"] == best


def test_between_calibrated_iterations_the_ratio_does_not_decide():
    for ratio, best in ((0.92, True), (1.1, True), (0.88, False), (1.14, False)):
        found = guard(scored(0.5, ratio=1.0))
        assert found.decide(1, scored(0.5, ratio=1.0), SAME)["best"]
        # one variance for every item: outside of the band a difference of ratios is beyond doubt
        verdict = found.decide(2, scored(0.492, ratio=ratio, noise=0.5), SAME)
        assert -2 * verdict["criterion_delta_se"] < verdict["criterion_delta"] < 0
        assert verdict["best"] == best
