"""Runs whose models are known: no warning if they are those of the truth, the right ones if they are not."""

from __future__ import annotations

import html
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from diffem import seeding
from diffem.cli import main
from diffem.corruptions import RandomMask
from diffem.data import Dataset, Observations
from diffem.diagnostics import diagnose, score
from diffem.diagnostics.diagnose import warnings
from diffem.errors import DiffemError
from diffem.mixtures import Mixture
from diffem.posterior import Posterior
from diffem.samplers import MixtureSampler, ObservationSampler, sample_prior
from diffem.units import Units

SHAPE, N, UNITS = (16,), 1300, Units(0.0, 2.0)
CORRUPTION = RandomMask(0.5, 0.1)


def model(width: float = 1.0) -> Posterior:
    """The exact posterior of a Gaussian of rank 3, or of one of another width."""
    generator = torch.Generator().manual_seed(0)
    mean, factor = 0.3 * torch.randn(1, 16, generator=generator), 0.4 * torch.randn(1, 16, 3, generator=generator)
    mixture = Mixture(torch.zeros(1), mean, width * factor, torch.full((1, 16), 0.05 * width**2))
    return Posterior(MixtureSampler(CORRUPTION.scaled(UNITS), SHAPE, mixture), CORRUPTION, UNITS)


def make(run: Path, seed: int = 0, width: float = 1.0, held_out: int = 600) -> Observations:
    """A finished run, with models of this width."""
    x = UNITS.restore(sample_prior(model().sampler, seeding.item_seeds(seed, 0, "data", torch.arange(N))))
    y, params = CORRUPTION.observe(x, torch.Generator().manual_seed(seed))
    hidden = np.arange(N) < held_out
    data = Observations(y.numpy(), CORRUPTION, {"mask": params["mask"].numpy()}, held_out=hidden)
    data.save(run / "observations")
    posterior = model(width)
    for name in ("posterior", "prior"):
        posterior.save_pretrained(run / name)
    np.save(run / "reconstructions.npy", posterior.reconstruct(data, np.arange(N), 1, seed)[0].numpy())
    found = score(posterior.sampler, Dataset(data, UNITS), data.split(seed)[2], seed, splits=2)
    row = {"iteration": 0, "score_name": "crps", "score": found.mean, "score_se": found.standard_error, "best": True}
    row |= {"ratio": found.ratio, "ratio_se": found.ratio_error, "accepted": True}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    config = {"em": {"seed": seed}, "facts": {"digest": data.digest()}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return data


def test_models_of_the_truth_have_no_warning(tmp_path):
    warned = []
    for seed in range(6):
        found = diagnose(tmp_path, make(tmp_path, seed))
        warned += found["warnings"]
    # about one run in ten has an interval that is off by two standard errors of its coverage, by chance
    assert len(warned) <= 1
    assert all("% intervals hold " in text for text in warned)
    assert found["items"] == 256
    assert found["coverage"]["observations"] == 64
    for level, share, error in zip(*(found["coverage"][k] for k in ("levels", "shares", "errors")), strict=True):
        assert abs(share - level) < 3 * error < 0.2
    assert "self_consistency" not in found
    full = diagnose(tmp_path, make(tmp_path, seed), full=True)
    assert full["warnings"] == []
    assert full["coverage"]["observations"] == 128
    assert full["self_consistency"]["p_value"] > 0.01


@pytest.mark.parametrize(("width", "said"), [(0.6, "intervals are too short"), (1.7, "intervals are too long")])
def test_models_that_are_too_narrow_or_too_wide(width, said, tmp_path):
    found = diagnose(tmp_path, make(tmp_path, width=width), full=True)
    text = " | ".join(found["warnings"])
    assert said in text
    assert "re-corrupted prior samples differ from the observations by " in text
    assert ("the prior samples are too much alike" in text) == (width < 1)
    assert ("the posterior draws vary" in text) == (width < 1)
    assert "simulated" not in text  # they fit each other: self-consistency is not truth
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_validation_observations_do_not_report(tmp_path):
    data = make(tmp_path)
    _, validation, test = data.split(0)
    whole = diagnose(tmp_path, data)
    for rows, same in ((validation, True), (test, False)):
        poisoned = make(tmp_path)
        poisoned.y[rows] += 5 * (poisoned.y[rows] != 0)
        (tmp_path / "config.yaml").write_text(
            yaml.safe_dump({"em": {"seed": 0}, "facts": {"digest": poisoned.digest()}})
        )
        found = diagnose(tmp_path, poisoned)
        for name in ("coverage", "divergence", "collapse"):
            assert (found[name] == whole[name]) == same, name


def test_words():
    coverage = {"levels": [0.5, 0.8, 0.95], "shares": [0.45, 0.61, 0.9], "errors": [0.01, 0.02, 0.04]}
    assert warnings({"coverage": coverage}) == [
        "intervals are too short: 80% intervals hold 61% of the hidden entries; the uncertainty is larger than the draws"
        " vary: train longer, check the declared noise, or take the coverage in the report for the level of an interval"
    ]
    assert warnings({"coverage": {**coverage, "errors": [0.1] * 3}}) == []  # so few entries do not say so
    wide = {**coverage, "shares": [0.59, 0.81, 0.94], "errors": [0.01, 0.01, 0.01]}
    assert warnings({"coverage": wide}) == [
        "intervals are too long: 50% intervals hold 59% of the hidden entries; the uncertainty is smaller than the draws"
        " vary: check the declared noise, or take the coverage in the report for the level of an interval"
    ]
    narrow = {"spread": {"value": 0.8, "error": 0.05, "warning": None}}
    assert warnings({"coverage": wide, "collapse": narrow}) == [
        "the distribution of the draws has the wrong shape: of the hidden entries 50% intervals hold 59%, 80% intervals hold 81%,"
        " 95% intervals hold 94%, and the calibration ratio is 0.80; choose the level of an interval by the coverage that the"
        " report shows, not by its name"
    ]
    unsure = {"spread": {"value": 0.8, "error": 0.2, "warning": None}}
    assert warnings({"coverage": wide, "collapse": unsure}) == warnings({"coverage": wide})
    tails = {**wide, "shares": [0.59, 0.78, 0.9]}
    assert warnings({"coverage": tails}) == [
        "the distribution of the draws has the wrong shape: of the hidden entries 50% intervals hold 59%, 80% intervals hold 78%,"
        " 95% intervals hold 90%; choose the level of an interval by the coverage that the report shows, not by its name"
    ]
    table = {"energy_distance": 0.02, "entries": 0.045, "pairs": 9.0, "p_value": 0.003}
    table |= {"energy_distance_p_value": 0.2, "entries_p_value": 0.001, "pairs_p_value": 0.001}
    assert warnings({"divergence": {"reconstructions": table}}) == [
        "re-corrupted reconstructions differ from the observations by 4.5% of the distance between two of them (energy distance"
        " of single entries); is the declared corruption the true one? `diffem check` tells what it can"
    ]
    assert warnings({"divergence": {"prior": {**table, "entries": 0.02}}}) == []  # sure, but too small to matter
    assert warnings({"divergence": {"prior": {**table, "entries_p_value": 0.02}}}) == []  # large, but not sure
    tarp = {"p_value": 1e-9, "tarp": {"deviation": -0.12}}
    assert warnings({"self_consistency": tarp}) == [
        "on observations simulated from the prior, credible regions of the posterior are off by 12%: posterior and prior do not"
        " fit each other, so do not use both for one conclusion"
    ]
    assert warnings({"self_consistency": {**tarp, "tarp": {"deviation": 0.03}}}) == []


def test_command(tmp_path, capsys):
    make(tmp_path, width=0.6)
    (tmp_path / "run.json").write_text('{"run": "diffem"}')
    assert main(["diagnose", str(tmp_path), "--device", "cpu"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert main(["diagnose", str(tmp_path), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert said == [f"warning: {text}" for text in found["warnings"]]
    assert json.loads((tmp_path / "diagnostics.json").read_text()) == found
    page = (tmp_path / "report.html").read_text()
    assert all(f"<li>{html.escape(text)}</li>" in page for text in found["warnings"])
    make(tmp_path, seed=1)
    assert main(["diagnose", str(tmp_path), "--device", "cpu"]) == 0
    assert "diagnostics: nothing is wrong" in capsys.readouterr().out
    assert "and held-out observations show nothing wrong." in (tmp_path / "report.html").read_text()


def test_too_few_held_out_observations_say_nothing(tmp_path):
    found = diagnose(tmp_path, make(tmp_path, width=0.6, held_out=21))
    assert found["warnings"] == ["11 test observations are too few to say whether all is well; it takes 16"]
    assert set(found) == {"iteration", "items", "seconds", "warnings"}


def test_few_observations_hide_neither_draws_that_agree_nor_a_tiny_ratio(tmp_path):
    few = "11 test observations are too few to say whether all is well; it takes 16"
    data = make(tmp_path, width=0.02, held_out=21)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["ratio"] < 0.1
    narrow = f"the posterior draws vary {row['ratio']:.2f} times as much as their errors say that they should: read their intervals as too narrow"
    assert diagnose(tmp_path, data)["warnings"] == [narrow, few]
    start = Posterior(ObservationSampler(CORRUPTION.scaled(UNITS), data.shape), CORRUPTION, UNITS)
    start.save_pretrained(tmp_path / "posterior")
    same = (
        "all draws of an observation are equal, so that its standard deviation is 0: the run kept its start, which has no"
        " uncertainty (the observation, or its inverse); train longer, with more m_step.steps"
    )
    assert diagnose(tmp_path, data)["warnings"] == [same, narrow, few]
    whole = make(tmp_path)
    start.save_pretrained(tmp_path / "posterior")
    assert diagnose(tmp_path, whole)["warnings"][0] == same


def test_the_largest_width_is_told(tmp_path):
    data = make(tmp_path)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    for width, said in ((6.0, []), (9.0, [
        "the final draws got the largest width, 9, since the network explained too little: single draws may look"
        " grainy where nothing was measured; train longer, with more m_step.steps or em.iterations"
    ])):  # fmt: skip
        (tmp_path / "metrics.jsonl").write_text(json.dumps({**row, "width": width}) + "\n")
        assert diagnose(tmp_path, data)["warnings"] == said


def test_mistakes(tmp_path):
    make(tmp_path / "run")
    other = make(tmp_path / "other", seed=1)
    with pytest.raises(DiffemError, match="are not the observations that"):
        diagnose(tmp_path / "run", other)
    with pytest.raises(DiffemError, match="is not a finished run"):
        diagnose(tmp_path, other)
