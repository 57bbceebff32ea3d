"""Corruptions: the linear algebra, the statistics of what they draw, and the registry."""

from __future__ import annotations

import itertools
import math
import random
import sys

import numpy as np
import pytest
import torch

from diffem.config import load_config
from diffem.corruptions import (
    REGISTRY,
    BlackBox,
    GaussianBlur,
    GaussianNoise,
    RandomMask,
    RandomProjection,
    from_config,
    from_path,
)
from diffem.corruptions.base import Corruption
from diffem.corruptions.diagonal import blur_matrix
from diffem.corruptions.linear import NOISE_FLOOR, SPREAD, LinearCorruption
from diffem.data import Observations
from diffem.diagnostics.check import check
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.mixtures import Mixture
from diffem.units import Units

DOUBLE = torch.float64
HIDDEN = 0.3  # the fraction that thinning is documented to hide
SHAPES = {"1d": (6,), "2d": (1, 4, 5), "channels": (3, 4, 5), "sequence": (2, 7)}
KINDS = {
    "mask": RandomMask(0.4, 0.1),
    "blocks": RandomMask(0.4, 0.1, block=2),
    "noise": GaussianNoise(0.3),
    "blur": GaussianBlur(0.8, 0.2),
    "wide blur": GaussianBlur(2.0, 0.2),
    "projection": RandomProjection(3, 0.1),
}
CASES = [
    pytest.param(corruption, shape, id=f"{kind}-{name}")
    for kind, corruption in KINDS.items()
    for name, shape in SHAPES.items()
    if kind != "projection" or len(shape) == 1
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype=DOUBLE) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def repeated(params, n):
    return {name: value[:1].expand(n, *value.shape[1:]) for name, value in params.items()}


def thinned(corruption, y, params, part: int, seed: int = 11):
    return corruption.thin(y, params, seeded(seed))[part]


def operator(corruption, params, shape) -> torch.Tensor:
    """The dense matrix of A for the first item: its columns are the images of the unit vectors."""
    d = math.prod(shape)
    eye = torch.eye(d, dtype=DOUBLE).view(d, *shape)
    return corruption.forward(eye, repeated(params, d)).flatten(1).T


def params_of_parts(corruption, shape, n=5):
    """The drawn parameters, and those of both parts after thinning."""
    params = corruption.draw(n, shape, seeded(1))
    y = corruption.apply(randn(n, *shape), params, seeded(2))
    return [params, *(thinned(corruption, y, params, part)[1] for part in (0, 1))]


@pytest.mark.parametrize(("corruption", "shape"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (DOUBLE, 1e-12)])
def test_adjoint(corruption, shape, dtype, tolerance):
    for params in params_of_parts(corruption, shape):
        x = randn(5, *shape, seed=3, dtype=dtype)
        ax = corruption.forward(x, params)
        y = randn(*ax.shape, seed=4, dtype=dtype)
        aty = corruption.adjoint(y, params)
        assert ax.dtype == aty.dtype == dtype
        assert aty.shape == x.shape
        left, right = (ax * y).flatten(1).sum(1), (x * aty).flatten(1).sum(1)
        size = ax.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)
        assert ((left - right).abs() <= tolerance * size).all()


@pytest.mark.parametrize(("corruption", "shape"), CASES)
@pytest.mark.parametrize("part", [None, 0])
def test_apply_is_gaussian_around_forward(corruption, shape, part):
    n = 20_000
    params = params_of_parts(corruption, shape)[0 if part is None else 1]
    x = randn(1, *shape)
    y = corruption.apply(x.expand(n, *shape), repeated(params, n), seeded(5)).flatten(1)
    matrix = operator(corruption, params, shape)
    error = y - matrix @ x.flatten()
    d = error.shape[1]
    projector = torch.eye(d, dtype=DOUBLE)
    if "mask" in params and not isinstance(corruption, GaussianBlur):
        projector = torch.diag(params["mask"][0].expand(shape).flatten().to(DOUBLE))
    elif "mask" in params:  # hidden cosines: the noise lies in the span of the others
        basis, _ = corruption.gains(shape)
        change = basis.analyse(torch.eye(d, dtype=DOUBLE)).T
        projector = change.T @ torch.diag(params["mask"][0].expand(shape).flatten().to(DOUBLE)) @ change
    elif "matrix" in params:
        projector = torch.diag((params["matrix"][0] != 0).any(1).to(DOUBLE))
    assert part is None or projector.trace() < d
    covariance = corruption.noise**2 * projector
    standard = covariance.diagonal().sqrt() / math.sqrt(n)
    assert (error.mean(0).abs() <= 5 * standard + 1e-12).all()
    variances = covariance.diagonal()
    spread = ((variances[:, None] * variances + covariance.square()) / n).sqrt()
    assert ((error.T @ error / n - covariance).abs() <= 5 * spread + 1e-12).all()


def test_apply_zeroes_what_is_masked_even_with_noise():
    corruption = RandomMask(0.5, 1.0)
    params = corruption.draw(50, (2, 4, 4), seeded())
    y = corruption.apply(randn(50, 2, 4, 4), params, seeded(1))
    mask = params["mask"].expand_as(y)
    assert (y[~mask] == 0).all()
    assert (y[mask] != 0).all()


@pytest.mark.parametrize("shape", [(12,), (3, 12, 9), (1, 11)])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_mask_rate_and_blocks(shape, block):
    corruption, n = RandomMask(0.75, 0.0, block), 4000
    mask = corruption.draw(n, shape, seeded())["mask"]
    spatial = shape if len(shape) == 1 else shape[1:]
    assert mask.dtype == torch.bool
    assert mask.shape == ((n, *shape) if len(shape) == 1 else (n, 1, *spatial))
    mask = mask.reshape(n, *spatial).double()
    coarse = mask[(slice(None), *[slice(None, None, block)] * len(spatial))]
    assert abs(coarse.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / coarse.numel())
    edges = [range(0, size, block) for size in spatial]
    for corner in itertools.product(*edges):  # every block is constant
        whole = mask[(slice(None), *(slice(c, c + block) for c in corner))].flatten(1)
        assert torch.equal(whole.amin(1), whole.amax(1))
    flat = coarse.flatten(1)  # and different blocks are independent
    correlation = torch.corrcoef(flat.T) - torch.eye(flat.shape[1], dtype=DOUBLE)
    assert correlation.abs().max() < 5.5 / math.sqrt(n)


def test_projection_rows_are_uniform_on_the_sphere():
    matrix = RandomProjection(2, 0.0).draw(20_000, (5,), seeded())["matrix"].double()
    assert matrix.shape == (20_000, 2, 5)
    assert (matrix.norm(dim=-1) - 1).abs().max() < 1e-6
    rows = matrix.flatten(0, 1)
    n = len(rows)
    assert rows.mean(0).abs().max() < 4.5 * math.sqrt(1 / 5 / n)
    # E[v v^T] = I / d and E[v_i^4] = 3 / (d (d + 2))
    assert (rows.T @ rows / n - torch.eye(5) / 5).abs().max() < 4.5 * math.sqrt(2 / 35 / n)
    assert (rows.pow(4).mean(0) - 3 / 35).abs().max() < 4.5 * rows.pow(4).std() / math.sqrt(n)
    pair = (matrix[:, 0] * matrix[:, 1]).sum(1)  # rows of one item are independent: E = 0, E[.^2] = 1 / d
    assert abs(pair.mean()) < 4.5 * math.sqrt(1 / 5 / 20_000)
    assert abs(pair.square().mean() - 1 / 5) < 4.5 * pair.square().std() / math.sqrt(20_000)


@pytest.mark.parametrize("shape", [(16,), (1, 9, 12), (3, 6, 7)])
@pytest.mark.parametrize(("std", "tolerance"), [(0.5, 1e-12), (1.0, 1e-12), (2.0, 1e-4)])
def test_blur_is_a_convolution_with_reflecting_borders(shape, std, tolerance):
    # From std 2 the truncated kernel has frequency gains just below 0, which are cut.
    x = randn(1, *shape)
    radius = round(4 * std)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
    kernel /= kernel.sum()
    expected = x[0].numpy()
    for axis in range(0 if len(shape) == 1 else 1, len(shape)):
        line = lambda v: np.convolve(np.pad(v, radius, mode="symmetric"), kernel, mode="valid")  # noqa: E731
        expected = np.apply_along_axis(line, axis, expected)
    blurred = GaussianBlur(std, 0.0).forward(x, {})[0].numpy()
    assert np.abs(blurred - expected).max() < tolerance


@pytest.mark.parametrize("shape", [(16,), (2, 9, 12)])
def test_blur_preserves_constants(shape):
    for std in (0.5, 1.0, 3.0):
        blurred = GaussianBlur(std, 0.0).forward(torch.full((2, *shape), 3.7, dtype=DOUBLE), {})
        assert (blurred - 3.7).abs().max() < 1e-12


@pytest.mark.parametrize("size", [1, 2, 5, 16])
@pytest.mark.parametrize("std", [0.2, 1.0, 5.0])
def test_blur_matrix(size, std):
    matrix = blur_matrix(size, std)
    assert (matrix - matrix.T).abs().max() < 1e-15
    assert (matrix.sum(1) - 1).abs().max() < 1e-14
    assert matrix.min() >= 0


@pytest.mark.parametrize(("corruption", "shape"), [c for c in CASES if not isinstance(c.values[0], RandomProjection)])
def test_thinning_a_diagonal_corruption(corruption, shape):
    n = 2000
    x, params = randn(n, *shape), corruption.draw(n, shape, seeded(1))
    y = corruption.apply(x, params, seeded(2))
    (y_kept, kept), (y_hidden, hidden) = corruption.thin(y, params, seeded(3))
    whole = params.get("mask", torch.ones(n, *(shape if len(shape) == 1 else (1, *shape[1:])), dtype=torch.bool))
    assert kept["mask"].dtype == hidden["mask"].dtype == torch.bool
    assert kept["mask"].shape == whole.shape
    assert not (kept["mask"] & hidden["mask"]).any()
    assert torch.equal(kept["mask"] | hidden["mask"], whole)
    fraction = hidden["mask"].sum() / whole.sum()
    assert abs(fraction - HIDDEN) < 4 * math.sqrt(HIDDEN * (1 - HIDDEN) / whole.sum())
    if shape == (6,):  # entries of one item are hidden one by one
        count = hidden["mask"].sum(1)
        assert set(count.tolist()) >= {0, 1, 2, 3}
    torch.testing.assert_close(y_kept + y_hidden, y, rtol=0, atol=1e-12)
    for part, mask in ((y_kept, kept["mask"]), (y_hidden, hidden["mask"])):
        shown = mask.expand_as(y)
        coefficients = corruption.compared(part)
        torch.testing.assert_close(coefficients[shown], corruption.compared(y)[shown], rtol=0, atol=1e-12)
        assert coefficients[~shown].abs().max() < 1e-12
    # a part is an observation with the part's parameters
    clean = corruption.forward(x, params)
    for part, (y_part, p) in enumerate(((y_kept, kept), (y_hidden, hidden))):
        expected = thinned(corruption, clean, params, part, seed=3)[0]
        torch.testing.assert_close(corruption.forward(x, p), expected, rtol=0, atol=1e-12)
        residual = corruption.compared(y_part - corruption.forward(x, p))[p["mask"].expand_as(y)]
        assert abs(residual.mean()) < 4 * corruption.noise / math.sqrt(len(residual))
        assert abs(residual.std() / corruption.noise - 1) < 4 / math.sqrt(2 * len(residual))


def test_thinning_again_hides_more():
    corruption = GaussianNoise(0.1)
    y = randn(3000, 6)
    y1, kept = thinned(corruption, y, {}, 0, seed=1)
    _, twice = thinned(corruption, y1, kept, 0, seed=2)
    assert not (twice["mask"] & ~kept["mask"]).any()
    assert abs(twice["mask"].double().mean() - (1 - HIDDEN) ** 2) < 4 * 0.5 / math.sqrt(18_000)


def test_thinning_a_projection_hides_one_row():
    corruption, n = RandomProjection(3, 0.0), 3000
    x, params = randn(n, 5), corruption.draw(n, (5,), seeded(1))
    y = corruption.apply(x, params, seeded(2))
    (y_kept, kept), (y_hidden, hidden) = corruption.thin(y, params, seeded(3))
    rows = corruption.seen(y, hidden)
    assert (rows.sum(1) == 1).all()
    assert torch.equal(corruption.seen(y, kept), ~rows)
    assert torch.equal(kept["matrix"] + hidden["matrix"], params["matrix"])
    assert torch.equal(y_kept + y_hidden, y)
    assert torch.equal(corruption.forward(x, kept), y_kept)
    assert torch.equal(corruption.forward(x, hidden), y_hidden)
    assert (rows.double().mean(0) - 1 / 3).abs().max() < 4 * math.sqrt(2 / 9 / n)  # each row as often
    noisy = RandomProjection(3, 0.5).apply(x, kept, seeded(4))
    assert torch.equal(noisy[rows], torch.zeros(n, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [*itertools.product(["mask", "blocks", "noise", "blur"], [(6,), (2, 2, 3)]), ("projection", (6,))],
)
@pytest.mark.parametrize("part", [None, 0, 1])
def test_likelihood_gives_the_textbook_posterior(kind, shape, part):
    corruption = KINDS[kind]
    d, n = math.prod(shape), 4
    params = params_of_parts(corruption, shape, n)[0 if part is None else 1 + part]
    y = corruption.apply(randn(n, *shape, seed=7), params, seeded(8))
    likelihood = corruption.likelihood(y, params)
    basis = getattr(likelihood, "basis", None)
    change = torch.eye(d, dtype=DOUBLE) if basis is None else basis.analyse(torch.eye(d, dtype=DOUBLE)).T
    mean, factor, variance = randn(1, d, seed=9), randn(1, d, 2, seed=10), randn(1, d, seed=11).square() + 0.2
    posterior = Mixture(torch.zeros(1, dtype=DOUBLE), mean, factor, variance).posterior(likelihood)
    prior_mean = change.T @ mean[0]  # the mixture is written in the basis of the likelihood
    prior_cov = change.T @ (factor[0] @ factor[0].T + torch.diag(variance[0])) @ change
    for i in range(n):
        a = operator(corruption, {k: v[i : i + 1] for k, v in params.items()}, shape)
        precision = torch.linalg.inv(prior_cov) + a.T @ a / corruption.noise**2
        information = torch.linalg.solve(prior_cov, prior_mean) + a.T @ y[i].flatten() / corruption.noise**2
        torch.testing.assert_close(posterior.mean[i], torch.linalg.solve(precision, information))
        covariance = torch.linalg.inv(precision)
        if kind == "projection":
            torch.testing.assert_close(posterior.chol[i] @ posterior.chol[i].T, covariance, rtol=1e-7, atol=1e-10)
        else:
            torch.testing.assert_close(posterior.std[i].square(), (change @ covariance @ change.T).diagonal())


# --- what an observation measured of an item -------------------------------------------------------------


def measuring(corruption: LinearCorruption, params, shape) -> torch.Tensor:
    """A^T (A A^T + (s / c)^2 I)^-1 A of the first item, densely."""
    matrix = operator(corruption, params, shape)
    noise = (max(corruption.noise, 1e-3) / 0.5) ** 2 * torch.eye(len(matrix), dtype=DOUBLE)
    return matrix.T @ torch.linalg.inv(matrix @ matrix.T + noise) @ matrix


MEASURED = [
    *CASES,
    pytest.param(GaussianNoise(2.0), (1, 4, 5), id="strong noise"),
    pytest.param(RandomMask(0.4, 0.0), (3, 4, 5), id="mask without noise"),
    pytest.param(GaussianBlur(0.8, 0.0), (3, 4, 5), id="blur without noise"),
    pytest.param(RandomProjection(3, 0.0), (6,), id="projection without noise"),
    pytest.param(RandomProjection(9, 0.1), (6,), id="more rows than features"),
]


@pytest.mark.parametrize(("corruption", "shape"), MEASURED)
@pytest.mark.parametrize("part", [None, 0, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (DOUBLE, 1e-9)])
def test_measured_is_what_the_operator_lets_through(corruption, shape, part, dtype, tolerance):
    """Of every item by its own operator, also where a part of the observation was taken away."""
    params = params_of_parts(corruption, shape)[0 if part is None else 1 + part]
    x = randn(5, *shape, seed=3, dtype=dtype)
    found = corruption.measured(x, params)
    assert (found.shape, found.dtype) == (x.shape, dtype)
    for i in range(5):
        own = {name: value[i : i + 1] for name, value in params.items()}
        expected = measuring(corruption, own, shape) @ x[i].flatten().double()
        torch.testing.assert_close(found[i].flatten().double(), expected, rtol=0, atol=tolerance)
    for value in params.values():
        assert not torch.equal(value, value.roll(1, 0))  # so that it makes a difference whose operator is used


@pytest.mark.parametrize(("corruption", "shape"), MEASURED)
@pytest.mark.parametrize("part", [None, 0, 1])
def test_measured_is_symmetric_with_eigenvalues_between_none_and_all(corruption, shape, part):
    params, d = params_of_parts(corruption, shape)[0 if part is None else 1 + part], math.prod(shape)
    matrix = corruption.measured(torch.eye(d, dtype=DOUBLE).view(d, *shape), repeated(params, d)).flatten(1)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-9)
    values = torch.linalg.eigvalsh(matrix)
    assert values.min() > -1e-9
    assert values.max() < 1 + 1e-9


def test_measured_in_the_words_of_the_docstring():
    assert SPREAD == 0.5
    x = randn(4, 3, 4, 5)
    mask = RandomMask(0.4, 0.0)
    params = mask.draw(4, (3, 4, 5), seeded())
    torch.testing.assert_close(mask.measured(x, params), x * params["mask"], rtol=0, atol=1e-4)
    assert not mask.measured(x, params)[~params["mask"].expand_as(x)].any()
    # noise as large as the data measures half of them
    torch.testing.assert_close(GaussianNoise(0.5).measured(x, {}), x / 2)
    torch.testing.assert_close(GaussianNoise(0.25).scaled(Units(7.0, 0.5)).measured(x, {}), x / 2)
    blur = GaussianBlur(0.8, 0.2)
    basis, gain = blur.gains((3, 4, 5))
    share = gain.flatten().square() / (gain.flatten().square() + 0.4**2)
    expected = basis.synthesise(share * basis.analyse(x.flatten(1))).view_as(x)
    torch.testing.assert_close(blur.measured(x, {}), expected)
    project = RandomProjection(3, 0.0)
    x = randn(4, 6)
    params = project.draw(4, (6,), seeded())
    rows = params["matrix"].double()
    torch.testing.assert_close(
        project.measured(x, params), (torch.linalg.pinv(rows) @ rows @ x[..., None])[..., 0], rtol=0, atol=1e-3
    )


@pytest.mark.parametrize(
    "corruption", [Corruption(), BlackBox(torch.sign), BlackBox(torch.sign).scaled(Units(1.0, 2.0))]
)
def test_where_nothing_is_known_everything_counts_as_measured(corruption):
    x = randn(4, 3, 4, 5)
    assert torch.equal(corruption.measured(x, {}), x)


# --- likelihoods at their limits, units, conditions, black boxes -----------------------------------------


def test_likelihood_of_noise_free_data_is_finite():
    y = randn(3, 6)
    mask = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool).expand(3, 6)
    likelihood = RandomMask(0.5, 0.0).likelihood(y, {"mask": mask})
    assert torch.equal(likelihood.precision > 0, mask)
    torch.testing.assert_close(likelihood.precision[mask], torch.full((12,), NOISE_FLOOR**-2, dtype=DOUBLE))
    assert RandomProjection(1, 0.0).likelihood(y[:, :1], {"matrix": randn(3, 1, 6)}).noise[0, 0] == NOISE_FLOOR
    assert RandomProjection(1, 0.5).likelihood(y[:, :1], {"matrix": randn(3, 1, 6)}).noise[0, 0] == 0.5


def test_coefficients_that_the_blur_removes_count_as_unseen():
    corruption = GaussianBlur(2.0, 0.1)
    likelihood = corruption.likelihood(randn(2, 16), {})
    gains = torch.linalg.eigvalsh(blur_matrix(16, 2.0))
    assert torch.equal(likelihood.precision[0] > 0, gains > 1e-3)
    assert 0 < (gains <= 1e-3).sum() < 16
    assert torch.isfinite(likelihood.z).all()


def with_noise(x):
    return x.clamp(min=0.1) + 0.3 * torch.randn_like(x)


SCALED = [*CASES, *(pytest.param(BlackBox(with_noise, "m:f"), s, id=f"box-{k}") for k, s in SHAPES.items())]


@pytest.mark.parametrize(("corruption", "shape"), SCALED)
def test_scaled_commutes_with_apply(corruption, shape):
    units = Units(1.7, 2.5)
    x = randn(6, *shape)
    candidates = [corruption.draw(6, shape, seeded(1))]
    if not isinstance(corruption, BlackBox):
        candidates = params_of_parts(corruption, shape, 6)
    for params in candidates:
        original = corruption.apply(x, params, seeded(2))
        noise = corruption.noise
        inside = corruption.scaled(units).apply(units.scale(x), params, seeded(2))
        outside = corruption.scale_y(original, params, units)
        torch.testing.assert_close(inside, outside, rtol=0, atol=1e-12)
        assert (inside - original).abs().max() > 0.1
        assert corruption.noise == noise  # the original is left alone
        assert torch.equal(corruption.apply(x, params, seeded(2)), original)


class Counts(Corruption):
    """Counts in a number of seconds, of rates that must not be negative: a corruption as a user may write it.

    Its thinning needs the counts themselves: each of them goes to the first part or to the second.
    """

    by_entry = True

    def draw(self, n, shape, generator):
        return {"seconds": 5 + 5 * torch.rand(n, 1, *shape[1:], generator=generator, dtype=DOUBLE)}

    def apply(self, x, params, generator):
        return torch.poisson(params["seconds"] * x.clamp(min=0), generator=generator)

    def thin(self, y, params, generator):
        assert (y - y.round()).abs().max() < 1e-9
        first = torch.binomial(y.round(), torch.full_like(y, 1 - HIDDEN), generator=generator)
        seconds = params["seconds"]
        return (first, {"seconds": (1 - HIDDEN) * seconds}), (y - first, {"seconds": HIDDEN * seconds})

    def measured(self, x, params):
        return x * params["seconds"] / 10

    def seen(self, y, params):
        return params["seconds"] > 7

    def compared(self, y):
        return y.flip(1)


class Whole(Counts):
    """The same where nobody knows how to split."""

    def thin(self, y, params, generator):
        return None


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_nonlinear_corruption_of_a_user_works_in_model_units(shape):
    corruption, units, n = Counts(), Units(6.0, 3.3), 20
    scaled = corruption.scaled(units)
    assert (scaled.config, scaled.by_entry) == (corruption.config, True)
    params = corruption.draw(n, shape, seeded(1))
    for a, b in zip(scaled.draw(n, shape, seeded(1)).values(), params.values(), strict=True):
        assert torch.equal(a, b)
    x = 6 + 3 * randn(n, *shape)
    y = corruption.apply(x, params, seeded(2))
    inside = scaled.apply(units.scale(x), params, seeded(2))
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(inside, corruption.scale_y(y, params, units), **close)
    # the same split, and what remains of the counts is in model units again
    expected = corruption.thin(y, params, seeded(3))
    for (part, own), (plain, of_plain) in zip(scaled.thin(inside, params, seeded(3)), expected, strict=True):
        torch.testing.assert_close(part, units.scale(plain), **close)
        assert torch.equal(own["seconds"], of_plain["seconds"])
        assert not torch.equal(own["seconds"], params["seconds"])
    torch.testing.assert_close(expected[0][0] + expected[1][0], y, rtol=0, atol=0)
    # what it says of items and observations
    assert torch.equal(scaled.measured(units.scale(x), params), units.scale(x) * params["seconds"] / 10)
    assert torch.equal(scaled.seen(inside, params), corruption.seen(y, params))
    torch.testing.assert_close(scaled.compared(inside), units.scale(corruption.compared(y)), **close)
    values, seen = scaled.entries(inside, params)
    assert torch.equal(values, scaled.compared(inside).flatten(1))
    assert torch.equal(seen, corruption.entries(y, params)[1])
    for found, plain in zip(scaled.condition(inside, params), corruption.condition(inside, params), strict=True):
        assert torch.equal(found, plain)


def test_capabilities_of_a_scaled_corruption_are_those_that_can_be_scaled():
    units = Units(6.0, 3.3)
    counts, whole, box = (c.scaled(units) for c in (Counts(), Whole(), BlackBox(torch.sign)))
    assert [c.thins for c in (counts, whole, box)] == [True, True, False]
    assert whole.thin(randn(4, 6), {}, seeded()) is None
    for corruption in (counts, whole, box):
        assert not any((corruption.linear, corruption.diagonal, corruption.exact((6,))))
        assert corruption.predictable == corruption.thins
    assert [c.by_entry for c in (counts, whole, box)] == [True, True, False]


RESTORED = [*SCALED, *(pytest.param(Counts(), s, id=f"counts-{k}") for k, s in SHAPES.items())]


@pytest.mark.parametrize(("corruption", "shape"), RESTORED)
def test_restore_y_inverts_scale_y(corruption, shape):
    units, x = Units(1.7, 2.5), randn(6, *shape)
    candidates = [corruption.draw(6, shape, seeded(1))]
    if corruption.thins:
        candidates = params_of_parts(corruption, shape, 6)
    for params in candidates:
        y = corruption.apply(x, params, seeded(2))
        inside = corruption.scale_y(y, params, units)
        assert (inside - y).abs().max() > 0.1
        torch.testing.assert_close(corruption.restore_y(inside, params, units), y, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            corruption.scale_y(corruption.restore_y(y, params, units), params, units), y, rtol=0, atol=1e-12
        )
        for there in (corruption.scale_y, corruption.restore_y):  # with nothing to change
            torch.testing.assert_close(there(y, params, Units()), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("corruption", "shape"), CASES)
def test_condition_shows_observation_and_parameters(corruption, shape):
    """The network is built for one set of parameters and must accept those of thinned observations."""
    shown = []
    for params in params_of_parts(corruption, shape):
        y = corruption.apply(randn(5, *shape), params, seeded(2))
        inputs = corruption.condition(y, params)
        assert inputs[0] is y
        assert all(v.dtype == y.dtype and len(v) == 5 for v in inputs)
        shown.append([v.shape for v in inputs])
        if "mask" in params:
            assert torch.equal(inputs[1].bool(), params["mask"].expand_as(inputs[1]))
        elif "matrix" in params:
            assert torch.equal(inputs[1].view(params["matrix"].shape), params["matrix"].double())
        else:
            assert (inputs[1] == 1).all()
    assert shown[0] == shown[1] == shown[2]


def three_generators(x):
    noise = np.random.normal(size=x.shape) + random.random()  # noqa: NPY002
    return x + torch.randn(x.shape) + torch.from_numpy(noise).to(x)


def test_black_box_reproduces_and_leaves_global_generators_alone():
    box, x = BlackBox(three_generators), randn(4, 3)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002

    def untouched():
        now = np.random.get_state()  # noqa: NPY002
        same_numpy = all(np.array_equal(a, b) for a, b in zip(states[1], now, strict=True))
        return torch.equal(torch.get_rng_state(), states[0]) and same_numpy and random.getstate() == states[2]

    first = box.apply(x, {}, seeded(3))
    assert untouched()
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002
    random.random()
    assert torch.equal(box.apply(x, {}, seeded(3)), first)
    other = box.apply(x, {}, seeded(4))
    assert (other != first).all()
    generator = seeded(3)
    assert torch.equal(box.apply(x, {}, generator), first)
    assert (box.apply(x, {}, generator) != first).all()  # one generator does not repeat itself

    # each of the three counts
    for draw in (lambda: torch.rand(()).item(), np.random.rand, random.random):
        single = BlackBox(lambda x, draw=draw: x * 0 + draw())
        a, b, c = (single.apply(x, {}, seeded(s)) for s in (1, 1, 2))
        assert torch.equal(a, b)
        assert (a != c).all()

    def fails(x):
        three_generators(x)
        raise RuntimeError("inside")

    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    with pytest.raises(DiffemError, match=r"^corruption fails: raised RuntimeError: inside$"):
        BlackBox(fails).apply(x, {}, seeded(3))
    assert untouched()


def test_black_box_gives_what_the_function_gives():
    x = randn(4, 2, 3)
    assert torch.equal(BlackBox(lambda x: x.sum(1)).apply(x, {}, seeded()), x.sum(1))
    assert torch.equal(BlackBox(lambda x: (x > 0).numpy()).apply(x, {}, seeded()), (x > 0).double())
    assert BlackBox(torch.abs).thin(x, {}, seeded()) is None
    assert BlackBox(torch.abs, "torch:abs").config == {"name": "BlackBox", "function": "torch:abs"}


def error(function, *args) -> str:
    with pytest.raises(DiffemError) as caught:
        function(*args)
    assert type(caught.value) is DiffemError
    return str(caught.value)


def test_black_box_errors():
    box = BlackBox(lambda x: x[:2], "m:f")
    assert error(box.apply, randn(4, 3), {}, seeded()) == "corruption m:f: gave 2 observations for 4 items"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(-1.0), "GaussianNoise: noise must be a standard deviation >= 0, got -1.0"),
        (lambda: RandomMask(0.5, math.nan), "RandomMask: noise must be a standard deviation >= 0, got nan"),
        (lambda: RandomMask(1.0, 0.1), "RandomMask: rate is the fraction deleted, in [0, 1), got 1.0"),
        (lambda: RandomMask(-0.1, 0.1), "RandomMask: rate is the fraction deleted, in [0, 1), got -0.1"),
        (lambda: RandomMask(0.5, 0.1, 0), "RandomMask: block must be at least 1, got 0"),
        (
            lambda: GaussianBlur(0.0, 0.1),
            "GaussianBlur: std of the kernel must be > 0 and at most 1,000 pixels, got 0.0",
        ),
        (lambda: RandomProjection(0, 0.1), "RandomProjection: rows must be at least 1, got 0"),
        (
            lambda: RandomProjection(1, 0.1).draw(2, (1, 3, 3), seeded()),
            "RandomProjection: items must have shape (features,), got (1, 3, 3)",
        ),
    ],
)
def test_argument_errors(make, message):
    assert error(make) == message


KNOWN = f"(known: {', '.join(sorted(REGISTRY))})"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "RandomMusk"}, f"f.yaml: name: unknown corruption 'RandomMusk'; did you mean 'RandomMask'? {KNOWN}"),
        ({"name": "zzz"}, f"f.yaml: name: unknown corruption 'zzz'; {KNOWN}"),
        ({"rate": 0.5}, f"f.yaml: name: missing; say how y came about, e.g. `name: Mask` {KNOWN.strip()}"),
        (
            {"name": ["RandomMask"]},
            f"f.yaml: name: unknown corruption ['RandomMask']; did you mean 'RandomMask'? {KNOWN}",
        ),
        (
            {"name": "RandomMask", "rat": 0.5, "noise": 0.1},
            "f.yaml: rat: RandomMask has no such argument; did you mean 'rate'? (known: block, noise, rate)",
        ),
        ({"name": "GaussianNoise", 3: 0.5}, "f.yaml: 3: GaussianNoise has no such argument; (known: noise)"),
        ({"name": "RandomMask"}, "f.yaml: rate: RandomMask needs it"),
        ({"name": "GaussianNoise", "noise": "a tenth"}, "f.yaml: noise: must be a number, got 'a tenth'"),
        ({"name": "GaussianNoise", "noise": True}, "f.yaml: noise: must be a number, got True"),
        ({"name": "GaussianNoise", "noise": None}, "f.yaml: noise: must be a number, got None"),
        (
            {"name": "BlackBox", "function": "os:system"},
            "f.yaml: a data folder never names code to run; "
            "give the function with --corruption package.module:function",
        ),
    ],
)
def test_from_config_errors(config, message):
    assert error(from_config, config, "f.yaml") == message


def test_from_config_names_its_source():
    assert error(from_config, {"name": "RandomMask"}) == "corruption: rate: RandomMask needs it"


@pytest.mark.parametrize("corruption", KINDS.values(), ids=KINDS)
def test_from_config_round_trip(corruption):
    config = corruption.config
    again = from_config(config)
    assert type(again) is type(corruption)
    assert again.config == config == corruption.config
    shape = (6,)
    x = randn(3, *shape)
    drawn = [c.apply(x, c.draw(3, shape, seeded()), seeded(1)) for c in (corruption, again)]
    assert torch.equal(*drawn)


def test_from_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_corruption_module.py").write_text("def twice(x):\n    return 2 * x\n\nnumber = 3\n")
    box = from_path("my_corruption_module:twice")
    monkeypatch.delitem(sys.modules, "my_corruption_module")
    x = randn(2, 3)
    assert torch.equal(box.apply(x, {}, seeded()), 2 * x)
    assert box.config == {"name": "BlackBox", "function": "my_corruption_module:twice"}
    for path in ("my_corruption_module", "my_corruption_module:", ":twice", ""):
        assert error(from_path, path) == f"--corruption {path}: write it as package.module:function"
    assert (
        error(from_path, "no_such_module_here:f")
        == "--corruption no_such_module_here:f: cannot be imported: No module named 'no_such_module_here'"
    )
    assert (
        error(from_path, "math:nothing")
        == "--corruption math:nothing: cannot be imported: module 'math' has no attribute 'nothing'"
    )
    assert error(from_path, "math:pi") == "--corruption math:pi: is not callable"


# --- what goes wrong in a user's own function -------------------------------------------------------------


@pytest.mark.parametrize(
    ("gives", "text"),
    [
        (lambda x: 1 // 0, "raised ZeroDivisionError: integer division or modulo by zero"),
        (lambda x: None, "gave NoneType, not an array of numbers"),
        (lambda x: x[:1], "gave 1 observations for 2 items"),
        (lambda x: x.mean(), "gave 1 observations for 2 items"),
        (lambda x: x * torch.nan, "gave values that are not finite"),
        (lambda x: torch.complex(x, x), "gave complex values; give real and imaginary parts as channels"),
        (lambda x: x[..., :2], "makes (2, 2) of 2 items, where y.npy has (2, 4)"),
    ],
    ids=["raises", "none", "fewer", "one number", "nan", "complex", "another shape"],
)
@pytest.mark.parametrize("how", ["train", "check"])
def test_a_black_box_is_tried_before_anything_else(how, gives, text, tmp_path):
    y = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    observations = Observations(y, BlackBox(gives, "mine:function"), range=(-2, 2))
    with pytest.raises(DiffemError) as caught:
        DiffEM("digits", observations, tmp_path / "run") if how == "train" else check(observations)
    assert str(caught.value) == f"corruption mine:function: {text}"
    assert not (tmp_path / "run").exists()


def test_a_parameter_that_no_file_holds_is_named():
    class Gain(Corruption):
        parameters = ("gain",)

        def apply(self, x, params, generator):
            return x * params["gain"]

    y = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    for corruption, name in ((Gain(), "Gain"), (BlackBox(lambda x, params: x * params["gain"], "m:f"), "m:f")):
        with pytest.raises(DiffemError) as caught:
            check(Observations(y, corruption, range=(-2, 2)))
        assert str(caught.value) == f"gain.npy: missing; corruption {name} asks for it"


def test_a_generator_in_the_place_of_the_parameters_is_refused():
    message = "corruption m:f: its second argument is given the parameters; write f(x, params, generator)"
    assert error(lambda: BlackBox(lambda x, generator: x, "m:f")) == message
    BlackBox(lambda x, params, generator: x, "m:f")


def test_a_users_class_that_raises_is_named():
    class Broken(Corruption):
        def apply(self, x, params, generator):
            return x @ torch.ones(3, 3)

    with pytest.raises(DiffemError, match=r"^corruption Broken: raised RuntimeError: "):
        Broken().rehearse((4,), torch.zeros(2, 4), {})


def test_a_black_box_sees_the_range_alone_if_it_is_asked_for(tmp_path):
    np.save(tmp_path / "y.npy", np.zeros((40, 4), np.float32))
    (tmp_path / "corruption.yaml").write_text("range: [0, 16]\nclip: true\n")
    box = Observations.load(tmp_path, BlackBox(torch.sqrt, "torch:sqrt")).corruption
    x = torch.tensor([[-4.0, 0.0, 9.0, 25.0]])
    assert box.apply(x, {}, seeded(0)).tolist() == [[0.0, 0.0, 3.0, 4.0]]
    assert box.config == {"name": "BlackBox", "function": "torch:sqrt", "clip": [0.0, 16.0]}


@pytest.mark.parametrize(
    "text", ["clip: true", "range: [0, 1]\nclip: 3", "name: GaussianNoise\nnoise: 1\nclip: true\nrange: [0, 1]"]
)
def test_clip_that_is_refused(text, tmp_path):
    np.save(tmp_path / "y.npy", np.zeros((40, 4), np.float32))
    (tmp_path / "corruption.yaml").write_text(text)
    with pytest.raises(
        DiffemError,
        match=r"corruption\.yaml: clip: must be true, beside a `range: \[low, high\]`, and is for black boxes$",
    ):
        Observations.load(tmp_path, None if "name" in text else BlackBox(torch.sqrt, "torch:sqrt"))


def test_an_argument_that_is_not_kept_is_refused():
    class Forgets(Corruption):
        def __init__(self, noise):
            self.level = noise

    with pytest.raises(DiffemError) as caught:
        Forgets(0.5).config  # noqa: B018
    assert str(caught.value) == "corruption Forgets: keep its argument noise as self.noise, or it cannot be saved"


def test_parameters_of_a_users_corruption_stand_beside_y(tmp_path):
    class Turned(Corruption):
        parameters = ("angle",)

        def draw(self, n, shape, generator):
            return {"angle": torch.rand(n, 1, generator=generator)}

        def apply(self, x, params, generator):
            return x * params["angle"].cos()

    y, params = Turned().observe(randn(40, 4), seeded(0))
    arrays = {k: v.numpy() for k, v in params.items()}
    Observations(y.numpy(), Turned(), arrays, range=(-2, 2)).save(tmp_path)
    loaded = Observations.load(tmp_path, Turned())
    assert np.array_equal(loaded.params["angle"], arrays["angle"])


def test_a_users_linear_corruption_is_checked_and_trains(tmp_path):
    class Half(LinearCorruption):
        """Sums of neighbours: forward and adjoint alone."""

        def forward(self, x, params):
            return (x[..., ::2] + x[..., 1::2]) / 2

        def adjoint(self, y, params):
            return y.repeat_interleave(2, -1) / 2

    corruption = Half(0.1)
    y, _ = corruption.observe(randn(60, 4), seeded(0))
    observations = Observations(y.numpy(), corruption, range=(-2, 2), shape=(4,))
    assert [f.text for f in check(observations) if f.name == "observed"] == [
        "what Half hides cannot be told from its observations"
    ]
    same = Observations(randn(60, 4).numpy(), Identity(0.1), range=(-2, 2))
    settings = [("em.iterations", "1"), ("m_step.first_steps", "2"), ("prior.steps", "2"), ("em.guard", "false")]
    settings += [("start.ranks", "[1]"), ("start.components", "[1]"), ("network.kind", "mlp")]
    for name, given in {"half": observations, "same": same}.items():
        rows = list(DiffEM(load_config("digits", settings), given, tmp_path / name).iterate())
        assert [row["ratio"] for row in rows] == [None] * 3  # it cannot be split


class Identity(LinearCorruption):
    def forward(self, x, params):
        return x

    def adjoint(self, y, params):
        return y
