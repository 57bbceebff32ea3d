"""All diagnostics of a finished run on held-out observations, and the warnings in words."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from diffem import memory, seeding
from diffem.data import Dataset, Observations, evenly, open_array
from diffem.diagnostics.calibration import self_consistency
from diffem.diagnostics.collapse import collapse_watch, narrow
from diffem.diagnostics.divergence import COMPARISONS, sample_divergence
from diffem.diagnostics.scores import Coverage, coverage
from diffem.errors import DiffemError
from diffem.posterior import from_pretrained
from diffem.run import read_config
from diffem.samplers import WIDTHS, draw_many, prior_samples
from diffem.watch import best_row, model_of, read_metrics

ITEMS = 256  # held-out observations, each reconstructed once; also the number of prior samples
COVERED = 64  # observations for coverage, with DRAWS draws each: most of the cost; twice as many with `full`
DRAWS = 39
FEWEST = 16  # held-out observations; fewer allow no conclusion
NUMBERS = 2**24  # numbers in all compared items; if items are large, fewer are compared
TRAINING = 4096  # training reconstructions that prior samples are compared with
LEVELS = (0.5, 0.8, 0.95)
POINTS = 0.05  # tolerated deviation of coverage from its level
SIGNIFICANT = 0.01
# Distances to the observations that cause a warning, as a share of the distance between two observations. On digits
# with the right corruption they are up to 0.003 and 0.026. The distance of pairs has no such scale, so it has no limit.
SIZES = {"energy_distance": 0.005, "entries": 0.03}
SAME = (
    "all draws of an observation are equal, so that its standard deviation is 0: the run kept its start, which has no"
    " uncertainty (the observation, or its inverse); train longer, with more m_step.steps"
)
GRAINY = (
    "the final draws got the largest width, {width:g}, since the network explained too little: single draws may look"
    " grainy where nothing was measured; train longer, with more m_step.steps or em.iterations"
)
PERMUTATIONS = 999  # the smallest joint p-value of three tests is 0.003


def diagnose(
    run: str | Path,
    observations: Observations,
    full: bool = False,
    device: str = "auto",
    precision: str = "auto",
    batch: int | None = None,
) -> dict:
    """Coverage, divergence and collapse watch of the models of a run, on its held-out observations.

    Arguments:
        run: The run folder.
        observations: The observations that it was trained on.
        full: Whether to compute coverage on more observations, and the :func:`self_consistency` of posterior and prior;
            several times slower.
        device: Where networks run; see :func:`diffem.devices.choose`.
        precision: Their arithmetic; see :func:`diffem.devices.choose`.
        batch: Observations at a time; by default as many as fit in memory.

    Returns:
        Ready for JSON. `warnings`: sentences, none if nothing is wrong; `iteration` of the models; `items`, the number
        of held-out observations used; `seconds`; and, if there are enough observations and the corruption allows it,

        - `coverage`: `levels` of central intervals, the `shares` of hidden entries inside them, `errors` (their
          standard errors over observations), `ranks` of the entries among the draws, and the number of `observations`;
        - `divergence`: the result of :func:`sample_divergence`;
        - `collapse`: the result of :func:`collapse_watch`;
        - `self_consistency`: the result of :func:`self_consistency`, if `full`.

    Raises:
        DiffemError: If the folder is not a run, or the run was trained on other observations.
    """
    run, began = Path(run), time.monotonic()
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run / name).exists():
            raise DiffemError(f"{run}: is not a finished run (no {name})")
    config, metrics = read_config(run), read_metrics(run)
    if config["facts"].get("digest") != observations.digest():
        raise DiffemError(f"{observations.source}: are not the observations that {run} was trained on")
    seed = config["em"]["seed"]
    final = best_row(metrics)
    place = {"device": device, "precision": precision}
    loaded = from_pretrained(run / "posterior", observations.corruption, **place)
    train, _, test = observations.split(seed)
    posterior, data = loaded.sampler, Dataset(observations, loaded.units, train)
    batch = batch or loaded.batch
    prior = None
    if (run / "prior" / "config.json").exists():
        prior = from_pretrained(run / "prior", observations.corruption, **place).sampler
    features = math.prod(data.shape)
    most = max(FEWEST, memory.at_once(features, ITEMS, NUMBERS))
    rows, key = evenly(test, most), seeding.fold(seed, *b"diagnose")  # not the draws of the training
    result: dict = {"iteration": model_of(final), "items": len(rows)}
    ratio = None if final.get("ratio") is None else (final["ratio"], final["ratio_se"])
    one, other = draw_many(posterior, data, evenly(rows, FEWEST), 2, key, batch=batch)
    first = [SAME] if torch.equal(one, other) else []
    first += [GRAINY.format(width=final["width"])] if final.get("width") == WIDTHS[-1] else []
    if len(rows) < FEWEST:
        few = f"{len(rows)} test observations are too few to say whether all is well; it takes {FEWEST}"
        return {**result, "seconds": time.monotonic() - began, "warnings": [*first, *narrow(ratio), few]}
    if (found := coverage(posterior, data, evenly(test, COVERED * (1 + full)), key, DRAWS, batch)) is not None:
        result["coverage"] = _coverage(found)
    x = draw_many(posterior, data, rows, 1, key, batch=batch)[0]
    samples = None if prior is None else prior_samples(prior, len(rows), key, batch)
    result["divergence"] = sample_divergence(x, samples, data, rows, key, PERMUTATIONS)
    kept = data.items(open_array(run / "reconstructions.npy"))[evenly(train, memory.at_once(features, TRAINING))]
    result["collapse"] = collapse_watch(x, samples, kept, data, rows, key, ratio)
    if full and prior is not None:
        result["self_consistency"] = self_consistency(posterior, prior, key, batch=batch)
    return {**result, "seconds": time.monotonic() - began, "warnings": [*first, *warnings(result)]}


def warnings(result: dict) -> list[str]:
    """Warnings about a run, one sentence each, from the results of :func:`diagnose`."""
    found = []
    if table := result.get("coverage"):
        found += _intervals(table, result.get("collapse", {}).get("spread"))
    for name, table in result.get("divergence", {}).items():
        sizes = {k: table[k] / least for k, least in SIZES.items() if table[f"{k}_p_value"] < SIGNIFICANT}
        if sizes and (largest := max(sizes, key=lambda k: sizes[k])) and sizes[largest] > 1:
            what = "prior samples" if name == "prior" else "reconstructions"
            found.append(
                f"re-corrupted {what} differ from the observations by {table[largest]:.1%} of the distance between two of them"
                f" ({COMPARISONS[largest]}); is the declared corruption the true one? `diffem check` tells what it can"
            )
    found += [row["warning"] for row in result.get("collapse", {}).values() if row["warning"]]
    if table := result.get("self_consistency"):
        off_by = table["tarp"]["deviation"]
        if table["p_value"] < SIGNIFICANT and abs(off_by) > POINTS:
            found.append(
                f"on observations simulated from the prior, credible regions of the posterior are off by {abs(off_by):.0%}:"
                " posterior and prior do not fit each other, so do not use both for one conclusion"
            )
    return found


def _intervals(table: dict, ratio: dict | None) -> list[str]:
    """The warning about central intervals, if there is one; `ratio` is the calibration ratio of the collapse watch.

    Intervals that hold too much may still be too short for the largest errors. Then the draws are neither too wide nor too narrow.
    """
    levels, shares, errors = table["levels"], table["shares"], table["errors"]
    off = [share - level for share, level in zip(shares, levels, strict=True)]
    wrong = [k for k, by in enumerate(off) if abs(by) > max(POINTS, 2 * errors[k])]
    if not wrong:
        return []
    k = max(wrong, key=lambda k: abs(off[k]))
    contradicted = any(by * off[k] < 0 and abs(by) > 2 * error for by, error in zip(off, errors, strict=True))
    held = ", ".join(f"{level:.0%} intervals hold {share:.0%}" for level, share in zip(levels, shares, strict=True))
    if ratio is not None and abs(ratio["value"] - 1) > 2 * ratio["error"] and (ratio["value"] - 1) * off[k] < 0:
        contradicted = True
        held += f", and the calibration ratio is {ratio['value']:.2f}"
    if contradicted:
        return [
            f"the distribution of the draws has the wrong shape: of the hidden entries {held}; choose the level of an interval"
            " by the coverage that the report shows, not by its name"
        ]
    length, size, more = ("short", "larger", "train longer, ") if off[k] < 0 else ("long", "smaller", "")
    return [
        f"intervals are too {length}: {levels[k]:.0%} intervals hold {shares[k]:.0%} of the hidden entries; the uncertainty is"
        f" {size} than the draws vary: {more}check the declared noise, or take the coverage in the report for the level of an"
        " interval"
    ]


def p_words(value: float) -> str:
    """A p-value in words."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def _coverage(found: Coverage) -> dict:
    return {
        "levels": list(LEVELS),
        "shares": [found(level) for level in LEVELS],
        "errors": [found.standard_error(level) for level in LEVELS],
        "ranks": found.ranks.tolist(),
        "observations": found.observations,
    }
