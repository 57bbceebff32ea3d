"""The loss of a denoiser by dense linear algebra, and what the second head learns."""

from __future__ import annotations

import math

import pytest
import torch

from diffem.corruptions import GaussianBlur, RandomMask, RandomProjection
from diffem.denoiser import LEAST, Denoiser, DenoiserConfig
from diffem.mixtures import Mixture
from diffem.networks import NetworkConfig
from diffem.trainer import MStepConfig, Trainer

CORRUPTION, SIGMA = RandomMask(0.5, 0.1), 1.0
MLP = NetworkConfig(kind="mlp", width=16, depth=1, embedding=8)
UNET = NetworkConfig(kind="unet", channels=(4, 8), blocks=(1, 1), embedding=8)


def build(
    network: NetworkConfig, shape: tuple[int, ...], corruption=CORRUPTION, start: Mixture | None = None
) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(corruption, shape, DenoiserConfig("auto", 0.5, 2.0), network, start)


def test_variance_is_that_of_two_points():
    # x is -1 or 1 in one entry, 0 in the other: given x_t its mean is tanh(x_t / sigma^2), and its variance 1 - tanh^2.
    network, config = NetworkConfig(kind="mlp", width=64, depth=2, embedding=32), MStepConfig(learning_rate=2e-3)
    trainer = Trainer(build(network, (2,)), config)
    generator = torch.Generator().manual_seed(1)

    def items(n: int) -> torch.Tensor:
        return torch.randint(2, (n, 1), generator=generator) * torch.tensor([2.0, 0.0]) - torch.tensor([1.0, 0.0])

    for step in range(800):
        x = items(256)
        y, params = CORRUPTION.observe(x, generator)
        trainer.update([trainer.denoiser.loss(x, y, params, generator, 1.0)], 2e-3 if step < 530 else 5e-4)
    x, withheld = items(20_000), torch.ones(20_000, dtype=torch.bool)
    x_t = x + SIGMA * torch.randn(x.shape, generator=generator)
    y, params = CORRUPTION.observe(x, generator)
    with torch.no_grad():
        posterior, _, v = trainer.averaged.predict(x_t, torch.full((20_000,), SIGMA), y, params, withheld)
    found, exact = (posterior.variance * v)[:, 0], 1 - torch.tanh(x_t[:, 0] / SIGMA**2).square()
    for low, high in ((0.0, 0.3), (0.3, 0.8), (0.8, 1.2), (1.2, 2.0)):
        within = (x_t[:, 0].abs() >= low) & (x_t[:, 0].abs() < high)
        assert found[within].mean().item() == pytest.approx(exact[within].mean().item(), rel=0.25)
    assert v[:, 1].mean() < 0.02  # of what never varies


@pytest.mark.parametrize(("said", "expected"), [(-3.0, math.exp(-3)), (0.0, 1.0), (100.0, 101.0)])
def test_a_share_beyond_one_does_not_grow_like_an_exponential(said, expected):
    """On digits, e^20 was said of an observation unlike all others, and its draw ended as NaN."""
    denoiser = build(MLP, (6,))
    denoiser.network.last.variance[-1].bias.data += said
    x, sigma = torch.zeros(1, 6), torch.ones(1)
    _, _, v = denoiser.predict(x, sigma, *CORRUPTION.observe(x, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(v, torch.full((1, 6), LEAST + (1 - LEAST) * expected))


# --- the loss, where the reference posterior and the weights are known ------------------------------------

CASES = {
    "mask": (RandomMask(0.5, 0.1), (6,), MLP, True),
    "mask of an image": (RandomMask(0.5, 0.3), (2, 4, 4), UNET, True),
    "blur": (GaussianBlur(0.7, 0.3), (1, 4, 4), UNET, False),
    "projection": (RandomProjection(2, 0.1), (6,), MLP, False),
}
IMPUTED = 0.2  # what an entry that was not measured weighs


class Case:
    """A denoiser whose heads say something, a batch, and the same in dense form; the items are flattened in the latter."""

    def __init__(self, name: str, plain: bool = False, items: int = 5, heads: float = 0.1) -> None:
        self.corruption, shape, network, by_entry = CASES[name]
        self.shape, self.by_entry, self.plain = shape, by_entry or plain, plain
        generator, self.features = torch.Generator().manual_seed(2), math.prod(shape)
        self.prior = Mixture(
            torch.zeros(1),
            0.5 * torch.randn(1, self.features, generator=generator),
            0.7 * torch.randn(1, self.features, 2, generator=generator),
            0.1 + torch.rand(1, self.features, generator=generator),
            self.corruption.basis(shape),
        )
        self.denoiser = build(network, shape, self.corruption, None if plain else self.prior)
        for parameter in self.denoiser.network.parameters():
            parameter.data += heads * torch.randn(parameter.shape, generator=generator)
        self.x = torch.randn(items, *shape, generator=generator)
        self.y, self.params = self.corruption.observe(self.x, generator)
        self.source = self.corruption.draw(items, shape, generator)  # of the real observations behind the items

    def weigh(self, x: torch.Tensor) -> torch.Tensor:
        return IMPUTED * x + (1 - IMPUTED) * self.corruption.measured(x, self.source)

    def dense_weights(self) -> torch.Tensor:
        """W of every item, (B, d, d)."""
        columns = [self.weigh(e.view(self.shape).expand_as(self.x)).flatten(1) for e in torch.eye(self.features)]
        return torch.stack(columns, 2).double()

    def loss(self, weigh: bool, dropout: float = 0.0) -> torch.Tensor:
        given = {"weigh": self.weigh} if weigh else {}
        return self.denoiser.loss(
            self.x, self.y, self.params, torch.Generator().manual_seed(3), dropout=dropout, **given
        )

    def drawn(self, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_t, sigma, and whose observation was withheld, as the loss draws them."""
        again = torch.Generator().manual_seed(3)
        sigma = self.denoiser.times(len(self.x), again).to(self.x)
        x_t = self.x + sigma.view(-1, *(1,) * len(self.shape)) * torch.randn(self.x.shape, generator=again)
        return x_t, sigma, torch.rand(len(self.x), generator=again) < dropout

    def reference(self, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Means (B, d) and covariances (B, d, d) of the reference posterior, by conditioning a joint Gaussian."""
        x_t, sigma, withheld = self.drawn(dropout)
        eye, basis = torch.eye(self.features, dtype=torch.float64), self.prior.basis
        mean, cov = torch.zeros(self.features, dtype=torch.float64), eye
        if not self.plain:
            there = eye if basis is None else basis.synthesise(eye)  # row j: the j-th vector of the basis
            mean = self.prior.mean[0].double() @ there
            cov = there.T @ self.prior.covariance()[0].double() @ there
        means, covs = [], []
        for i in range(len(self.x)):
            own = {k: v[i : i + 1].expand(self.features, *v.shape[1:]) for k, v in self.params.items()}
            a = self.corruption.forward(eye.view(-1, *self.shape), own).flatten(1).T
            if self.plain or withheld[i]:
                a = a[:0]
            rows = torch.cat((a, eye))
            seen = torch.cat((self.y[i].flatten()[: len(a)], x_t[i].flatten())).double()
            noise = torch.cat((torch.full((len(a),), self.corruption.noise), sigma[i].expand(self.features))).double()
            gain = cov @ rows.T @ torch.linalg.inv(rows @ cov @ rows.T + noise.square().diag())
            means.append(mean + gain @ (seen - rows @ mean))
            covs.append(cov - gain @ rows @ cov)
        return torch.stack(means), torch.stack(covs)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("plain", [False, True], ids=["start", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_loss_is_the_weighted_error_over_the_mean_variance_of_the_reference(name, plain, weighed, dropout):
    case = Case(name, plain)
    x_t, sigma, withheld = case.drawn(dropout)
    assert withheld.any() == (dropout > 0)
    means, covs = case.reference(dropout)
    with torch.no_grad():
        posterior, _, v = case.denoiser.predict(x_t, sigma, case.y, case.params, withheld)
        denoised = case.denoiser(x_t, sigma, case.y, case.params, withheld)
    torch.testing.assert_close(posterior.mean.double(), means, rtol=1e-3, atol=1e-4)
    assert (denoised.flatten(1) - means).abs().max() > 0.01  # the network says something
    assert (v - 1).abs().max() > 0.01
    error = (case.x - denoised).flatten(1).double()
    weights = case.dense_weights() if weighed else torch.eye(case.features, dtype=torch.float64).expand_as(covs)
    left = covs.diagonal(dim1=1, dim2=2).mean(1)
    each = torch.einsum("bi,bij,bj->b", error, weights, error) / case.features / left
    assert case.loss(weighed, dropout).item() == pytest.approx(each.mean().item(), rel=1e-3)
    unweighed = (error.square().mean(1) / left).mean()
    assert (abs(each.mean() / unweighed - 1) > 0.05) == weighed  # W makes a difference


def test_plain_and_unweighed_it_is_the_loss_of_the_paper():
    case = Case("mask of an image", plain=True)
    x_t, sigma, withheld = case.drawn(0.5)
    with torch.no_grad():
        error = case.x - case.denoiser(x_t, sigma, case.y, case.params, withheld)
    paper = ((1 / sigma.square() + 1).view(-1, 1, 1, 1) * error.square()).mean()
    assert case.loss(weigh=False, dropout=0.5).item() == pytest.approx(paper.item(), rel=1e-5)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_mean_and_of_the_variances(name, weighed):
    case = Case(name)
    x_t, sigma, _ = case.drawn()
    names, parameters = zip(*case.denoiser.network.named_parameters(), strict=True)
    found = torch.autograd.grad(case.loss(weighed), parameters)

    def product(a: torch.Tensor) -> torch.Tensor:
        return a * (case.weigh(a.view_as(case.x)).flatten(1) if weighed else a)

    posterior, f, v = case.denoiser.predict(x_t, sigma, case.y, case.params)
    # where S is not diagonal, the shares of entries would turn noise into directions that were observed
    assert torch.allclose(v, v[:, :1]) == (not case.by_entry) == (not posterior.by_entry)
    error = case.x.flatten(1) - posterior.mean - posterior.scale(f)
    of_mean = (product(error).mean(1) / posterior.variance.mean(1)).mean()
    first = torch.autograd.grad(of_mean, parameters, retain_graph=True, allow_unused=True)
    whitened = product(posterior.whiten(error).detach())
    again = torch.Generator().manual_seed(3)  # what the loss draws before the signs
    case.denoiser.times(len(case.x), again)
    torch.randn(case.x.shape, generator=again)
    torch.rand(len(case.x), generator=again)
    signs = torch.randint(0, 2, v.shape, generator=again).float() * 2 - 1
    weight = product(signs) if weighed else torch.ones_like(v)
    of_variance = (whitened.mean(1, keepdim=True) / v + weight.mean(1, keepdim=True) * v.log()).mean()
    if case.by_entry:
        of_variance = (whitened / v + weight * v.log()).mean()
    second = torch.autograd.grad(of_variance, parameters, allow_unused=True)
    for key, all_of_it, one, two in zip(names, found, first, second, strict=True):
        assert (one is None) == key.startswith("last.variance")
        assert (two is None) == key.startswith("last.mean")  # the variances shape the features, too
        expected = sum(part for part in (one, two) if part is not None)
        torch.testing.assert_close(all_of_it, expected, rtol=1e-3, atol=1e-5, msg=key)
        assert all_of_it.any()


def says(denoiser: Denoiser, shares: torch.Tensor) -> torch.nn.Parameter:
    """Has a head of variances, whose last weights are zero, say these shares; returns what says so."""
    said, bias = (shares - LEAST) / (1 - LEAST), denoiser.network.last.variance[-1].bias
    bias.data = torch.where(said < 1, said.log(), said - 1).to(bias)
    return bias


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(
    ("name", "plain"), [("mask", False), ("mask", True), ("projection", False), ("projection", True)]
)
def test_variances_rest_at_the_weighted_error_over_the_weight(name, plain, weighed):
    """v = E[e^T W e] / w, of every entry, or where S or W is not diagonal of all of them: e_i (W e)_i may be negative."""
    case = Case(name, plain, items=4000, heads=0.0)  # d = m, and the same v whatever is shown
    x_t, sigma, _ = case.drawn()
    posterior, f, _ = case.denoiser.predict(x_t, sigma, case.y, case.params)
    assert not f.any()
    e = posterior.whiten(case.x.flatten(1) - posterior.mean).double()
    weights = case.dense_weights() if weighed else torch.eye(6, dtype=torch.float64).expand(4000, 6, 6)
    error, weight = (e * torch.einsum("bij,bj->bi", weights, e)).mean(0), weights.diagonal(dim1=1, dim2=2).mean(0)
    by_entry = case.by_entry and (case.corruption.by_entry or not weighed)
    rest = error / weight if by_entry else (error.mean() / weight.mean()).expand(6)
    assert (rest - 1).abs().max() > 0.02  # the prior is not the truth

    def pull(factor: torch.Tensor | float) -> torch.Tensor:
        bias = says(case.denoiser, rest * factor)
        return torch.autograd.grad(case.loss(weighed), bias)[0]

    if not by_entry:  # what is random in the trace of W averages out
        assert pull(1.0).norm() < 0.2 * pull(1.1).norm()
        assert (pull(1.1) > 0).all()
        assert (pull(0.9) < 0).all()
        return
    assert pull(1.0).abs().max() < 1e-3 * pull(1.1).abs().min()
    for j in range(6):  # each by itself
        factor = torch.ones(6, dtype=torch.float64)
        for factor[j] in (1.1, 0.9):
            others = pull(factor)
            assert (others[j] > 0) == (factor[j] > 1)
            assert others[j].abs() > 100 * others[torch.arange(6) != j].abs().max()
