"""Operators of deepinv: the same numbers as ours where both exist, and whole runs."""

from __future__ import annotations

import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch

from diffem import config as configuration
from diffem.cli import main
from diffem.corruptions import Blur, Fourier, LinearCorruption, Mask, from_deepinv
from diffem.data import Observations
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.posterior import from_pretrained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what deepinv imports
    from deepinv import physics as operators

NOISE = 0.1
TINY = {
    "network": {"channels": [8], "blocks": [1], "embedding": 16},
    "start": {"components": [1], "ranks": [2], "iterations": 3},
    "sampler": {"steps": 2},
    "em": {"iterations": 1, "guard": False},
    "m_step": {"first_steps": 2, "steps": 2, "batch": 8},
    "prior": {"steps": 2, "sampler_steps": 2},
}


def gaussian():
    return operators.GaussianNoise(NOISE)


def inpainting():
    made = operators.Inpainting(img_size=(1, 8, 8), mask=torch.ones(1, 8, 8), noise_model=gaussian())
    return made, operators.generator.BernoulliSplittingMaskGenerator((1, 8, 8), split_ratio=0.5)


def blur():
    kernel = torch.tensor([[0.0, 1, 0], [2, 3, 1], [0, 1, 4]]).view(1, 1, 3, 3) / 12
    return operators.Blur(filter=kernel, padding="circular", noise_model=gaussian()), None


def mri():
    made = operators.MRI(img_size=(8, 8), noise_model=gaussian())
    return made, operators.generator.RandomMaskGenerator((2, 8, 8), acceleration=2)


def tomography():
    return operators.Tomography(angles=6, img_width=8, adjoint_via_backprop=True, noise_model=gaussian()), None


CASES = {"inpainting": inpainting, "blur": blur, "mri": mri, "tomography": tomography}
SHAPES = {"mri": (2, 8, 8)}
pytestmark = pytest.mark.filterwarnings("ignore")  # deepinv's own


@pytest.fixture(params=CASES)
def case(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corruption = from_deepinv(*CASES[request.param]())
    shape = SHAPES.get(request.param, (1, 8, 8))
    generator = torch.Generator().manual_seed(0)
    return corruption, shape, corruption.draw(5, shape, generator), generator


def test_linear_ones_have_an_exact_adjoint_and_the_dense_measured(case):
    corruption, shape, params, generator = case
    assert isinstance(corruption, LinearCorruption)
    x = torch.randn(5, *shape, generator=generator)
    image = corruption.forward(x, params)
    y = torch.randn(image.shape, generator=generator)
    left, right = (image * y).sum(), (x * corruption.adjoint(y, params)).sum()
    assert abs(left - right) <= 1e-5 * image.norm() * y.norm()
    assert corruption.item_shape(tuple(image.shape[1:])) == shape
    units = torch.eye(x[0].numel()).view(-1, *shape)
    for i in range(5):
        own = {k: v[i : i + 1].expand(len(units), *v.shape[1:]) for k, v in params.items()}
        A = corruption.forward(units, own).flatten(1).T.double()
        inverse = (A @ A.T + (NOISE / 0.5) ** 2 * torch.eye(len(A), dtype=torch.float64)).inverse()
        dense = A.T @ inverse @ A @ x[i].flatten().double()
        torch.testing.assert_close(corruption.measured(x, params)[i].flatten().double(), dense, rtol=1e-3, atol=1e-3)


def test_each_trains_loads_and_is_drawn_from_again(case, tmp_path):
    corruption, shape, _, generator = case
    x = torch.rand(60, *shape, generator=generator) * 2 - 1
    y, params = corruption.observe(x, generator)
    config = configuration.from_dict({**TINY})
    observations = Observations(y.numpy(), corruption, {k: v.numpy() for k, v in params.items()}, shape=shape)
    rows = list(DiffEM(config, observations, tmp_path / "run").iterate())
    assert rows[-1]["score_name"] == "crps"
    assert np.isfinite(rows[-1]["score"])
    with pytest.raises(DiffemError, match=r"give it with corruption="):
        from_pretrained(tmp_path / "run" / "posterior")
    posterior = from_pretrained(tmp_path / "run" / "posterior", corruption)
    assert posterior.sample(y[:2], {k: v[:2] for k, v in params.items()}, n=3).shape == (3, 2, *shape)


def test_they_agree_with_ours_where_both_exist():
    generator = torch.Generator().manual_seed(1)
    theirs, x = from_deepinv(*inpainting()), torch.randn(3, 1, 8, 8, generator=generator)
    params = theirs.draw(3, (1, 8, 8), generator)
    ours = Mask(NOISE)
    for method in ("forward", "adjoint", "measured"):
        torch.testing.assert_close(getattr(theirs, method)(x, params), getattr(ours, method)(x, params))
    theirs = from_deepinv(*blur())
    params = {"kernel": theirs.physics.filter[0].expand(3, 3, 3)}
    ours = Blur(border="circular", noise=NOISE)
    torch.testing.assert_close(theirs.forward(x, {}), ours.forward(x, params), rtol=1e-4, atol=1e-5)
    theirs, x = from_deepinv(*mri()), torch.randn(3, 2, 8, 8, generator=generator)
    params = theirs.draw(3, (2, 8, 8), generator)
    ours = Fourier(items="complex", noise=NOISE)
    torch.testing.assert_close(theirs.forward(x, params), ours.forward(x, params), rtol=1e-4, atol=1e-5)


def test_parameters_of_one_call_do_not_stay():
    theirs, generator = from_deepinv(*inpainting()), torch.Generator().manual_seed(1)
    x = torch.ones(3, 1, 8, 8)
    theirs.forward(x, theirs.draw(3, (1, 8, 8), generator))
    assert torch.equal(theirs.A(x, {}), x)


def test_a_mask_that_all_share_is_never_predicted():
    mask = torch.zeros(1, 8, 8)
    mask[:, :3] = 1
    theirs = from_deepinv(operators.Inpainting(img_size=(1, 8, 8), mask=mask, noise_model=gaussian()))
    y = theirs.apply(torch.ones(4, 1, 8, 8), {}, torch.Generator().manual_seed(0))
    (_, kept), (_, hidden) = theirs.thin(y, {}, torch.Generator().manual_seed(0))
    assert torch.equal(kept["mask"] + hidden["mask"] > 0, mask.bool().expand(4, 1, 8, 8))
    assert not (kept["mask"].bool() & hidden["mask"].bool()).any()


def test_draws_depend_on_our_generator_only():
    corruption = from_deepinv(*inpainting())
    first, again = (corruption.draw(4, (1, 8, 8), torch.Generator().manual_seed(7))["mask"] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, corruption.draw(4, (1, 8, 8), torch.Generator().manual_seed(8))["mask"])


def test_other_noise_is_a_black_box_with_its_distribution():
    physics = operators.Denoising(operators.PoissonNoise(gain=0.1))
    corruption = from_deepinv(physics)
    assert not corruption.linear
    y = corruption.apply(torch.full((1, 1, 200, 200), 0.5), {}, torch.Generator().manual_seed(0))
    assert y.mean() == pytest.approx(0.5, abs=0.01)
    assert y.var() == pytest.approx(0.05, rel=0.05)  # gain times mean


def test_an_adjoint_that_deepinv_only_approximates_is_exact_here():
    physics = operators.Tomography(angles=6, img_width=8, adjoint_via_backprop=False)
    corruption, generator = from_deepinv(physics), torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    y = torch.randn(physics.A(x).shape, generator=generator)
    scale = physics.A(x).norm() * y.norm()
    assert abs((physics.A(x) * y).sum() - (x * physics.A_adjoint(y)).sum()) > 1e-3 * scale
    assert abs((physics.A(x) * y).sum() - (x * corruption.adjoint(y, {})).sum()) < 1e-6 * scale


def test_an_operator_from_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from deepinv import physics
        camera = physics.Denoising(physics.GaussianNoise(0.1))
        """)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "y.npy", np.random.default_rng(0).normal(size=(60, 1, 8, 8)).astype(np.float32))
    settings = [f"--{section}.{k}={v}" for section, group in TINY.items() for k, v in group.items()]
    train = ["train", "--observations", "data", "--out", "run", "--corruption", "mine:camera", "--force"]
    assert main([*train, *settings]) == 0
    again = ["reconstruct", "run", "--observations", "data", "--out", "out", "--corruption", "mine:camera"]
    assert main(again) == 0
    assert np.load(tmp_path / "out" / "mean.npy").shape == (60, 1, 8, 8)
