"""The check before training: each finding is there where it is true, and only there."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from diffem import config as configuration
from diffem import judging
from diffem.clean import datasets
from diffem.cli import main
from diffem.corruptions import (
    BlackBox,
    Corruption,
    Fourier,
    GaussianBlur,
    GaussianNoise,
    PoissonGaussian,
    RandomMask,
    RandomProjection,
    Saturate,
)
from diffem.cost import forecast
from diffem.data import Observations
from diffem.diagnostics import Score
from diffem.diagnostics.check import Finding, check
from diffem.diagnostics.spectrum import Spectrum
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.samplers import DiffusionSampler
from diffem.trainer import Trainer

TINY = {
    "network": {"kind": "mlp", "width": 16, "depth": 1, "embedding": 16},
    "start": {"components": [1, 2], "ranks": [2]},
    "sampler": {"steps": 3},
    "em": {"iterations": 2},
    "m_step": {"first_steps": 30, "steps": 20},
    "prior": {"steps": 10},
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def found(observations: Observations) -> dict[str, Finding]:
    findings = check(observations)
    levels = [f.level for f in findings]
    assert levels == sorted(levels, key=("problem", "warning", "note").index)
    assert len({f.name for f in findings}) == len(findings)
    assert all("\n" not in f.text and f.text[-1] != "." for f in findings)
    return {f.name: f for f in findings}


def alarms(observations: Observations) -> set[str]:
    return {name for name, finding in found(observations).items() if finding.level != "note"}


def observe(x: np.ndarray, corruption: Corruption, declared: Corruption | None = None, **options):
    """Observations of items x; they are said to come about by `declared`."""
    y, params = corruption.observe(torch.from_numpy(x.astype(np.float32)), torch.Generator().manual_seed(0))
    arrays = {name: value.numpy() for name, value in params.items()}
    return Observations(y.numpy(), declared or corruption, arrays, **options)


def digits() -> np.ndarray:
    return datasets.load("digits").items


def images(n: int = 2000, size: int = 16) -> np.ndarray:
    """Smooth random images, (n, 1, size, size), about 0 to 255, none of whose pixels is constant."""
    position = (np.arange(size)[:, None] + 0.5) / size
    waves = np.cos(np.pi * position * np.arange(5)) / (1 + np.arange(5))
    return 128 + 25 * (waves @ rng(3).normal(size=(n, 1, 5, 5)) @ waves.T)


def features(n: int = 4000, d: int = 8) -> np.ndarray:
    """Correlated features that are all of the same size, (n, d)."""
    x = rng().normal(size=(n, d)) @ (np.eye(d) + 0.3 * rng(1).normal(size=(d, d)))
    return x / x.std(0)


def masked(y: np.ndarray, mask: np.ndarray, noise: float = 0.01) -> Observations:
    return Observations(y.astype(np.float32), RandomMask(round(1 - mask.mean(), 3), noise), {"mask": mask})


def half(n: int, d: int) -> np.ndarray:
    return rng(5).random((n, d)) > 0.5


# --- nothing in the way ------------------------------------------------------------------------------

HEALTHY = {
    "mask": lambda: observe(digits(), RandomMask(0.5, 0.08), range=(0, 16)),
    "mask-block": lambda: observe(digits(), RandomMask(0.75, 0.08, block=2), range=(0, 16)),
    "mask-90": lambda: observe(digits(), RandomMask(0.9, 0.0), range=(0, 16)),
    "mask-images": lambda: observe(images(), RandomMask(0.75, 5.0)),
    "mask-features": lambda: observe(features(), RandomMask(0.5, 0.1)),
    "noise": lambda: observe(digits(), GaussianNoise(1.0)),
    "noise-none": lambda: observe(digits(), GaussianNoise(0.0), range=(0, 16)),
    "blur": lambda: observe(digits(), GaussianBlur(1.0, 0.08), range=(0, 16)),
    "blur-images": lambda: observe(images(), GaussianBlur(2.0, 3.0)),
    "projection": lambda: observe(datasets.load("manifold", limit=4000).items, RandomProjection(2, 0.01)),
    "photons": lambda: observe(images(400, 32), PoissonGaussian(2.0, 3.0)),
    "photons-alone": lambda: observe(images(400, 32), PoissonGaussian(2.0)),
    "k-space": lambda: observe(images(400), Fourier("real", 3.0)),
    "box": lambda: Observations(features().astype(np.float32), BlackBox(torch.abs, "torch:abs")),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarms(name):
    assert alarms(HEALTHY[name]()) == set()


def k_space() -> np.ndarray:
    y, _ = Fourier("real", 3.0).observe(torch.from_numpy(images(400)).float(), torch.Generator().manual_seed(0))
    return y.numpy()


def test_a_zero_frequency_in_the_corner():
    corner = np.fft.ifftshift(k_space(), axes=(-2, -1))
    finding = found(Observations(corner, Fourier("real", 3.0)))["zero-frequency"]
    assert finding == Finding(
        "problem",
        "zero-frequency",
        "the zero frequency seems to be in the corner of y, and Fourier has it in the middle; apply fftshift to the spatial axes"
        " of y",
    )


def test_lines_of_k_space_that_were_not_measured():
    y, mask = k_space(), np.ones((400, 1, 1, 16), bool)
    mask[:, :, :, ::4] = False
    assert alarms(Observations(y, Fourier("real", 3.0), {"mask": mask})) == set()
    finding = found(Observations(y * mask, Fourier("real", 3.0)))["not-measured"]
    assert finding.level == "problem"
    assert finding.text == (
        "25 % of the values are exactly 0, which noise would not leave so; if these were not measured, hide"
        " them in mask.npy (true = observed)"
    )
    assert "not-measured" not in found(Observations(y * mask, Fourier("real", 0.0)))


@pytest.mark.parametrize(
    ("gain", "noise", "level"), [(2.0, 18.0, "warning"), (0.2, 3.0, "problem"), (9.0, 3.0, "problem")]
)
def test_photon_noise_that_is_not_that_of_the_data(gain, noise, level):
    finding = found(observe(images(400, 32), PoissonGaussian(2.0, 3.0), PoissonGaussian(gain, noise)))["photons"]
    assert finding.level == level
    parts = re.fullmatch(
        rf"declared gain {gain:g} and noise {noise:g} make a standard deviation of (\S+) where the observations show (\S+); they"
        r" fit `gain: (\S+)`, `noise: (\S+)`",
        finding.text,
    )
    assert float(parts[3]) == pytest.approx(2.0, rel=0.2)
    assert float(parts[2]) == pytest.approx(np.sqrt(2.0 * 200 + 9), rel=0.4)


def test_noise_in_other_units_is_found_where_values_are_clipped():
    y = np.clip(observe(images(200), GaussianNoise(20.0)).y / 255, 0.2, None).astype(np.float32)
    assert (y == y.min()).mean() > 0.01
    assert "noise-too-large" not in found(Observations(y, GaussianNoise(20.0 / 255)))
    finding = found(Observations(y, GaussianNoise(20.0)))["noise-too-large"]
    assert finding.level == "problem"
    assert finding.text == (
        f"declared noise 20, but the values vary by {y.std(dtype=np.float64):.3g} in all; it is a standard deviation, in the units of y"
    )


def test_whole_photons_only_where_there_is_no_read_noise():
    y = observe(images(50), PoissonGaussian(2.0)).y
    with pytest.raises(DiffemError, match="PoissonGaussian never makes"):
        Observations(np.asarray(y) + 0.5, PoissonGaussian(2.0))
    Observations(np.asarray(y) + 0.5, PoissonGaussian(2.0, 1.0))


def test_entries_that_no_observation_shows_are_found_where_each_is_observed_alone():
    mask = half(400, 8)
    mask[:, 3] = False
    y = np.where(mask, features(400), 0.0).clip(max=1.5).astype(np.float32)
    finding = found(Observations(y, Saturate(1.5, 0.1), {"mask": mask}))["never-observed"]
    assert finding.text.startswith("no observation shows entry [3], so that nothing can be learned there")


def test_photons_that_use_a_small_part_of_the_range():
    y = np.asarray(observe(images(400, 32), PoissonGaussian(2.0, 3.0)).y)
    finding = found(Observations(y, PoissonGaussian(2.0, 3.0), range=(0, 65535)))["range"]
    assert finding.level == "warning"
    assert re.fullmatch(
        r"the values use 0\.\d+ % of the stated `range: \[0, 65535\]`; models expect data that span it", finding.text
    )


def test_a_table_of_many_columns_may_be_series():
    text = "y is read as a table of 40 columns without an order; if they are points of a series add `axes: NT` to corruption.yaml"
    assert found(observe(features(400, 40), GaussianNoise(0.1)))["layout"] == Finding("note", "layout", text)
    assert "layout" not in found(observe(features(400, 40), GaussianNoise(0.1), axes="NF"))
    assert "layout" not in found(observe(features(400, 32), GaussianNoise(0.1)))


def test_too_few_observations_to_judge_by():
    finding = found(observe(images(200), GaussianNoise(5.0)))["too-few"]
    assert finding == Finding(
        "warning",
        "too-few",
        "10 validation and 10 test observations are too few to tell whether a run went well; it takes 16 of each, so 320"
        " observations, or a larger held_out.npy",
    )
    assert "too-few" not in found(observe(images(320), GaussianNoise(5.0)))


def test_an_inverted_mask_is_all_that_is_said_of_values():
    y, mask = images(400), rng().random((400, 1, 16, 16)) > 0.5
    observations = Observations(np.where(mask, y, 0).astype(np.float32), RandomMask(0.5, 1.0), {"mask": ~mask})
    assert alarms(observations) == {"mask-inverted"}
    y = np.where(mask, y, 65535.0).astype(np.float32)  # what was not seen is written as another value than 0
    finding = found(Observations(y, RandomMask(0.5, 1.0), {"mask": ~mask}))["mask-inverted"]
    assert finding.text == (
        "what the mask shows is 65535 everywhere, and what it hides is not; is mask.npy inverted? It is true where y was observed"
    )


def test_a_black_box_says_nothing():
    text = "what a black box hides cannot be told from its observations"
    assert list(found(HEALTHY["box"]()).values()) == [Finding("note", "black-box", text)]


@pytest.mark.parametrize(
    "observations",
    [
        Observations(
            np.zeros((50, 1, 7, 5), np.float32), RandomMask(0.5, 0.1), {"mask": np.zeros((50, 1, 7, 5), bool)}
        ),
        Observations(
            np.zeros((50, 1, 7, 5), np.float32), RandomMask(0.5, 0.1), {"mask": rng().random((50, 1, 7, 1)) > 0.5}
        ),
        Observations(rng().random((50, 1, 1, 1)).astype(np.float32), GaussianNoise(0.1)),
        Observations(np.full((50, 4), 2, np.uint8), GaussianNoise(0.0)),
        observe(rng().normal(size=(100, 1, 4, 5, 6)), GaussianBlur(1.0, 0.1)),
        observe(rng().normal(size=(100, 300)), RandomProjection(2, 0.1)),
    ],
    ids=["nothing", "broadcast", "one", "constant", "volume", "wide"],
)
def test_odd_observations(observations):
    assert all(finding.text for finding in found(observations).values())


# --- what is observed --------------------------------------------------------------------------------


def test_never_observed_entries():
    mask = rng().random((1797, 1, 8, 8)) > 0.5
    mask[:, 0, 2, 1] = False
    text = "no observation shows entry [0, 2, 1], so that nothing can be learned there; leave out what was never measured, or train with --allow-unobserved"
    assert found(masked(digits(), mask))["never-observed"] == Finding("problem", "never-observed", text)
    mask[:, 0, 0] = False
    assert "shows entry [0, 0, 0] and 8 more," in found(masked(digits(), mask))["never-observed"].text
    mask[5, 0] = True  # one observation is enough to be seen at all
    now = found(masked(digits(), mask))
    assert "never-observed" not in now
    text = "fewer than 20 observations show entry [0, 0, 0] and 8 more; what is drawn there is little more than a guess"
    assert now["rarely-observed"] == Finding("warning", "rarely-observed", text)


def test_how_much_is_observed():
    mask = np.ones((1000, 6), bool)
    mask[:, 4] = np.arange(1000) % 4 == 0
    text = "an entry is seen by 87.5 % of the observations on average, and by 25 % at the least (entry [4])"
    assert found(masked(features(1000, 6), mask))["observed"] == Finding("note", "observed", text)  # (5 + 1/4) / 6


def test_pairs_that_are_never_observed_together():
    y, mask = features(2000, 6), half(2000, 6)
    mask[:, 1] = ~mask[:, 4]
    text = "no observation shows both entry [1] and entry [4]; how they depend on each other comes from the prior alone"
    assert found(masked(y, mask))["never-together"] == Finding("warning", "never-together", text)
    mask[:, 2] = mask[:, 1]
    assert "entry [1] and entry [4], nor 1 more pairs;" in found(masked(y, mask))["never-together"].text
    mask[7] = True
    assert "never-together" not in found(masked(y, mask))


def test_directions_that_no_matrix_sees():
    x, n = features(3000, 5), 3000
    matrix = rng(2).normal(size=(n, 2, 5))
    blind = matrix - matrix.mean(-1, keepdims=True)  # the sum of all is never seen

    def findings(a: np.ndarray) -> dict[str, Finding]:
        a = (a / np.linalg.norm(a, axis=-1, keepdims=True)).astype(np.float32)
        y = np.einsum("nmd,nd->nm", a, x) + 0.1 * rng(4).normal(size=(n, 2))
        return found(Observations(y.astype(np.float32), RandomProjection(2, 0.1), {"matrix": a}))

    problem = findings(blind)["never-observed"]
    assert problem.level == "problem"
    assert re.match(r"no observation shows 1 direction, mostly of entry \[\d\] and 4 more, so", problem.text)
    blind[:10] = matrix[:10]
    assert "show 1 direction, mostly" in findings(blind)["rarely-observed"].text
    blind[:1000] = matrix[:1000]
    assert not {"never-observed", "rarely-observed"} & set(findings(blind))


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_cosines_that_a_blur_deletes(std):
    # The transfer function of a symmetric kernel with reflecting borders at the k-th cosine of n pixels.
    radius = round(4 * std)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
    kernel /= kernel.sum()
    gain = (kernel * np.cos(np.pi * np.arange(8)[:, None] * np.arange(-radius, radius + 1) / 8)).sum(1)
    deleted = int((np.outer(gain, gain) <= 1e-3).sum())
    text = f"the blur deletes {deleted} of 64 cosine coefficients; what it deletes comes from the prior alone"
    assert found(observe(digits(), GaussianBlur(std, 0.08)))["observed"] == Finding("note", "observed", text)


@pytest.mark.parametrize("block", [1, 4])
def test_mask_rate(block):
    """Of masks by a formula; else new ones are rows of those that were measured."""
    wrong = RandomMask(0.75, 1.0, block)
    observations = observe(images(), RandomMask(0.349, 1.0, block), declared=wrong, formula=True)
    shown = observations.params["mask"].mean()
    text = f"declared rate 0.75, but the observed fraction is {shown:.3g}, so that re-corruption would draw the wrong masks; use `rate: {1 - shown:.3g}`, or leave out `formula: true`"
    assert found(observations)["mask-rate"] == Finding("problem", "mask-rate", text)
    undeclared = observe(images(), RandomMask(0.5, 1.0), declared=GaussianNoise(1.0), formula=True)
    assert "; use `name: RandomMask` with `rate: 0." in found(undeclared)["mask-rate"].text
    few = observe(images(100), RandomMask(0.75, 1.0, block=8), formula=True)  # so uncertain
    assert "mask-rate" not in found(few)
    assert "mask-rate" not in found(observe(images(), RandomMask(0.349, 1.0, block), declared=wrong))


def test_a_channel_that_was_off():
    x = np.concatenate([images(400), images(400) + 20], 1)
    data = observe(x, GaussianNoise(5.0))
    off = np.arange(0, 400, 10)
    assert "blank-channel" not in found(data)
    data.y[off, 1] = 0
    said = found(data)
    assert said["blank-channel"] == Finding(
        "warning",
        "blank-channel",
        "channel 1 is exactly 0 everywhere in 10 % of the observations, which noise would not leave so; if it was not measured, hide it in mask.npy",
    )
    assert "clipped" not in said
    odd = Observations(np.where(np.arange(16) % 2, data.y, np.nan).astype(np.float32), GaussianNoise(5.0))
    odd.y[off, 1, :, 1::2] = 7
    assert "channel 1 is exactly 7 everywhere in 10 %" in found(odd)["blank-channel"].text
    mask = np.ones((400, 2, 1, 1), bool)
    mask[off, 1] = False
    assert "blank-channel" not in found(Observations(data.y, GaussianNoise(5.0), {"mask": mask}))
    assert "blank-channel" not in found(Observations(data.y, GaussianNoise(0.0)))


@pytest.mark.parametrize("which", [2, 150])  # of the validation, of the test observations
def test_duplicates(which):
    y, mask = features(2000, 6), half(2000, 6)
    assert "duplicates" not in found(masked(y, mask))
    train, *halves = masked(y, mask).split(seed=0)
    held_out = np.concatenate(halves)
    for a, b in ((train[3], train[5]), (train[4], train[9]), (train[30], held_out[which])):
        mask[a, :5] = True  # what shows next to nothing may well be alike
        y[b], mask[b] = y[a], mask[a]
    index = min(train[5], train[9], max(train[30], held_out[which]))
    earlier = {train[5]: train[3], train[9]: train[4]}.get(index, min(train[30], held_out[which]))
    y[~mask] = np.nan  # what was not seen makes no difference
    text = f"3 of 2,000 observations are copies of an earlier one (first: {index} of {earlier}), and 1 of 200 held-out ones are in training, too, so that their scores would be too good; remove them, unless they were measured so"
    assert found(masked(y, mask))["duplicates"] == Finding("warning", "duplicates", text)
    mask[train[3], 1] = ~mask[train[3], 1]  # the same values through another mask are another observation
    y[train[3], 1] = 0.0
    assert found(masked(y, mask))["duplicates"].text.startswith("2 of 2,000")


def test_projections_are_copies_only_with_the_same_matrix():
    observations = observe(np.zeros((600, 5)), RandomProjection(4, 0.0))
    assert "duplicates" not in found(observations)
    observations.params["matrix"][9] = observations.params["matrix"][4]
    assert (
        "1 of 600 observations are copies of an earlier one (first: 9 of 4);" in found(observations)["duplicates"].text
    )


# --- what is constant --------------------------------------------------------------------------------


def test_constant_entries():
    assert (digits().std(0) == 0).sum() == 3
    text = "3 of 64 never change: entry [0, 0, 0] and 2 more; they cost nothing but time"
    clean = observe(digits(), GaussianNoise(0.0), range=(0, 16))
    assert found(clean)["constant-entries"] == Finding("note", "constant-entries", text)
    noisy = found(HEALTHY["mask"]())["constant-entries"].text
    assert re.match(r"[3-6] of 64 never change beyond the noise: entry \[0, 0, 0\]", noisy)
    assert "constant-entries" not in found(HEALTHY["mask-features"]())
    nothing = found(observe(np.full((1000, 6), 3.0), GaussianNoise(0.1)))["constant-entries"]
    text = "nothing varies beyond the noise; look whether y holds what you think"
    assert nothing == Finding("problem", "constant-entries", text)


def summed(d: int, kind: str = "normal") -> np.ndarray:
    """Data of which the sum is constant, though no entry is."""
    x = rng(1).normal(size=(5000, d))
    if kind == "curved":
        x = np.tanh(rng(1).normal(size=(5000, 2)) @ rng(9).normal(size=(2, d))) + 0.3 * x
    x[:, -1] = 1 - x[:, :-1].sum(1)
    return rng(1).dirichlet(np.ones(d), 5000) if kind == "shares" else x


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["normal", "shares", "curved"])
@pytest.mark.parametrize("d", [3, 12])
def test_a_constant_sum(d, kind, rate):
    findings = found(observe(summed(d, kind), RandomMask(rate, 0.01)))
    warning = findings["constant-directions"]
    assert warning.level == "warning"
    named = re.match(r"what does not vary: 1 direction, mostly of entry \[\d+\] and (\d+) more; draws", warning.text)
    assert int(named[1]) >= d - 3  # a small one of them may go unnoticed
    assert not {"constant-entries", "noise-too-small", "noise-too-large"} & set(findings)


@pytest.mark.parametrize("corruption", [RandomProjection(2, 0.01), GaussianNoise(0.01)])
def test_a_constant_sum_seen_otherwise(corruption):
    assert "vary: 1 direction, mostly" in found(observe(summed(5), corruption))["constant-directions"].text


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_plane(rate):
    x = rng(1).normal(size=(5000, 3)) @ rng(2).normal(size=(3, 20))
    assert "vary: 17 directions" in found(observe(x, RandomMask(rate, 0.01)))["constant-directions"].text


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("decay", [lambda k: 1 / (1 + k), lambda k: np.exp(-k / 2), lambda k: np.exp(-k)])
@pytest.mark.parametrize("d", [4, 12, 40])
def test_a_spectrum_that_decays_is_not_constant(d, decay, rate):
    turn = np.linalg.qr(rng(7).normal(size=(d, d)))[0]
    x = rng(8).normal(size=(2000, d)) * decay(np.arange(d)) @ turn
    assert "constant-directions" not in found(observe(x, RandomMask(rate, 0.01)))


@pytest.mark.parametrize("corruption", [RandomMask(0.4, 0.05), RandomProjection(2, 0.05), GaussianNoise(0.05)])
def test_the_spectrum_is_that_of_the_data(corruption):
    x = features(8000, 6) * np.array([1, 1, 1, 2, 2, 0.5])
    o = observe(x, corruption)
    y, params = o.batch(np.arange(len(o)))
    seen = corruption.seen(y, params).expand_as(y).numpy()
    spectrum = Spectrum.of(y.double().numpy(), seen, params.get("matrix"), 0.05)
    assert spectrum is not None
    expected = np.linalg.eigvalsh(np.corrcoef(x.T))
    assert (np.abs(spectrum.share - expected) < 5 * spectrum.error + 0.03 * expected).all()
    assert (spectrum.error < 0.3).all()


# --- noise -------------------------------------------------------------------------------------------


def declared(name: str, noise: float) -> Corruption:
    return {"mask": RandomMask(0.5, noise), "mask75": RandomMask(0.75, noise), "blur": GaussianBlur(1.0, noise)}[name]


def estimate(finding: Finding) -> float:
    return float(re.search(r"use `noise: ([\d.]+)`", finding.text)[1])


@pytest.mark.parametrize("name", ["mask", "mask75", "blur"])
def test_noise_of_digits(name):
    def findings(true: float, said: float) -> dict[str, Finding]:
        return found(observe(digits(), declared(name, true), declared(name, said), range=(0, 16)))

    small = findings(0.1, 0.02)
    assert small["noise-too-small"].level == "warning"
    assert estimate(small["noise-too-small"]) == pytest.approx(0.1, rel=0.12)
    assert "range" not in small
    large = findings(0.08, 0.2)["noise-too-large"]
    assert large.level == "problem"
    assert re.fullmatch(r"declared noise 0.2, but .* vary by (0.0[78]\d*); use `noise: \1` or less", large.text), (
        large.text
    )
    right = findings(0.08, 0.08)
    assert not {"noise-too-small", "noise-too-large"} & set(right)
    assert right["noise"].level == "note"


@pytest.mark.parametrize("integers", [False, True])
def test_noise_of_images(integers):
    """No pixel is constant: only the details of neighbouring pixels tell."""

    def findings(true: float, said: float) -> set[str]:
        observations = observe(images(), RandomMask(0.5, true), RandomMask(0.5, said))
        if integers:
            observations.y = np.rint(observations.y)
        return set(found(observations)) & {"noise-too-small", "noise-too-large"}

    assert findings(0.0, 0.0) == findings(2.0, 2.0) == findings(10.0, 10.0) == set()
    assert findings(10.0, 2.0) == findings(10.0, 0.0) == {"noise-too-small"}
    assert findings(10.0, 20.0) == {"noise-too-large"}


def test_noise_of_features_is_bounded():
    wrong = {"noise-too-small", "noise-too-large"}
    large = found(observe(features(), GaussianNoise(0.1), GaussianNoise(2.0)))
    assert "use `noise: 1" in large["noise-too-large"].text  # the features' own standard deviation
    assert not wrong & set(found(observe(features(), GaussianNoise(0.1), GaussianNoise(0.01))))
    # a constant sum is as quiet as the noise, so that it bounds it closely
    sums = found(observe(summed(8), GaussianNoise(0.01), GaussianNoise(0.1)))["noise-too-large"]
    assert "the quietest weighted sums of entries vary by 0.01" in sums.text
    # of a plane there are many such sums, equally quiet: an estimate
    plane = rng(1).normal(size=(5000, 3)) @ rng(2).normal(size=(3, 12))
    small = found(observe(plane, GaussianNoise(0.1), GaussianNoise(0.02)))["noise-too-small"]
    assert estimate(small) == pytest.approx(0.1, rel=0.1)
    projected = observe(summed(5), RandomProjection(2, 0.01), RandomProjection(2, 0.5))
    assert "noise-too-large" in found(projected)


def test_clipped_noise():
    clean = observe(digits(), GaussianNoise(0.0), GaussianNoise(1.0), range=(0, 16))
    share = 100 * (digits() == 0).mean()
    text = f"{share:.3g} % of the values are exactly 0, which noise would not leave so; use `noise: 0` if there is none, or `name: Saturate` if a sensor clips"
    assert found(clean)["clipped"] == Finding("warning", "clipped", text)
    noisy = HEALTHY["noise"]()
    noisy.y = noisy.y.clip(0, 16)
    assert "clipped" in found(noisy)
    assert "noise-too-large" not in found(noisy)  # what looks quiet was clipped


# --- values ------------------------------------------------------------------------------------------


def test_eight_bit_data_as_floats():
    x = np.rint(images()).clip(0, 255).astype(np.float32)
    noise, whole = (
        GaussianNoise(0.0),
        f"y holds whole numbers from {x.min():g} to {x.max():g} as floats, as 8-bit images do",
    )
    text = f"{whole}; state `range: [0, 255]`, or what the range is"
    assert found(Observations(x, noise))["eight-bit"] == Finding("warning", "eight-bit", text)
    wrong = found(Observations(x, noise, range=(0, 1)))
    text = f"{whole}, but `range: [0, 1]` is stated; use `range: [0, 255]`"
    assert wrong["eight-bit"] == Finding("problem", "eight-bit", text)
    assert "range" not in wrong
    healthy = (
        Observations(x, noise, range=(0, 255)),
        Observations(x.astype(np.uint8), noise),
        Observations(x / 255, noise),
        Observations((x > 128).astype(np.float32), noise),
    )
    assert all("eight-bit" not in found(observations) for observations in healthy)


def test_a_range_that_does_not_fit():
    x = rng().random((2000, 6))

    def of(limits: tuple[float, float], noise: float = 0.0) -> tuple[str, str]:
        finding = found(observe(x, GaussianNoise(noise), range=limits)).get("range", Finding("", "", ""))
        return finding.level, finding.text

    assert of((0, 1)) == of((0, 1), 0.2) == of((-1, 2)) == ("", "")
    beyond = 100 * (x.astype(np.float32) > 0.55).mean()  # a tenth of the range is forgiven
    text = f"{beyond:.3g} % of the values lie far outside of the stated `range: [0, 0.5]`; they are {x.min():g} to {x.max():g}"
    assert of((0, 0.5)) == ("problem", text)
    assert of((0, 100))[0] == "warning"
    assert of((0, 100))[1].startswith("the values use 0.99")


# --- the cost ----------------------------------------------------------------------------------------


def test_cost_counts_what_a_run_does(tmp_path, monkeypatch):
    config = configuration.from_dict(TINY)
    observations = observe(features(600), RandomMask(0.3, 0.01))
    text = forecast(observations, config)
    assert text.startswith("about ")
    assert "\n" not in text
    assert text[-1] != "."
    updates, draws = (int(re.search(rf"([\d,]+) {what}", text)[1].replace(",", "")) for what in ("updates", "draws"))
    count = {"updates": 0, "draws": 0}
    update, draw = Trainer.update, DiffusionSampler.draw

    def counted_update(self, *arguments):
        count["updates"] += 1
        return update(self, *arguments)

    def counted_draw(self, y, *arguments):
        count["draws"] += len(y)
        return draw(self, y, *arguments)

    monkeypatch.setattr(Trainer, "update", counted_update)
    monkeypatch.setattr(DiffusionSampler, "draw", counted_draw)
    renoise = DiffusionSampler.renoise

    def counted_renoise(self, x, *arguments):
        count["draws"] += len(x) * 3 // 4  # it takes three evaluations, a draw four
        return renoise(self, x, *arguments)

    monkeypatch.setattr(DiffusionSampler, "renoise", counted_renoise)

    def decided(sampler, *arguments):
        score(sampler, *arguments)
        # iterations are better than the start; draws of a width of 1.5 are nearly calibrated
        ones, width = torch.ones(6), getattr(sampler, "width", 0.5)
        return Score("crps", ones / (1 + (width >= 1)), width / 1.51 * ones, ones, 0 * ones)

    score = judging.score
    monkeypatch.setattr(judging, "score", decided)
    rows = list(DiffEM(config, observations, tmp_path).iterate())
    assert [row["width"] for row in rows] == [None, 1, 1, 1.5]
    assert updates == count["updates"] == 30 + 20 + 10
    # two E-steps and the last one; 30 validation observations that score them, and 3 widths closely; 30 test observations
    assert draws == count["draws"] == 3 * 600 - 150 + 2 * (2 * 2 * 30) + (3 + 1) * (8 * 2 * 30)


@pytest.mark.parametrize("kind", ["gaussian", "observation"])
@pytest.mark.parametrize("corruption", [RandomProjection(2, 0.01), GaussianBlur(1.0, 0.01)])
def test_cost_of_every_start(kind, corruption):
    if kind == "observation" and isinstance(corruption, RandomProjection):
        pytest.skip("y cannot stand for x")
    config = configuration.from_dict({**TINY, "start": {**TINY["start"], "kind": kind}})
    assert "60 updates" in forecast(observe(features(600), corruption), config)


# --- size --------------------------------------------------------------------------------------------


def anonymous() -> float:
    """Memory of this process that no file stands behind, in MB."""
    line = next(v for v in Path("/proc/self/status").read_text().splitlines() if v.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_fifty_thousand_images(tmp_path):
    n = 50_000
    y = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.uint8, (n, 1, 28, 28))
    mask = np.lib.format.open_memmap(tmp_path / "mask.npy", "w+", bool, (n, 1, 28, 28))
    x = images(2500, 28)
    for start in range(0, n, 2500):
        part, noise = slice(start, start + 2500), rng(start).standard_normal(x.shape, dtype=np.float32)
        y[part] = np.clip(np.rint(x + 5 * noise), 0, 255)
        mask[part] = rng(start + 1).random(x.shape, dtype=np.float32) >= 0.75
    mask[:, 0, 3, 4] = False
    y[40_000], mask[40_000] = y[123], mask[123]
    y.flush(), mask.flush()
    (tmp_path / "corruption.yaml").write_text("name: RandomMask\nrate: 0.75\nnoise: 5\n")
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    peak, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak.append(anonymous())

    observations, begin = Observations.load(tmp_path), time.process_time()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        findings = found(observations)
    finally:
        done.set()
        thread.join()
    print(f"{time.process_time() - begin:.1f} s, {max(peak) - peak[0]:.0f} MB")
    assert time.process_time() - begin < 20
    assert max(peak) - peak[0] < 400  # a part of the images, in double precision
    assert {f.name for f in findings.values() if f.level != "note"} == {"never-observed", "duplicates"}
    assert "no observation shows entry [0, 3, 4]," in findings["never-observed"].text
    assert "1 of 50,000 observations are copies of an earlier one (first: 40000 of 123)" in findings["duplicates"].text
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


# --- the command -------------------------------------------------------------------------------------


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    observe(features(1200), RandomMask(0.5, 0.05)).save(tmp_path / "good")
    observe(features(1200), RandomMask(0.5, 0.05), RandomMask(0.3, 0.05), formula=True).save(tmp_path / "bad")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(TINY))
    before = {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*")}

    assert main(["check", "good"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "nothing stands in the way"
    assert out[0].startswith("note     observed: an entry is seen by ")
    assert not any(line.startswith(("problem", "warning")) or "cost:" in line for line in out)

    assert main(["check", "bad"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("problem  mask-rate: declared rate 0.3, but the observed fraction is 0.5")
    assert out[-1] == "1 problem, 0 warnings"

    assert main(["check", "good", "mine.yaml"]) == 0
    assert "for 60 updates" in capsys.readouterr().out
    assert main(["check", "--em.iterations", "3", "--prior.steps=1", "good", "mine.yaml"]) == 0
    assert "for 71 updates" in capsys.readouterr().out
    assert {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["nowhere"], "nowhere: no such folder of observations"),
        (["good", "digit"], "digit: unknown preset"),
        (["good", "--em.iteration", "3"], "em.iteration: unknown field"),
        (["good", "--em.iterations"], "diffem check: --em.iterations: needs a value"),
        (["few"], "too few"),
        ([], "observations"),
    ],
)
def test_mistakes(argv, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, n in (("good", 100), ("few", 3)):
        observe(features(n), GaussianNoise(0.05)).save(tmp_path / name)
    assert main(["check", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("diffem: ")
    assert err.count("\n") == 1
    assert text.lower() in err.lower()


def test_command_with_a_black_box(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "a_box_of_mine.py").write_text("def clip(x):\n    return x.clamp(-1, 1)\n")
    (tmp_path / "obs").mkdir()
    np.save("obs/y.npy", features(1200).clip(-1, 1).astype(np.float32))
    assert main(["check", "obs", "--corruption", "a_box_of_mine:clip"]) == 0
    assert "note     black-box: " in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [True, False])
def test_an_inverted_mask_is_a_problem(wrong):
    data = observe(features(400), RandomMask(0.4, 0.01))
    mask = data.params["mask"]
    y = np.where(mask, data.y, 0).astype(np.float32)
    found = [
        f
        for f in check(Observations(y, RandomMask(0.4, 0.01), {"mask": ~mask if wrong else mask}))
        if f.name == "mask-inverted"
    ]
    assert [f.level for f in found] == ["problem"] * wrong
