"""The columns of any run from its own metrics.jsonl, and distances to its clean data if it made its own observations.

python benchmarks/images.py runs/fashion-mask75 --out benchmarks/results/fashion-mask75.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffem.evaluation import evaluate
from diffem.observations import Observations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="a JSON file; printed otherwise")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if row["accepted"])
    folder = arguments.run / "observations"
    clean = evaluate(arguments.run, folder / "clean.npy", Observations.load(folder))
    columns = {}
    for name, row, distances in (("start", rows[0], clean["start"]), ("diffem", last, clean["reconstructions"])):
        columns[name] = {"crps": row["score"], "crps_se": row["score_se"], "ratio": row["ratio"]}
        if row is not rows[0]:
            columns[name] |= {"delta": row["start_delta"], "delta_se": row["start_delta_se"]}
        columns[name] |= {k: distances[k] for k in ("energy_distance", "residual", "psnr")}
    columns["prior samples"] = {"energy_distance": clean["prior"]["energy_distance"]}
    prior = arguments.run / "prior.json"
    seconds = sum(row["seconds"] for row in rows) + (json.loads(prior.read_text())["seconds"] if prior.exists() else 0)
    result = {
        "command": f"diffem train {arguments.run.name}; python benchmarks/images.py",
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
