"""Sharing a saved model: its card, and the Hugging Face Hub (extra `hub`)."""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffem.errors import DiffemError, optional

if TYPE_CHECKING:
    from diffem.posterior import Posterior

FILES = ["config.json", "model.safetensors"]  # all that is downloaded; nothing is unpickled or run
SCORES = ("score_name", "score", "score_se", "ratio", "start_score", "start_score_se", "start_ratio")
NAMES = {"crps": "CRPS (of model units: half the range of the data is 1)", "energy_distance": "energy distance"}


def push(posterior: Posterior, name: str, token: str | None, private: bool) -> str:
    """Uploads a model to the Hub; returns its address."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise DiffemError(f"{name}: is no name on the Hugging Face Hub; write OWNER/NAME")
    hub = optional("huggingface_hub", "hub")
    with tempfile.TemporaryDirectory(prefix="diffem-push-") as folder:
        posterior.save_pretrained(folder)
        card = Path(folder) / "README.md"
        card.write_text(card.read_text().replace(HERE, name))
        try:
            api = hub.HfApi(token=token)
            api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="diffem: save_pretrained")
        except Exception as error:  # of the network, or the Hub
            raise DiffemError(f"{name}: the Hugging Face Hub did not take it: {_line(error)}") from error
    return f"https://huggingface.co/{name}"


def elsewhere(name: str) -> bool:
    """Whether it is OWNER/NAME on the Hub rather than a folder: neither the folder nor OWNER is here."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name).parent.exists()


def pull(name: str) -> Path:
    """Downloads a model from the Hub; returns its folder."""
    try:
        hub = optional("huggingface_hub", "hub")
    except DiffemError as error:
        raise DiffemError(f"{name}: no such folder; if it is on the Hugging Face Hub: {error}") from None
    try:
        folder = Path(hub.snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # of the network, or the Hub
        raise DiffemError(
            f"{name}: no such folder, and the Hugging Face Hub did not give it: {_line(error)}"
        ) from error
    if missing := [file for file in FILES if not (folder / file).exists()]:
        raise DiffemError(f"{name}: holds no {missing[0]} on the Hugging Face Hub, so it is no model of diffem")
    return folder


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def chosen(row: dict | None) -> dict | None:
    """The scores in a row of metrics that a model card shows; None if there are none."""
    known = {name: row[name] for name in SCORES if row and _is_figure(row.get(name), name)}
    return known if "score_name" in known and "score" in known else None


def checked(scores: Any) -> dict[str, Any] | None:
    """Scores as :func:`chosen` made them, from the file of a saved model.

    Raises:
        ValueError: If they are something else.
    """
    if scores is not None and not (isinstance(scores, dict) and chosen(scores) == scores):
        raise ValueError(f"scores are {str(scores)[:80]}")
    return scores


def _is_figure(value: object, name: str) -> bool:
    if name == "score_name":
        return isinstance(value, str)
    return isinstance(value, int | float) and math.isfinite(value)


# --- the card ------------------------------------------------------------------------------------------

HERE = "THIS FOLDER"
_CARD = """---
{front}---

# {title}

A posterior sampler, made by [diffem](https://pypi.org/project/diffem-torch/) from corrupted observations, without clean data:
it draws clean items given observations of the kind that it was trained on.

| | |
|---|---|
| corruption | `{corruption}` |
| an item | shape {shape}, axes {axes} |
| values | in the units of the observations; the data ranged from about {low:.6g} to about {high:.6g} |
| sampler | {kind} |
{scores}
## How to sample

    pip install diffem-torch

    import diffem
    posterior = diffem.from_pretrained("{here}")
    draws = posterior.sample(y, params, n=8)     # (8, N, ...) for N observations; their mean and std tell what is known

`y` holds observations as they were measured, and `params` their parameters by name, e.g. `{{"mask": mask}}`, true where y was
observed. A corruption or a network that is not one of diffem's must be given to `from_pretrained`.

## Limits

- It is for observations of this corruption. With another one, or other noise, it gives wrong answers with small error bars.
- It knows only what its training observations together showed. What none of them shows depends on its start.
- Draws are no measurements: look at their spread before a decision rests on them.
"""


def card(config: dict) -> str:
    """The model card: YAML front matter and Markdown.

    Arguments:
        config: What config.json holds.
    """
    import yaml

    name, (centre, half) = config["corruption"]["name"], (np.asarray(value, float) for value in config["scaling"])
    front = {"library_name": "diffem", "tags": ["diffusion", "inverse-problems", "posterior-sampling", name]}
    low, high = float((centre - half).min()), float((centre + half).max())
    axes, parts = config["item_layout"]
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=f"diffem: posterior sampler for {name}",
        corruption=json.dumps(config["corruption"]).replace("|", "\\|"),
        shape=" x ".join(map(str, config["shape"])),
        axes=axes + (" of complex numbers, as pairs of channels" if parts else ""),
        low=low,
        high=high,
        kind=config["kind"],
        scores=_scores(config.get("scores")),
        here=HERE,
    )


def _scores(of: dict[str, Any] | None) -> str:
    if of is None:
        return ""
    lines = ["", "## Scores on test observations, which were used for no choice", ""]
    lines += ["| | this model | the start of its training |", "|---|---|---|"]
    label = NAMES.get(of["score_name"], of["score_name"])
    lines += [f"| {label}; smaller is better | {_cell(of, 'score')} | {_cell(of, 'start_score')} |"]
    if "ratio" in of:
        label = "spread of the draws over the spread that their errors imply; 1 is calibrated"
        lines += [f"| {label} | {_cell(of, 'ratio', 2)} | {_cell(of, 'start_ratio', 2)} |"]
    return "\n".join([*lines, ""])


def _cell(of: dict[str, Any], name: str, digits: int = 4) -> str:
    if name not in of:
        return "–"
    error = of.get(f"{name}_se")
    return f"{of[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
