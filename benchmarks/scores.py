"""The columns that any run has: the scores of its own metrics.jsonl, which need no clean data.

python benchmarks/scores.py runs/fashion-mask75 --out benchmarks/results/fashion-mask75.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="a JSON file; printed otherwise")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()]
    start, last = rows[0], next(row for row in reversed(rows) if row["accepted"])
    columns = {
        name: {"crps": row["score"], "crps_se": row["score_se"], "ratio": row["ratio"]}
        for name, row in (("start", start), ("diffem", last))
    }
    columns["diffem"] |= {"delta": last["start_delta"], "delta_se": last["start_delta_se"]}
    prior = arguments.run / "prior.json"
    seconds = sum(row["seconds"] for row in rows) + (json.loads(prior.read_text())["seconds"] if prior.exists() else 0)
    result = {
        "command": f"diffem train {arguments.run.name}; python benchmarks/scores.py",
        "seconds": seconds,
        "iterations": sum(row["loss"] is not None for row in rows),
        "columns": columns,
    }
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
