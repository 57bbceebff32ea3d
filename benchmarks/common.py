"""What the benchmarks share: their arguments, the columns of a score, the cost of a run, and how a result is kept."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffem.diagnostics import Score


def parse(description: str | None, bound: bool = True) -> argparse.Namespace:
    """The arguments `run`, `--out` and, if there is such a column, `--bound`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    if bound:
        parser.add_argument("--bound", type=Path, help="a run of benchmarks/bound.py on the same preset")
    parser.add_argument("--out", type=Path, help="a JSON file; printed otherwise")
    return parser.parse_args()


def rows(run: Path) -> list[dict]:
    """The metrics of a run: the start, the iterations, and perhaps a last E-step without a loss."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scored(current: Score, first: Score | None) -> dict[str, float | None]:
    """The columns of a score, and of its paired difference to the start's."""
    column = {"crps": current.mean, "crps_se": current.standard_error, "ratio": current.ratio}
    if first is not None:
        column["delta"], column["delta_se"] = current.difference(first)
    return column


def publish(arguments: argparse.Namespace, script: str, columns: dict[str, dict], **more: float) -> None:
    """Prints the result and writes it to `--out`: the command, what the run cost, and the columns."""
    metrics, prior = rows(arguments.run), arguments.run / "prior.json"
    iterations = [row for row in metrics if row["loss"] is not None]
    result = {
        "command": f"diffem train {arguments.run.name}; python benchmarks/{script}",
        "seconds": sum(row["seconds"] for row in metrics)
        + (json.loads(prior.read_text())["seconds"] if prior.exists() else 0),
        "iterations": len(iterations),
        "accepted": sum(row["accepted"] for row in iterations),
        **more,
        "columns": columns,
    }
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)
