"""Corruptions of single entries, JPEG, and corruptions that are not known: against formulas and the codec."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from diffem import config as configuration
from diffem import memory, seeding
from diffem.cli import main
from diffem.corruptions import (
    JPEG,
    Corruption,
    EntrywiseCorruption,
    Gamma,
    GaussianNoise,
    OneOf,
    PoissonGaussian,
    Quantise,
    SaltAndPepper,
    Saturate,
    Speckle,
    from_config,
)
from diffem.data import Dataset, Observations
from diffem.denoiser import Denoiser, DenoiserConfig
from diffem.diagnostics import scores
from diffem.diagnostics.check import check
from diffem.diagnostics.scores import coverage, score
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.mixtures import Diagonal, Mixture, Rows
from diffem.networks import NetworkConfig
from diffem.posterior import from_pretrained
from diffem.samplers import DiffusionSampler, ObservationSampler, Sampler, SamplerConfig
from diffem.trainer import MStepConfig, Trainer
from diffem.units import Units

N = 200_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(corruption: EntrywiseCorruption, value: float, n: int = N) -> np.ndarray:
    return corruption.apply(torch.full((n, 1), value, dtype=torch.float64), {}, generator())[:, 0].numpy()


# --- what they make, against the formula -------------------------------------------------------------


@pytest.mark.parametrize(("x", "gain", "noise"), [(0.0, 2.0, 0.5), (3.0, 0.5, 0.0), (40.0, 4.0, 3.0)])
def test_photon_noise_has_the_moments_of_the_formula(x, gain, noise):
    y = made(PoissonGaussian(gain, noise), x)
    variance = gain * x + noise**2
    assert y.mean() == pytest.approx(x, abs=5 * math.sqrt(variance / N) + 1e-12)
    assert y.var() == pytest.approx(variance, rel=0.02, abs=1e-12)


def test_photons_without_read_noise_are_poisson():
    y = made(PoissonGaussian(2.0), 6.0, 20_000) / 2
    counts = np.bincount(y.astype(int), minlength=15)[:15]
    expected = stats.poisson.pmf(np.arange(15), 3.0)
    assert stats.chisquare(counts[:11], counts[:11].sum() * expected[:11] / expected[:11].sum()).pvalue > 0.001
    assert (made(PoissonGaussian(2.0), -1.0, 100) == 0).all()  # there are no negative rates


def test_speckle_is_relative_to_the_signal():
    for x in (-2.0, 5.0):
        y = made(Speckle(0.3), x)
        assert stats.kstest(y[:20_000], stats.norm(x, 0.3 * abs(x)).cdf).pvalue > 0.001
    assert (made(Speckle(0.3), 0.0, 100) == 0).all()


def test_salt_and_pepper_are_as_many_as_stated():
    y = made(SaltAndPepper(0.2, 0.0, 1.0), 0.4)
    shares = [(y == value).mean() for value in (0.0, 0.4, 1.0)]
    assert shares == pytest.approx([0.1, 0.8, 0.1], abs=5 * math.sqrt(0.25 / N))


def test_levels_clipping_and_curves_are_exact():
    x = torch.tensor([[-1.0, 0.0, 2.6, 2.7, 9.0, 16.0, 20.0]])
    assert Quantise(4, 0, 16).apply(x, {}, generator())[0].tolist() == pytest.approx([0, 0, 0, 16 / 3, 32 / 3, 16, 16])
    assert Saturate(9.0).apply(x, {}, generator())[0].tolist() == pytest.approx([-1, 0, 2.6, 2.7, 9, 9, 9])
    y = Gamma(0.5, 16.0).apply(x, {}, generator())
    assert y[0].tolist() == pytest.approx([0, 0, *(16 * math.sqrt(v / 16) for v in (2.6, 2.7, 9.0, 16.0, 20.0))])
    assert Gamma(0.5, 16.0).initial(y, {})[0, 1:].tolist() == pytest.approx(x[0, 1:].tolist(), abs=1e-5)
    noisy = made(Saturate(1.0, 0.5), 0.5)
    assert noisy.max() == 1.0
    assert (noisy == 1.0).mean() == pytest.approx(stats.norm.sf(1.0), abs=0.005)
    assert made(Gamma(2.0, 1.0, 0.1), 0.5).std() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_the_codec_makes(channels):
    x = 255 * torch.rand(5, channels, 16, 24, generator=generator(1))
    y = JPEG(30).apply(x, {}, generator())
    for image, found in zip(x, y, strict=True):
        pixels = image.round().to(torch.uint8).movedim(0, -1).numpy()
        stream = io.BytesIO()
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(stream, "JPEG", quality=30)
        decoded = np.asarray(Image.open(stream)).reshape(pixels.shape)
        np.testing.assert_array_equal(found.movedim(0, -1).numpy(), decoded)


def test_a_quality_is_drawn_for_each_image():
    x = (255 * torch.rand(1, 1, 16, 16, generator=generator(1))).expand(60, 1, 16, 16)
    made = JPEG([10, 12]).apply(x, {}, generator())
    of = [JPEG(quality).apply(x[:1], {}, generator())[0] for quality in (10, 11, 12)]
    which = [next(k for k, image in enumerate(of) if torch.equal(image, y)) for y in made]
    assert stats.chisquare(np.bincount(which, minlength=3)).pvalue > 0.001


def test_one_of_several_is_drawn_for_each_item():
    x = torch.zeros(3000, 40)
    std = OneOf([GaussianNoise(1.0), GaussianNoise(4.0)]).apply(x, {}, generator()).std(1)
    assert ((std < 2).sum() / 3000).item() == pytest.approx(0.5, abs=0.05)
    assert std[std < 2].mean().item() == pytest.approx(1.0, rel=0.05)
    assert std[std > 2].mean().item() == pytest.approx(4.0, rel=0.05)


def test_clipping_from_below_censors_what_was_not_detected():
    x = torch.tensor([[-3.0, 0.2, 0.5, 7.0]])
    assert Saturate(5.0, low=0.5).apply(x, {}, generator())[0].tolist() == [0.5, 0.5, 0.5, 5.0]
    assert from_config({"name": "Saturate", "level": 5.0, "low": 0.5}).config == Saturate(5.0, low=0.5).config
    assert "low" not in Saturate(5.0).config


# --- the start ---------------------------------------------------------------------------------------


def started(corruption, y: torch.Tensor, params: dict, units: Units) -> torch.Tensor:
    """What the start `observation` draws, in the units of the data."""
    keys = seeding.item_seeds(0, 0, "user", range(len(y)))
    sampler = ObservationSampler(corruption.scaled(units), tuple(y.shape[1:]))
    return units.restore(sampler.draw(corruption.scale_y(y, params, units), params, keys))


@pytest.mark.parametrize(
    ("corruption", "ends"),
    [
        (Quantise(3, 0.0, 16.0), {0.0: (0, 0), 8.0: (8, 8)}),
        (Saturate(12.0, low=2.0), {2.0: (0, 2), 7.0: (7, 7), 12.0: (12, 16)}),
        (Saturate(12.0), {-3.0: (-3, -3), 12.0: (12, 16)}),
        (PoissonGaussian(1.0), {0.0: (0, 0), 19.0: (19, 19)}),
        (Gamma(2.0, 16.0), {4.0: (8, 8)}),
    ],
)
def test_a_start_lies_where_the_observation_says(corruption, ends):
    units = Units(8.0, 8.0)
    for value, (low, high) in ends.items():
        y = torch.full((3000, 1), value)
        x = started(corruption, y, {}, units)[:, 0].numpy()
        if low == high:
            assert x == pytest.approx(np.full(3000, low), abs=1e-5)
        else:
            assert stats.kstest(x, stats.uniform(low, high - low).cdf).pvalue > 0.001
        if corruption.noise == 0 and not isinstance(corruption, PoissonGaussian):
            again = corruption.apply(torch.from_numpy(x), {}, generator())
            assert (again - value).abs().max() < 1e-4  # it makes the same observation
    hidden = {"mask": torch.zeros(3000, 1, dtype=torch.bool)}
    x = started(corruption, torch.zeros(3000, 1), hidden, units)[:, 0].numpy()
    assert stats.kstest(x, stats.uniform(0, 16).cdf).pvalue > 0.001  # anything within the range


# --- scores by simulation ----------------------------------------------------------------------------


class Exact(Sampler):
    """Draws from the posterior of x ~ Gamma(4, 1 / 2), y ~ Poisson(x): Gamma(4 + y, 1 / 3); the prior where y is hidden."""

    widen = 1.0

    def __init__(self, corruption, shape, widen: float = 1.0) -> None:
        super().__init__(corruption, shape)
        self.widen = widen

    def draw(self, y, params, seeds, withheld=None):
        seen = params["mask"].expand_as(y)
        x = np.empty(y.shape)
        for k, seed in enumerate(seeds.tolist()):
            rng = np.random.default_rng(abs(seed))
            shape, rate = (4 + seen * y)[k].numpy(), (2 + seen * 1.0)[k].numpy()
            mean = shape / rate
            x[k] = mean + self.widen * (rng.gamma(shape) / rate - mean)
        return torch.from_numpy(x).float()


@pytest.mark.parametrize(("widen", "low", "high"), [(1.0, 0.93, 1.07), (0.0, 0.6, 0.75)])
def test_scores_of_the_exact_posterior_are_calibrated(widen, low, high):
    rng = np.random.default_rng(0)
    x = rng.gamma(4.0, 0.5, (1500, 8))
    corruption = PoissonGaussian(1.0)
    y = corruption.apply(torch.from_numpy(x).float(), {}, generator())
    data = Dataset(Observations(y.numpy(), corruption, {"mask": np.ones_like(x, bool)}, formula=True), Units())
    sampler = Exact(data.corruption, (8,), widen)
    found = score(sampler, data, np.arange(1500), 0)
    assert found.name == "crps"
    assert found.ratio is not None
    assert low < found.ratio < high  # the prior's width makes most of it, and is not in the draws of `widen` 0
    inside = coverage(sampler, data, np.arange(600), 0)
    assert inside is not None
    if widen:
        assert abs(inside(0.8) - 0.8) < 4 * inside.standard_error(0.8)
    again = score(sampler, data, np.arange(1500), 0, batch=17)
    torch.testing.assert_close(found.items, again.items)  # whatever the batch


class Twin(EntrywiseCorruption):
    """White noise, as a corruption of which nothing is known but how to simulate it."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def distort(self, x, generator):
        return x + self.noise * torch.randn(x.shape, generator=generator)


class Middle(Sampler):
    """Half of y, and noise."""

    def draw(self, y, params, seeds, withheld=None):
        return 0.5 * y + 0.5 * seeding.normal(seeds, self.shape)


def test_simulated_scores_agree_with_those_of_the_formula():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(1200, 10)).astype(np.float32)
    masks, found = {"mask": np.ones_like(y, bool)}, []
    for corruption in (GaussianNoise(0.3), Twin(0.3)):
        data = Dataset(Observations(y, corruption, masks, formula=True), Units())
        found.append(score(Middle(data.corruption, (10,)), data, np.arange(1200), 0, draws=8))
    a, b = found
    assert b.mean == pytest.approx(a.mean, abs=4 * math.hypot(a.standard_error, b.standard_error))
    assert b.ratio == pytest.approx(a.ratio, rel=0.05)


def test_simulated_noise_differs_between_chunks(monkeypatch):
    """Large items are scored a few at a time: each few have noise of their own."""
    y, at_once = np.zeros((10, 40), np.float32), 5
    data = Dataset(Observations(y, Twin(1.0), {"mask": np.ones_like(y, bool)}, formula=True), Units())
    monkeypatch.setattr(memory, "at_once", lambda *_: at_once)
    sampler = Middle(data.corruption, (40,))
    monkeypatch.setattr(sampler, "draw", lambda y, params, seeds, withheld=None: torch.zeros_like(y))
    first, second = (part for _, part in scores._hidden(sampler, data, np.arange(10), 0, 2, 1, 256))
    both = (first.seen * second.seen).bool().expand_as(first.noisy)
    assert both.sum() > 10
    assert (first.noisy[both] != second.noisy[both]).all()


# --- masks, thinning, words --------------------------------------------------------------------------


def test_thinning_splits_what_was_observed():
    corruption, x = PoissonGaussian(1.0), 3 + torch.rand(50, 2, 6, 6, generator=generator())
    mask = torch.rand(50, 1, 6, 6, generator=generator(1)) < 0.7
    y = corruption.apply(x, {"mask": mask}, generator(2))
    assert (y[~mask.expand_as(y)] == 0).all()
    (kept, of_kept), (hidden, of_hidden) = corruption.thin(y, {"mask": mask}, generator(3))
    assert torch.equal(of_kept["mask"] | of_hidden["mask"], mask)
    assert not (of_kept["mask"] & of_hidden["mask"]).any()
    assert torch.equal(kept + hidden, y)


def test_kept_and_hidden_parts_are_independent_given_x():
    x = torch.tensor([2.0, 6.0, 1.0, 9.0]).expand(N // 10, 4)
    for corruption in (PoissonGaussian(1.0, 0.5), Speckle(0.3), SaltAndPepper(0.2, 0, 10), Saturate(5.0, 2.0)):
        y = corruption.apply(x, {}, generator())
        (kept, of_kept), (hidden, of_hidden) = corruption.thin(y, {}, generator(1))
        a, b = ((part - y.mean(0) * of["mask"]).sum(1) for part, of in ((kept, of_kept), (hidden, of_hidden)))
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(N // 10)
    one_of = OneOf([GaussianNoise(0.5), GaussianNoise(2.0)])  # its parts share a level that is not known
    assert not one_of.thins
    assert not one_of.predictable


@pytest.mark.parametrize(
    ("corruption", "y", "text"),
    [
        (Quantise(3, 0, 4), 1.5, "y.npy: holds 1.5, which Quantise never makes with levels 3, low 0, high 4"),
        (Saturate(3.0), 3.5, "y.npy: holds 3.5, which Saturate never makes with level 3, noise 0"),
        (
            Saturate(3.0, 0.1, -1.0),
            -1.5,
            "y.npy: holds -1.5, which Saturate never makes with level 3, noise 0.1, low -1",
        ),
        (JPEG(20), 0.5, "y.npy: holds 0.5; JPEG makes whole numbers from 0 to 255"),
        (JPEG(20), 256.0, "y.npy: holds 256; JPEG makes whole numbers from 0 to 255"),
    ],
)
def test_values_that_it_never_makes_are_refused(corruption, y, text):
    array = np.zeros((60, 1, 4, 4), np.float32)
    array[3, 0, 1, 2] = y
    with pytest.raises(DiffemError) as caught:
        Observations(array, corruption, range=(0, 255))
    assert str(caught.value) == f"observations: {text}"
    if not isinstance(corruption, JPEG):  # what was not observed may be anything
        Observations(array, corruption, {"mask": array != y}, range=(0, 4))


def test_a_mask_that_does_not_fit_is_refused():
    with pytest.raises(
        DiffemError, match=r"mask.npy: shape \(60, 1, 3, 4\) does not broadcast against y's \(60, 1, 4, 4\)"
    ):
        Observations(np.zeros((60, 1, 4, 4)), Speckle(0.1), {"mask": np.ones((60, 1, 3, 4), bool)}, range=(0, 1))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: PoissonGaussian(0.0), "PoissonGaussian: gain must be > 0, got 0.0"),
        (lambda: PoissonGaussian(1.0, -1), "PoissonGaussian: noise must be a standard deviation >= 0, got -1"),
        (lambda: Speckle(math.nan), "Speckle: std must be > 0, got nan"),
        (lambda: SaltAndPepper(1.0, 0, 1), "SaltAndPepper: rate is the fraction replaced, in (0, 1), got 1.0"),
        (lambda: SaltAndPepper(0.5, 1, 1), "SaltAndPepper: low must be below high, got 1 and 1"),
        (lambda: Quantise(1, 0, 1), "Quantise: levels must be a whole number of at least 2, got 1"),
        (lambda: Saturate(1.0, -0.1), "Saturate: noise must be a standard deviation >= 0, got -0.1"),
        (lambda: Saturate(1.0, low=1.0), "Saturate: low must be below level, got 1.0 and 1.0"),
        (lambda: Gamma(0, 1), "Gamma: gamma must be > 0, got 0"),
        (lambda: JPEG(0), "JPEG: quality must be from 1 to 95, or [least, largest], got 0"),
        (lambda: JPEG([50, 20]), "JPEG: quality must be from 1 to 95, or [least, largest], got [50, 20]"),
        (lambda: OneOf([GaussianNoise(1.0)]), "OneOf: chain must be a list of at least two corruptions"),
        (lambda: OneOf([GaussianNoise(1.0), JPEG(20)]), "OneOf: chain: the corruptions must take the same parameters"),
    ],
)
def test_what_is_refused(make, text):
    with pytest.raises(DiffemError) as caught:
        make()
    assert str(caught.value).startswith(text)


CASES = {
    "photons": (PoissonGaussian(1.0, 0.5), (1, 8, 8)),
    "speckle": (Speckle(0.2), (1, 8, 8)),
    "salt": (SaltAndPepper(0.1, 0.0, 16.0), (3, 8, 8)),
    "levels": (Quantise(4, 0.0, 16.0), (1, 8, 8)),
    "clipped": (Saturate(9.0, 0.3, 1.0), (1, 20)),
    "curve": (Gamma(0.5, 16.0, 0.1), (6,)),
    "jpeg": (JPEG([10, 30]), (3, 8, 8)),
    "one of": (OneOf([GaussianNoise(0.5), GaussianNoise(2.0)]), (1, 8, 8)),
}
SETTINGS = {
    "network": {"channels": [8], "blocks": [1], "width": 16, "depth": 1},
    "m_step": {"first_steps": 3, "steps": 2, "batch": 8},
    "em": {"iterations": 2},
    "sampler": {"steps": 2},
    "start": {"components": [1], "ranks": [2]},
    "prior": {"steps": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_each_trains_saves_and_loads(name, tmp_path):
    corruption, shape = CASES[name]
    high = 255 if name == "jpeg" else 16
    x = high * torch.rand(60, *shape, generator=generator())
    y = corruption.apply(x, {}, generator(1)).numpy()
    Observations(y, corruption, range=(0, high)).save(tmp_path / "data")
    observations = Observations.load(tmp_path / "data")
    assert observations.corruption.config == corruption.config
    assert from_config(corruption.config).config == corruption.config
    assert [f for f in check(observations) if f.level == "problem"] == []
    rows = list(DiffEM(configuration.from_dict(SETTINGS), observations, tmp_path / "run").iterate())
    assert {row["score_name"] for row in rows} == {"energy_distance" if name in ("jpeg", "one of") else "crps"}
    loaded = from_pretrained(tmp_path / "run" / "posterior")
    assert loaded.sample(y[:3], n=2).shape == (2, 3, *shape)


@pytest.mark.parametrize("name", ["curve", "jpeg"])
def test_check_and_diagnose_run(name, tmp_path, capsys):
    corruption, shape = CASES[name]
    high = 255 if name == "jpeg" else 16
    y = corruption.apply(high * torch.rand(330, *shape, generator=generator()), {}, generator(1)).numpy()
    Observations(y, corruption, range=(0, high)).save(tmp_path / "data")
    observations = Observations.load(tmp_path / "data")
    list(DiffEM(configuration.from_dict(SETTINGS), observations, tmp_path / "run").iterate())
    assert main(["check", str(tmp_path / "data")]) == 0
    capsys.readouterr()
    assert main(["diagnose", str(tmp_path / "run"), "--observations", str(tmp_path / "data"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ("coverage" in found) == corruption.predictable
    assert found["divergence"]


# --- what is not known is integrated over ------------------------------------------------------------


def test_the_posterior_integrates_over_a_noise_level_that_is_not_known():
    # x ~ N(0, I) in four entries, y = x + s e, s = 0.5 or 1.5: E[x | y] = y sum_s p(s | y) / (1 + s^2)
    levels, d = torch.tensor([0.5, 1.5]), 4
    corruption = OneOf([GaussianNoise(float(s)) for s in levels]).scaled(Units())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = NetworkConfig(kind="mlp", width=64, depth=2, embedding=32)
        denoiser = Denoiser(corruption, (d,), DenoiserConfig("plain", 0.05, 10.0), network)
    trainer, draws = Trainer(denoiser, MStepConfig()), generator(1)
    for step in range(1000):
        x = torch.randn(256, d, generator=draws)
        y, params = corruption.observe(x, draws)
        trainer.update([denoiser.loss(x, y, params, draws)], 2e-3 * max(0.05, 1 - step / 1000))
    y, _ = corruption.observe(torch.randn(600, d, generator=draws), draws)
    sampler = DiffusionSampler(trainer.averaged, SamplerConfig(steps=12))
    keys = [seeding.item_seeds(0, j, "user", range(600)) for j in range(30)]
    drawn = torch.stack([sampler.draw(y, {}, k) for k in keys])
    evidence = torch.distributions.Normal(0, (1 + levels.square()).sqrt()).log_prob(y[..., None]).sum(1)
    p = evidence.softmax(1)
    gains = 1 / (1 + levels.square())
    exact = p @ gains
    spread = p @ (1 - gains) + (p @ gains.square() - exact.square()) * y.square().mean(
        1
    )  # an entry's variance, in the mean
    order = y.square().sum(1).argsort()
    for part in order.chunk(4):  # quiet observations are believed, loud ones are not
        found = (drawn.mean(0)[part] * y[part]).sum() / y[part].square().sum()
        wanted = (exact[part] * y[part].square().sum(1)).sum() / y[part].square().sum()
        assert found.item() == pytest.approx(wanted.item(), abs=0.05)
        assert drawn.var(0)[part].mean().item() == pytest.approx(spread[part].mean().item(), rel=0.15)
    first, last = exact[order[:150]].mean(), exact[order[-150:]].mean()
    assert first > 0.6 > 0.4 > last  # and so no single level would pass


# --- Gaussian approximations, from which a run starts ------------------------------------------------


@pytest.mark.parametrize(("mean", "gain", "noise"), [(6.0, 2.0, 0.5), (40.0, 4.0, 3.0), (0.0, 2.0, 0.0)])
def test_the_variance_of_photon_noise_is_that_of_the_mean_signal(mean, gain, noise):
    corruption, mask = PoissonGaussian(gain, noise), torch.rand(50, 1, 40, 40, generator=generator(1)) < 0.5
    x = mean * (0.5 + torch.rand(50, 1, 40, 40, generator=generator(2)))
    y, params = corruption.apply(x, {"mask": mask}, generator()), {"mask": mask}
    expected = gain * max(mean, 0.1 * gain) + noise**2  # at least a tenth of a photon
    assert corruption.variance(y, params).flatten().numpy() == pytest.approx(np.full(50, expected), rel=0.1)
    found = corruption.likelihood(y, params)
    assert torch.equal(found.precision.view(mask.shape) > 0, mask)
    units = Units(30.0, 20.0)
    scaled = corruption.scaled(units).likelihood(corruption.scale_y(y, params, units), params)
    assert torch.allclose(scaled.precision, found.precision * 400, rtol=1e-4)
    assert torch.allclose(scaled.z[mask.flatten(1)], (found.z[mask.flatten(1)] - 30) / 20, atol=1e-5)


def test_the_variance_of_speckle_is_that_of_the_mean_signal():
    x = 3 + torch.rand(20, 100, 100, generator=generator(4))
    y = Speckle(0.5).apply(x, {}, generator())
    assert Speckle(0.5).variance(y, {}).flatten().numpy() == pytest.approx(0.25 * float(x.square().mean()), rel=0.05)
    blank = {"mask": torch.tensor([[True, False, True]])}  # nothing but zeros
    precision = Speckle(0.5).scaled(Units(0.0, 2.0)).likelihood(torch.zeros(2, 3), blank).precision
    assert precision.isfinite().all()
    assert (precision > 0).tolist() == 2 * blank["mask"].tolist()


def test_the_variance_of_rounding_is_that_of_a_uniform_error():
    corruption = Quantise(5, 0.0, 8.0)
    x = 8 * torch.rand(N, 1, generator=generator(3), dtype=torch.float64)
    y = corruption.apply(x, {}, generator())
    assert float((y - x).var()) == pytest.approx(float(corruption.variance(y, {})[0]), rel=0.02)


def test_starts_are_mixtures_where_the_variance_is_known_and_hold_possible_items(tmp_path):
    """Items are e^g with a Gaussian g of rank 2; a mixture learns their covariance, which single counts hide."""
    rng = np.random.default_rng(0)
    clean = np.exp(rng.normal(size=(600, 2)) @ rng.normal(size=(2, 12)) / 2).astype(np.float32)
    corruption = PoissonGaussian(0.5)
    y = corruption.apply(torch.from_numpy(clean), {}, generator()).numpy()
    folder, config = tmp_path / "run", configuration.load_config(None, {"em.iterations": 0, "start.ranks": [2]})
    run = DiffEM(config, Observations(y, corruption, range=(0, 6)), folder)
    for _ in run.iterate():
        pass
    assert json.loads((folder / "start.json").read_text())["kind"] == "mixture"
    draws = from_pretrained(folder / "posterior").sample(y, n=40)
    assert draws.min() >= -1e-5
    assert np.square(draws.mean(0) - clean).mean() < 0.6 * np.square(y - clean).mean()
    assert 0.8 < np.mean(np.abs(draws.mean(0) - clean) < 1.64 * draws.std(0)) < 0.97
    assert configuration.load_config(None).start.resolve(Saturate(1.0).scaled(Units()), (3,)) == "observation"


class Doubled(EntrywiseCorruption):
    def distort(self, x, generator):
        return 2 * x

    def likelihood(self, y, params):
        return Diagonal(y.flatten(1) / 2, torch.full_like(y, 100.0).flatten(1))


def test_a_likelihood_of_an_entrywise_corruption_of_ones_own_counts():
    assert [kind.exact((3,)) for kind in (Doubled(), Gamma(2.0), Speckle(0.1))] == [True, False, True]


class Halves(Corruption):
    """y is half of x plus noise: with a likelihood of either kind."""

    def __init__(self, rows: bool) -> None:
        self.rows = rows

    def apply(self, x, params, generator):
        return x / 2 + 0.1 * torch.randn(x.shape, generator=generator)

    def likelihood(self, y, params):
        if not self.rows:
            return Diagonal(2 * y, torch.full_like(y, 25.0))
        matrix = torch.eye(y.shape[1]).expand(len(y), -1, -1) / 2
        return Rows(y, matrix, torch.full_like(y[:, :1], 0.1))


@pytest.mark.parametrize("rows", [False, True])
def test_a_likelihood_of_ones_own_is_used_in_model_units(rows):
    units, sigma = Units(3.0, 2.0), 1.5
    scaled, u = Halves(rows).scaled(units), torch.tensor([[-0.5, 0.25, 1.0]])
    y = units.scale(units.restore(u) / 2)
    assert scaled.exact((3,))
    found = Mixture.standard(3).posterior(scaled.likelihood(y, {}).given(u, torch.full((1, 1), sigma)))
    precision = 1 + sigma**-2 + (2 * 0.5 / 0.1) ** 2  # of the prior, of u, and of y, whose noise is 0.1 of 2 * 0.5 u
    assert torch.allclose(found.mean, u * (precision - 1) / precision, atol=1e-4)
    assert torch.allclose(found.variance, torch.full((1, 3), 1 / precision), rtol=1e-3)
