"""Sharing: a model goes to the Hub and comes back the same; a stand-in takes the place of huggingface_hub."""

from __future__ import annotations

import fnmatch
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from test_em import train
from test_posterior import CASES, diffusion, keys, observed

from diffem.cli import main
from diffem.errors import DiffemError
from diffem.posterior import Posterior, from_pretrained


class Hub(ModuleType):
    """The part of huggingface_hub that is used; repositories are folders."""

    def __init__(self, root: Path) -> None:
        super().__init__("huggingface_hub")
        self.root, self.calls = root, []
        hub = self

        class HfApi:
            def __init__(self, token: str | None = None) -> None:
                hub.calls.append(("token", token))

            def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
                hub.calls.append(("create", name, private, exist_ok))

            def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
                if repo_id.startswith("others/"):
                    raise OSError("403 Forbidden\n(Request ID: 1)")
                shutil.copytree(folder_path, hub.root / repo_id, dirs_exist_ok=True)

        self.HfApi = HfApi

    def snapshot_download(self, name: str, *, allow_patterns: list[str]) -> str:
        if not (self.root / name).exists():
            raise OSError(f"404 Client Error.\n\nRepository Not Found for {name}")
        cache = self.root / "cache" / name
        for file in (self.root / name).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                cache.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache)
        cache.mkdir(parents=True, exist_ok=True)
        return str(cache)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    module = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def posterior() -> Posterior:
    corruption, shape = CASES["mask of an image"]
    return diffusion(corruption, shape)


SCORES = {"score_name": "crps", "score": 0.1234, "score_se": 0.01, "ratio": 0.9, "start_score": 0.2, "seconds": 7.0}


def front(card: str) -> dict:
    head, _ = card.removeprefix("---\n").split("---\n", 1)
    return yaml.safe_load(head)


# --- the card ------------------------------------------------------------------------------------------


def test_the_card_says_what_the_model_is(tmp_path):
    posterior().save_pretrained(tmp_path, SCORES)
    card = (tmp_path / "README.md").read_text()
    assert front(card) == {
        "library_name": "diffem",
        "tags": ["diffusion", "inverse-problems", "posterior-sampling", "RandomMask"],
    }
    for line in (
        '| corruption | `{"name": "RandomMask", "rate": 0.5, "noise": 0.1, "block": 1}` |',
        "| an item | shape 2 x 3 x 4, axes NCHW |",
        "| values | in the units of the observations; the data ranged from about -1.5 to about 2.5 |",
        "| CRPS (of model units: half the range of the data is 1); smaller is better | 0.1234 ± 0.0100 | 0.2000 |",
        "| spread of the draws over the spread that their errors imply; 1 is calibrated | 0.90 | – |",
    ):
        assert line in card.splitlines()
    assert "7.0" not in card


def test_scores_come_back_and_go_out_again(tmp_path):
    posterior().save_pretrained(tmp_path / "one", SCORES)
    again = from_pretrained(tmp_path / "one")
    assert again.scores == {name: value for name, value in SCORES.items() if name != "seconds"}
    again.save_pretrained(tmp_path / "two")
    for name in ("README.md", "config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    posterior().save_pretrained(tmp_path / "three")
    assert "scores" not in json.loads((tmp_path / "three" / "config.json").read_text())
    assert "## Scores" not in (tmp_path / "three" / "README.md").read_text()
    posterior().save_pretrained(tmp_path / "four", {**SCORES, "score": float("nan")})
    assert "## Scores" not in (tmp_path / "four" / "README.md").read_text()


def test_the_code_on_the_card_runs(tmp_path):
    of = posterior()
    of.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text().replace("THIS FOLDER", str(tmp_path))
    lines = [line.strip() for line in card.splitlines() if line.startswith("    ") and "pip" not in line]
    y, params = observed(*CASES["mask of an image"])
    names: dict = {"y": y, "params": params}
    exec("\n".join(lines), names)
    assert names["draws"].shape == (8, *y.shape)


def test_a_run_writes_its_final_scores_into_the_card(tmp_path):
    last = train(tmp_path).rows[-1]
    found = from_pretrained(tmp_path / "posterior").scores
    assert (found["score"], found["start_score"]) == (last["score"], last["start_score"])
    assert from_pretrained(tmp_path / "start").scores is None


# --- the Hub -------------------------------------------------------------------------------------------


def test_there_and_back(hub, tmp_path):
    of = posterior()
    assert of.push_to_hub("owner/masks", token="hf_x", private=True) == "https://huggingface.co/owner/masks"
    assert hub.calls == [("token", "hf_x"), ("create", "owner/masks", True, True)]
    assert 'from_pretrained("owner/masks")' in (hub.root / "owner" / "masks" / "README.md").read_text()
    (hub.root / "owner" / "masks" / "model.pkl").write_bytes(b"code")
    again = from_pretrained("owner/masks")
    y, params = observed(*CASES["mask of an image"])
    assert torch.equal(*(one.sample(y, params, seeds=keys(5)) for one in (of, again)))
    downloaded = {file.name for file in (hub.root / "cache" / "owner" / "masks").iterdir()}
    assert downloaded == {"config.json", "model.safetensors"}  # nothing that could be run


def test_a_folder_goes_before_the_hub(hub, tmp_path):
    posterior().save_pretrained("owner/here")
    assert from_pretrained("owner/here").shape == (2, 3, 4)
    with pytest.raises(DiffemError, match=r"owner/elsewhere is not a saved model$"):
        from_pretrained("owner/elsewhere")  # in a folder that is here: a mistyped name, not one of the Hub
    with pytest.raises(DiffemError, match=r"nobody/nothing is not a saved model$"):
        from_pretrained(Path("nobody/nothing"))  # a path is a path
    assert hub.calls == []


def test_what_the_hub_does_not_have(hub):
    def refused(what) -> str:
        with pytest.raises(DiffemError) as caught:
            what()
        return str(caught.value)

    assert refused(lambda: from_pretrained("owner/nothing")) == (
        "owner/nothing: no such folder, and the Hugging Face Hub did not give it: "
        "404 Client Error. Repository Not Found for owner/nothing"
    )
    (hub.root / "owner" / "text").mkdir(parents=True)
    (hub.root / "owner" / "text" / "config.json").write_text("{}")
    assert refused(lambda: from_pretrained("owner/text")) == (
        "owner/text: holds no model.safetensors on the Hugging Face Hub, so it is no model of diffem"
    )
    assert refused(lambda: posterior().push_to_hub("others/theirs")) == (
        "others/theirs: the Hugging Face Hub did not take it: 403 Forbidden (Request ID: 1)"
    )
    assert refused(lambda: posterior().push_to_hub("name")) == (
        "name: is no name on the Hugging Face Hub; write OWNER/NAME"
    )


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DiffemError) as caught:
        from_pretrained("owner/name")
    assert str(caught.value) == (
        "owner/name: no such folder; if it is on the Hugging Face Hub: "
        "huggingface_hub is not installed: pip install 'diffem-torch[hub]'"
    )
    with pytest.raises(DiffemError) as caught:
        posterior().push_to_hub("owner/name")
    assert str(caught.value) == "huggingface_hub is not installed: pip install 'diffem-torch[hub]'"


def test_push_of_a_run(hub, capsys):
    train(Path("run"))
    assert main(["push", "run", "owner/run", "--private"]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/owner/run\n"
    assert hub.calls[1] == ("create", "owner/run", True, True)
    assert "## Scores on test observations" in (hub.root / "owner" / "run" / "README.md").read_text()
    assert main(["push", "nowhere", "owner/run"]) == 2
    assert capsys.readouterr().err == "diffem: nowhere: is not a run folder (no config.yaml)\n"
