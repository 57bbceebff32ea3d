r"""The loop with a weighted M-step in closed form: where it rests, and that it gets there sooner.

The items are Gaussian, and two of their six entries are observed. What a network would learn is then a linear regression,
and everything that the E-step draws is Gaussian: its second moments can be carried through the sampler's steps exactly. For
every entry j the M-step sees the reconstructions of the observation pattern m with the weight

.. math:: W_{jj} = \lambda + (1 - \lambda) P_{jj} \, ,

with P the part that the pattern measured, as :meth:`RandomMask.measured` says it. No network errs here, and no draws are
finite in number: what is left is the algorithm.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffem.corruptions import RandomMask

ENTRIES, SEEN, NOISE = 6, 2, 0.05
CORRUPTION = RandomMask(1 - SEEN / ENTRIES, NOISE)
MASKS = torch.tensor([[i in chosen for i in range(ENTRIES)] for chosen in itertools.combinations(range(ENTRIES), SEEN)])
EYE = torch.eye(ENTRIES, dtype=torch.float64)


def truth() -> torch.Tensor:
    """The covariance of the items: of rank two, a little noise, and variances of 1."""
    factor = torch.randn(ENTRIES, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = factor @ factor.T + 0.1 * EYE
    scale = covariance.diagonal().rsqrt()
    return scale[:, None] * covariance * scale


TRUTH = truth()


def weights(imputed: float) -> torch.Tensor:
    """The diagonals of W, (patterns, entries): `imputed` is lambda."""
    everything = torch.ones(len(MASKS), ENTRIES, dtype=torch.float64)
    return imputed + (1 - imputed) * CORRUPTION.measured(everything, {"mask": MASKS})


def m_step(drawn: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The second moments that the regression of each entry sees, (entries, d, d); a pattern is as frequent as another one.

    Arguments:
        drawn: Second moments of the reconstructions of every pattern, (patterns, d, d).
        weight: The diagonals of W, (patterns, entries).
    """
    return torch.einsum("pj,pab->jab", weight / weight.sum(0), drawn)


def e_step(laws: torch.Tensor, whole: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    """Second moments of the reconstructions of every pattern, (patterns, d, d).

    Arguments:
        laws: What :func:`m_step` gives.
        whole: Second moments of all reconstructions, by which the residual variance that is put back is known.
        sigmas: The sampler's noise levels, the largest first.
    """
    found = []
    for mask in MASKS:
        rows = EYE[mask]
        of_y = rows @ TRUTH @ rows.T + NOISE**2 * torch.eye(SEEN)  # of real observations
        of_x, cross = sigmas[0] ** 2 * EYE, torch.zeros(ENTRIES, SEEN, dtype=torch.float64)  # of x_t, of x_t and y
        for sigma, after in itertools.pairwise([*sigmas, 0.0]):
            given = torch.cat((EYE, rows))  # x_t and y, made of x
            noise = torch.tensor([sigma**2] * ENTRIES + [NOISE**2] * SEEN, dtype=torch.float64).diag()
            # the denoiser: entry j is regressed on x_t and y, with the moments that it saw
            gain = torch.stack(
                [torch.linalg.solve(given @ law @ given.T + noise, given @ law[:, j]) for j, law in enumerate(laws)]
            )
            missed = EYE - gain @ given
            residual = missed @ whole @ missed.T + gain @ noise @ gain.T
            tau = 1 - (after / sigma) ** 2
            # x_s = (1 - tau) x_t + tau (gain (x_t, y) + residual noise) + noise
            from_x, from_y = (1 - tau) * EYE + tau * gain[:, :ENTRIES], tau * gain[:, ENTRIES:]
            mixed = from_x @ cross @ from_y.T
            of_x = from_x @ of_x @ from_x.T + mixed + mixed.T + from_y @ of_y @ from_y.T
            of_x = of_x + tau**2 * residual + after**2 * tau * EYE
            cross = from_x @ cross + from_y @ of_y
        found.append(of_x)
    return torch.stack(found)


def levels(largest: float, count: int) -> list[float]:
    """Noise levels, as evenly spaced in their logarithms as the package's."""
    return torch.logspace(math.log10(largest), math.log10(0.02), count).tolist()


def divergence(whole: torch.Tensor) -> float:
    """KL(truth || N(0, whole))."""
    ratio = torch.linalg.solve(whole, TRUTH)
    return 0.5 * (ratio.trace() - ENTRIES - torch.linalg.slogdet(ratio).logabsdet).item()


def run(imputed: float, iterations: int, sigmas: list[float]) -> list[float]:
    """The divergence after every E-step, from reconstructions of white noise on."""
    laws, whole, found = EYE.expand(ENTRIES, -1, -1), EYE, []
    for _ in range(iterations + 1):
        drawn = e_step(laws, whole, sigmas)
        whole, laws = drawn.mean(0), m_step(drawn, weights(imputed))
        found.append(divergence(whole))
    return found


@pytest.mark.parametrize("imputed", [1.0, 0.1, 0.01])
def test_weights_are_one_where_the_pattern_measured_and_lambda_elsewhere(imputed):
    weight = weights(imputed)
    assert MASKS.sum(1).eq(SEEN).all()
    assert weight[~MASKS].numpy() == pytest.approx(imputed)
    assert (weight[MASKS] > 0.98).all()  # but for the noise
    assert weight.max() <= 1


@pytest.mark.parametrize("imputed", [1.0, 0.1, 0.01])
def test_the_truth_is_a_fixed_point(imputed):
    moved, laws_moved = [], []
    for largest in (10.0, 30.0, 100.0, 300.0):
        drawn = e_step(TRUTH.expand(ENTRIES, -1, -1), TRUTH, levels(largest, 8))
        moved.append((drawn.mean(0) - TRUTH).abs().max().item())
        laws_moved.append((m_step(drawn, weights(imputed)) - TRUTH).abs().max().item())
    # the sampler starts from noise alone, in place of noise and an item: a bias that is gone where sigma_max is large
    for sizes in (moved, laws_moved):
        assert all(after < before / 5 for before, after in itertools.pairwise(sizes))
        assert sizes[0] < 0.01
        assert sizes[-1] < 1e-5


@pytest.mark.parametrize("imputed", [1.0, 0.01])
def test_what_is_not_the_truth_is_no_fixed_point(imputed):
    wrong = 0.5 * (TRUTH + EYE)
    drawn = e_step(wrong.expand(ENTRIES, -1, -1), wrong, levels(300.0, 8))
    assert (drawn.mean(0) - wrong).abs().max() > 0.01
    assert divergence(drawn.mean(0)) < divergence(wrong)


def test_imputed_entries_that_weigh_less_save_more_than_half_of_the_iterations():
    sigmas = levels(10.0, 8)
    plain, weighted = run(1.0, 30, sigmas), run(0.01, 15, sigmas)
    assert all(after < before for before, after in itertools.pairwise(plain))
    assert plain[0] == pytest.approx(weighted[0])
    assert plain[30] < 0.5 * plain[0]
    assert min(weighted) < plain[30]
