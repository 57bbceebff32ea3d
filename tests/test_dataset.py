"""Observations in model units, and where the parameters of new ones come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from diffem.corruptions import BlackBox, Corruption, GaussianNoise, Mask, RandomMask, RandomProjection
from diffem.data import Dataset, Observations
from diffem.units import Units


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dataset(mask: np.ndarray, shape: tuple[int, ...], corruption: Corruption | None = None, **options) -> Dataset:
    """Zeros, observed with these masks."""
    y = np.zeros((len(mask), *shape), np.float32)
    return Dataset(Observations(y, corruption or Mask(0.1), {"mask": mask}, range=(-1, 1), **options), Units())


# --- new observations have the parameters of measured ones ---------------------------------------------


def test_new_masks_are_those_of_training_observations():
    n, d = 64, 16
    mask = ((np.arange(n)[:, None] >> np.arange(d)) & 1).astype(bool)  # the number of its row, in binary
    observations = Observations(np.zeros((n, d), np.float32), Mask(0.1), {"mask": mask}, range=(-1, 1))
    train = observations.split(0)[0]
    data = Dataset(observations, Units(), train)
    _y, params = data.corruption.observe(torch.zeros(6000, d), seeded())
    drawn = (params["mask"].numpy() << np.arange(d)).sum(1)
    assert set(drawn) == set(train)
    assert stats.chisquare(np.bincount(drawn, minlength=n)[train]).pvalue > 0.001


def test_matrices_and_parameters_of_a_function_are_rows_too():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(30, 2, 5)).astype(np.float32)
    data = Dataset(Observations(np.zeros((30, 2)), RandomProjection(2, 0.1), {"matrix": matrix}, (-1, 1)), Units())
    drawn = data.corruption.observe(torch.zeros(200, 5), seeded())[1]["matrix"].numpy()
    assert all((matrix == row).all((1, 2)).sum() == 1 for row in drawn)

    def multiply(x, params):
        return x * params["gain"]

    gain = rng.normal(size=(30, 1)).astype(np.float32)
    data = Dataset(Observations(np.zeros((30, 4)), BlackBox(multiply), {"gain": gain}, range=(-1, 1)), Units())
    y, params = data.corruption.observe(torch.ones(200, 4), seeded())
    assert np.isin(params["gain"].numpy(), gain).all()
    assert torch.equal(y, params["gain"].expand(200, 4))
    assert [tuple(v.shape) for v in data.corruption.condition(y, params)] == [(200, 4), (200, 1)]


def test_a_formula_is_used_where_the_user_prefers_it():
    mask = np.ones((40, 1, 8, 8), bool)
    mask[:, :, 0] = False
    for formula in (False, True):
        data = dataset(mask, (1, 8, 8), RandomMask(0.5, 0.1), formula=formula)
        drawn = data.corruption.observe(torch.zeros(100, 1, 8, 8), seeded())[1]["mask"]
        assert drawn[:, :, 0].any() == formula


@pytest.mark.parametrize("arguments", [1, 2, 3])
def test_a_function_gets_as_much_as_it_asks_for(arguments):
    functions = [
        lambda x: x,
        lambda x, params: x + params["shift"],
        lambda x, params, generator: x + params["shift"] + torch.randn(x.shape, generator=generator),
    ]
    box = BlackBox(functions[arguments - 1])
    x, params = torch.zeros(5, 3), {"shift": torch.arange(5.0)[:, None]}
    y, again = (box.apply(x, params, seeded(1)) for _ in range(2))
    assert torch.equal(y, again)
    expected = x if arguments == 1 else x + params["shift"]
    assert torch.equal(y, expected) == (arguments < 3)
    assert box.parameters == (() if arguments == 1 else None)


# --- thinning hides what is like the gaps that are there -------------------------------------------------


def intervals(n: int = 500) -> np.ndarray:
    """Series of 96, each with one gap of 30."""
    begin = np.random.default_rng(0).integers(0, 96 - 30 + 1, n)[:, None]
    return ~((np.arange(96) >= begin) & (np.arange(96) < begin + 30))[:, None]


def thinned(mask: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The masks of what is kept and of what is hidden; they are two parts of the whole."""
    data = dataset(mask, shape)
    (_, kept), (_, hidden) = data.corruption.thin(*data.batch(range(len(mask))), seeded())
    kept, hidden = kept["mask"].numpy(), hidden["mask"].numpy()
    assert not (kept & hidden).any()
    assert np.array_equal(kept | hidden, np.broadcast_to(mask, kept.shape))
    return kept, hidden


def test_gaps_are_hidden_as_gaps():
    mask = intervals()
    _kept, hidden = thinned(mask, (1, 96))
    lengths = []
    for row, shown in zip(hidden[:, 0], mask[:, 0], strict=True):
        where = np.flatnonzero(row)
        if len(where):
            assert where[-1] - where[0] < 30  # of one gap of 30
            assert (
                row[where[0] : where[-1] + 1].sum() == shown[where[0] : where[-1] + 1].sum()
            )  # all that was seen of it
            lengths.append(len(where))
    assert np.mean(np.array(lengths) == 30) > 0.2
    assert 0.25 < hidden.sum() / mask.sum() < 0.45


def test_channels_are_hidden_as_channels_and_lines_as_lines():
    rng = np.random.default_rng(0)
    channels = rng.permuted(np.broadcast_to([True, True, False], (400, 3)), axis=1)[:, :, None, None]
    _kept, hidden = thinned(np.broadcast_to(channels, (400, 3, 4, 4)), (3, 4, 4))
    assert np.array_equal(hidden.any((2, 3)), hidden.all((2, 3)))
    assert 0.2 < hidden.mean() / (2 / 3) < 0.4
    lines = rng.random((400, 1, 1, 32)) < 0.3
    lines[..., 14:18] = True  # the middle of k-space, which no observation misses
    _kept, hidden = thinned(lines, (1, 16, 32))
    assert hidden.shape == (400, 1, 1, 32)
    assert not hidden[..., 14:18].any()
    assert 0.2 < hidden.sum() / lines[..., [*range(14), *range(18, 32)]].sum() < 0.45


@pytest.mark.parametrize("missing", [0.03, 0.2, 0.5, 0.75, 0.95])
def test_about_a_third_is_hidden(missing):
    mask = np.random.default_rng(0).random((800, 1, 16, 16)) >= missing
    hidden = thinned(mask, (1, 16, 16))[1]
    assert 0.2 < hidden.sum() / mask.sum() < 0.42


def test_single_entries_are_hidden_where_all_masks_are_alike_or_there_is_none():
    mask = np.ones((400, 1, 8, 8), bool)
    mask[:, :, 2:4] = False
    hidden = thinned(mask, (1, 8, 8))[1]
    assert abs(hidden.sum() / mask.sum() - 0.3) < 0.02
    data = Dataset(Observations(np.zeros((400, 1, 8, 8)), GaussianNoise(0.1), range=(-1, 1)), Units())
    assert abs(data.corruption.thin(*data.batch(range(400)), seeded())[1][1]["mask"].float().mean() - 0.3) < 0.02
