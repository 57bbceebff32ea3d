"""Rebuilds the tables of benchmarks/README.md and of docs/ from benchmarks/results.

python benchmarks/table.py            rewrites what stands between the markers
python benchmarks/table.py --check    exit status 1 if that would change anything
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables: made by table.py -->\n", "<!-- end of tables -->"
HEADS = {
    "crps": "CRPS",
    "ratio": "ratio",
    "delta": "paired difference to the start",
    "frechet": "Frechet",
    "to_curve": "draw to curve",
    "from_curve": "curve to draw",
    "residual": "residual / noise",
    "sinkhorn": "Sinkhorn",
    "energy_distance": "energy distance",
    "accuracy": "accuracy of a draw",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "psnr": "PSNR of a draw (no objective)",
    "psnr_mean": "PSNR of the mean",
    "psnr_classical": "PSNR, Richardson-Lucy",
    "prior_frechet": "prior: Frechet",
    "prior_recall": "prior: recall",
    "prior_to_curve": "prior: to curve",
    "prior_from_curve": "prior: from curve",
}
PATIENCE = (5, 8)
FINE = ("crps", "delta", "energy_distance", "to_curve", "from_curve", "sinkhorn", "prior_to_curve", "prior_from_curve")
# of a comparison: what says most, so that a table can be read
COMPARED = [n for n in HEADS if n not in ("delta", "residual")]


def number(name: str, value: float) -> str:
    return f"{value:.4f}" if name in FINE else f"{value:.2f}"


def cell(column: dict, name: str) -> str:
    if column.get(name) is None:
        return "–"
    spread = f" ± {number(name, column[name + '_se'])}" if name + "_se" in column else ""
    return number(name, column[name]) + spread


def markdown(heads: list[str], rows: Iterable[list[str]]) -> str:
    """A table."""
    head, *others = ("| " + " | ".join(row) + " |\n" for row in (heads, *rows))
    return head.replace("|  |", "| |") + "|" + "---|" * len(heads) + "\n" + "".join(others)


def grid(columns: dict[str, dict], names: Iterable[str], extra: dict[str, list[str]] | None = None) -> str:
    """Markdown: a row per arm, a column per metric that some arm has."""
    names = [n for n in names if any(c.get(n) is not None for c in columns.values())]
    extra = extra or {}
    rows = [
        [arm, *(cell(column, n) for n in names), *(v[i] for v in extra.values())]
        for i, (arm, column) in enumerate(columns.items())
    ]
    return markdown(["", *(HEADS[n] for n in names), *extra], rows)


def single(file: Path) -> str:
    """The table of one run and its references."""
    result = json.loads(file.read_text())
    about = f"`{result['command']}`: {result['iterations']} iterations, {result['seconds']:.0f} s."
    return f"### {file.stem}\n\n{about}\n\n{grid(result['columns'], HEADS)}"


def load(folder: Path) -> dict[str, list[dict]]:
    """The runs of a task by method, in the order of compare.py."""
    runs: dict[str, list[dict]] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        runs.setdefault(result["method"], []).append(result)
    order = ["clean", "diffem", "em-mmps", "emdiffusion", "ambient", "scsi", "start", "observed"]
    return {k: runs[k] for k in [*[m for m in order if m in runs], *sorted(set(runs) - set(order))]}


def averaged(results: list[dict], names: Iterable[str]) -> dict:
    """Mean and, of several seeds, standard deviation of metrics."""
    column: dict = {}
    for name in names:
        values = [r["metrics"][name] for r in results if r["metrics"].get(name) is not None]
        if values:
            column[name] = statistics.mean(values)
        if len(values) > 1:
            column[name + "_se"] = statistics.stdev(values)
    return column


def mean(results: list[dict], name: str) -> float:
    return statistics.mean(r[name] for r in results)


def per_iteration(results: list[dict]) -> str:
    """Seconds of an iteration after the first: an M-step, an E-step and the scores."""
    seconds = []
    for result in results:
        points = [p["seconds"] for p in result["curve"]][: result["iterations"] + 1]
        seconds += [b - a for a, b in itertools.pairwise(points[1:])]
    return f"{statistics.median(seconds):.0f}" if seconds else "–"


def comparison(folder: Path) -> str:
    """The table of a task."""
    runs = load(folder)
    columns = {f"{method} ({len(results)})": averaged(results, COMPARED) for method, results in runs.items()}
    extra = {
        "iterations": [f"{mean(r, 'iterations'):.0f}" for r in runs.values()],
        "evaluations [10⁶]": [f"{mean(r, 'evaluations') / 1e6:.2f}" for r in runs.values()],
        "seconds": [f"{mean(r, 'seconds'):.0f}" for r in runs.values()],
        "of them an iteration": [per_iteration(r) for r in runs.values()],
    }
    every = [r for results in runs.values() for r in results]
    budget = " or ".join(f"{b:,}" for b in sorted({r["budget"] for r in every}))
    seeds = " ".join(str(s) for s in sorted({r["seed"] for r in every}))
    about = (
        f"`python benchmarks/compare.py --tasks {folder.name} --seeds {seeds}`: a budget of {budget} evaluations; "
        "± is the standard deviation over seeds, whose number stands in brackets."
    )
    return f"### compared: {folder.name}\n\n{about}\n\n{grid(columns, COMPARED, extra)}"


def summary(folder: Path) -> str:
    """A task in the columns that decide, for the documentation."""
    runs = load(folder)
    distance = "to_curve" if folder.name == "manifold" else "frechet"
    names = ["crps", "ratio", distance, f"prior_{distance}", "recall", "coverage"]
    columns = {method: averaged(results, names) for method, results in runs.items()}
    closed = []
    for column in columns.values():
        gap = columns["start"]["crps"] - columns["clean"]["crps"] if {"start", "clean"} <= set(columns) else 0.0
        closed.append(f"{100 * (columns['start']['crps'] - column['crps']) / gap:.0f} %" if gap > 0 else "–")
    extra = {"of the way from start to clean": closed, "seconds": [f"{mean(r, 'seconds'):.0f}" for r in runs.values()]}
    return f"### {folder.name}\n\n{grid(columns, names, extra)}"


def patient(points: list[dict], patience: int) -> int:
    """The iteration that a run would have ended with, had `em.patience` not been 0; :class:`diffem.guard.Guard`'s rule."""
    stale = best = 0
    accepted = False
    for point in points[1:]:
        improved = point["best"] or (point["accepted"] and (not accepted or point["delta"] < 0))
        accepted |= point["accepted"]
        best = point["iteration"] if point["best"] else best
        stale = 0 if improved else stale + 1
        if stale == patience:
            if point["dispersion"]:
                break
            stale = 0
    return best


def lasting() -> str:
    """Of every long run: what it ends with, beside the best that it had on the way, and what patience would have saved."""
    heads = ["run", "method", "seed", "iterations", "ratio"]
    for name in ("CRPS", "energy distance", "Frechet"):
        heads += [f"{name}: start", "least (at)", "last"]
    heads += [f"saved with patience {patience} (share of the fall in CRPS)" for patience in PATIENCE]
    lines = []
    for folder in (f for f in compared() if f.name.endswith("-long")):
        runs = load(folder)
        for method, results in runs.items():
            for result in results if method not in ("start", "clean") else []:
                points = [p for p in result["curve"] if not p["calibrated"]]
                last = next(p for p in reversed(points) if p["best"])
                final = result["curve"][-1] if result["curve"][-1]["calibrated"] else last
                cells = [folder.name, method, str(result["seed"]), str(result["iterations"]), f"{final['ratio']:.2f}"]
                # only a watched run has scores of the same splits and draws from its start to what it ends with
                score = ("close_crps", final, 4) if "close_crps" in final else ("crps", last, 4)
                again = result.get("again")  # by other draws than chose what is the best
                for name, ended, digits in (score, ("energy_distance", final, 4), ("frechet", final, 1)):
                    values = {p["iteration"]: p[name] for p in points if name in p}
                    at = min(values, key=values.__getitem__)
                    if again:
                        shown = [again[str(look)][name] for look in (0, at, "last")]
                    else:
                        shown = [values[0], values[at], ended[name]]
                    cells += [f"{value:.{digits}f}" for value in shown]
                    cells[-2] += f" ({at})"
                origin = next(r for r in runs["start"] if r["seed"] == result["seed"])
                fall = origin["metrics"]["crps"] - result["metrics"]["crps"]  # of all held-out digits, several splits
                whole = points[patient(points, len(points))]["crps"]
                guarded = result["settings"].get("em.guard") != "false"
                for stop in (patient(points, patience) for patience in PATIENCE) if guarded else ():
                    share = f" ({1 - (points[stop]['crps'] - whole) / fall:.0%})" if fall > 1e-3 else ""
                    cells.append(f"{stop}{share}")
                lines.append(cells + ["–"] * (len(heads) - len(cells)))
    return "### long runs\n\n" + markdown(heads, lines) if lines else ""


def chosen(rows: list[dict]) -> int:
    """The iteration that the guard would have saved, patience included."""
    best = 0
    for row in rows[1:]:
        if row["guard"]["best"]:
            best = row["iteration"]
        if row["guard"]["over"]:
            break
    return best if best and rows[best]["guard"].get("outdoes", True) else 0


def turning() -> str:
    """Of every run of turning.py: clean-data distances of the chosen, the best and the last iteration."""
    heads = ["run", "seed", "chosen"]
    for name in ("energy distance", "Frechet"):
        heads += [f"{name}: best (at)", "chosen", "last"]
    lines = []
    for file in sorted((HERE / "results" / "turning").glob("*.json")):
        result = json.loads(file.read_text())
        rows = [row for row in result["rows"] if "of" not in row]
        cells = [result["task"], str(result["seed"]), str(chosen(rows))]
        for name, digits in (("energy_distance", 4), ("frechet", 1)):
            values = [row["clean"][name] for row in rows]
            best = values.index(min(values))
            shown = (values[best], values[chosen(rows)], values[-1])
            first, *others = (f"{value:.{digits}f}" for value in shown)
            cells += [f"{first} ({best})", *others]
        lines.append(cells)
    return "### quality that turns\n\n" + markdown(heads, lines) if lines else ""


def misspecified() -> str:
    """Of every case of misspecified.py: the effect, the mean of its seeds, and what noticed it, on how many of them."""
    heads = ["true", "assumed", "PSNR of the mean", "energy distance", "prior: energy distance"]
    heads += ["ratio, held out", "ratio, clean", "check", "diagnose"]
    names = (("psnr_mean", 2), ("energy_distance", 4), ("prior_energy_distance", 4), ("ratio", 2), ("clean_ratio", 2))
    cases: dict[str, list[dict]] = {}
    for file in sorted((HERE / "results" / "misspecified").glob("*.json")):
        cases.setdefault(file.stem.rsplit("-", 1)[0], []).append(json.loads(file.read_text()))
    lines = []
    for seeds in cases.values():
        true, assumed = seeds[0]["true"], seeds[0]["assumed"]
        cells = [f"{statistics.mean(seed[name] for seed in seeds):.{digits}f}" for name, digits in names]
        for name in ("check", "diagnose"):
            heard = Counter(re.split(r" \(|:|, by ", w)[0] for seed in seeds for w in seed[name])
            cells.append("; ".join(f"{words} ({count} of {len(seeds)})" for words, count in heard.items()) or "–")
        lines.append([true, "the same" if assumed == true else assumed, *cells])
    return "### wrong corruptions\n\n" + markdown(heads, lines) if lines else ""


def compared() -> list[Path]:
    return [folder for folder in sorted((HERE / "results" / "compare").glob("*")) if folder.is_dir()]


def pages() -> dict[Path, str]:
    """Every page with tables, and its text with the tables of today."""
    tables = {
        HERE / "README.md": [comparison(f) for f in compared()]
        + [single(f) for f in sorted((HERE / "results").glob("*.json"))],
        HERE.parent / "docs" / "which-method.md": [summary(f) for f in compared() if not f.name.endswith("-long")],
        HERE.parent / "docs" / "without-clean-data.md": [turning(), lasting(), misspecified()],
    }
    texts = {}
    for file, parts in tables.items():
        before, rest = file.read_text().split(BEGIN)
        texts[file] = before + BEGIN + "\n" + "\n".join(parts) + "\n" + END + rest.split(END)[1]
    return texts


def main() -> int:
    texts = pages()
    if "--check" in sys.argv:
        return int(any(text != file.read_text() for file, text in texts.items()))
    for file, text in texts.items():
        file.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
