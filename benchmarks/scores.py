"""The columns that any run has: the scores of its own metrics.jsonl, which need no clean data.

python benchmarks/scores.py runs/fashion-mask75 --out benchmarks/results/fashion-mask75.json
"""

from __future__ import annotations

from common import parse, publish, rows


def main() -> None:
    arguments = parse(__doc__, bound=False)
    metrics = rows(arguments.run)
    arms = {"start": metrics[0], "diffem": next(row for row in reversed(metrics) if row["accepted"])}
    names = {
        "crps": "score",
        "crps_se": "score_se",
        "ratio": "ratio",
        "delta": "start_delta",
        "delta_se": "start_delta_se",
    }
    columns = {arm: {k: row[name] for k, name in names.items() if row[name] is not None} for arm, row in arms.items()}
    publish(arguments, "scores.py", columns)


if __name__ == "__main__":
    main()
