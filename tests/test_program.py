"""Exported programs: without diffem, they draw what the posterior draws."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from test_em import make, observations
from test_posterior import NETWORK, UNITS, diffusion, keys, mixture, observed, prior

from diffem.cli import main
from diffem.corruptions import (
    BlackBox,
    Corruption,
    GaussianBlur,
    GaussianNoise,
    Params,
    PoissonGaussian,
    Quantise,
    RandomMask,
    RandomProjection,
)
from diffem.corruptions.blur import Blur
from diffem.data import Layout
from diffem.errors import DiffemError
from diffem.mixtures import Mixture
from diffem.networks import Given, NetworkConfig
from diffem.posterior import Posterior, from_pretrained
from diffem.samplers import MixtureSampler

UNET = NetworkConfig(kind="unet", channels=(4, 8), blocks=(1, 1), attention=(1,), embedding=8)


def denoising(corruption: Corruption, shape: tuple[int, ...], network: NetworkConfig | Given = UNET, steps: int = 1):
    """Reverse diffusion of few steps, since each is traced."""
    of = diffusion(corruption, shape, network)
    of.sampler.settings = dataclasses.replace(of.sampler.settings, steps=steps)
    return of


def kernels(corruption: Corruption, shape: tuple[int, ...]) -> tuple[torch.Tensor, Params]:
    generator = torch.Generator().manual_seed(0)
    params = {"kernel": torch.rand(5, 3, generator=generator)}
    x = UNITS.restore(torch.randn(5, *shape, generator=generator))
    return corruption.apply(x, params, generator), params


def components(corruption: Corruption, shape: tuple[int, ...]) -> Posterior:
    """A mixture of three components that draws from all of them."""
    scaled, d = corruption.scaled(UNITS), torch.Size(shape).numel()
    one = prior(d)
    mean = torch.cat([one.mean - 1, one.mean, one.mean + 1])
    start = Mixture(torch.full((3,), -1.1), mean, one.factor.expand(3, -1, -1), one.variance.expand(3, -1))
    return Posterior(MixtureSampler(scaled, shape, start), corruption, UNITS)


CASES = {
    "mask, unet": (denoising, RandomMask(0.5, 0.1), (1, 4, 4), observed),
    "noise, two steps": (partial(denoising, network=NETWORK, steps=2), GaussianNoise(0.3), (4,), observed),
    "blurs of files": (partial(denoising, network=NETWORK), Blur(noise=0.1), (4,), kernels),  # conjugate gradients
    "mask, mixture": (components, RandomMask(0.5, 0.1), (6,), observed),
    "cosines, mixture": (mixture, GaussianBlur(0.8, 0.1), (1, 4, 4), observed),
    "photons, mixture": (mixture, PoissonGaussian(0.5, 0.1), (1, 4, 4), observed),
    "levels, mixture": (mixture, Quantise(5, -2.0, 2.0), (1, 4, 4), observed),
    "projection, mixture": (mixture, RandomProjection(2, 0.1), (6,), observed),
}
WITHOUT_DIFFEM = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save([program(*some) for some in inputs], sys.argv[3])
assert not [name for name in sys.modules if name.startswith("diffem")]
"""


def loaded(file: Path, *inputs: tuple) -> list[torch.Tensor]:
    """What the program draws in this process: quicker."""
    program = torch.export.load(file).module()
    return [program(*some) for some in inputs]


def load_and_draw(file: Path, *inputs: tuple) -> list[torch.Tensor]:
    """What the program draws in a process that knows nothing of diffem."""
    given, drawn = file.with_suffix(".in"), file.with_suffix(".out")
    torch.save(list(inputs), given)
    code = [sys.executable, "-I", "-c", WITHOUT_DIFFEM, str(file), str(given), str(drawn)]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(drawn, weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_without_diffem_it_draws_what_the_posterior_draws(case, tmp_path):
    make, corruption, shape, observe = CASES[case]
    of, (y, params) = make(corruption, shape).eval(), observe(corruption, shape)
    file = tmp_path / "posterior.pt2"
    assert of.export(file, y, params) is None  # any number of observations
    seeds = keys(5)
    some = [slice(0, 5), slice(0, 1), slice(1, 4)]
    inputs = [(y[rows], {k: v[rows] for k, v in params.items()}, seeds[rows]) for rows in some]
    draw = load_and_draw if "unet" in case or case == "mask, mixture" else loaded
    for drawn, (y_, params_, seeds_) in zip(draw(file, *inputs), inputs, strict=True):
        expected = of.sample(y_, params_, seeds=seeds_)[0]
        assert drawn.shape == expected.shape
        torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
        assert drawn.std() > 0.1


def test_the_file_holds_neither_the_example_nor_paths(tmp_path):
    y, params = observed(RandomMask(0.5, 0.1), (6,))
    y = y + 12345.678
    file = tmp_path / "posterior.pt2"
    mixture(RandomMask(0.5, 0.1), (6,)).export(file, y, params)
    with zipfile.ZipFile(file) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert b".py" not in content
    assert str(Path(__file__).parents[1]).encode() not in content
    assert y[params["mask"]][:1].numpy().tobytes() not in content


def test_images_without_a_channel_axis(tmp_path):
    of = mixture(RandomMask(0.5, 0.1), (1, 3, 4))
    of.layout = of.item_layout = Layout("NHW")
    file = tmp_path / "posterior.pt2"
    assert of.export(file) is None  # the corruption makes an example
    y, params = observed(RandomMask(0.5, 0.1), (1, 3, 4))
    y, mask = y[:, 0], params["mask"][:, 0]
    drawn = loaded(file, (y, {"mask": mask}, keys(5)))[0]
    torch.testing.assert_close(drawn, of.sample(y, {"mask": mask}, seeds=keys(5))[0], rtol=1e-4, atol=1e-4)


def refused(of: Posterior, file: Path, *example) -> str:
    with pytest.raises(DiffemError) as caught:
        of.export(file, *example)
    assert not file.exists()
    return str(caught.value)


def test_what_cannot_be_exported_is_refused_in_a_line(tmp_path):
    file = tmp_path / "posterior.pt2"
    noise = mixture(GaussianNoise(0.3), (6,))
    assert refused(noise, tmp_path / "posterior.onnx") == (
        f"{tmp_path / 'posterior.onnx'}: must end in .pt2, the suffix of exported programs"
    )
    tell = "export: y and params: give a few observations; the corruption does not tell what they look like"
    assert refused(diffusion(BlackBox(lambda x: x)), file) == tell
    assert refused(mixture(GaussianNoise(None), (6,)), file) == tell
    assert "mask.npy: missing" in refused(mixture(RandomMask(0.5, 0.1), (6,)), file, torch.zeros(3, 6))

    class Asks(torch.nn.Module):
        def __init__(self, channels, shape):
            super().__init__()
            self.layer = torch.nn.Linear(channels, 2 * shape[0])

        def forward(self, x, log_sigma):
            return self.layer(x) * (1.0 if float(x.sum()) > 0 else 2.0)

    said = refused(diffusion(GaussianNoise(0.3), network=Given(Asks)), file)
    assert said.startswith(f"{file}: torch.export cannot trace diffusion of GaussianNoise: ")
    assert "\n" not in said


def test_a_black_box_with_an_example(tmp_path):
    of = denoising(BlackBox(lambda x: x**2), (6,), NETWORK)
    y = torch.rand(3, 6)
    file = tmp_path / "posterior.pt2"
    assert of.export(file, y) is None
    drawn = loaded(file, (y, {}, keys(3)))[0]
    torch.testing.assert_close(drawn, of.sample(y, seeds=keys(3))[0], rtol=1e-4, atol=1e-4)


def test_a_network_that_fixes_the_number_says_so(tmp_path):
    class Fixed(torch.nn.Module):
        def __init__(self, channels, shape):
            super().__init__()
            self.layer = torch.nn.Linear(channels, 2 * shape[0])

        def forward(self, x, log_sigma):
            return torch.stack([self.layer(one) for one in x])

    of = denoising(GaussianNoise(0.3), (6,), Given(Fixed))
    assert of.export(tmp_path / "posterior.pt2", torch.rand(4, 6)) == 4


def test_export_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    observations().save("data")
    em = make(Path("run"), observations().load("data"), em={"iterations": 1}, sampler={"steps": 1})
    list(em.iterate())
    assert main(["export", "run", "--out", "posterior.pt2"]) == 0
    assert capsys.readouterr().out == "posterior.pt2: a program for any number of observations at a time\n"
    y, params = em.observations.batch(range(4))
    drawn = loaded(Path("posterior.pt2"), (y, params, keys(4)))[0]
    expected = from_pretrained("run/posterior").sample(y, params, seeds=keys(4))[0]
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    assert main(["export", "run", "--out", "posterior.pt2"]) == 2
    assert capsys.readouterr().err == (
        "diffem: diffem export: --out: posterior.pt2 is there already; --overwrite replaces it\n"
    )
