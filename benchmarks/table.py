"""Rebuilds the tables of benchmarks/README.md from benchmarks/results.

python benchmarks/table.py            rewrites what stands between the markers
python benchmarks/table.py --check    exit status 1 if that would change anything
"""

from __future__ import annotations

import json
import statistics
import sys
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
FINE = ("crps", "delta", "energy_distance", "to_curve", "from_curve", "sinkhorn", "prior_to_curve", "prior_from_curve")
# of a comparison: what says most, so that a table can be read
COMPARED = [n for n in HEADS if n not in ("delta", "residual", "psnr_classical")]


def number(name: str, value: float) -> str:
    return f"{value:.4f}" if name in FINE else f"{value:.2f}"


def cell(column: dict, name: str) -> str:
    if column.get(name) is None:
        return "–"
    spread = f" ± {number(name, column[name + '_se'])}" if name + "_se" in column else ""
    return number(name, column[name]) + spread


def grid(columns: dict[str, dict], names: Iterable[str], extra: dict[str, list[str]] | None = None) -> str:
    """Markdown: a row per arm, a column per metric that some arm has."""
    names = [n for n in names if any(c.get(n) is not None for c in columns.values())]
    extra = extra or {}
    lines = ["| | " + " | ".join([HEADS[n] for n in names] + list(extra)) + " |"]
    lines += ["|---|" + "---|" * (len(names) + len(extra))]
    for i, (arm, column) in enumerate(columns.items()):
        lines.append(
            f"| {arm} | " + " | ".join([cell(column, n) for n in names] + [v[i] for v in extra.values()]) + " |"
        )
    return "\n".join(lines) + "\n"


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


def comparison(folder: Path) -> str:
    """The table of a task: mean and standard deviation over seeds."""
    runs = load(folder)
    columns: dict[str, dict] = {}
    seconds, evaluations, iterations = [], [], []
    for method, results in runs.items():
        column: dict = {}
        for name in COMPARED:
            values = [r["metrics"][name] for r in results if r["metrics"].get(name) is not None]
            if values:
                column[name] = statistics.mean(values)
                if len(values) > 1:
                    column[name + "_se"] = statistics.stdev(values)
                else:
                    column.pop(name + "_se", None)
        columns[f"{method} ({len(results)})"] = column
        seconds.append(f"{statistics.mean(r['seconds'] for r in results):.0f}")
        evaluations.append(f"{statistics.mean(r['evaluations'] for r in results) / 1e6:.2f}")
        iterations.append(f"{statistics.mean(r['iterations'] for r in results):.0f}")
    extra = {"iterations": iterations, "evaluations [10⁶]": evaluations, "seconds": seconds}
    budget = {r["budget"] for results in runs.values() for r in results}
    seeds = sorted({r["seed"] for results in runs.values() for r in results})
    command = f"python benchmarks/compare.py --tasks {folder.name} --seeds {' '.join(map(str, seeds))}"
    about = f"`{command}`: a budget of {' or '.join(f'{b:,}' for b in sorted(budget))} evaluations; ± is the standard deviation over seeds (their number in brackets)."
    return f"### compared: {folder.name}\n\n{about}\n\n{grid(columns, COMPARED, extra)}"


def tables() -> str:
    parts = [comparison(folder) for folder in sorted((HERE / "results" / "compare").glob("*")) if folder.is_dir()]
    parts += [single(file) for file in sorted((HERE / "results").glob("*.json"))]
    return "\n".join(parts)


def main() -> int:
    file = HERE / "README.md"
    before, rest = file.read_text().split(BEGIN)
    text = before + BEGIN + "\n" + tables() + "\n" + END + rest.split(END)[1]
    if "--check" in sys.argv:
        return int(text != file.read_text())
    file.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
