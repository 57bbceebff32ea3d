"""Every linear corruption against dense matrices, each item with an operator of its own."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import yaml
from operators import assert_same_in_model_units
from scipy import ndimage

from diffem import config as configuration
from diffem.corruptions import (
    BlackBox,
    Blur,
    Compose,
    Downsample,
    Fourier,
    GaussianBlur,
    GaussianNoise,
    Grayscale,
    LinearCorruption,
    Mask,
    MotionBlur,
    Radon,
    RandomMask,
    RandomProjection,
    from_config,
)
from diffem.corruptions.linear import NOISE_FLOOR, SPREAD, solve
from diffem.corruptions.thinning import HIDDEN
from diffem.data import Dataset, Observations
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.mixtures import Mixture
from diffem.posterior import from_pretrained
from diffem.units import Units

DOUBLE = torch.float64
N = 4
TINY = {
    "network": {"kind": "auto", "width": 16, "depth": 1, "embedding": 16, "channels": [8], "blocks": [1]},
    "start": {"components": [1], "ranks": [2], "iterations": 3},
    "sampler": {"steps": 2},
    "em": {"iterations": 2, "guard": False},
    "m_step": {"first_steps": 2, "steps": 2, "batch": 8},
    "prior": {"steps": 2, "sampler_steps": 2},
}


class Turned(LinearCorruption):
    """As a user writes one: pairs of neighbours turned by an angle, the second of each pair given up."""

    parameters = ("angle", "mask", "noise")

    def draw(self, n, shape, generator):
        return {"angle": torch.rand(n, 1, generator=generator)}

    def A(self, x, params):
        angle = params["angle"].to(x)
        return angle.cos() * x[:, ::2] + angle.sin() * x[:, 1::2]

    def A_adjoint(self, y, params):
        angle = params["angle"].to(y)
        return torch.stack((angle.cos() * y, angle.sin() * y), 2).flatten(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def kernels(*shape: int, n: int = N) -> torch.Tensor:
    kernel = torch.rand(n, *shape, generator=seeded(5), dtype=DOUBLE)
    return kernel / kernel.flatten(1).sum(1).view(-1, *(1,) * len(shape))


def masks(*shape: int, n: int = N) -> torch.Tensor:
    return torch.rand(n, *shape, generator=seeded(6)) < 0.6


# the corruption, the shape of an item, parameters of n observations
CASES = {
    "mask": (Mask(0.2), (3, 4, 5), lambda n: {"mask": masks(3, 4, 5, n=n)}),
    "random mask": (RandomMask(0.4, 0.2), (6,), lambda n: RandomMask(0.4).draw(n, (6,), seeded())),
    "noise": (GaussianNoise([0.1, 0.3]), (2, 3, 3), lambda n: {}),
    "Gaussian blur": (GaussianBlur(0.8, 0.2), (1, 4, 5), lambda n: {}),
    "projection": (RandomProjection(3, 0.2), (6,), lambda n: RandomProjection(3).draw(n, (6,), seeded())),
    "blur": (Blur("reflect", 0.2), (2, 5, 6), lambda n: {"kernel": kernels(3, 4, n=n)}),
    "blur, zero": (Blur("zero", 0.2), (1, 5, 6), lambda n: {"kernel": kernels(3, 3, n=n)}),
    "blur, circular": (Blur("circular", 0.2), (1, 5, 6), lambda n: {"kernel": kernels(2, 5, n=n)}),
    "blur of rows": (Blur(noise=0.2), (8,), lambda n: {"kernel": kernels(3, n=n), "mask": masks(8, n=n)}),
    "blur of series": (Blur(noise=[0.1, 0.3]), (2, 8), lambda n: {"kernel": kernels(4, n=n)}),
    "blur of volumes": (Blur(noise=0.2), (1, 3, 4, 4), lambda n: {"kernel": kernels(2, 3, 3, n=n)}),
    "masked blur": (Blur(noise=0.2), (1, 5, 6), lambda n: {"kernel": kernels(3, 3, n=n), "mask": masks(1, 5, 6, n=n)}),
    "motion": (MotionBlur(2.6, noise=0.2), (1, 5, 6), lambda n: MotionBlur(2.6).draw(n, (1, 5, 6), seeded())),
    "bins": (Downsample(2, 0.2), (3, 4, 6), lambda n: {"mask": masks(1, 2, 3, n=n)}),
    "bins of an axis": (Downsample([1, 3], 0.2), (1, 4, 6), lambda n: {"mask": masks(1, 4, 2, n=n)}),
    "gray": (Grayscale(noise=0.2), (3, 4, 4), lambda n: {"mask": masks(1, 4, 4, n=n)}),
    "k-space": (Fourier(noise=0.2), (2, 4, 6), lambda n: {"mask": masks(1, 1, 6, n=n)}),
    "k-space, real": (Fourier("real", 0.2), (1, 5, 4), lambda n: {"mask": masks(1, 5, 4, n=n)}),
    "k-space, series": (Fourier("real", 0.2), (1, 7), lambda n: {"mask": masks(1, 7, n=n)}),
    "coils": (
        Fourier(noise=0.2),
        (2, 4, 4),
        lambda n: {"coils": randn(n, 6, 4, 4, seed=7), "mask": masks(1, 1, 4, n=n)},
    ),
    "beams": (Radon(5, noise=0.2), (1, 6, 6), lambda n: {"mask": masks(1, 5, 1, n=n)}),
    "few beams": (Radon([0, 30, 100.5], noise=0.2), (2, 5, 5), lambda n: {}),
    "blur, bins": (
        Compose([Blur(), Downsample(2)], 0.2),
        (1, 4, 6),
        lambda n: {"kernel": kernels(3, 3, n=n), "mask": masks(1, 2, 3, n=n)},
    ),
    "blur, mask": (
        Compose([GaussianBlur(1.0), RandomMask(0.5)], 0.2),
        (1, 4, 5),
        lambda n: {"mask": masks(1, 4, 5, n=n)},
    ),
    "bins, k-space": (Compose([Downsample(2), Fourier()], 0.2), (2, 4, 8), lambda n: {"mask": masks(1, 1, 4, n=n)}),
    "noise by entry": (
        Blur(),
        (1, 4, 5),
        lambda n: {
            "kernel": kernels(3, 3, n=n),
            "noise": 0.1 + torch.rand(n, 1, 4, 5, generator=seeded(), dtype=DOUBLE),
        },
    ),
    "a user's": (Turned(0.2), (6,), lambda n: {"angle": randn(n, 1), "mask": masks(3, n=n)}),
}
parametrised = pytest.mark.parametrize(("corruption", "shape", "make"), CASES.values(), ids=CASES)


def dense(corruption: LinearCorruption, params: dict, shape: tuple[int, ...], i: int) -> torch.Tensor:
    """The matrix of item i, a unit vector at a time."""
    d = math.prod(shape)
    own = {k: v[i : i + 1].expand(d, *v.shape[1:]) for k, v in params.items()}
    return corruption.forward(torch.eye(d, dtype=DOUBLE).view(d, *shape), own).flatten(1).T


def deviation(corruption: LinearCorruption, params: dict, y: torch.Tensor, i: int) -> torch.Tensor:
    """The standard deviations of the noise of item i, flattened."""
    if "noise" in params:
        return params["noise"][i].expand(y.shape[1:]).flatten()
    level = torch.tensor(corruption.noise, dtype=DOUBLE)
    return (level if not level.ndim else level.view(-1, *(1,) * (y.ndim - 2))).expand(y.shape[1:]).flatten()


def parts(corruption: LinearCorruption, shape: tuple[int, ...], make) -> list[dict]:
    """The parameters, and those of both parts after thinning."""
    params = make(N)
    y = corruption.apply(randn(N, *shape), params, seeded(2))
    return [params, *(part[1] for part in corruption.thin(y, params, seeded(3)))]


# --- A --------------------------------------------------------------------------------------------------


@parametrised
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (DOUBLE, 1e-10)])
def test_adjoint(corruption, shape, make, dtype, tolerance):
    for params in parts(corruption, shape, make):
        x = randn(N, *shape, seed=3, dtype=dtype)
        ax = corruption.forward(x, params)
        y = randn(*ax.shape, seed=4, dtype=dtype)
        back = corruption.adjoint(y, params)
        assert ax.dtype == back.dtype == dtype
        assert back.shape == x.shape
        left, right = (ax * y).flatten(1).sum(1), (x * back).flatten(1).sum(1)
        assert ((left - right).abs() <= tolerance * x.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)).all()
    assert ax.abs().sum() > 0


@parametrised
def test_every_item_has_its_own_operator(corruption, shape, make):
    x, params = randn(N, *shape), make(N)
    whole = corruption.forward(x, params)
    for i in range(N):
        own = {k: v[i : i + 1] for k, v in params.items()}
        torch.testing.assert_close(corruption.forward(x[i : i + 1], own)[0], whole[i], rtol=0, atol=1e-12)


def test_blur_is_a_convolution():
    x, kernel = randn(N, 2, 7, 6), kernels(4, 3)
    for border, mode in (("reflect", "reflect"), ("zero", "constant"), ("circular", "wrap")):
        y = Blur(border, 0.1).forward(x, {"kernel": kernel})
        for i in range(N):
            for c in range(2):
                expected = ndimage.convolve(x[i, c].numpy(), kernel[i].numpy(), mode=mode)
                np.testing.assert_allclose(y[i, c].numpy(), expected, atol=1e-12)


def test_a_gaussian_kernel_is_the_gaussian_blur():
    place = torch.arange(-4, 5, dtype=DOUBLE)
    line = torch.exp(-0.5 * place.square())
    line = line / line.sum()
    kernel = (line[:, None] * line).expand(N, 9, 9)
    x = randn(N, 1, 12, 10)
    torch.testing.assert_close(
        Blur(noise=0.1).forward(x, {"kernel": kernel}), GaussianBlur(1.0, 0.1).forward(x, {}), rtol=0, atol=1e-5
    )


def test_a_motion_kernel_is_a_line():
    """Its mass is 1 and lies around the centre; along its direction it has the variance of a line of that length, and
    across it only that of sharing each point between two pixels, at most 1/4."""
    length = 6.0
    kernel = MotionBlur(length).draw(200, (1, 12, 12), seeded())["kernel"].double()
    place = torch.arange(-3, 4, dtype=DOUBLE)
    torch.testing.assert_close(kernel.sum((1, 2)), torch.ones(200, dtype=DOUBLE))
    for axis in (1, 2):
        assert (kernel.sum(3 - axis) @ place).abs().max() < 1e-5
    rows, columns = kernel.sum(2) @ place.square(), kernel.sum(1) @ place.square()
    mixed = torch.einsum("nyx,y,x->n", kernel, place, place)
    spread = torch.linalg.eigvalsh(torch.stack([rows, mixed, mixed, columns], 1).view(-1, 2, 2))
    assert ((spread[:, 1] - length**2 / 12).abs() < 0.3).all()
    assert (spread[:, 0] <= 0.26).all()
    angle = 0.5 * torch.atan2(2 * mixed, columns - rows)
    assert angle.std() > 0.8  # every direction: pi / sqrt(12) = 0.91


def test_bins_and_gray_images_are_means():
    x = randn(2, 3, 4, 6)
    y = Downsample(2, 0.1).forward(x, {})
    torch.testing.assert_close(y[1, 2, 1, 2], x[1, 2, 2:4, 4:6].mean())
    gray = Grayscale(noise=0.1).forward(x, {})
    torch.testing.assert_close(gray[0, 0], 0.299 * x[0, 0] + 0.587 * x[0, 1] + 0.114 * x[0, 2])


def test_k_space_has_its_zero_frequency_in_the_middle():
    x = torch.full((1, 2, 4, 6), 1.0, dtype=DOUBLE)
    y = Fourier(noise=0.1).forward(x, {})
    assert y[0, :, 2, 3].tolist() == pytest.approx([24**0.5] * 2)
    assert y.abs().sum() == pytest.approx(2 * 24**0.5)
    z = np.random.default_rng(0).normal(size=(4, 6)) + 1j * np.random.default_rng(1).normal(size=(4, 6))
    expected = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(z), norm="ortho"))
    found = Fourier(noise=0.1).forward(torch.from_numpy(np.stack((z.real, z.imag))[None]), {})[0].numpy()
    np.testing.assert_allclose(found[0] + 1j * found[1], expected, atol=1e-12)
    coil = np.random.default_rng(2).normal(size=(4, 6)) * 1j
    maps = torch.from_numpy(np.stack((0 * z.real, coil.imag))[None])
    found = Fourier(noise=0.1).forward(torch.from_numpy(np.stack((z.real, z.imag))[None]), {"coils": maps})[0].numpy()
    expected = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(coil * z), norm="ortho"))
    np.testing.assert_allclose(found[0] + 1j * found[1], expected, atol=1e-12)


def test_beams_sum_along_lines():
    n = 9
    inside = (torch.arange(n) - 4).square()[:, None] + (torch.arange(n) - 4).square() < 16
    x = randn(1, 1, n, n) * inside
    y = Radon([0, 90, 180, 45], noise=0.1).forward(x, {})[0, 0]
    torch.testing.assert_close(y[0], x[0, 0].sum(0))
    torch.testing.assert_close(y[1], x[0, 0].sum(1).flip(0))  # what is above falls on the right
    torch.testing.assert_close(y[2], y[0].flip(0))
    torch.testing.assert_close(y[3].sum(), x.sum())  # nothing is lost, and a point falls where it should
    point = torch.zeros(1, 1, n, n, dtype=DOUBLE)
    point[0, 0, 2, 6] = 1.0  # two to the right, two above
    y = Radon([45.0], noise=0.1).forward(point, {})[0, 0, 0]
    assert (y * torch.arange(n)).sum() == pytest.approx(4 + 8**0.5)


def test_beams_that_were_used_can_be_copied():  # as the average of a network is
    used, x = Radon(3, noise=0.1), randn(2, 1, 5, 5)
    y = used.forward(x, {})
    torch.testing.assert_close(copy.deepcopy(used).forward(x, {}), y, rtol=0, atol=0)


def test_a_limited_range_of_angles():
    assert Radon(4, noise=0.1).degrees == [0, 45, 90, 135]
    assert Radon(4, 120, noise=0.1).degrees == [0, 30, 60, 90]


# --- noise, what was measured, posteriors ---------------------------------------------------------------


@parametrised
def test_noise_is_that_of_the_formula(corruption, shape, make):
    n = 4000
    params = {k: v[:1].expand(n, *v.shape[1:]) for k, v in make(N).items()}
    x = randn(1, *shape)
    y = corruption.apply(x.expand(n, *shape), params, seeded(5))
    error = (y - corruption.forward(x, {k: v[:1] for k, v in params.items()})).flatten(1)
    std = deviation(corruption, params, y, 0) * corruption.seen(y, params)[:1].expand(1, *y.shape[1:]).flatten()
    covariance = error.T @ error / n
    allowed = 5.5 * torch.sqrt(std.square()[:, None] * std.square() * (1 + torch.eye(len(std))) / n)
    assert ((covariance - torch.diag(std.square())).abs() <= allowed + 1e-12).all()
    assert (error.mean(0).abs() <= 5 * std / math.sqrt(n) + 1e-12).all()


@parametrised
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-4), (DOUBLE, 1e-8)])
def test_measured_and_the_first_reconstruction_are_the_dense_formulas(corruption, shape, make, dtype, tolerance):
    for params in parts(corruption, shape, make):
        x = randn(N, *shape, seed=3, dtype=dtype)
        y = corruption.apply(x, params, seeded(1))
        found, first = corruption.measured(x, params), corruption.initial(y, params)
        assert found.dtype == first.dtype == dtype
        for i in range(N):
            a, std = dense(corruption, params, shape, i), deviation(corruption, params, y, i)
            if corruption.basis(shape) is not None:  # its masks are of coefficients
                std = std[:1].expand_as(std)
            gram = a @ a.T + torch.diag((std.clamp(min=NOISE_FLOOR) / SPREAD).square())
            expected = a.T @ torch.linalg.solve(gram, a @ x[i].flatten().double())
            close = {"rtol": 0, "atol": tolerance * float(x[i].norm())}
            torch.testing.assert_close(found[i].flatten().double(), expected, **close)
            if not corruption.diagonal:  # whose first reconstruction is y
                expected = a.T @ torch.linalg.solve(gram, y[i].flatten().double())
                torch.testing.assert_close(first[i].flatten().double(), expected, **close)


@parametrised
def test_likelihood_gives_the_textbook_posterior(corruption, shape, make):
    d = math.prod(shape)
    prior = Mixture.standard(d).copied(DOUBLE)
    prior.basis = corruption.basis(shape)
    assert corruption.exact(shape) == (d <= 64 or corruption.diagonal)
    for params in parts(corruption, shape, make):
        y = corruption.apply(randn(N, *shape), params, seeded(1))
        found = prior.posterior(corruption.likelihood(y, params))
        for i in range(N):
            a, std = dense(corruption, params, shape, i), deviation(corruption, params, y, i)
            expected = a.T @ torch.linalg.solve(a @ a.T + torch.diag(std.square()), y[i].flatten())
            torch.testing.assert_close(found.mean[i], expected, rtol=0, atol=1e-6)


def test_large_items_have_no_exact_start():
    assert [Downsample(2, 0.1).exact(shape) for shape in ((1, 8, 8), (1, 10, 10))] == [True, False]
    assert GaussianBlur(1.0, 0.1).exact((3, 64, 64))


def test_an_item_does_not_depend_on_its_neighbours():
    corruption, shape, make = CASES["masked blur"]
    x, params = randn(N, *shape, dtype=torch.float32), make(N)
    x[1:] *= torch.tensor([1e-6, 0.0, 1e6]).view(3, 1, 1, 1)
    whole = corruption.measured(x, params)
    for i in range(N):
        alone = corruption.measured(x[i : i + 1], {k: v[i : i + 1] for k, v in params.items()})[0]
        torch.testing.assert_close(alone, whole[i], rtol=1e-5, atol=1e-6 * float(x[i].abs().max()))
    assert torch.equal(whole, corruption.measured(x, params))


def test_the_gradient_of_what_was_measured_is_itself():
    corruption, shape, make = CASES["masked blur"]
    params, x, v = make(N), randn(N, *shape, seed=1).requires_grad_(), randn(N, *shape, seed=2)
    (gradient,) = torch.autograd.grad((v * corruption.measured(x, params)).sum(), x)
    torch.testing.assert_close(gradient, corruption.measured(v, params))


def test_conjugate_gradients():
    root = randn(3, 6, 6)
    k, b = root @ root.mT + 0.1 * torch.eye(6, dtype=DOUBLE), randn(3, 6, seed=1)
    b[1] = 0
    found = solve(lambda u: (k @ u[..., None])[..., 0], b)
    torch.testing.assert_close(found, torch.linalg.solve(k, b), rtol=1e-8, atol=1e-10)


# --- thinning, units, what the network is shown ---------------------------------------------------------


@parametrised
def test_thinning_splits_what_was_observed(corruption, shape, make):
    if corruption.parameters == ("matrix", "noise"):
        pytest.skip("its rows are hidden one by one: tests/test_corruptions.py")
    n = 1000
    params = make(n)
    y = corruption.apply(randn(n, *shape), params, seeded(2))
    (shown, kept), (rest, hidden) = corruption.thin(y, params, seeded(3))
    whole = corruption.seen(y, params)
    assert not (kept["mask"] & hidden["mask"]).any()
    assert torch.equal(kept["mask"] | hidden["mask"], whole.expand_as(kept["mask"]))
    share = hidden["mask"].sum() / (kept["mask"] | hidden["mask"]).sum()
    assert abs(share - HIDDEN) < 4 * math.sqrt(HIDDEN * (1 - HIDDEN) / kept["mask"].numel() * 2)
    torch.testing.assert_close(shown + rest, y, rtol=0, atol=1e-12)
    for part, of in ((shown, kept), (rest, hidden)):
        torch.testing.assert_close(corruption.shown(part, of), part, rtol=0, atol=1e-12)


def test_lines_of_k_space_hide_lines():
    lines = masks(1, 1, 16, n=300).numpy()
    lines[..., 6:10] = True
    y = np.zeros((300, 2, 8, 16), np.float32)
    data = Dataset(Observations(y, Fourier(noise=0.1), {"mask": lines}, (-1, 1)), Units())
    _, (_, hidden) = data.corruption.thin(*data.batch(range(300)), seeded())
    assert hidden["mask"].shape == (300, 1, 1, 16)
    assert hidden["mask"].any()
    assert not hidden["mask"][..., 6:10].any()  # what all have measured


@parametrised
@pytest.mark.parametrize("apart", [False, True])
def test_in_model_units_it_is_the_same_observation(corruption, shape, make, apart):
    if apart and not corruption.apart(shape):
        pytest.skip("its channels are not observed apart")
    each = (shape[0], *(1,) * (len(shape) - 1))
    units = Units(randn(*each, seed=2).numpy(), 0.5 + randn(*each).square().numpy()) if apart else Units(0.3, 2.0)
    assert_same_in_model_units(corruption, randn(N, *shape, seed=3), make(N), units)


@parametrised
def test_the_network_is_shown_what_fits_beside_an_item(corruption, shape, make):
    shapes = []
    for params in (*parts(corruption, shape, make), corruption.draw(N, shape, seeded())):
        y = corruption.apply(randn(N, *shape), params, seeded(1))
        inputs = corruption.condition(y, params)
        assert all(v.isfinite().all() and v.dtype == y.dtype for v in inputs)
        assert len(shape) == 1 or all(v.shape[2:] == shape[1:] for v in inputs)
        shapes.append([v.shape for v in inputs])
    assert all(s == shapes[0] for s in shapes)


@pytest.mark.parametrize("name", ["masked blur", "bins", "k-space", "beams", "blur, bins", "noise by entry", "gray"])
def test_the_network_can_tell_operators_and_noise_apart(name):
    corruption, shape, make = CASES[name]
    params = make(N)
    y = corruption.forward(torch.ones(N, *shape, dtype=DOUBLE), params)
    shown = torch.cat([v.flatten(1) for v in corruption.condition(y, params)], 1)
    for key, value in params.items():
        other = torch.cat([v.flatten(1) for v in corruption.condition(y, {**params, key: value.roll(1, 0)})], 1)
        assert ((shown - other).abs().amax(1) > 1e-3).all(), key


# --- from files to a trained model ----------------------------------------------------------------------


@parametrised
def test_it_trains_and_loads_by_its_config_alone(corruption, shape, make, tmp_path):
    n = 40
    params = make(n)
    y = corruption.apply(randn(n, *shape), params, seeded(1)).numpy().astype(np.float32)
    arrays = {k: v.numpy() for k, v in params.items()}
    Observations(y, corruption, arrays, (-3, 3), shape).save(tmp_path / "data")
    own = corruption if isinstance(corruption, Turned) else None
    observations = Observations.load(tmp_path / "data", own)
    assert observations.shape == shape
    rows = list(DiffEM(configuration.from_dict(TINY), observations, tmp_path / "run", allow_unobserved=True).iterate())
    assert all(math.isfinite(row["score"]) and math.isfinite(row["ratio"]) for row in rows)
    posterior = from_pretrained(tmp_path / "run" / "posterior", own)
    assert posterior.corruption.config == corruption.config
    draws = posterior.sample(y[:3], {k: v[:3] for k, v in arrays.items()}, n=2)
    assert draws.shape == (2, 3, *shape)
    assert np.isfinite(draws).all()
    assert posterior.sample_prior(3).isfinite().all()


def test_the_shape_of_an_item_comes_from_the_corruption():
    y = np.zeros((9, 1, 4, 4), np.float32)
    assert Observations(y, Downsample(2, 0.1)).shape == (1, 8, 8)
    assert Observations(y, Grayscale(noise=0.1)).shape == (3, 4, 4)
    assert Observations(y, Radon(4, noise=0.1)).shape == (1, 4, 4)
    assert Observations(np.zeros((9, 2, 4, 4)), Fourier("real", 0.1)).shape == (1, 4, 4)
    both = Compose([Grayscale(), Blur(), Downsample(2)], 0.1)
    assert Observations(y, both, {"kernel": np.ones((1, 3, 3))}).shape == (3, 8, 8)


def test_units_are_those_of_y_where_y_is_means_of_x():
    y = np.random.default_rng(0).normal(100, 1, (500, 1, 4, 4))
    units = Observations(y, Downsample(2, 0.1)).units(np.arange(400))
    assert units.centre == pytest.approx(100, abs=0.5)
    assert units.half < 6
    k_space = np.random.default_rng(0).normal(0, 1, (500, 2, 4, 4))
    assert Observations(k_space, Fourier(noise=0.1)).units(np.arange(400)) == Units(
        0.0, 2 * np.sqrt(np.square(np.float32(k_space[:400])).mean())
    )


@pytest.mark.parametrize(
    ("corruption", "parameters"),
    [
        (Grayscale((1.0, 1.0, 1.0), 0.1), {}),
        (Blur(noise=0.1), {"kernel": np.full((1, 3, 3), 1 / 3)}),
        (Grayscale((-1.0, -1.0, -1.0), 0.1), {}),
    ],
)
def test_units_are_those_of_x_where_weights_do_not_sum_to_one(corruption, parameters):
    x = torch.rand(500, 3, 6, 6, generator=seeded())
    params = {k: torch.from_numpy(v).float().expand(500, *v.shape[1:]) for k, v in parameters.items()}
    y = corruption.forward(x, params).numpy()
    units = Observations(y, corruption, parameters).units(np.arange(500))
    assert np.abs(units.centre - 0.5).max() < 0.05
    assert 0.1 < np.min(units.half) <= np.max(units.half) < 0.8


def test_a_chain_in_a_file(tmp_path):
    text = "name: Compose\nchain:\n  - name: Blur\n    border: zero\n  - {name: Downsample, factor: 2}\nnoise: 1e-1\n"
    chain = from_config(yaml.safe_load(text), "here")
    assert chain.config == {
        "name": "Compose",
        "chain": [
            {"name": "Blur", "border": "zero", "noise": 0.0},
            {"name": "Downsample", "factor": 2, "noise": 0.0},
        ],
        "noise": 0.1,
    }
    assert from_config(chain.config).config == chain.config
    drawn = Compose([Grayscale(), Downsample(2), RandomMask(0.5)], 0.1).draw(5, (3, 4, 4), seeded())
    assert drawn["mask"].shape == (5, 1, 2, 2)


# --- what is refused ------------------------------------------------------------------------------------

IMAGES = np.zeros((9, 1, 4, 4), np.float32)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Blur("mirror", 0.1), "Blur: border must be reflect, zero or circular, got 'mirror'"),
        (lambda: Downsample(0, 0.1), "Downsample: factor must be a whole number of pixels >= 1, got 0"),
        (lambda: Downsample(1.5, 0.1), "Downsample: factor must be a whole number of pixels >= 1, got 1.5"),
        (lambda: Grayscale([0, 0], 0.1), "Grayscale: weights must be numbers, one for each channel, got [0, 0]"),
        (lambda: Fourier("imaginary"), "Fourier: items must be complex or real, got 'imaginary'"),
        (lambda: Radon([]), "Radon: angles must be a number of angles from 1 to 10,000, or a list in degrees, got []"),
        (lambda: Radon(0), "Radon: angles must be a number of angles from 1 to 10,000, or a list in degrees, got 0"),
        (
            lambda: Observations(IMAGES, Blur(noise=0.1)),
            "observations: kernel.npy: missing; Blur needs the kernel of each observation, or one; it must be (N, up to 4, up to 4)",
        ),
        (
            lambda: Observations(IMAGES, Blur(noise=0.1), {"kernel": np.ones((9, 5, 3))}),
            "observations: kernel.npy: shape (9, 5, 3) does not fit y's (9, 1, 4, 4); it must be (N, up to 4, up to 4)",
        ),
        (
            lambda: Observations(IMAGES, GaussianBlur(1.0, 0.1), {"kernel": np.ones((9, 3, 3))}),
            "observations: kernel.npy: GaussianBlur takes noise.npy; `name: Blur` takes it; put other files elsewhere",
        ),
        (
            lambda: Observations(IMAGES, Blur(noise=0.1), {"kernel": np.ones((1, 3, 3)), "mask": np.ones((9, 3))}),
            "observations: mask.npy: shape (9, 3) does not broadcast against y's (9, 1, 4, 4)",
        ),
        (
            lambda: Observations(IMAGES, Downsample(2, 0.1), shape=(1, 9, 9)),
            "observations: shape: Downsample makes y of shape (1, 4, 4) of items of shape (1, 8, 8), not (1, 9, 9)",
        ),
        (
            lambda: Observations(IMAGES, Downsample([2, 2, 2], 0.1)),
            "observations: Downsample: factor has 3 values for 2 spatial axes",
        ),
        (
            lambda: Downsample(3, 0.1).forward(torch.zeros(1, 1, 4, 6), {}),
            "Downsample: items of shape (1, 4, 6) are no multiple of 3 pixels",
        ),
        (
            lambda: Observations(np.zeros((9, 3, 4, 4)), Grayscale(noise=0.1)),
            "observations: y.npy: shape (N, 3, 4, 4) is not that of gray images (N, 1, ...)",
        ),
        (
            lambda: Observations(IMAGES, Fourier(noise=0.1)),
            "observations: y.npy: shape (9, 1, 4, 4) is not that of k-space: real and imaginary parts are channels",
        ),
        (
            lambda: Observations(np.zeros((9, 4, 4, 4)), Fourier(noise=0.1)),
            "observations: coils.npy: missing; y.npy has 2 coils, whose maps must be known",
        ),
        (
            lambda: Observations(np.zeros((9, 4, 4, 4)), Fourier(noise=0.1), {"coils": np.ones((9, 2, 4, 4))}),
            "observations: coils.npy: shape (9, 2, 4, 4) does not fit y's (9, 4, 4, 4)",
        ),
        (
            lambda: Observations(IMAGES, Radon(5, noise=0.1)),
            "observations: y.npy: shape (N, 1, 4, 4) is not (N, channels, 5 angles, bins)",
        ),
        (
            lambda: Radon(5, noise=0.1).forward(torch.zeros(1, 1, 4, 6), {}),
            "Radon: items must be square images (channels, n, n), got (1, 4, 6)",
        ),
        (lambda: Compose([], 0.1), "Compose: chain must be a list of linear corruptions, got []"),
        (
            lambda: Compose([BlackBox(torch.abs, "m:f"), Downsample(2)], 0.1),
            "Compose: chain: BlackBox is not linear with Gaussian noise; write the whole as one function",
        ),
        (
            lambda: Compose([GaussianBlur(1.0, 0.5), Downsample(2)], 0.1),
            "Compose: chain: GaussianBlur has noise 0.5; noise is added at the end: `noise` of Compose",
        ),
        (
            lambda: Compose([RandomMask(0.5), GaussianBlur(1.0)], 0.1),
            "Compose: chain: RandomMask must be the last; mask.npy says which entries of y were observed",
        ),
        (lambda: Compose([Blur(), Blur()], 0.1), "Compose: chain: two corruptions take kernel.npy; make them one"),
        (
            lambda: Observations(IMAGES, Compose([Blur(), Downsample(2)], 0.1)),
            "observations: kernel.npy: missing; Blur needs the kernel of each observation, or one; it must be (N, up to 8, up to 8)",
        ),
        (
            lambda: Observations(IMAGES, Compose([GaussianBlur(1.0), Mask()], 0.1)),
            "observations: mask.npy: missing; Mask needs to know which entries were observed (true = observed)",
        ),
        (
            lambda: Observations(IMAGES, Compose([GaussianBlur(1.0), Downsample(2)])),
            "observations: noise: Compose needs it: a standard deviation, or noise.npy",
        ),
        (
            lambda: from_config({"name": "Compose", "chain": 3}, "f"),
            "Compose: chain must be a list of linear corruptions, got 3",
        ),
        (
            lambda: from_config({"name": "Downsample", "factor": "two"}, "f"),
            "f: factor: must be a number, got 'two'",
        ),
        (
            lambda: from_config({"name": "Compose", "chain": [{"name": "Blur", "edge": 3}]}, "f"),
            "f: chain: edge: Blur has no such argument; (known: border, noise)",
        ),
    ],
)
def test_errors(make, text):
    with pytest.raises(DiffemError) as caught:
        make()
    assert str(caught.value) == text


def test_a_wrong_adjoint_is_refused_before_training():
    class Wrong(LinearCorruption):
        def A(self, x, params):
            return 2 * x

        def A_adjoint(self, y, params):
            return y + y.flip(-1)

    class Short(Wrong):
        def A_adjoint(self, y, params):
            return y[:, 1:]

    y = np.random.default_rng(0).normal(size=(20, 8))
    for kind, said in (
        (
            Wrong,
            r"Wrong: A_adjoint is not the adjoint of A: \|A x\|\^2 is \d+\.?\d*, but x \(A\^T A x\) is -?\d+\.?\d*$",
        ),
        (Short, r"Short: A_adjoint makes \(2, 7\) of y, where items are \(2, 8\)$"),
    ):
        with pytest.raises(DiffemError, match=said):
            DiffEM(configuration.from_dict(TINY), Observations(y, kind(0.1)), "never")
