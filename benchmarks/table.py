"""Rebuilds the tables of benchmarks/README.md and of docs/ from benchmarks/results.

python benchmarks/table.py            rewrites the text between the markers
python benchmarks/table.py --check    exit status 1 if that would change anything
"""

from __future__ import annotations

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
FINE = ("crps", "delta", "energy_distance", "to_curve", "from_curve", "sinkhorn", "prior_to_curve", "prior_from_curve")
# the most informative columns of a comparison, to keep the table readable
COMPARED = [
    "crps",
    "ratio",
    "psnr_mean",
    "psnr_classical",
    "frechet",
    "energy_distance",
    "accuracy",
    "to_curve",
    "sinkhorn",
]
COMPARED += ["prior_frechet", "prior_to_curve"]
ORDER = ["start", "diffem", "lambda1", "paper", "scsi", "scsi+weights", "em-mmps", "emdiffusion", "ambient"]
ORDER += ["splitting", "splitting-deepinv", "observed", "clean"]


def number(name: str, value: float) -> str:
    return f"{value:.4f}" if name in FINE else f"{value:.2f}"


def cell(column: dict, name: str) -> str:
    if column.get(name) is None:
        return "–"
    spread = f" ± {number(name, column[name + '_se'])}" if name + "_se" in column else ""
    return number(name, column[name]) + spread


def markdown(heads: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
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
    return {k: runs[k] for k in [*[m for m in ORDER if m in runs], *sorted(set(runs) - set(ORDER))]}


def averaged(results: list[dict], names: Iterable[str]) -> dict:
    """Mean and, for several seeds, standard deviation of metrics."""
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


def way(columns: dict[str, dict], name: str) -> list[str]:
    """How far each method gets from the start (0 %) to the network trained on clean data (100 %), in a metric."""
    if not {"start", "clean"} <= set(columns) or name not in columns["clean"]:
        return []
    start, clean = columns["start"][name], columns["clean"][name]
    gap = start - clean
    return [f"{100 * (start - c[name]) / gap:.0f} %" if name in c and gap > 0 else "–" for c in columns.values()]


SAME = 1e-3  # relative difference of equal scores


def reached(runs: dict[str, list[dict]]) -> list[str]:
    """Evaluations until the validation CRPS equals that of plain EM (lambda 1) at the end of its budget, in units of
    that budget; the mean over seeds. Only runs whose start has the same score are compared: the versions of diffem
    differ in the parts that they hide."""
    goals = {r["seed"]: (_iterations(r)[0], _iterations(r)[-1]) for r in runs.get("lambda1", [])}
    cells = []
    for results in runs.values():
        shares: list[float | None] = []
        for result in (r for r in results if r["seed"] in goals and r["curve"]):
            first, goal = goals[result["seed"]]
            if abs(_iterations(result)[0]["crps"] / first["crps"] - 1) > SAME:
                continue
            point = next((p for p in _iterations(result) if p["crps"] <= goal["crps"]), None)
            shares.append(point and point["evaluations"] / goal["evaluations"])
        known = [share for share in shares if share is not None]
        text = "–" if not shares else "never" if not known else f"{statistics.mean(known):.2f}"
        cells.append(text + (f" ({len(known)} of {len(shares)})" if 0 < len(known) < len(shares) else ""))
    return cells if goals else []


def _iterations(result: dict) -> list[dict]:
    """The points of a curve that are scored on the same observations: all but that of the final model."""
    return [p for p in result["curve"] if not p["last"]]


def columns_of(runs: dict[str, list[dict]], names: list[str]) -> tuple[dict[str, dict], dict[str, list[str]]]:
    """The metrics by method, and columns computed from them."""
    columns = {method: averaged(results, names) for method, results in runs.items()}
    extra = {"of the way in CRPS": way(columns, "crps")}
    extra |= {f"in {HEADS[n]}": way(columns, n) for n in ("frechet", "energy_distance") if n in names}
    extra["evaluations to plain EM's CRPS"] = reached(runs)
    return columns, {k: v for k, v in extra.items() if v}


def comparison(folder: Path) -> str:
    """The table of a task."""
    runs = load(folder)
    columns, extra = columns_of(runs, COMPARED)
    columns = {f"{method} ({len(runs[method])})": column for method, column in columns.items()}
    extra |= {
        "iterations": [f"{mean(r, 'iterations'):.0f}" for r in runs.values()],
        "evaluations [10⁶]": [f"{mean(r, 'evaluations') / 1e6:.2f}" for r in runs.values()],
        "seconds": [f"{mean(r, 'seconds'):.0f}" for r in runs.values()],
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
    """The most important columns of a task, for the documentation."""
    runs = load(folder)
    names = ["crps", "ratio", "psnr_mean", "to_curve" if folder.name == "manifold" else "frechet", "energy_distance"]
    columns, extra = columns_of(runs, names)
    return f"### {folder.name}\n\n{grid(columns, names, extra)}"


EVIDENCE = {
    "digits-mask75-long": "digits, 75 % missing",
    "digits-mask90-long": "digits, 90 % missing",
    "fashion-mask75": "garments, 75 % missing",
    "cifar10-mask75": "CIFAR-10, 75 % missing",
}


def evidence() -> str:
    """The main results in one table."""
    methods = ["start", "diffem", "clean"]
    heads = [
        "",
        *(f"CRPS: {m}" for m in methods),
        "ratio",
        *(f"PSNR of the mean: {m}" for m in [*methods, "splitting"]),
    ]
    lines = []
    for task, words in EVIDENCE.items():
        runs = load(HERE / "results" / "compare" / task)
        if "diffem" not in runs:
            continue
        columns = {m: averaged(r, ["crps", "ratio", "psnr_mean"]) for m, r in runs.items()}
        of = lambda m, n, digits, c=columns: f"{c[m][n]:.{digits}f}" if n in c.get(m, {}) else "–"  # noqa: E731
        cells = [*(of(m, "crps", 3) for m in methods), of("diffem", "ratio", 2)]
        lines.append([words, *cells, *(of(m, "psnr_mean", 1) for m in [*methods, "splitting"])])
    return markdown(heads, lines)


def chosen(rows: list[dict]) -> int:
    """The iteration that the selection keeps."""
    return next(row["iteration"] for row in reversed(rows) if row["best"])


def turning() -> str:
    """For every run of turning.py: distances to clean data of the chosen, the best and the last iteration."""
    heads = ["run", "seed", "chosen"]
    for name in ("energy distance", "Frechet"):
        heads += [f"{name}: best (at)", "chosen", "last"]
    lines = []
    for file in sorted((HERE / "results" / "turning").glob("*.json")):
        result = json.loads(file.read_text())
        rows = [row for row in result["rows"] if "final" not in row]
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
    """For every case of misspecified.py: the mean effect over seeds, and what detected it, on how many seeds."""
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
            heard = Counter(re.split(r" \(|:|, by | by \d", w)[0] for seed in seeds for w in seed[name])
            cells.append("; ".join(f"{words} ({count} of {len(seeds)})" for words, count in heard.items()) or "–")
        lines.append([true, "the same" if assumed == true else assumed, *cells])
    return "### wrong corruptions\n\n" + markdown(heads, lines) if lines else ""


KEPT = {"lambda1": "kept", "lambda01": "0.003", "no-split": "kept", "detached": "kept", "times": "Beta(3, 1.5)"}
KEPT |= {"all-split": "20 passes", "whole": "kept", "plain": "kept", "fewer": "as they were", "refresh": "a setting"}
KEPT |= {"pure": "a setting", "renoise4": "two", "momentum": "not built in", "formula": "a setting"}


def ablation() -> str:
    """The benefit of each mechanism: differences from the loop as it is, means over seeds and their standard errors."""
    files = sorted((HERE / "results" / "ablation").glob("*.json"))
    if not files:
        return ""
    from ablation import ARMS

    tasks: dict[str, list[dict]] = {}
    for file in files:
        result = json.loads(file.read_text())
        tasks.setdefault(result["task"], []).append(result["arms"])
    lines = []
    for name, change in ARMS.items():
        cells = [change.what]
        for seeds in tasks.values():
            pairs = [(arms["default"], arms[name]) for arms in seeds if name in arms and "default" in arms]
            for metric in ("crps", "energy_distance"):
                if not pairs:
                    cells.append("–")
                elif name == "default":
                    cells.append(f"{statistics.mean(b[metric] for _, b in pairs):.4f}")
                else:
                    apart = [b[metric] - a[metric] for a, b in pairs]
                    error = f" ± {statistics.stdev(apart) / len(apart) ** 0.5:.4f}" if len(apart) > 1 else ""
                    cells.append(f"{statistics.mean(apart):+.4f}{error}")
        lines.append([*cells, "" if name == "default" else KEPT.get(name, "deleted")])
    heads = ["", *(f"{task}: {metric}" for task in tasks for metric in ("CRPS", "energy distance")), "what was done"]
    about = (
        "`python benchmarks/ablation.py`: differences to the loop as it is, at equal evaluations, on seeds that no comparison "
        "reports; ± is the standard error over seeds. Seed 11 drew every E-step from pure noise."
    )
    return f"### ablation\n\n{about}\n\n{markdown(heads, lines)}"


# the authors' JAX code on the paper's U-Net at batch 8 and on two cores, over a bare loop of PyTorch in float32 beside it
AUTHORS = {"m_step": 4.0 / 7.5, "e_step": 21.0 / 21.8}


def throughput() -> str:
    """For every network and variant of throughput.py: rates, and their ratios to those of bare loops."""
    heads = ["network, batch", "arithmetic"]
    for step, unit in (("M-step", "images/s"), ("E-step", "evaluations/s")):
        heads += [f"{step}: {unit}", "of a bare loop", "of float32", "of the matrix rate", "of the authors' code"]
    heads += ["memory of an update [GB]", "first calls [s]"]
    lines, about = [], ""
    for result in _throughputs("device", "variants"):
        for variant, row in result["variants"].items():
            cells = [f"{result['network']}, {result['batch']}", variant]
            for step in ("m_step", "e_step"):
                cells += [f"{row[step]:,.0f}" if row[step] > 20 else f"{row[step]:.1f}"]
                cells += [_within(row.get(f"{step}_{of}")) for of in ("of_bare", "gain", "of_matrix")]
                comparable = result["network"] == "cifar10" and result["batch"] == 8
                bare = row.get(f"{step}_of_bare_float32") if comparable else None
                cells += [_within(bare and [value / AUTHORS[step] for value in bare])]
            memory = row["memory_gb"]
            lines.append([*cells, "–" if memory is None else f"{memory:.2f}", f"{row['startup_seconds']:.0f}"])
        about = f"{result['device']}, {result['threads']} thread{'s' * (result['threads'] > 1)}"
    if not lines:
        return ""
    words = (
        f"`throughput.py` says what was timed; {about}. ± is the standard error of a median. The authors' code is scaled by a "
        "bare loop in float32, beside which it was measured elsewhere."
    )
    return f"### throughput\n\n{words}\n\n{markdown(heads, lines)}"


def processes() -> str:
    """How much faster several processes are than one."""
    heads = ["network, batch", "processes", "M-step", "E-step"]
    lines = [
        [f"{r['network']}, {r['batch']}", str(r["processes"]), _within(r["m_step"]), _within(r["e_step"])]
        for r in _throughputs("processes")
    ]
    about = "How many times as fast as one process of one thread; on two cores."
    return f"### several processes\n\n{about}\n\n{markdown(heads, lines)}" if lines else ""


def scaling() -> str:
    """The memory of a run on few and on many observations."""
    results = [json.loads(f.read_text()) for f in sorted((HERE / "results" / "scaling").glob("*.json"))]
    results.sort(key=lambda result: (result["kind"], result["items"]))
    if not results:
        return ""
    heads = ["", *(f"{result['kind']}, {result['items']:,}" for result in results)]
    lines = [
        [steps[0]["step"], *(f"{step['resident']:,} ({step['anonymous']:,})" for step in steps)]
        for steps in zip(*(result["steps"] for result in results), strict=True)
    ]
    words = (
        "The peak of resident memory in MB, and in brackets without pages of files, for observations of 3 x 32 x 32; "
        "`scaling.py` says what was measured."
    )
    return f"### memory\n\n{words}\n\n{markdown(heads, lines)}"


def _throughputs(*keys: str) -> list[dict]:
    results = [json.loads(f.read_text()) for f in sorted((HERE / "results" / "throughput").glob("*.json"))]
    return [result for result in results if all(key in result for key in keys)]


def _within(value: list[float] | None) -> str:
    return f"{value[0]:.2f} ± {value[1]:.2f}" if value else "–"


ITERATION = 70 * 60  # seconds of one GPU that the paper gives for an iteration on CIFAR-10
LINK = 2e11  # bytes per second at which gradients are added up among eight GPUs: an assumption
FULL = {"cifar10-mask75": ("CIFAR-10", 50_000, 32), "celeba-mask50": ("CelebA", 202_599, 64)}


def computed() -> str:
    """The cost of the paper's runs, from their operations and an assumed rate."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from diffem.config import load_config
    from diffem.samplers import trained_kind

    heads = ["", "items", "operations per evaluation [10⁹]", "updates", "evaluations in E-steps [10⁶]"]
    heads += ["operations [10¹⁸]", "one GPU [hours]", "eight GPUs [hours]"]
    lines, rate = [], 0.0
    for preset, (name, n, side) in FULL.items():
        config = load_config(preset)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            inputs = [
                torch.zeros(1, channels, side, side) for channels in (3, 3, 3, 1)
            ]  # x_t, y, mask, whether y is given
            network = config.network.build((3, side, side), [tuple(v.shape[1:]) for v in inputs])
            network(inputs, torch.zeros(1))
        one, weights = counter.get_total_flops(), sum(p.numel() for p in network.parameters())
        full, later = (trained_kind(config.sampler).evaluations(config.sampler, renoised) for renoised in (False, True))
        update, iterations = 3 * config.m_step.batch * one, config.em.iterations
        updates = config.m_step.first_steps + (iterations - 1) * config.m_step.steps
        evaluations = n * (2 * full + (iterations - 1) * later)  # the first E-step, the final draws, and those between
        rate = rate or (config.m_step.steps * update + n * full * one) / ITERATION  # of the first row
        work = updates * update + evaluations * one
        adding = updates * 2 * 4 * weights / LINK
        hours = (work / rate / 3600, (work / rate / 8 + adding) / 3600)
        cells = [f"{n:,}", f"{one / 1e9:.1f}", f"{updates:,}", f"{evaluations / 1e6:,.0f}", f"{work / 1e18:.1f}"]
        lines.append([name, *cells, *(f"{h:.0f}" for h in hours)])
    about = f"Computed, not measured, for a GPU that makes {rate / 1e12:.0f} · 10¹² operations per second."
    return f"### full size (computed)\n\n{about}\n\n{markdown(heads, lines)}"


TABLES = {
    "cancer": "breast cancer (scikit-learn)",
    "wine": "wine (scikit-learn)",
    "iris": "iris (scikit-learn)",
    "fair": "fair (statsmodels)",
    "income": "income and ratio, simulated",
    "cancer-block": "breast cancer, a third of the columns missing together",
}


def imputers() -> str:
    """For every table of tables.py: the error, the accuracy and the coverage of each imputer, means over seeds."""
    heads = ["table", "imputer", "RMSE [standard deviations]", "accuracy of categories", "coverage of 90 % intervals"]
    lines = []
    for name, words in TABLES.items():
        files = sorted((HERE / "results" / "tables").glob(f"{name}-[0-9]*.json"))
        seeds = [json.loads(file.read_text())["methods"] for file in files]
        label = f"{words} ({len(seeds)})"
        for method in seeds[0] if seeds else ():
            rows = [seed[method] for seed in seeds]
            accuracy = [statistics.mean(row["accuracy"].values()) for row in rows if row["accuracy"]]
            shown = [_spread([row["rmse_mean"] for row in rows], 3), _spread(accuracy, 2)]
            shown += [_spread([row["coverage"] for row in rows if "coverage" in row], 2)]
            lines.append([label, method, *shown])
            label = ""
    return markdown(heads, lines) if lines else ""


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    error = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{error}"


def own_data() -> str:
    """For every case of own_data.py: errors and coverage of a run."""
    heads = ["case", "RMSE: diffem", "the usual method", "spread of the data", "spread of the draws"]
    heads += ["coverage of 95 % intervals", "what the run says", "seconds"]
    lines = []
    for file in sorted((HERE / "results" / "own_data").glob("*.json")):
        r = json.loads(file.read_text())
        said = "–" if r["said"] is None else f"{r['said']:.3f}"
        cells = [f"{r['rmse']:.3g}", f"{r['usual']:.3g} ({r['usual_name']})", f"{r['spread_of_data']:.3g}"]
        lines.append([r["case"], *cells, f"{r['claimed']:.3g}", f"{r['coverage']:.3f}", said, f"{r['seconds']}"])
    words = "`python benchmarks/own_data.py`: each is one run; the script says what the cases are. Units are those of the data."
    return f"### own data\n\n{words}\n\n{markdown(heads, lines)}" if lines else ""


def photographs() -> str:
    """The photographs of photons.py."""
    file = HERE / "results" / "photons" / "photographs.json"
    if not file.exists():
        return ""
    r = json.loads(file.read_text())
    deciles = ", ".join(f"{share:.2f}" for share in r["coverage_by_decile"])
    words = f"`{r['command']}`: PSNR in dB. Of the 90 % intervals {r['coverage']:.2f} hold the truth; by brightness, from dark to bright: {deciles}."
    return f"### photographs with few photons\n\n{words}\n\n{markdown(list(r['psnr']), [[f'{v:.2f}' for v in r['psnr'].values()]])}"


GALLERY = ("digits", "winds", "mri", "hubble", "fertility", "co2")


def gallery() -> str:
    """The figures of the scripts in examples/: a row for each figure, diffem and the methods beside it."""
    heads, lines = ["example", "figure", "diffem", "beside it", "seconds"], []
    for name in GALLERY:
        file = HERE / "results" / "gallery" / f"{name}.json"
        result = json.loads(file.read_text()) if file.exists() else {"figures": {}}
        for i, (figure, values) in enumerate(result["figures"].items()):
            others = "; ".join(f"{method} {value:.3g}" for method, value in values.items() if method != "diffem")
            first = [f"[{name}.py](../examples/{name}.py)", f"{result['seconds']}"] if i == 0 else ["", ""]
            lines.append([first[0], figure, f"{values['diffem']:.3g}", others or "–", first[1]])
    return markdown(heads, lines)


def compared() -> list[Path]:
    return [folder for folder in sorted((HERE / "results" / "compare").glob("*")) if folder.is_dir()]


def pages() -> dict[Path, str]:
    """Every page with tables, and its text with the current tables."""
    tables = {
        HERE / "README.md": [ablation(), throughput(), processes(), own_data(), photographs()]
        + [comparison(f) for f in compared()]
        + [single(f) for f in sorted((HERE / "results").glob("*.json")) if f.stem != "chaos"],
        HERE.parent / "README.md": [evidence()],
        HERE.parent / "docs" / "which-method.md": [summary(f) for f in compared() if not f.name.endswith("-long")],
        HERE.parent / "docs" / "gallery.md": [gallery()],
        HERE.parent / "docs" / "tables.md": [imputers()],
        HERE.parent / "docs" / "cost.md": [scaling(), processes(), computed()],
        HERE.parent / "docs" / "wrong-corruptions.md": [turning(), misspecified()],
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
