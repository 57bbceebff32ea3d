"""Samplers and saved models, where the answer is known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffem import __version__, seeding
from diffem.corruptions import GaussianBlur, GaussianNoise, RandomMask, RandomProjection
from diffem.denoiser import LEAST, Denoiser, DenoiserConfig
from diffem.errors import DiffemError
from diffem.mixtures import Mixture
from diffem.networks import NetworkConfig
from diffem.posterior import Posterior, from_pretrained
from diffem.samplers import DiffusionSampler, MixtureSampler, ObservationSampler, SamplerConfig, sample_prior
from diffem.units import Units

NETWORK = NetworkConfig(kind="mlp", width=16, depth=1, embedding=16)
SHAPE = (1, 4, 4)


def test_model_of_another_corruption(tmp_path):
    blur = GaussianBlur(1.0, 0.1)
    mixture = Mixture.standard(16)
    Posterior(MixtureSampler(blur, SHAPE, mixture), blur, Units()).save_pretrained(tmp_path)
    assert from_pretrained(tmp_path, GaussianBlur(1.0, 0.3)).corruption.noise == 0.3  # written in the same basis
    with pytest.raises(DiffemError, match=r": its mixture is written for \{'name': 'GaussianBlur', .*not for"):
        from_pretrained(tmp_path, GaussianBlur(2.0, 0.1))


def gaussian(shrink: float = 1.0) -> Mixture:
    generator = torch.Generator().manual_seed(3)
    mean = 0.5 * torch.randn(1, 6, generator=generator)
    factor = 0.5 * torch.randn(1, 6, 2, generator=generator)
    return Mixture(torch.zeros(1), mean, shrink * factor, shrink**2 * torch.full((1, 6), 0.05), None)


def covariance(mixture: Mixture) -> torch.Tensor:
    return mixture.factor[0] @ mixture.factor[0].T + mixture.variance[0].diag()


def diffusion(corruption, steps: int, width: float, start=None) -> DiffusionSampler:
    denoiser = Denoiser(corruption, (6,), DenoiserConfig(precondition="start"), NETWORK, start or gaussian())
    return DiffusionSampler(denoiser.eval(), SamplerConfig(steps=steps, width=width))


MATRIX = torch.tensor([[[0.6, 0.0, -0.8, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.5, 0.0, -0.5]]])
CASES = {
    "noise": (GaussianNoise(0.3), {}),
    "mask": (RandomMask(0.5, 0.1), {"mask": torch.tensor([[True, False, False, True, False, True]])}),
    "blur": (GaussianBlur(1.2, 0.1), {}),
    "projection": (RandomProjection(2, 0.1), {"matrix": MATRIX}),
}
DRAWN = 20_000


def prior_of(corruption) -> tuple[Mixture, torch.Tensor, torch.Tensor]:
    """The Gaussian, written in the corruption's basis, and its mean and covariance."""
    mixture, basis = gaussian(), corruption.basis((6,))
    prior = Mixture(*mixture.tensors.values(), basis=basis)
    there = torch.eye(6) if basis is None else basis.synthesise(torch.eye(6))  # row j: the j-th basis vector
    return prior, mixture.mean[0] @ there, there.T @ covariance(mixture) @ there


def posterior_of(case: str):
    """The observation, its parameters, and the posterior's mean and covariance by dense linear algebra."""
    corruption, params = CASES[case]
    _, mean, cov = prior_of(corruption)
    many = {k: v.expand(6, *v.shape[1:]) for k, v in params.items()}
    operator = corruption.forward(torch.eye(6), many).T  # column j: what the j-th entry makes
    y = operator @ (mean + torch.tensor([0.4, -0.3, 0.2, 0.8, -0.6, 0.1]))
    gain = cov @ operator.T @ torch.linalg.inv(operator @ cov @ operator.T + corruption.noise**2 * torch.eye(len(y)))
    return y[None], params, mean + gain @ (y - operator @ mean), cov - gain @ operator @ cov


def draws(case: str, steps: int, width: float, given: bool) -> torch.Tensor:
    corruption = CASES[case][0]
    sampler = diffusion(corruption, steps, width, start=prior_of(corruption)[0])
    seeds = seeding.item_seeds(0, 0, "user", torch.arange(DRAWN))
    if not given:
        return sample_prior(sampler, seeds, DRAWN)
    y, params, *_ = posterior_of(case)
    many = {k: v.expand(DRAWN, *v.shape[1:]) for k, v in params.items()}
    return sampler.draw(y.expand(DRAWN, -1), many, seeds)


@pytest.mark.parametrize("steps", [4, 16])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_sampler_draws_the_posterior_and_the_prior(case, given, steps):
    # With the exact denoiser a step is exact at any number of steps: what is left is the error of 20,000 draws.
    *_, mean, cov = posterior_of(case) if given else prior_of(CASES[case][0])
    x = draws(case, steps, 1.0, given)
    assert ((x.mean(0) - mean).abs() < 0.03 * cov.diag().sqrt() + 1e-4).all()
    assert (torch.cov(x.T) - cov).norm() < 0.04 * cov.norm()


@pytest.mark.parametrize("kind", ["mixture", "diffusion"])
@pytest.mark.parametrize("case", CASES)
def test_two_antithetic_draws_have_the_mean_of_a_gaussian_posterior(case, kind):
    y, params, mean, cov = posterior_of(case)
    corruption, start = CASES[case][0], prior_of(CASES[case][0])[0]
    sampler = diffusion(corruption, 8, 1.0, start=start)
    if kind == "mixture":
        sampler = MixtureSampler(corruption, (6,), start)
    draws = Posterior(sampler, corruption, Units(0, 1)).sample(
        y, params, n=4, generator=torch.Generator().manual_seed(0)
    )
    found, std = draws.view(2, 2, 6).mean(1), cov.diag().sqrt()  # of each pair
    assert ((found - mean).abs() < 0.01 * std + 2e-4).all()
    assert (draws[0] - draws[2]).norm() > 0.1 * std.norm()  # the pairs differ


@pytest.mark.parametrize("case", CASES)
def test_renoised_draws_keep_the_posterior_and_forget_their_own_errors(case):
    y, params, mean, cov = posterior_of(case)
    corruption = CASES[case][0]
    sampler = diffusion(corruption, 16, 1.0, start=prior_of(corruption)[0])
    many, all_y = {k: v.expand(DRAWN, *v.shape[1:]) for k, v in params.items()}, y.expand(DRAWN, -1)
    seeds = [seeding.item_seeds(0, k, "user", torch.arange(DRAWN)) for k in range(2)]
    right = sampler.draw(all_y, many, seeds[0])
    x = sampler.renoise(right, all_y, many, seeds[1])
    assert ((x.mean(0) - mean).abs() < 0.03 * cov.diag().sqrt() + 1e-4).all()
    assert (torch.cov(x.T) - cov).norm() < 0.04 * cov.norm()
    wrong = right + 0.5
    assert (sampler.renoise(wrong, all_y, many, seeds[1]).mean(0) - mean).norm() < 0.5 * (wrong.mean(0) - mean).norm()


def test_renoising_takes_a_quarter_of_the_evaluations():
    sampler = diffusion(GaussianNoise(0.3), 64, 1.0)
    y, calls = torch.zeros(3, 6), []
    predict = sampler.denoiser.predict
    sampler.denoiser.predict = lambda *given: (calls.append(1), predict(*given))[1]
    sampler.renoise(y, y, {}, seeding.item_seeds(0, 0, "user", range(3)))
    assert len(calls) == DiffusionSampler.evaluations(sampler.settings, renoised=True) == 17
    sampler.draw(y, {}, seeding.item_seeds(0, 0, "user", range(3)))
    assert len(calls) - 17 == DiffusionSampler.evaluations(sampler.settings) == 65
    for steps, renoised in ((1, 2), (2, 3), (6, 3), (16, 5), (20, 6)):
        assert DiffusionSampler.evaluations(SamplerConfig(steps=steps), renoised=True) == renoised


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_plain_ddpm_loses_variance(case, given):
    *_, mean, cov = posterior_of(case) if given else prior_of(CASES[case][0])
    x = draws(case, 8, 0.0, given)
    assert ((x.mean(0) - mean).abs() < 0.05 * cov.diag().sqrt() + 1e-4).all()
    assert torch.cov(x.T).trace() < 0.85 * cov.trace()


def expect(sampler: DiffusionSampler, shares: torch.Tensor) -> None:
    """Has the head of variances say that these shares are left, whatever it is shown."""
    said = (shares - LEAST) / (1 - LEAST)
    sampler.denoiser.network.last.variance[-1].bias.data = torch.where(said < 1, said.log(), said - 1)


@pytest.mark.parametrize("shares", [torch.ones(6), torch.tensor([1.0, 0.5, 0.1, 1.0, 0.1, 0.5])])
def test_width_beyond_one_goes_where_there_is_room_for_error(shares):
    """Against the recursion of each entry's variance, for entries that are independent under the prior."""
    prior = torch.tensor([1e-6, 0.5, 1.0, 1e-6, 0.5, 1.0])  # a thousandth of noise, or unknown; three of them observed
    start = Mixture(torch.zeros(1), torch.zeros(1, 6), torch.zeros(1, 6, 0), prior[None])
    mask, excess, noise = torch.tensor([True] * 3 + [False] * 3), 4.0, 0.1
    sampler = diffusion(RandomMask(0.5, noise), 8, 1 + excess, start=start)
    expect(sampler, shares)
    seeds = seeding.item_seeds(0, 0, "user", torch.arange(DRAWN))
    found = sampler.draw(torch.zeros(DRAWN, 6), {"mask": mask.expand(DRAWN, -1)}, seeds).var(0)

    sigmas = [*sampler.sigmas.tolist(), 0.0]
    x, widest = torch.full((6,), sigmas[0] ** 2), torch.tensor(0.0)
    for sigma, after in itertools.pairwise(sigmas):
        left = 1 / (1 / prior + mask / noise**2 + 1 / sigma**2)
        widest = widest if widest else left.max()
        tau = 1 - (after / sigma) ** 2
        x = x * (1 - tau + tau * left / sigma**2) ** 2  # the mean of x given x_t is left / sigma^2 x_t
        x = x + tau**2 * left * shares * (1 + excess * left / widest) + after**2 * tau
    torch.testing.assert_close(found, x, rtol=0.05, atol=0)
    exact = 1 / (1 / prior + mask / noise**2)
    assert (found / exact)[[0, 1, 2, 3]].max() < 1.1  # what is known gets no noise,
    assert (found / exact)[5] > 1.5 * shares[5]  # what is not, does


@pytest.mark.parametrize("kind", ["observation", "mixture", "diffusion"])
def test_save_and_load(kind, tmp_path):
    corruption, units = RandomMask(0.5, 0.1), Units(0.5, 2.0)
    scaled = corruption.scaled(units)
    if kind == "observation":
        sampler = ObservationSampler(scaled, (6,))
    elif kind == "mixture":
        sampler = MixtureSampler(scaled, (6,), gaussian())
    else:
        sampler = diffusion(scaled, 3, 0.7)
        generator = torch.Generator().manual_seed(1)
        for parameter in sampler.denoiser.network.parameters():  # else the network is zero
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    posterior = Posterior(sampler, corruption, units)
    posterior.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = from_pretrained(tmp_path)
    assert loaded.sampler.kind == kind
    generator = torch.Generator().manual_seed(2)
    params = corruption.draw(9, (6,), generator)
    y = corruption.apply(torch.randn(9, 6, generator=generator), params, generator)
    seeds = seeding.item_seeds(0, 0, "user", torch.arange(9))
    draws = posterior.sample(y, params, seeds=seeds)
    assert draws.std() > 0.1
    assert torch.equal(draws, loaded.sample(y, params, seeds=seeds))
    assert torch.equal(posterior.generate(9), loaded.generate(9))


def test_saved_model_is_incomplete(tmp_path):
    with pytest.raises(DiffemError, match="missing"):
        from_pretrained(tmp_path)
    mask = RandomMask(0.5, 0.1)
    Posterior(MixtureSampler(mask, (6,), gaussian()), mask, Units()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DiffemError, match=r"model\.safetensors: is damaged: "):
        from_pretrained(tmp_path)


def without_a_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["denoiser.network.last.variance.0.weight"]
    save_file(tensors, folder / "model.safetensors")


def configured(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


OLD = "is damaged, or was changed by hand; train it again"


@pytest.mark.parametrize(
    ("age", "text"),
    [
        (without_a_head, "its weights are not those of its network and its observations"),
        (configured(lambda config: config.pop("kind")), OLD),
        (
            configured(lambda config: config["network"].update(width=2**20)),
            "its weights are not those of its network and its observations",
        ),
        (
            configured(lambda config: config["network"].update(depth=10**6)),
            "its weights are not those of its network and its observations",
        ),
        (
            configured(lambda config: config.update(shape=[10**6, 10**6])),
            "its items have shape (1000000, 1000000), but its mixture has 6 features",
        ),
        (
            configured(lambda config: config["sampler"].update(steps=10**9)),
            "sampler: steps must be from 1 to 3,000, width from 0 to 100",
        ),
        (configured(lambda config: config["sampler"].update(dispersion=config["sampler"].pop("width"))), OLD),
        (configured(lambda config: config["sampler"].update(method="ddpm")), OLD),
        (configured(lambda config: config.pop("scaling")), OLD),
        (
            configured(lambda config: config["denoiser"].update(precondition="fuse")),
            "denoiser.precondition: must be auto, plain or start, got 'fuse'",
        ),
        (
            configured(lambda config: config.update(kind="difusion")),
            "config.json: kind: unknown sampler 'difusion'; did you mean 'diffusion'?",
        ),
    ],
    ids=[
        "no head of variances",
        "no kind",
        "width",
        "depth",
        "shape",
        "steps",
        "dispersion",
        "kinds of samplers",
        "no units",
        "fuse",
        "kind",
    ],
)
def test_saved_model_of_another_version(age, text, tmp_path):
    mask = RandomMask(0.5, 0.1)
    Posterior(diffusion(mask, 3, 1.0), mask, Units()).save_pretrained(tmp_path)
    from_pretrained(tmp_path)
    age(tmp_path)
    with pytest.raises(DiffemError) as caught:
        from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: {text}")


@pytest.mark.parametrize(
    ("version", "who"),
    [("0.0.7", "diffem 0.0.7"), (None, "another version of diffem"), ([7], "another version of diffem")],
)
def test_saved_model_says_which_version_wrote_it(version, who, tmp_path):
    mask = RandomMask(0.5, 0.1)
    Posterior(diffusion(mask, 3, 1.0), mask, Units()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["version"] == __version__
    configured(lambda config: config.update(version=version))(tmp_path)
    from_pretrained(tmp_path)  # it is refused only where it cannot be read
    configured(lambda config: config.pop("scaling"))(tmp_path)
    with pytest.raises(DiffemError) as caught:
        from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: was saved by {who}, which {__version__} cannot read; train it again (KeyError: 'scaling')"
    )


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b"3", b"{}", b"{"])
def test_a_config_that_is_none(content, tmp_path):
    mask = RandomMask(0.5, 0.1)
    Posterior(diffusion(mask, 3, 1.0), mask, Units()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(DiffemError) as caught:
        from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}: ")
