"""What users call: draws in the units of y, equal draws of equal seeds, and models with parts of the user's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffem import config as configuration
from diffem import samplers, seeding
from diffem.corruptions import (
    REGISTRY,
    BlackBox,
    Corruption,
    GaussianBlur,
    GaussianNoise,
    LinearCorruption,
    Params,
    RandomMask,
    RandomProjection,
    register_corruption,
)
from diffem.data import Observations
from diffem.denoiser import Denoiser, DenoiserConfig
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.mixtures import Mixture, Rows
from diffem.networks import Given, NetworkConfig
from diffem.posterior import Posterior, from_pretrained
from diffem.samplers import SAMPLERS, DiffusionSampler, MixtureSampler, ObservationSampler, Sampler, SamplerConfig
from diffem.units import Units

NETWORK = NetworkConfig(kind="mlp", width=16, depth=1, embedding=16)
UNITS = Units(0.5, 2.0)
D = 6
CASES = {
    "mask": (RandomMask(0.5, 0.1), (D,)),
    "mask of an image": (RandomMask(0.5, 0.1), (2, 3, 4)),
    "noise": (GaussianNoise(0.3), (D,)),
    "blur": (GaussianBlur(0.8, 0.1), (1, 4, 4)),
    "projection": (RandomProjection(2, 0.1), (D,)),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prior(features: int, basis=None) -> Mixture:
    generator = seeded(3)
    mean, factor = 0.3 * torch.randn(1, features, generator=generator), torch.randn(1, features, 2, generator=generator)
    return Mixture(torch.zeros(1), mean, 0.5 * factor, torch.full((1, features), 0.05), basis)


def mixture(corruption: Corruption, shape: tuple[int, ...]) -> Posterior:
    scaled = corruption.scaled(UNITS)
    start = prior(math.prod(shape), scaled.basis(shape))
    return Posterior(MixtureSampler(scaled, shape, start), corruption, UNITS)


def diffusion(
    corruption: Corruption,
    shape: tuple[int, ...] = (D,),
    network: NetworkConfig | Given = NETWORK,
    kind=DiffusionSampler,
) -> Posterior:
    """With a network that says something."""
    scaled = corruption.scaled(UNITS)
    start = prior(math.prod(shape), scaled.basis(shape)) if scaled.exact(shape) else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = Denoiser(scaled, shape, DenoiserConfig(), network, start).eval()
        for parameter in denoiser.network.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return Posterior(kind(denoiser, SamplerConfig(steps=3)), corruption, UNITS)


def observed(corruption: Corruption, shape: tuple[int, ...], n: int = 5) -> tuple[Tensor, Params]:
    generator = seeded(7)
    return corruption.observe(UNITS.restore(torch.randn(n, *shape, generator=generator)), generator)


def keys(n: int) -> Tensor:
    return seeding.item_seeds(0, 0, "user", range(n))


def same(one: Posterior, two: Posterior, y: Tensor, params: Params) -> bool:
    """Whether they draw the same, and something."""
    draws = [of.sample(y, params, n=2, seeds=keys(len(y))) for of in (one, two)]
    priors = [of.sample_prior(4, seeded()) for of in (one, two)]
    assert draws[0].isfinite().all()
    return torch.equal(*draws) and torch.equal(*priors)


# --- draws ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mixture, diffusion])
@pytest.mark.parametrize("case", CASES)
def test_arrays_give_arrays_and_tensors_tensors(case, make):
    corruption, shape = CASES[case]
    of, (y, params) = make(corruption, shape), observed(corruption, shape)
    draws = of.sample(y, params, n=3, generator=seeded())
    assert isinstance(draws, Tensor)
    assert draws.shape == (3, 5, *shape)
    assert draws.dtype == torch.float32
    arrays = {k: v.numpy() for k, v in params.items()}
    drawn = of.sample(y.numpy(), arrays, n=3, generator=seeded())
    assert isinstance(drawn, np.ndarray)
    assert np.array_equal(drawn, draws.numpy())
    assert torch.equal(of.sample(y.double(), arrays, n=3, generator=seeded()), draws)  # whatever the dtype
    assert of.sample(y, params).shape == (1, 5, *shape)
    assert draws.std(0).min() > 1e-3  # they are different ones
    assert draws[:, 1:].isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_draws_are_in_the_units_of_y(case):
    """In the mean over many they are the posterior mean, which dense linear algebra gives."""
    corruption, shape = CASES[case]
    of, (y, params), d = mixture(corruption, shape), observed(corruption, shape, 1), math.prod(shape)
    start, eye = prior(d, corruption.basis(shape)), torch.eye(d, dtype=torch.float64)
    there = eye if start.basis is None else start.basis.synthesise(eye)  # row j: the j-th vector of the basis
    mean = UNITS.restore(start.mean[0].double() @ there)
    cov = UNITS.half**2 * there.T @ start.covariance()[0].double() @ there
    many = {k: v.expand(d, *v.shape[1:]) for k, v in params.items()}
    a = corruption.forward(eye.view(-1, *shape), many).flatten(1).T
    noise = corruption.noise**2 * torch.eye(len(a), dtype=torch.float64)
    gain = cov @ a.T @ torch.linalg.inv(a @ cov @ a.T + noise)
    expected = mean + gain @ (y.flatten().double() - a @ mean)
    left = (cov - gain @ a @ cov).diagonal().sqrt()
    draws = of.sample(y, params, n=4000, generator=seeded())[:, 0].flatten(1).double()
    assert ((draws.mean(0) - expected).abs() < 4.5 * left / 4000**0.5).all()
    torch.testing.assert_close(draws.std(0), left, rtol=0.06, atol=0)
    new = of.sample_prior(4000, seeded()).flatten(1).double()
    std = cov.diagonal().sqrt()
    assert ((new.mean(0) - mean).abs() < 4.5 * std / 4000**0.5).all()
    torch.testing.assert_close(new.std(0), std, rtol=0.06, atol=0)


@pytest.mark.parametrize("make", [mixture, diffusion])
@pytest.mark.parametrize("case", CASES)
def test_equal_seeds_give_equal_draws_in_a_batch_of_any_size(case, make):
    corruption, shape = CASES[case]
    of, n = make(corruption, shape), 11
    y, params = observed(corruption, shape, n)
    whole = of.sample(y, params, n=3, seeds=keys(n))
    for batch in (1, 4, 11):
        drawn = of.sample(y, params, n=3, seeds=keys(n), batch=batch)
        torch.testing.assert_close(drawn, whole, rtol=1e-4, atol=1e-4)
    rows = torch.tensor([9, 2, 5])  # by themselves, in another order
    part = of.sample(y[rows], {k: v[rows] for k, v in params.items()}, n=3, seeds=keys(n)[rows])
    torch.testing.assert_close(part, whole[:, rows], rtol=1e-4, atol=1e-4)
    assert torch.equal(of.sample(y, params, n=2, seeds=keys(n)), whole[:2])  # nor do they depend on how many there are
    again = of.sample(y, params, seeds=keys(n) + 1)
    assert (again - whole[0]).abs().max() > 0.1


def test_a_generator_makes_draws_reproducible():
    of, (y, params) = diffusion(*CASES["mask"]), observed(*CASES["mask"])
    generator = seeded(5)
    one, two = (of.sample(y, params, generator=generator) for _ in range(2))
    assert not torch.allclose(one, two, atol=0.1)  # it goes on
    assert torch.equal(of.sample(y, params, generator=seeded(5)), one)
    assert torch.equal(of.sample_prior(4, seeded(5)), of.sample_prior(4, seeded(5)))
    assert not torch.allclose(of.sample_prior(4, seeded(5)), of.sample_prior(4, seeded(6)), atol=0.1)


def test_without_a_generator_it_is_the_global_one_of_torch():
    of, (y, params) = diffusion(*CASES["mask"]), observed(*CASES["mask"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        one, two = of.sample(y, params), of.sample(y, params)
        torch.manual_seed(5)
        new = of.sample_prior(3)
        before = torch.get_rng_state()
        of.sample(y, params, generator=seeded(5))
        of.sample(y, params, seeds=keys(len(y)))
        assert torch.equal(torch.get_rng_state(), before)  # which is left alone where it is not needed
    assert torch.equal(one, of.sample(y, params, generator=seeded(5)))
    assert not torch.allclose(one, two, atol=0.1)
    assert torch.equal(new, of.sample_prior(3, seeded(5)))


@pytest.mark.parametrize("make", [mixture, diffusion])
@pytest.mark.parametrize("case", ["mask", "mask of an image"])
def test_what_stands_under_the_mask_does_not_matter(case, make):
    of, (y, params) = make(*CASES[case]), observed(*CASES[case])
    mask = params["mask"]
    draws = of.sample(y, params, n=2, seeds=keys(5))
    for value in (100.0, math.nan, math.inf):
        other = torch.where(mask, y, value)
        assert torch.equal(of.sample(other, params, n=2, seeds=keys(5)), draws)
        for kind in (bool, np.uint8, np.float64):  # a mask as numpy, of whatever dtype
            found = of.sample(other.numpy(), {"mask": mask.numpy().astype(kind)}, n=2, seeds=keys(5))
            assert np.array_equal(found, draws.numpy())
    seen = of.sample(torch.where(mask, y + 1, y), params, n=2, seeds=keys(5))
    assert (seen - draws).abs().max() > 0.1  # but what was observed does


def test_draws_of_observations_depend_on_the_seed_and_the_row():
    corruption, shape = CASES["mask"]
    of, (y, params) = diffusion(corruption, shape), observed(corruption, shape, 9)
    data = Observations(y.numpy(), corruption, {k: v.numpy() for k, v in params.items()})
    rows = np.array([7, 0, 4])
    whole = of.reconstruct(data, np.arange(9), n=2, seed=1)
    assert whole.shape == (2, 9, *shape)
    torch.testing.assert_close(of.reconstruct(data, rows, n=2, seed=1, batch=2), whole[:, rows], rtol=1e-4, atol=1e-4)
    seeds = seeding.item_seeds(1, 0, "user", range(9))
    torch.testing.assert_close(of.sample(y, params, n=2, seeds=seeds), whole, rtol=1e-4, atol=1e-4)
    new = of.generate(5, seed=1)
    assert new.shape == (5, *shape)
    torch.testing.assert_close(of.generate(3, seed=1, batch=2), new[:3], rtol=1e-4, atol=1e-4)


MASK, MATRIX = np.ones((3, D), bool), np.ones((3, 2, D), np.float32)
FITS = "where the model's have (6,)"


@pytest.mark.parametrize(
    ("case", "y", "params", "text"),
    [
        (
            "mask",
            (3, D),
            {},
            "mask.npy: missing; RandomMask needs to know which entries were observed (true = observed)",
        ),
        (
            "mask",
            (3, D),
            {"maks": MASK},
            "params: maks: is no parameter of RandomMask; did you mean 'mask'? (known: mask, noise)",
        ),
        ("mask", (3, D), {"mask": MASK[:, :4]}, "mask.npy: shape (3, 4) does not broadcast against y's (3, 6)"),
        ("mask", (3, D), {"mask": MASK[:1]}, "mask: has 1 rows where y has 3"),
        ("mask", (3, D), {"mask": MASK[0]}, "mask: has 6 rows where y has 3"),
        ("mask", (3, D), {"mask": np.array(True)}, "mask: has 0 rows where y has 3"),
        ("mask", (3, 4), {"mask": MASK[:, :4]}, f"y: is of items of shape (4,), {FITS}"),
        ("mask", (D,), {"mask": MASK[0]}, f"y: is of items of shape (), {FITS}"),
        ("noise", (3, 4), {}, f"y: is of items of shape (4,), {FITS}"),
        ("noise", (3, 1, D), {}, f"y: is of items of shape (1, 6), {FITS}"),
        (
            "projection",
            (3, 2),
            {},
            "matrix.npy: missing; RandomProjection needs one matrix (rows, features) per observation",
        ),
        (
            "projection",
            (3, 5),
            {"matrix": MATRIX},
            "matrix.npy: shape (3, 2, 6) does not fit y's (3, 5); it must be (N, rows, features)",
        ),
        ("projection", (3, 2), {"matrix": MATRIX[..., :5]}, f"y: is of items of shape (5,), {FITS}"),
    ],
)
@pytest.mark.parametrize("make", [mixture, diffusion])
def test_parameters_that_are_missing_or_wrong(case, y, params, text, make):
    of = make(*CASES[case])
    for given, where in (
        (np.zeros(y, np.float32), params),
        (torch.zeros(y), {k: torch.tensor(v) for k, v in params.items()}),
    ):
        with pytest.raises(DiffemError) as caught:
            of.sample(given, where)
        assert str(caught.value) == text


def test_seeds_that_are_too_few():
    with pytest.raises(DiffemError) as caught:
        mixture(*CASES["noise"]).sample(torch.zeros(3, D), seeds=keys(2))
    assert str(caught.value) == "seeds: 2 of them, where y has 3 rows"


# --- a corruption of the user's own ---------------------------------------------------------------------


class Clip(Corruption):
    """Cuts off what is far from zero."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def apply(self, x: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        return x.clamp(-self.limit, self.limit)


class Pairs(LinearCorruption):
    """Sums of weighted neighbours: y has half of the entries of x."""

    def __init__(self, weights: Tensor, noise: float) -> None:
        super().__init__(noise)
        self.weights = weights

    def matrix(self, n: int) -> Tensor:
        return (self.weights * torch.eye(D // 2).repeat_interleave(2, 1)).expand(n, -1, -1)

    def forward(self, x: Tensor, params: Params) -> Tensor:
        return (self.matrix(len(x)).to(x) @ x[..., None])[..., 0]

    def adjoint(self, y: Tensor, params: Params) -> Tensor:
        return (self.matrix(len(y)).to(y).mT @ y[..., None])[..., 0]

    def likelihood(self, y: Tensor, params: Params) -> Rows:
        return Rows(y, self.matrix(len(y)).to(y), self.noise_std(y, params).expand_as(y)[:, :1])


OWN = {
    "clip": (Clip(1.5), diffusion),
    "pairs": (Pairs(torch.linspace(-1, 1, D), 0.1), mixture),
    "pairs, a network": (Pairs(torch.linspace(-1, 1, D), 0.1), diffusion),
}


@pytest.fixture
def _shelves() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    shelves = REGISTRY, SAMPLERS
    before = [dict(shelf) for shelf in shelves]
    yield
    for shelf, held in zip(shelves, before, strict=True):
        shelf.clear()
        shelf.update(held)


@pytest.mark.parametrize("own", OWN)
def test_a_corruption_of_the_users_own_is_given_again(own, tmp_path):
    mine, make = OWN[own]
    of, (y, params) = make(mine, (D,)), observed(mine, (D,))
    of.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, corruption=mine)
    assert loaded.corruption is mine
    assert same(of, loaded, y, params)
    assert of.sample(y, n=2).shape == (2, 5, D)
    with pytest.raises(DiffemError) as caught:
        from_pretrained(tmp_path)
    name = type(mine).__name__
    assert str(caught.value) == f"{tmp_path}: its corruption {name} is not one of diffem's; give it with corruption="


@pytest.mark.usefixtures("_shelves")
def test_a_registered_corruption_loads_by_name(tmp_path):
    assert register_corruption(Clip) is Clip
    of = diffusion(Clip(1.25))
    of.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded.corruption) is Clip
    assert loaded.corruption.limit == 1.25
    assert same(of, loaded, *observed(of.corruption, (D,)))
    assert from_pretrained(tmp_path, corruption=Clip(2.0)).corruption.limit == 2  # what is given goes before


@pytest.mark.usefixtures("_shelves")
def test_a_registered_corruption_with_an_array_is_given_again(tmp_path):
    register_corruption(Pairs)
    mine = OWN["pairs"][0]
    of = mixture(mine, (D,))
    of.save_pretrained(tmp_path)
    assert same(of, from_pretrained(tmp_path, corruption=mine), *observed(mine, (D,)))
    with pytest.raises(DiffemError) as caught:  # the file does not hold it
        from_pretrained(tmp_path)
    assert str(caught.value) == f"{tmp_path}: config.json: corruption: weights: Pairs needs it"


# --- a network and a sampler of the user's own ----------------------------------------------------------

SETTINGS = {
    "em": {"iterations": 1, "guard": False},
    "m_step": {"steps": 2, "first_steps": 2, "batch": 8},
    "sampler": {"steps": 3},
    "start": {"components": [1], "ranks": [1], "iterations": 10},
    "network": {"kind": "mlp", "width": 16, "depth": 1, "embedding": 16},
    "prior": {"steps": 2, "sampler_steps": 3},
}


def train(out: Path, case: str, network=None, **sections) -> Observations:
    """A run of two updates in `out`; its observations."""
    corruption, shape = CASES[case]
    y, params = observed(corruption, shape, 30)
    data = Observations(y.numpy(), corruption, {k: v.numpy() for k, v in params.items()})
    em = DiffEM(configuration.from_dict({**SETTINGS, **sections}), data, out, network=network)
    rows = list(em.iterate())
    assert [row["examples"] for row in rows] == [0, 2 * 8, 0]
    return data


def is_of_the_run(loaded: Posterior, out: Path, data: Observations) -> None:
    """It draws what the run drew."""
    rows = np.arange(len(data))
    found = loaded.sample(*data.batch(rows), seeds=seeding.item_seeds(0, 1, "e_step", rows))[0]
    np.testing.assert_allclose(found, np.load(out / "reconstructions.npy"), rtol=1e-4, atol=1e-4)


class Turned(LinearCorruption):
    """Pairs of neighbours turned by an angle that only files know."""

    parameters = ("angle", "mask", "noise")

    def A(self, x: Tensor, params: Params) -> Tensor:
        cos, sin = params["angle"].cos().to(x), params["angle"].sin().to(x)
        left, right = x.view(len(x), -1, 2).unbind(-1)
        return torch.stack([cos * left - sin * right, sin * left + cos * right], -1).view(x.shape)

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        return self.A(y, {**params, "angle": -params["angle"]})


def brighter(x: Tensor, params: Params) -> Tensor:
    return (x * params["gain"]).abs()


@pytest.mark.parametrize("corruption", [Turned(0.1), BlackBox(brighter)], ids=["linear", "function"])
def test_parameters_that_are_only_in_files_are_enough(corruption, tmp_path):
    name, shape = ("angle", (30, 1)) if corruption.linear else ("gain", (30, 1, D))
    shape = shape if corruption.linear else (30, D)
    y = torch.randn(30, D, generator=seeded()).abs().numpy()
    params = {name: torch.rand(shape, generator=seeded()).numpy()}
    data = Observations(y, corruption, params, range=(-3, 3))
    list(DiffEM(configuration.from_dict(SETTINGS), data, tmp_path / "run").iterate())
    posterior = from_pretrained(tmp_path / "run" / "posterior", corruption)
    is_of_the_run(posterior, tmp_path / "run", data)
    assert from_pretrained(tmp_path / "run" / "prior", corruption).sample_prior(2).shape == (2, D)
    posterior.save_pretrained(tmp_path / "again")
    assert same(posterior, from_pretrained(tmp_path / "again", corruption), *data.batch(np.arange(30)))


class Own(nn.Module):
    """A network that diffem does not know; its last layer begins at zero."""

    def __init__(self, channels: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        layer = nn.Linear if len(shape) == 1 else (lambda a, b: nn.Conv2d(a, b, 1))
        self.first, self.last = layer(channels + 1, 12), layer(12, 2 * shape[0])
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        level = log_sigma.view(-1, 1, *(1,) * (x.ndim - 2)).expand(-1, 1, *x.shape[2:])
        return self.last(torch.tanh(self.first(torch.cat((x, level), 1))))


@pytest.mark.parametrize("case", ["mask", "mask of an image", "projection"])
def test_a_network_of_the_users_own_trains_and_is_given_again(case, tmp_path):
    data = train(tmp_path, case, Own)
    for name in ("posterior", "prior"):
        folder = tmp_path / name
        loaded = from_pretrained(folder, network=Own)
        module = loaded.sampler.denoiser.network.module
        assert isinstance(module, Own)
        assert module.last.weight.abs().max() > 0  # it has been trained
        assert loaded.sample_prior(3, seeded()).isfinite().all()
        with pytest.raises(DiffemError) as caught:
            from_pretrained(folder)
        assert str(caught.value) == f"{folder}: its network is not one of diffem's; give it with network="
    is_of_the_run(from_pretrained(tmp_path / "posterior", network=Own), tmp_path, data)


def test_a_network_of_the_users_own_saves_and_loads(tmp_path):
    of = diffusion(CASES["mask"][0], network=Given(Own))
    of.save_pretrained(tmp_path)
    assert same(of, from_pretrained(tmp_path, network=Own), *observed(*CASES["mask"]))
    of.save_pretrained(tmp_path / "own")
    with pytest.raises(DiffemError) as caught:
        from_pretrained(tmp_path, network=lambda channels, shape: nn.Linear(channels, 2 * D))
    assert str(caught.value) == f"{tmp_path}: its weights are not those of its network and its observations"


def test_a_network_that_says_nothing_of_a_variance_is_refused(tmp_path):
    class Half(Own):
        def forward(self, x: Tensor, log_sigma: Tensor) -> Tensor:
            return super().forward(x, log_sigma)[:, :D]

    with pytest.raises(DiffemError) as caught:
        train(tmp_path, "mask", Half)
    assert str(caught.value) == "network: gave (2, 6) where (2, 12) is wanted: a mean and a variance"


class Louder(DiffusionSampler):
    """Goes a little beyond the estimate."""

    kind = "louder"

    def estimate(self, x, sigma, tau, query, stream):
        return 1.1 * super().estimate(x, sigma, tau, query, stream)


@pytest.mark.usefixtures("_shelves")
def test_a_sampler_of_the_users_own_trains_and_loads(tmp_path):
    assert samplers.register_sampler(Louder) is Louder
    data = train(tmp_path, "mask", sampler={"kind": "louder", "steps": 3})
    loaded = from_pretrained(tmp_path / "posterior")
    assert type(loaded.sampler) is Louder
    is_of_the_run(loaded, tmp_path, data)
    assert type(from_pretrained(tmp_path / "prior").sampler) is Louder
    plain = Posterior(
        DiffusionSampler(loaded.sampler.denoiser, loaded.sampler.settings), loaded.corruption, loaded.units
    )
    assert not same(plain, loaded, *data.batch(np.arange(5)))
    del SAMPLERS["louder"]
    known = ", ".join(sorted(SAMPLERS))
    with pytest.raises(DiffemError) as caught:
        from_pretrained(tmp_path / "posterior")
    assert (
        str(caught.value)
        == f"{tmp_path / 'posterior'}: config.json: kind: unknown sampler 'louder'; (known: {known}); is its module imported?"
    )


class Around(Sampler):
    """Draws around a centre, whatever y is: a sampler without a network."""

    kind = "around"

    def __init__(self, corruption: Corruption, shape: tuple[int, ...], centre: float = 0.0) -> None:
        super().__init__(corruption, shape)
        self.register_buffer("centre", torch.tensor(centre))

    def draw(self, y: Tensor, params: Params, seeds: Tensor, withheld: Tensor | None = None) -> Tensor:
        return self.centre + seeding.normal(seeds, self.shape)


@pytest.mark.usefixtures("_shelves")
def test_a_sampler_of_the_users_own_needs_no_network(tmp_path):
    samplers.register_sampler(Around)
    corruption, shape = CASES["mask"]
    of = Posterior(Around(corruption.scaled(UNITS), shape, 3.0), corruption, UNITS)
    of.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded.sampler) is Around
    assert loaded.sampler.centre == 3
    y, params = observed(corruption, shape)
    assert same(of, loaded, y, params)
    assert of.sample(y, params, n=400).mean() == pytest.approx(UNITS.restore(3.0), abs=0.1)
    with pytest.raises(DiffemError) as caught:
        train(tmp_path / "run", "mask", sampler={"kind": "around"})
    assert str(caught.value) == "sampler.kind: around has no network that could be trained; use diffusion"
    assert not (tmp_path / "run").exists()


def test_the_observation_itself(tmp_path):
    corruption, shape = CASES["mask"]
    of = Posterior(ObservationSampler(corruption.scaled(UNITS), shape), corruption, UNITS)
    of.save_pretrained(tmp_path)
    y, params = observed(corruption, shape)
    expected = torch.where(params["mask"], y, float(UNITS.centre))  # what was not observed is the middle of the range
    for posterior in (of, from_pretrained(tmp_path)):
        torch.testing.assert_close(posterior.sample(y, params, n=2), expected.expand(2, -1, -1))


def test_no_draws_are_refused():
    posterior = diffusion(CASES["mask"][0])
    y, params = observed(*CASES["mask"])
    for draw in (lambda: posterior.sample(y, params, n=0), lambda: posterior.sample_prior(0)):
        with pytest.raises(DiffemError) as caught:
            draw()
        assert str(caught.value) == "n: must be at least 1, got 0"


def test_what_is_not_finite_or_not_known_is_refused():
    posterior = diffusion(CASES["mask"][0])
    y, params = observed(*CASES["mask"])
    y = torch.where(params["mask"], y, torch.nan)
    assert posterior.sample(y, params).isfinite().all()
    for given, text in (
        (
            {"mask": ~params["mask"]},
            "y: holds what is not finite where it counts as observed; a mask is true where y was observed",
        ),
        (
            {"masks": params["mask"]},
            "params: masks: is no parameter of RandomMask; did you mean 'mask'? (known: mask, noise)",
        ),
        (params["mask"], 'params: must be named arrays, e.g. {"mask": mask}, got Tensor'),
    ):
        with pytest.raises(DiffemError) as caught:
            posterior.sample(y, given)
        assert str(caught.value) == text
