"""Presets load, and hold the paper's settings where they claim to; the tiny runs use files in the real layouts."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from PIL import Image

from diffem import cli, config
from diffem.corruptions import GaussianNoise, from_config
from diffem.data import Observations
from diffem.em import DiffEM
from diffem.errors import DiffemError

TINY = [
    "--prior.steps",
    "2",
    "--prior.sampler_steps",
    "2",
    "--network.channels",
    "[8,8]",
    "--network.blocks",
    "[1,1]",
    "--network.attention",
    "[1]",
    "--network.embedding",
    "16",
    "--start.ranks",
    "[2]",
    "--start.iterations",
    "2",
    "--sampler.steps",
    "2",
    "--em.iterations",
    "1",
    "--em.score_items",
    "2",
    "--m_step.steps",
    "2",
    "--m_step.first_steps",
    "2",
    "--m_step.batch",
    "4",
]


@pytest.mark.parametrize("name", config.presets())
def test_presets_load_and_name_a_corruption(name):
    preset = config.load_config(name)
    assert preset.to_dict() == config.from_dict(preset.to_dict()).to_dict()
    if name == "table":  # whose observations are always the user's
        assert not preset.data.source
        return
    assert from_config(preset.data.corruption).config["name"] == preset.data.corruption["name"]


@pytest.mark.parametrize(("name", "rate"), [("cifar10-mask75", 0.75), ("cifar10-mask90", 0.9)])
def test_cifar_presets_are_those_of_the_paper(name, rate):
    preset = config.load_config(name)
    assert preset.data.corruption["rate"] == rate
    assert preset.network.channels == (128, 256, 384)
    assert (preset.sampler.steps, preset.m_step.batch, preset.m_step.learning_rate) == (256, 256, 2e-4)
    assert (preset.em.iterations, preset.denoiser.precondition) == (21, "plain")


@pytest.mark.parametrize("name", [n for n in config.presets() if n.startswith("cifar10")])
def test_cifar_presets_run(name, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(1, 6):
        batch = {b"data": rng.integers(0, 256, (8, 3072), np.uint8), b"labels": [0] * 8}
        (folder / f"data_batch_{k}").write_bytes(pickle.dumps(batch))
    assert (
        cli.main(["train", name, "--root", str(tmp_path), "--out", str(tmp_path / "run"), "--allow-unobserved", *TINY])
        == 0
    )
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("name", [n for n in config.presets() if n.startswith("celeba")])
def test_celeba_presets_run(name, tmp_path):
    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(24):
        Image.fromarray(rng.integers(0, 256, (218, 178, 3), np.uint8)).save(folder / f"{k:06d}.jpg")
    assert (
        cli.main(["train", name, "--root", str(tmp_path), "--out", str(tmp_path / "run"), "--allow-unobserved", *TINY])
        == 0
    )
    assert (tmp_path / "run" / "posterior" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"m_step": {"batch": 0}}, "m_step: steps, first_steps and batch must be at least 1, micro_batch >= 0"),
        ({"m_step": {"ema": 1.0}}, "m_step: ema must be in [0, 1), thinned and clean_share in [0, 1]"),
        ({"m_step": {"clean_share": 1.5}}, "m_step: ema must be in [0, 1), thinned and clean_share in [0, 1]"),
        *(
            ({"m_step": {"imputed_weight": value}}, f"m_step.imputed_weight: must be in (0, 1], got {value}")
            for value in (0.0, -0.1, 1.5)
        ),
        ({"sampler": {"width": -1.0}}, "sampler: steps must be from 1 to 3,000, width from 0 to 100"),
        ({"sampler": {"steps": 0}}, "sampler: steps must be from 1 to 3,000, width from 0 to 100"),
        (
            {"denoiser": {"precondition": "fuse"}},
            "denoiser.precondition: must be auto, plain or start, got 'fuse'",
        ),
        *(
            ({"m_step": {"learning_rate": value}}, f"m_step.learning_rate: must be > 0, got {value}")
            for value in (-1.0, 0.0, math.nan, math.inf)
        ),
        *(
            ({"network": section}, "network: width, embedding, channels and blocks must be at least 1, depth >= 0")
            for section in ({"width": 0}, {"depth": -1}, {"embedding": 0}, {"channels": [0, 4]}, {"blocks": [0, 1]})
        ),
        ({"network": {"dropout": 2.0}}, "network.dropout: must be in [0, 1), got 2.0"),
        ({"denoiser": {"time_beta": -1.0}}, "denoiser.time_beta: must be > 0, got -1.0"),
        *(
            ({"start": section}, "start: components and iterations must be at least 1, items at least 2")
            for section in ({"components": [0]}, {"items": 0}, {"iterations": 0})
        ),
        ({"sampler": {"width": math.nan}}, "sampler: steps must be from 1 to 3,000, width from 0 to 100"),
        (
            {"prior": {"sampler_steps": 10**6}},
            "prior.steps: must be at least 1, and prior.sampler_steps from 1 to 3,000",
        ),
        ({"em": {"patience": -1}}, "em.patience: must be a number of iterations >= 0, got -1"),
        (
            {"prior": {"kind": "joint"}, "denoiser": {"observation_dropout": 0.0}},
            "prior.kind: joint needs denoiser.observation_dropout > 0: the network must know both",
        ),
    ],
)
def test_values_that_cannot_be(values, text):
    with pytest.raises(DiffemError) as caught:
        config.from_dict(values)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "name", ["em.gate", "m_step.reinitialise", "m_step.checkpoint", "sampler.guidance", "sampler.dispersion"]
)
def test_fields_of_older_versions_are_refused(name):
    section, field = name.split(".")
    with pytest.raises(DiffemError, match=rf"^configuration: {name}: unknown field;"):
        config.from_dict({section: {field: 1}})


@pytest.mark.parametrize("field", ["batch", "width", "dispersion", "gain", "ratio", "sharp", "sharp_ratio"])
def test_sections_of_older_versions_are_refused(field):
    with pytest.raises(DiffemError, match=r"^configuration: e_step: unknown section;"):
        config.from_dict({"e_step": {field: 1}})


@pytest.mark.parametrize("minutes", [-1.0, math.nan])
def test_times_between_checkpoints_that_cannot_be(minutes, tmp_path):
    observations = Observations(np.zeros((40, 3), np.float32), GaussianNoise(0.1), range=(-1, 1))
    with pytest.raises(DiffemError) as caught:
        DiffEM(config.load_config(), observations, tmp_path / "run", checkpoint_minutes=minutes)
    assert str(caught.value) == f"checkpoint_minutes: must be a number of minutes >= 0, got {minutes}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("batch", [0, -1])
def test_batches_that_cannot_be(batch, tmp_path, capsys):
    observations = Observations(np.zeros((40, 3), np.float32), GaussianNoise(0.1), range=(-1, 1))
    with pytest.raises(DiffemError) as caught:
        DiffEM(config.load_config(), observations, tmp_path / "run", batch=batch)
    assert str(caught.value) == f"batch: must be at least 1, got {batch}"
    observations.save(tmp_path / "observations")
    words = ["train", "--observations", str(tmp_path / "observations"), "--out", str(tmp_path / "run")]
    assert cli.main([*words, "--batch", str(batch)]) == 2
    assert f"--batch: must be at least 1, got {batch}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_imputed_entries_may_weigh_as_much_as_measured_ones():
    assert 0 < config.load_config().m_step.imputed_weight < 1
    assert config.load_config(None, [("m_step.imputed_weight", "1")]).m_step.imputed_weight == 1.0


def test_every_setting_is_described(capsys):
    found = {name: (default, words) for name, default, words in config.described()}
    assert set(found) == {f"{s}.{f}" for s, fields in config.Config().to_dict().items() for f in fields}
    assert found["em.iterations"] == (20, "Number of EM iterations.")
    assert all(words.endswith((".", ")")) for _, words in found.values()), [w for _, w in found.values()]
    assert cli.main(["settings"]) == 0
    assert "--em.iterations 20\n    Number of EM iterations.\n" in capsys.readouterr().out


def test_overrides_are_pairs_or_a_dictionary_of_values_or_of_yaml():
    for overrides in ([("em.iterations", 2)], [("em.iterations", "2")], {"em.iterations": 2}, {"em.iterations": "2"}):
        assert config.load_config("demo", overrides).em.iterations == 2
    with pytest.raises(DiffemError, match="em.iterations: must be of type int, got 2.5"):  # noqa: RUF043
        config.load_config("demo", {"em.iterations": 2.5})
