"""Mixtures against brute force: dense joint Gaussians for posteriors, dense and textbook updates for EM."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffem.corruptions import GaussianBlur
from diffem.mixtures import Basis, Diagonal, Mixture, Rows
from diffem.mixtures.fit import em_step, single
from diffem.mixtures.model import ROWS, DiagonalPosterior

DOUBLE = torch.float64
D, B = 6, 5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=DOUBLE)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=DOUBLE)


def mixture(components: int, rank: int, d: int = D, seed: int = 0, isotropic: bool = False) -> Mixture:
    weights = (rand(components, seed=seed + 1) + 0.2).log()
    variance = rand(components, 1 if isotropic else d, seed=seed + 4).expand(-1, d) * 0.5 + 0.1
    return Mixture(
        weights.log_softmax(0),
        0.8 * randn(components, d, seed=seed + 2),
        0.7 * randn(components, d, rank, seed=seed + 3),
        variance,
    )


def blur_basis(shape=(2, 3)) -> tuple[Basis, torch.Tensor]:
    """An orthonormal basis and its matrix B: coefficients = B x."""
    basis, _ = GaussianBlur(0.8, 0.1).gains((1, *shape))
    matrix = torch.kron(basis.matrices[1], basis.matrices[2])
    return basis, matrix


def masked(basis: Basis | None = None, n: int = B, seed: int = 20) -> Diagonal:
    """Precisions differ between entries and items, a third of the entries are unseen and hold rubbish."""
    seen = rand(n, D, seed=seed) > 0.35
    precision = torch.where(seen, 20 * rand(n, D, seed=seed + 1) + 0.5, 0.0)
    return Diagonal(torch.where(seen, randn(n, D, seed=seed + 2), torch.nan), precision, basis)


def rows(kind: str, n: int = B, seed: int = 30) -> Rows:
    """A few rows for each item, more than are conditioned on at a time, or rows and noise that all items share."""
    m, common = ROWS + 8 if kind == "many rows" else 3, kind == "common rows"
    matrix = randn(1 if common else n, m, D, seed=seed)
    matrix[0, 1] = 0.0  # a row that measures nothing
    noise = 0.3 + rand(1 if common else n, 1, seed=seed + 2)
    return Rows(randn(n, m, seed=seed + 1), matrix, noise.expand(n, 1))


KINDS = ["masks", "basis", "rows", "many rows", "common rows"]


def noisy(n: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(n, D, seed=40), 0.8 + rand(n, 1, seed=41)


def observation(kind: str, given: bool, n: int = B):
    """A likelihood, and the change of basis B in which mixtures for it are written."""
    basis, change = blur_basis() if kind == "basis" else (None, torch.eye(D, dtype=DOUBLE))
    likelihood = rows(kind, n) if "rows" in kind else masked(basis, n)
    if given:
        likelihood = likelihood.given(*noisy(n))
    return likelihood, change


def dense_observation(kind: str, given: bool, i: int, change: torch.Tensor, n: int = B):
    """The same for item i in plain terms: value = matrix x + N(0, diag(noise))."""
    if "rows" in kind:
        plain = rows(kind, n)
        matrix, value, noise = (
            plain.matrix.expand(n, -1, -1)[i],
            plain.y[i],
            plain.noise[i].square().expand(plain.y.shape[1]),
        )
    else:
        plain = masked(n=n)
        seen = plain.precision[i] > 0
        matrix, value, noise = change[seen], plain.z[i][seen], 1 / plain.precision[i][seen]
    if given:
        matrix = torch.cat((matrix, torch.eye(D, dtype=DOUBLE)))
        x_t, sigma = noisy(n)
        value = torch.cat((value, x_t[i]))
        noise = torch.cat((noise, sigma[i].square().expand(D)))
    return matrix, value, noise


def gaussian_log_density(error: torch.Tensor, cov: torch.Tensor) -> torch.Tensor:
    quadratic = error @ torch.linalg.solve(cov, error)
    return -0.5 * (quadratic + torch.linalg.slogdet(cov).logabsdet + len(error) * math.log(2 * math.pi))


def brute_force(model: Mixture, change: torch.Tensor, matrix, value, noise):
    """From the joint Gaussian of (x, value), for each component: log evidence, weights, means, covariances."""
    logs, means, covs = [], [], []
    for k in range(model.components):
        mean = change.T @ model.mean[k]
        cov = change.T @ (model.factor[k] @ model.factor[k].T + torch.diag(model.variance[k])) @ change
        total = matrix @ cov @ matrix.T + torch.diag(noise)
        cross = cov @ matrix.T
        means.append(mean + cross @ torch.linalg.solve(total, value - matrix @ mean))
        covs.append(cov - cross @ torch.linalg.solve(total, cross.T))
        logs.append(model.log_weights[k] + gaussian_log_density(value - matrix @ mean, total))
    logs, means, covs = torch.stack(logs), torch.stack(means), torch.stack(covs)
    weights = logs.softmax(0)
    mean = weights @ means
    centred = means - mean
    cov = torch.einsum("k,kde->de", weights, covs) + torch.einsum("k,kd,ke->de", weights, centred, centred)
    return logs.logsumexp(0), weights, mean, cov


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("rank", [0, 2])
def test_posterior_against_dense_joint(kind, given, components, rank):
    likelihood, change = observation(kind, given)
    models = [mixture(components, rank), mixture(components, rank, seed=100)]
    posterior, other = (model.posterior(likelihood) for model in models)
    assert posterior.mean.dtype == DOUBLE
    evidence = []
    for i in range(B):
        plain = dense_observation(kind, given, i, change)
        log_evidence, weights, mean, cov = brute_force(models[0], change, *plain)
        evidence.append(torch.stack((log_evidence, brute_force(models[1], change, *plain)[0])))
        torch.testing.assert_close(posterior.responsibilities[i], weights, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(posterior.mean[i], mean, rtol=1e-8, atol=1e-10)
        basis_vector = torch.eye(D, dtype=DOUBLE)[i].expand(B, D)
        if "rows" in kind:
            torch.testing.assert_close(posterior.chol[i] @ posterior.chol[i].T, cov, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(posterior.scale(basis_vector)[i], torch.linalg.cholesky(cov)[:, i])
        else:  # exact variances in the basis
            std = (change @ cov @ change.T).diagonal().sqrt()
            torch.testing.assert_close(posterior.std[i], std, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(posterior.scale(basis_vector)[i], (change.T @ torch.diag(std) @ change)[:, i])
    evidence = torch.stack(evidence, 1)
    # up to a constant that does not depend on the mixture, and which is 0 where nothing was merged
    difference = posterior.log_evidence - other.log_evidence
    torch.testing.assert_close(difference, evidence[0] - evidence[1], rtol=1e-8, atol=1e-9)
    if not given or "rows" in kind:
        torch.testing.assert_close(posterior.log_evidence, evidence[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [False, True])
def test_whiten_inverts_scale(kind, given):
    likelihood, _ = observation(kind, given)
    posterior = mixture(3, 2).posterior(likelihood)
    f = randn(B, D, seed=50)
    assert (posterior.scale(f) - f).abs().max() > 0.1
    torch.testing.assert_close(posterior.whiten(posterior.scale(f)), f)
    torch.testing.assert_close(posterior.scale(posterior.whiten(f)), f)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("components", "rank"), [(1, 0), (1, 2), (3, 0), (3, 2)])
def test_draws_have_the_moments_of_the_posterior(kind, given, components, rank):
    n, item = 20_000, 2
    likelihood, change = observation(kind, given)
    fields = {k: v for k, v in vars(likelihood).items() if isinstance(v, torch.Tensor)}
    many = type(likelihood)(
        **{k: v.expand(B, *v.shape[1:])[item : item + 1].expand(n, *v.shape[1:]) for k, v in fields.items()}
    )
    if kind == "basis":
        many = Diagonal(many.z, many.precision, likelihood.basis)
    model = mixture(components, rank)
    _, weights, mean, cov = brute_force(model, change, *dense_observation(kind, given, item, change))
    assert components == 1 or weights.max() < 0.99  # else this would test a single component
    draws = model.posterior(many).draw(rand(n, seed=60), randn(n, rank + D, seed=61))
    assert draws.shape == (n, D)
    centred = draws - mean
    assert (centred.mean(0).abs() < 5 * (cov.diagonal() / n).sqrt()).all()
    products = centred[:, :, None] * centred[:, None, :]
    assert ((products.mean(0) - cov).abs() < 5 * products.std(0) / math.sqrt(n)).all()


def test_draws_pick_components_by_their_responsibilities():
    # far apart and narrow: the component of a draw is visible
    means = torch.tensor([[-10.0], [0.0], [10.0]], dtype=DOUBLE)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE)
    model = Mixture(weights.log(), means, torch.zeros(3, 1, 0, dtype=DOUBLE), torch.full((3, 1), 1e-4, dtype=DOUBLE))
    uniform = torch.tensor([0.0, 0.199, 0.201, 0.699, 0.701, 1 - 2**-24], dtype=DOUBLE)
    nothing = torch.zeros(len(uniform), 1, dtype=DOUBLE)
    expected = torch.tensor([-10.0, -10, 0, 0, 10, 10], dtype=DOUBLE)
    draws = model.posterior(Diagonal(nothing, nothing)).draw(uniform, randn(len(uniform), 1))[:, 0]
    assert (draws - expected).abs().max() < 0.1
    unseen = Rows(nothing, torch.zeros(len(uniform), 1, 1, dtype=DOUBLE), nothing + 1)
    draws = model.posterior(unseen).draw(uniform, randn(len(uniform), 1))[:, 0]
    assert (draws - expected).abs().max() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_withheld_gives_the_prior(kind):
    likelihood, change = observation(kind, given=False)
    model = mixture(3, 2)
    where = torch.tensor([True, False, True, False, True])
    posterior, whole = model.posterior(likelihood.withheld(where)), model.posterior(likelihood)
    _, weights, mean, cov = brute_force(  # of nothing
        model, change, torch.zeros(0, D, dtype=DOUBLE), torch.zeros(0, dtype=DOUBLE), torch.zeros(0, dtype=DOUBLE)
    )
    torch.testing.assert_close(weights, model.log_weights.exp())
    torch.testing.assert_close(posterior.responsibilities[where], weights.expand(3, 3))
    torch.testing.assert_close(posterior.mean[where], mean.expand(3, D))
    torch.testing.assert_close(posterior.log_evidence[where], torch.zeros(3, dtype=DOUBLE), rtol=0, atol=1e-12)
    if "rows" in kind:
        torch.testing.assert_close((posterior.chol @ posterior.chol.mT)[where], cov.expand(3, D, D))
    else:
        std = (change @ cov @ change.T).diagonal().sqrt()
        torch.testing.assert_close(posterior.std[where], std.expand(3, D))
    torch.testing.assert_close(posterior.mean[~where], whole.mean[~where])
    torch.testing.assert_close(posterior.log_evidence[~where], whole.log_evidence[~where])
    # with a noisy item beside it, what was withheld is as if never measured
    x_t, sigma = noisy()
    posterior = model.posterior(likelihood.withheld(where).given(x_t, sigma))
    for i in (0, 2, 4):
        eye, noise = torch.eye(D, dtype=DOUBLE), sigma[i].square().expand(D)
        _, weights, mean, _ = brute_force(model, change, eye, x_t[i], noise)
        torch.testing.assert_close(posterior.mean[i], mean)
        torch.testing.assert_close(posterior.responsibilities[i], weights)


def test_the_standard_mixture_is_the_usual_preconditioning():
    sigma = torch.tensor([[0.01], [1.0], [50.0]])
    x_t = torch.randn(3, D, generator=seeded(0))
    posterior = Mixture.standard(D).posterior(Diagonal(x_t, torch.zeros(3, D)).given(x_t, sigma))
    torch.testing.assert_close(posterior.mean, x_t / (1 + sigma.square()))
    torch.testing.assert_close(posterior.std, (sigma / (1 + sigma.square()).sqrt()).expand(3, D))


def test_given_is_exact_at_extreme_precisions_in_single_precision():
    z, x_t = torch.full((1, 1), 0.3), torch.full((1, 1), 0.7)
    for precision, sigma in ((1e6, 100.0), (1e-6, 1e-3), (1e6, 1e-3)):
        merged = Diagonal(z, torch.full((1, 1), precision)).given(x_t, torch.full((1, 1), sigma))
        total = precision + sigma**-2
        torch.testing.assert_close(merged.precision.item(), total, rtol=1e-6, atol=0)
        torch.testing.assert_close(merged.z.item(), (precision * 0.3 + 0.7 / sigma**2) / total, rtol=1e-6, atol=0)


def test_basis_is_orthonormal_and_matches_its_matrix():
    basis, change = blur_basis()
    x = randn(4, D)
    torch.testing.assert_close(basis.analyse(x), x @ change.T)
    torch.testing.assert_close(basis.synthesise(basis.analyse(x)), x)
    torch.testing.assert_close(basis.analyse(x).norm(dim=1), x.norm(dim=1))
    assert torch.equal(Basis([None], (D,)).analyse(x), x)


# EM ------------------------------------------------------------------------------------------------


def em_data(kind: str, n: int = 120, components: int = 3, rank: int = 2):
    """Observations of draws from a mixture; every entry is seen at one precision in all items that see it, unless `varied`."""
    truth = mixture(components, rank, seed=200)
    k = torch.multinomial(truth.log_weights.exp(), n, replacement=True, generator=seeded(70))
    latent, normal = randn(n, rank, seed=71), randn(n, D, seed=72)
    x = 2 * truth.mean[k] + (truth.factor[k] @ latent[..., None])[..., 0] + truth.variance[k].sqrt() * normal
    if "rows" in kind:
        matrix = randn(n, 3, D, seed=73)
        noise = 0.2
        y = (matrix @ x[..., None])[..., 0] + noise * randn(n, 3, seed=74)
        return Rows(y, matrix, torch.full((n, 1), noise, dtype=DOUBLE))
    level = 4 + 20 * rand(D, seed=75)
    if kind == "varied":
        level = level * 10 ** (4 * rand(n, D, seed=78) - 3)
    basis = None
    seen = rand(n, D, seed=76) > 0.4
    seen[torch.arange(n), torch.arange(n) % D] = True
    if kind == "basis":  # as for a blur: the same coefficients in all items, one of them lost
        basis, seen = blur_basis()[0], (torch.arange(D) != 4).expand(n, D)
    z = x + randn(n, D, seed=77) / level.sqrt()
    return Diagonal(torch.where(seen, z, 0.0), torch.where(seen, level, 0.0), basis, varied=kind == "varied")


def cut(likelihood, size: int):
    fields = vars(likelihood)
    n = len(next(iter(fields.values())))
    for start in range(0, n, size):
        pick = lambda v: v[start : start + size] if isinstance(v, torch.Tensor) else v  # noqa: B023, E731
        yield type(likelihood)(**{k: pick(v) for k, v in fields.items()})


@pytest.mark.parametrize("kind", [*KINDS, "varied"])
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("rank", [0, 2])
def test_likelihood_never_falls(kind, components, rank):
    data = em_data(kind)
    model = mixture(components, rank, seed=300, isotropic=True)
    history = []
    for _ in range(31):
        model, log_likelihood = em_step(model, [data], floor=1e-8)
        history.append(log_likelihood)
    assert all(after >= before - 1e-10 * abs(before) for before, after in itertools.pairwise(history))
    assert history[-1] > history[0] + 0.5
    torch.testing.assert_close(model.log_weights.exp().sum(), torch.ones((), dtype=DOUBLE))


@pytest.mark.parametrize("kind", [*KINDS, "varied"])
@pytest.mark.parametrize(("components", "rank"), [(1, 0), (3, 2)])
@pytest.mark.parametrize("ridge", [0.0, 5.0])
def test_batches_do_not_matter(kind, components, rank, ridge):
    data, model = em_data(kind), mixture(components, rank, seed=300)
    whole, whole_log = em_step(model, [data], ridge=ridge)
    parts, parts_log = em_step(model, cut(data, 7), ridge=ridge)
    assert parts_log == pytest.approx(whole_log, rel=1e-12)
    torch.testing.assert_close(parts.log_weights, whole.log_weights)
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.covariance(), whole.covariance())
    torch.testing.assert_close(parts.variance, whole.variance)
    assert (whole.mean - model.mean).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["masks", "basis"])
def test_em_computes_no_means_of_items(kind, monkeypatch):
    """They are the largest of all arrays, and EM needs the latents only."""
    likelihood, _ = observation(kind, given=False)
    model = mixture(3, 2)
    before = em_step(model, [likelihood], ridge=1.0)
    means = property(lambda posterior: pytest.fail("means are computed"))
    for name in ("_means", "_mean", "mean", "std"):
        monkeypatch.setattr(DiagonalPosterior, name, means)
    after = em_step(model, [likelihood], ridge=1.0)
    assert after[1] == before[1]
    assert all(torch.equal(v, before[0].tensors[k]) for k, v in after[0].tensors.items())


def test_mean_log_likelihood_is_that_of_the_old_parameters():
    for kind in KINDS:
        data, model = em_data(kind), mixture(3, 2, seed=300)
        log_likelihood = em_step(model, [data])[1]
        assert log_likelihood == pytest.approx(model.posterior(data).log_evidence.mean().item(), rel=1e-12)


@pytest.mark.parametrize("rank", [D - 1, D])
def test_rows_update_is_the_textbook_one(rank):
    data, model = em_data("rows"), mixture(1, rank, seed=300)
    mean, cov = model.mean[0], model.covariance()[0]
    firsts, seconds = [], []
    for y, matrix, noise in zip(data.y, data.matrix, data.noise, strict=True):
        gain = cov @ matrix.T @ torch.linalg.inv(matrix @ cov @ matrix.T + noise.square() * torch.eye(3, dtype=DOUBLE))
        m = mean + gain @ (y - matrix @ mean)
        firsts.append(m)
        seconds.append(cov - gain @ matrix @ cov + torch.outer(m, m))
    new_mean = torch.stack(firsts).mean(0)
    new_cov = torch.stack(seconds).mean(0) - torch.outer(new_mean, new_mean)
    updated, _ = em_step(model, [data])
    torch.testing.assert_close(updated.mean[0], new_mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(updated.covariance()[0], new_cov, rtol=1e-9, atol=1e-10)
    assert (new_cov - cov).abs().max() > 0.1


def test_rows_update_at_low_rank_is_probabilistic_pca():
    data = em_data("rows")
    full, _ = em_step(mixture(1, 2, seed=300), [data])
    # from the same old parameters, written at rank d - 1: its update is the unconstrained covariance
    old = mixture(1, 2, seed=300)
    padded = Mixture(
        old.log_weights, old.mean, torch.cat((old.factor, torch.zeros(1, D, 3, dtype=DOUBLE)), 2), old.variance
    )
    values, vectors = torch.linalg.eigh(em_step(padded, [data])[0].covariance()[0])
    kept = torch.cat((values[:4].mean().expand(4), values[4:]))
    torch.testing.assert_close(full.covariance()[0], vectors @ torch.diag(kept) @ vectors.T)


@pytest.mark.parametrize("kind", ["masks", "basis", "varied"])
def test_diagonal_update_is_the_textbook_one(kind):
    """Item by item, from the joint Gaussian of (u, z), then a regression for each entry (K = 3)."""
    data, model = em_data(kind), mixture(3, 2, seed=300)
    n, rank = len(data.z), 2
    weights = [[torch.zeros(rank + 1, rank + 1, dtype=DOUBLE) for _ in range(D)] for _ in range(3)]
    targets = [[torch.zeros(rank + 1, dtype=DOUBLE) for _ in range(D)] for _ in range(3)]
    moments, counts = [], torch.zeros(3, dtype=DOUBLE)
    for i in range(n):
        seen = data.precision[i] > 0
        logs, latents = [], []
        for k in range(3):
            v = model.factor[k][seen]
            total = v @ v.T + torch.diag(model.variance[k][seen] + 1 / data.precision[i][seen])
            error = data.z[i][seen] - model.mean[k][seen]
            mean_u = v.T @ torch.linalg.solve(total, error)
            cov_u = torch.eye(rank, dtype=DOUBLE) - v.T @ torch.linalg.solve(total, v)
            u = torch.cat((mean_u, torch.ones(1, dtype=DOUBLE)))
            second = torch.outer(u, u)
            second[:rank, :rank] += cov_u
            latents.append((u, second))
            logs.append(model.log_weights[k] + gaussian_log_density(error, total))
        gamma = torch.stack(logs).softmax(0)
        counts += gamma
        for k, (u, second) in enumerate(latents):
            for j in seen.nonzero()[:, 0].tolist():
                weight = gamma[k] / (model.variance[k, j] + 1 / data.precision[i, j])
                weights[k][j] += weight * second
                targets[k][j] += weight * u * data.z[i, j]
                moments.append((k, j, gamma[k], u, second, data.z[i, j], 1 / data.precision[i, j]))
    updated, _ = em_step(model, [data], floor=1e-8)
    torch.testing.assert_close(updated.log_weights.exp(), counts / n)
    total, seen_by = torch.zeros(3, D, dtype=DOUBLE), torch.zeros(3, D, dtype=DOUBLE)
    for k, j, gamma, u, second, z, noise in moments:
        w = torch.linalg.solve(weights[k][j], targets[k][j])
        torch.testing.assert_close(w, torch.cat((updated.factor[k, j], updated.mean[k, j : j + 1])), msg=f"{k} {j}")
        # E[e^2] with z = w (u, 1) + e + noise
        psi = model.variance[k, j]
        squared = z * z - 2 * z * (w @ u) + w @ second @ w
        gain = psi / (psi + noise)
        total[k, j] += gamma * (gain**2 * squared + psi * noise / (psi + noise))
        seen_by[k, j] += gamma
    ever = seen_by > 0
    torch.testing.assert_close(updated.variance[ever], (total / seen_by)[ever])
    torch.testing.assert_close(updated.variance[~ever], model.variance[~ever])
    assert ever.all() == (kind != "basis")


@pytest.mark.parametrize("kind", ["masks", "rows", "varied"])
def test_em_converges_to_a_stationary_point(kind):
    data = em_data(kind, n=300, components=1, rank=1)
    model = mixture(1, 1, seed=300, isotropic=True)
    for _ in range(2000):
        old = model
        model, _ = em_step(model, [data], floor=1e-8)
        if (model.covariance() - old.covariance()).abs().max() < 1e-9:
            break
    assert model.variance.min() > 1e-2  # an interior point, where the gradient must vanish
    mean, factor = (t.clone().requires_grad_() for t in (model.mean, model.factor))
    log_variance = model.variance.log()[:, :1] if "rows" in kind else model.variance.log()
    log_variance = log_variance.clone().requires_grad_()
    refit = Mixture(model.log_weights, mean, factor, log_variance.exp().expand(1, D))
    gradients = torch.autograd.grad(refit.posterior(data).log_evidence.mean(), (mean, factor, log_variance))
    assert max(g.abs().max() for g in gradients) < 1e-5


def test_variances_stay_above_the_floor():
    constant = torch.ones(50, 3, dtype=DOUBLE)
    model = mixture(1, 0, d=3)
    for _ in range(200):
        model, _ = em_step(model, [Diagonal(constant, constant * 1e8)], floor=1e-3)
    torch.testing.assert_close(model.variance, torch.full((1, 3), 1e-3, dtype=DOUBLE))
    torch.testing.assert_close(model.mean, torch.ones(1, 3, dtype=DOUBLE))


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_a_component_without_items_stays_finite(ridge):
    data = em_data("masks")
    model = mixture(2, 2, seed=300)
    model.mean[1] += 1e4  # responsibilities underflow to exactly 0
    assert model.posterior(data).responsibilities[:, 1].max() == 0
    updated, _ = em_step(model, [data], ridge=ridge)
    for name, tensor in updated.tensors.items():
        assert torch.isfinite(tensor).all() or (name == "log_weights" and not ridge)
    single = Mixture(torch.zeros(1, dtype=DOUBLE), model.mean[:1], model.factor[:1], model.variance[:1])
    alone, _ = em_step(single, [data], ridge=ridge)
    torch.testing.assert_close(updated.mean[0], alone.mean[0])
    torch.testing.assert_close(updated.variance[0], alone.variance[0])
    if ridge:  # pseudo-observations alone decide: the mean of all that was seen, no factors
        weight = (data.precision > 0).sum(0) * (gain := _gain(model, data)[0])
        overall = gain * torch.where(data.precision > 0, data.z, 0.0).sum(0) / (weight + ridge)
        torch.testing.assert_close(updated.mean[1], overall)
        assert updated.factor[1].abs().max() < 1e-12
    again, log_likelihood = em_step(updated, [data], ridge=ridge)
    assert math.isfinite(log_likelihood)
    assert torch.isfinite(again.mean).all()


def _gain(model: Mixture, data: Diagonal) -> torch.Tensor:
    """psi / (psi + 1 / lambda) of every component and entry."""
    known = model.variance * data.precision.amax(0)
    return known / (1 + known)


def test_ridge_is_that_many_pseudo_observations():
    """The means and factors are least squares: of what was seen, whose variance is psi + 1 / lambda, and of as many
    entries without noise as ridge says, whose variance is psi, one for each factor and the mean."""
    data, model, ridge = em_data("masks"), mixture(1, 2, seed=300), 10.0
    ridged, _ = em_step(model, [data], ridge=ridge)
    posterior, gain = model.posterior(data), _gain(model, data)[0]
    seen = (data.precision > 0).to(DOUBLE)
    z = torch.where(data.precision > 0, data.z, 0.0)
    overall = gain * z.sum(0) / (gain * seen.sum(0) + ridge)
    u, spread = posterior.latent[0], torch.cholesky_inverse(posterior.chol[0])

    def cost(factor: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        error = (z - mean - u @ factor.T).square() + torch.einsum("di,bij,dj->bd", factor, spread, factor)
        pseudo = factor.square().sum(1) + (mean - overall).square()
        return ((seen * error).sum(0) * gain + ridge * pseudo).sum()

    def slope(factor: torch.Tensor, mean: torch.Tensor) -> float:
        given = factor.clone().requires_grad_(), mean.clone().requires_grad_()
        return max(g.abs().max().item() for g in torch.autograd.grad(cost(*given), given))

    plain, _ = em_step(model, [data])
    assert slope(ridged.factor[0], ridged.mean[0]) < 1e-9 < 1e-1 < slope(plain.factor[0], plain.mean[0])


def test_ridge_pulls_variances_to_the_pooled_one():
    data, model = em_data("masks"), mixture(1, 0, seed=300)
    ridged, _ = em_step(model, [data], ridge=10.0)
    seen, gain = (data.precision > 0).to(DOUBLE), _gain(model, data)[0]
    error = (seen * (torch.where(data.precision > 0, data.z, 0.0) - ridged.mean[0]).square()).sum(0)
    total = gain.square() * error + model.variance[0] * (1 - gain) * seen.sum(0)
    pooled = total.sum() / seen.sum()
    torch.testing.assert_close(ridged.variance[0], (total + 10 * pooled) / (seen.sum(0) + 10))


def test_noise_that_hides_an_entry_makes_no_factors():
    """Maximum likelihood gives entries under noise what factors and means the noise happens to have."""
    n, noise = 1000, 100.0
    x = randn(n, 1, seed=1) * torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]) + 0.3 * randn(n, D, seed=2)
    std = torch.tensor([0.1, 0.1, 0.1, noise, noise, noise], dtype=DOUBLE)
    data = Diagonal(x + std * randn(n, D, seed=3), (1 / std.square()).expand(n, D))
    power, mean = {}, {}
    for ridge in (0.0, 1.0):
        model = mixture(1, 2)
        for _ in range(50):
            model, _ = em_step(model, [data], ridge=ridge)
        power[ridge], mean[ridge] = model.factor[0].square().sum(1), model.mean[0].square()
        assert (power[ridge][:3] - 1).abs().max() < 0.2
    assert power[1.0][3:].sum() < 0.2 * power[0.0][3:].sum()
    assert mean[1.0][3:].sum() < 0.2 * mean[0.0][3:].sum()


# --- partial E-steps (SCSI) -----------------------------------------------------------------------------


def gaussian(mean: torch.Tensor, cov: torch.Tensor) -> Mixture:
    """A Gaussian of any covariance, as a mixture."""
    values, vectors = torch.linalg.eigh(cov)
    factor = vectors * (values - values[0]).clamp(min=0).sqrt()
    return Mixture(torch.zeros(1, dtype=DOUBLE), mean[None], factor[None], values[:1].expand(1, len(mean)))


@pytest.mark.parametrize("how", ["a share of all", "all of a share"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_partial_e_steps_end_where_em_does(share, how):
    """A pool of posterior moments, of which a share is refreshed before the model is fitted to the whole of it.

    An item's moments stand for infinitely many draws of its reconstruction: with single draws the pool's fit would
    fluctuate about the same point, by the Monte Carlo error of as many draws as there are items. `a share of all` is the
    expectation of a refreshment at random; `all of a share` refreshes items at random, and leaves the others as old
    as they are (what em.refresh does, and Neal and Hinton's incremental EM).
    """
    n, generator, true = 80, seeded(7), mixture(1, 2, d=3)
    x = true.mean + randn(n, 2, seed=1) @ true.factor[0].T + true.variance[0].sqrt() * randn(n, 3, seed=2)
    matrix = randn(n, 2, 3, seed=3)
    y = (matrix @ x[..., None])[..., 0] + 0.3 * randn(n, 2, seed=4)
    data = Rows(y, matrix, torch.full((n, 1), 0.3, dtype=DOUBLE))

    def moments(model: Mixture) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = model.posterior(data)
        mean = posterior.mean
        return mean, posterior.chol @ posterior.chol.mT + mean[:, :, None] * mean[:, None]

    def fit(first: torch.Tensor, second: torch.Tensor) -> Mixture:
        mean = first.mean(0)
        return gaussian(mean, second.mean(0) - torch.outer(mean, mean))

    def apart(one: Mixture, two: Mixture) -> float:
        return max((one.mean - two.mean).abs().max().item(), (one.covariance() - two.covariance()).abs().max().item())

    em = start = mixture(1, 3, d=3, seed=300, isotropic=True)
    for _ in range(200):
        em, _ = em_step(em, [data], floor=1e-9)
    assert apart(em, em_step(em, [data], floor=1e-9)[0]) < 1e-9
    assert apart(em, start) > 0.5
    pool = moments(mixture(1, 3, d=3, seed=500, isotropic=True))  # reconstructions of another model to start with
    for step in range(round(120 / share)):
        fresh = moments(fit(*pool))
        if how == "a share of all":
            weight = torch.tensor(share, dtype=DOUBLE)
        else:
            weight = (torch.rand(n, generator=generator, dtype=DOUBLE) < share).to(DOUBLE)
        pool = tuple(torch.lerp(a, b, weight.view(-1, *(1,) * (a.ndim - 1))) for a, b in zip(pool, fresh, strict=True))
        if step == 0:
            assert apart(fit(*pool), em) > 0.3
            assert apart(fit(*pool), fit(*fresh)) > 0.05  # it is not a whole step
    assert apart(fit(*pool), em) < 1e-7


def test_the_first_guess_does_not_take_sums_of_what_is_alike_for_large_variances():
    """Rows that average entries that are alike: one variance for all would have to be larger than that of any entry."""
    x = 0.4 * randn(500, 1, seed=90).expand(500, D)
    matrix = torch.full((500, 1, D), 1 / D, dtype=DOUBLE)
    y = (matrix @ x[..., None])[..., 0]
    guess = single(Rows(y, matrix, torch.full((500, 1), 0.1, dtype=DOUBLE)), 2, D, torch.Generator().manual_seed(0))
    assert y.square().mean() / matrix[0].square().sum() > 0.5
    assert 2 * guess.variance.max() <= 0.25
