"""Rebuilds the tables of benchmarks/README.md from benchmarks/results/*.json.

python benchmarks/table.py            rewrites what stands between the markers
python benchmarks/table.py --check    exit status 1 if that would change anything
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables: made by table.py -->\n", "<!-- end of tables -->"
HEADS = {
    "crps": "CRPS",
    "ratio": "ratio",
    "delta": "paired difference to the start",
    "frechet": "Frechet (classifier)",
    "accuracy": "accuracy of a draw",
    "to_curve": "draw to curve",
    "from_curve": "curve to draw",
    "residual": "residual / noise",
    "sinkhorn": "Sinkhorn",
    "energy_distance": "energy distance",
    "psnr": "PSNR (no objective)",
}


def cell(column: dict, name: str) -> str:
    if name not in column:
        return "–"
    value = (
        f"{column[name]:.2f}" if name in ("ratio", "frechet", "accuracy", "psnr", "residual") else f"{column[name]:.4f}"
    )
    return f"{value} ± {column[name + '_se']:.4f}" if name + "_se" in column else value


def tables() -> str:
    parts = []
    for file in sorted((HERE / "results").glob("*.json")):
        result = json.loads(file.read_text())
        columns = result["columns"]
        names = [n for n in HEADS if any(n in c for c in columns.values())]
        lines = [
            f"### {file.stem}",
            "",
            f"`{result['command']}`: {result['iterations']} iterations, {result['seconds']:.0f} s.",
            "",
        ]
        lines += ["| | " + " | ".join(HEADS[n] for n in names) + " |", "|---|" + "---|" * len(names)]
        lines += [f"| {arm} | " + " | ".join(cell(c, n) for n in names) + " |" for arm, c in columns.items()]
        parts.append("\n".join(lines) + "\n")
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
