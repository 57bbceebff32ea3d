"""The random numbers: independent of how the work is cut up, well distributed, and never silently changed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffem import seeding


def kolmogorov_smirnov(x: torch.Tensor, cdf) -> float:
    """sqrt(n) times the greatest distance between the empirical and the exact cdf; above 2.2 with chance 1e-4."""
    x = x.double().flatten().sort().values
    n = len(x)
    exact = cdf(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((steps[1:] - exact).max().item(), (exact - steps[:-1]).max().item())


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return torch.special.ndtr(x)


@pytest.mark.parametrize("draw", [seeding.uniform, seeding.normal])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (101,)])
def test_items_do_not_depend_on_the_batch(draw, shape):
    indices = torch.arange(600)
    whole = draw(seeding.item_seeds(7, 3, "e_step", indices), shape, stream=5)
    assert whole.shape == (600, *shape)
    assert whole.dtype == torch.float32
    for size in (1, 7, 256):
        parts = [draw(seeding.item_seeds(7, 3, "e_step", i), shape, stream=5) for i in indices.split(size)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(seeding.item_seeds(7, 3, "e_step", order), shape, stream=5), whole[order])
    as_list = seeding.item_seeds(7, 3, "e_step", [17, 3])
    assert torch.equal(draw(as_list, shape, stream=5), whole[[17, 3]])


def test_uniform_numbers_do_not_depend_on_how_many_are_drawn():
    seeds = seeding.item_seeds(0, 0, "user", range(4))
    assert torch.equal(seeding.uniform(seeds, (100,))[:, :3], seeding.uniform(seeds, (3,)))


def test_different_addresses_give_different_numbers():
    addresses = [
        (seed, iteration, purpose, index, stream)
        for seed, iteration, purpose, index, stream in itertools.product(
            (0, 1, 2**63), (0, 1, 2), seeding.PURPOSES, (0, 1, 10**9), (0, 1, 64)
        )
    ]
    numbers = [
        seeding.uniform(seeding.item_seeds(seed, iteration, purpose, [index]), (4,), stream)
        for seed, iteration, purpose, index, stream in addresses
    ]
    rows = torch.cat(numbers)
    assert len(torch.unique(rows, dim=0)) == len(addresses)
    assert len(torch.unique(rows)) > 0.999 * rows.numel()


def test_keys_have_no_collisions():
    keys = torch.cat(
        [seeding.item_seeds(0, i, purpose, torch.arange(20_000)) for i in range(3) for purpose in ("e_step", "score")]
    )
    assert len(torch.unique(keys)) == len(keys)


@pytest.mark.parametrize("items", [10, 200_000])  # few items with long streams, many items with short ones
def test_distributions(items):
    shape = (400_000 // items,)
    seeds = seeding.item_seeds(1, 2, "prior", torch.arange(items))
    u = seeding.uniform(seeds, shape)
    assert u.min() >= 0
    assert u.max() < 1
    assert kolmogorov_smirnov(u, lambda x: x) < 2.2
    n = seeding.normal(seeds, shape)
    assert torch.isfinite(n).all()
    assert kolmogorov_smirnov(n, normal_cdf) < 2.2
    # moments, each with its exact standard error, and the tails
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = n.double().pow(power).mean().item() - expected
        assert abs(error) < 4 * math.sqrt(variance / n.numel())
    beyond = 2 * normal_cdf(torch.tensor(-4.0, dtype=torch.float64)).item() * n.numel()
    assert abs((n.abs() > 4).sum().item() - beyond) < 4 * math.sqrt(beyond)


def test_the_two_halves_of_box_muller_are_independent():
    n = seeding.normal(seeding.item_seeds(0, 0, "init", torch.arange(100_000)), (2,)).double()
    assert kolmogorov_smirnov(n.square().sum(1), lambda x: 1 - (-x / 2).exp()) < 2.2
    assert kolmogorov_smirnov(torch.atan2(n[:, 1], n[:, 0]), lambda x: (x + math.pi) / (2 * math.pi)) < 2.2


@pytest.mark.parametrize("draw", [seeding.uniform, seeding.normal])
def test_neighbours_are_uncorrelated(draw):
    indices = torch.arange(20_001)

    def numbers(seed=0, iteration=0, purpose="e_step", stream=0, shift=0):
        return draw(seeding.item_seeds(seed, iteration, purpose, indices + shift), (5,), stream).double()

    base = numbers()
    pairs = {
        "items": (base[1:], base[:-1]),
        "far items": (base, numbers(shift=2**20)),
        "streams": (base, numbers(stream=1)),
        "positions": (base[:, 1:], base[:, :-1]),
        "two positions": (base[:, 2:], base[:, :-2]),
        "three positions": (base[:, 3:], base[:, :-3]),
        "item and stream": (base[1:], numbers(stream=1)[:-1]),
        "item and position": (base[1:, 1:], base[:-1, :-1]),
        "iterations": (base, numbers(iteration=1)),
        "phases": (base, numbers(purpose="score")),
        "seeds": (base, numbers(seed=1)),
    }
    for name, (a, b) in pairs.items():
        for transform in (lambda v: v, torch.square):  # squares: a shared magnitude with random signs would show
            correlation = torch.corrcoef(torch.stack((transform(a).flatten(), transform(b).flatten())))[0, 1]
            assert abs(correlation) < 4 / math.sqrt(a.numel()), name


def test_generator_repeats():
    def numbers(*args):
        return torch.randn(8, generator=seeding.generator(*args)).tolist()

    assert numbers(1, 2, "m_step", 3) == numbers(1, 2, "m_step", 3)
    others = [(0, 2, "m_step", 3), (1, 1, "m_step", 3), (1, 2, "e_step", 3), (1, 2, "m_step", 4), (2, 1, "m_step", 3)]
    assert all(numbers(*other) != numbers(1, 2, "m_step", 3) for other in others)
    assert numbers(1, 2, "m_step") == numbers(1, 2, "m_step", 0)
    state = torch.get_rng_state()
    numbers(1, 2, "m_step", 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_global_generators_are_keyed_and_then_as_they_were():
    def numbers(*key):
        with seeding.global_generators("cpu", *key):
            return torch.rand(4).tolist()

    torch.rand(3)
    state = torch.get_rng_state()
    first = numbers(1, 2, "m_step", 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert numbers(1, 2, "m_step", 3) == first
    others = ((0, 2, "m_step", 3), (1, 3, "m_step", 2), (1, 2, "m_step", 4), (1, 2, "prior_step", 3), (1, 2))
    assert all(numbers(*key) != first for key in others)
    state = torch.get_rng_state()

    @seeding.global_generators("cpu", 1, 2, "m_step", 3)
    def fails():
        torch.rand(1)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert torch.equal(torch.get_rng_state(), state)


def test_keys_of_further_draws_are_new():
    seeds = seeding.item_seeds(0, 0, "user", range(2000))
    assert torch.equal(seeding.again(seeds, 0), seeds)
    keys = torch.stack([seeding.again(seeds, number) for number in range(20)])
    assert len(torch.unique(keys)) == keys.numel()
    assert torch.equal(seeding.again(seeds[[7, 3]], 5), keys[5, [7, 3]])  # of any batch
    numbers = torch.stack([seeding.normal(key, ()) for key in keys]).double()
    correlation = torch.corrcoef(numbers) - torch.eye(20, dtype=torch.float64)
    assert correlation.abs().max() < 4.5 / math.sqrt(2000)


def test_antithetic_keys_give_opposite_numbers():
    seeds = seeding.item_seeds(0, 0, "user", range(2000))
    draws = [seeding.antithetic(seeds, number) for number in range(8)]
    assert torch.equal(draws[0], seeds)
    for one, other in zip(draws[::2], draws[1::2], strict=True):
        for key, mirror in ((one, other), (seeding.again(one, 7), seeding.again(other, 7))):
            assert torch.equal(seeding.normal(mirror, (3,), stream=2), -seeding.normal(key, (3,), stream=2))
            u, v = (seeding.uniform(k, (3,), stream=2) for k in (key, mirror))
            assert torch.equal(u + v, torch.full((2000, 3), 1 - 2.0**-24))
    numbers = torch.stack([seeding.normal(key, ()) for key in draws[::2]]).double()
    assert (torch.corrcoef(numbers) - torch.eye(4, dtype=torch.float64)).abs().max() < 4.5 / math.sqrt(2000)


def test_fold_takes_every_counter_and_their_order():
    keys = {seeding.fold(*numbers) for numbers in itertools.product(range(6), repeat=3)}
    keys |= {seeding.fold(*numbers) for numbers in itertools.product(range(6), repeat=2)}
    assert len(keys) == 6**3 + 6**2
    assert all(0 <= key < 2**64 for key in keys)


def test_mixing_is_splitmix64():
    # The reference stream of SplitMix64 for seed 1234567 (from the generator's published test vectors).
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + (j + 1) * gamma) % 2**64 for j in range(5)]
    assert [seeding._mix(s) for s in states] == expected
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    assert [v % 2**64 for v in seeding._hash(signed).tolist()] == expected


def test_the_streams_are_pinned():
    # These numbers are what a seed means: results stop being reproducible when they change.
    assert list(seeding.PURPOSES)[:9] == [
        "init",
        "split",
        "data",
        "start",
        "m_step",
        "e_step",
        "score",
        "prior",
        "user",
    ]
    seeds = seeding.item_seeds(0, 1, "e_step", [0, 1, 123456])

    assert seeding.fold(3, 1, 4) == 13610870152623129215
    assert seeds.tolist() == [-5597966292176874931, 205203844301906614, -1933244586156863754]
    uniform = (seeding.uniform(seeds, (2,), stream=3) * 2**24).long()
    assert uniform.tolist() == [[4520431, 2930911], [2457190, 9592519], [3147975, 15638503]]
    normal = torch.tensor(
        [
            [0.42117694, -0.26981670, 0.67118877],
            [0.97573054, -1.05464947, 1.69998705],
            [0.30528229, -1.78783453, 0.56781274],
        ]
    )
    torch.testing.assert_close(seeding.normal(seeds, (3,), stream=3), normal, rtol=1e-5, atol=1e-6)
    drawn = torch.rand(2, generator=seeding.generator(0, 1, "m_step", 2))
    torch.testing.assert_close(drawn, torch.tensor([0.94782174, 0.28222692]), rtol=0, atol=1e-7)


class OfAGpu:
    """What `integers` asks of a generator of CUDA, without one."""

    device = torch.device("cuda")

    def __init__(self, seed: int) -> None:
        self.seed, self.offset = seed, 0

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0  # as CUDA demands
        self.offset = offset


def test_integers_come_from_the_generator_and_for_a_gpu_from_its_state():
    one, two = (torch.Generator().manual_seed(3) for _ in range(2))
    drawn = seeding.integers(1000, 500, one)
    assert drawn.tolist() == torch.randint(1000, (500,), generator=two).tolist()
    gpu = OfAGpu(3)
    first, second = seeding.integers(1000, 500, gpu), seeding.integers(1000, 500, gpu)
    assert (first == seeding.integers(1000, 500, OfAGpu(3))).all()
    others = [second, seeding.integers(1000, 500, OfAGpu(4))]
    assert all((first == other).mean() < 0.02 for other in others)
    assert 0 <= first.min() < 10 < 990 < first.max() < 1000
