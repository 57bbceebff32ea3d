"""The figures of the report: pictures of items, curves over iterations, and calibration; for light and dark mode."""

from __future__ import annotations

import base64
import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from diffem import files
from diffem.diagnostics.scores import OVER_CONFIDENT, UNDER_CONFIDENT

Row = dict[str, Any]
Pictures = Mapping[str, NDArray]
Tile = NDArray  # uint8, (height, width, 3)
Figure = dict[str, Any]  # caption, alt (its alternative text) and versions (data URIs, the light one first)

ITEMS, DRAWS, SAMPLES = 8, 3, 64  # the largest numbers that a picture shows
LARGEST = 192  # the largest side of an image in a grid, in pixels; larger images are averaged down
HEAVY = 1_000_000  # bytes; a larger picture is drawn in light mode only, and used for both
UNOBSERVED = (178, 198, 226)


@dataclass(frozen=True)
class Theme:
    page: str
    text: str
    muted: str
    grid: str
    main: str
    refused: str
    chosen: str


LIGHT = Theme("#ffffff", "#1f2328", "#8b949e", "#d8dee4", "#0969da", "#cf222e", "#bf5b04")
DARK = Theme("#161b22", "#e6edf3", "#7d8590", "#30363d", "#58a6ff", "#ff7b72", "#f2a33a")
THEMES = (LIGHT, DARK)


def finite(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        return None
    return float(value)


def uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# Pictures of images


def image_grid(
    file: str | Path | IO[bytes],
    rows: Sequence[Sequence[Tile | None]],
    headings: Sequence[str] = (),
    theme: Theme = LIGHT,
) -> None:
    """Saves a grid of images as a PNG; small images are enlarged by an integer factor, so that pixels stay sharp.

    Arguments:
        file: Where to.
        rows: Rows of uint8 images (height, width, 3); None leaves a place empty. An image that is smaller than the
            largest is stretched to its size.
        headings: One per column, or none.
        theme: The colours of text and ground.
    """
    from PIL import Image, ImageDraw, ImageFont

    tiles = [tile for row in rows for tile in row if tile is not None]
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    side, target = max(height, width), 88 if headings else 56
    if side > LARGEST:
        factor = LARGEST / side
        height, width = max(1, round(height * factor)), max(1, round(width * factor))
    else:
        factor = math.ceil(target / side)
        height, width = height * factor, width * factor
    gap, top = 4, 24 if headings else 0
    font = ImageFont.load_default(13)
    cell = max([width, *(math.ceil(font.getlength(heading)) + 4 for heading in headings)])
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (gap + columns * (cell + gap), gap + top + len(rows) * (height + gap)), theme.page)
    pen = ImageDraw.Draw(grid)
    for column, heading in enumerate(headings):
        pen.text(
            (gap + column * (cell + gap) + cell // 2, gap + top // 2), heading, fill=theme.text, font=font, anchor="mm"
        )
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if tile is not None:
                how = Image.Resampling.BOX if max(tile.shape[:2]) > LARGEST else Image.Resampling.NEAREST
                image = Image.fromarray(np.ascontiguousarray(tile)).resize((width, height), how)
                grid.paste(image, (gap + j * (cell + gap) + (cell - width) // 2, gap + top + i * (height + gap)))
    grid.save(file, format="PNG", optimize=True)


def _plane(x: NDArray) -> NDArray:
    """One item as (1 or 3, height, width): the middle slice of a volume; the first two or four channels side by side,
    if they are not colours."""
    while x.ndim > 3:
        x = x[:, x.shape[1] // 2]
    return x if len(x) in (1, 3) else np.block([[*x[:2]], [*x[2:4]]] if len(x) > 3 else [[*x]])[None]


def shown(shape: tuple[int, ...]) -> str:
    """A sentence on which part of an item the pictures show; empty if they show all of it."""
    parts = ["The middle slice of each volume."] if len(shape) > 3 else []
    if shape[0] not in (1, 3):
        some = f"All {shape[0]}" if shape[0] <= 4 else f"The first 4 of {shape[0]}"
        parts.append(f"{some} channels side by side.")
    return " ".join(parts)


def _tile(x: NDArray, low: float, high: float) -> Tile:
    x = np.nan_to_num(np.clip((_plane(x).astype(np.float64) - low) / (high - low), 0, 1))
    return np.broadcast_to(np.rint(255 * x).astype(np.uint8).transpose(1, 2, 0), (*x.shape[1:], 3))


def _observation_tile(y: NDArray, seen: NDArray, low: float, high: float) -> Tile:
    seen = _plane(np.broadcast_to(seen, y.shape))
    plane = np.where(seen, _plane(y), (low + high) / 2)
    tile = _tile(plane, low, high).copy()
    tile[~seen.any(axis=0)] = UNOBSERVED
    return tile


def _std_tile(std: NDArray, high: float) -> Tile:
    import matplotlib

    plane = np.nan_to_num(_plane(std).astype(np.float64)).mean(axis=0)
    return matplotlib.colormaps["magma"](np.clip(plane / high, 0, 1), bytes=True)[..., :3]


def seen_entries(pictures: Pictures) -> NDArray:
    """True where y was observed, in the shape of y."""
    seen = np.isfinite(pictures["y"])
    return seen & pictures["mask"].astype(bool) if "mask" in pictures else seen


def _limits(pictures: Pictures) -> tuple[float, float]:
    values = pictures["range"] if "range" in pictures else np.percentile(np.nan_to_num(pictures["draws"]), (0.5, 99.5))
    low, high = float(values[0]), float(values[-1])
    return (low, high) if low < high else (low - 1, low + 1)


def std_limit(pictures: Pictures) -> float:
    top = max(float(np.nan_to_num(_plane(std)).mean(axis=0).max()) for std in pictures["std"][:ITEMS])
    return top if top > 0 else 1.0


def _image_columns(pictures: Pictures) -> dict[str, list[Tile]]:
    n, (low, high) = min(len(pictures["mean"]), ITEMS), _limits(pictures)
    dimensions = pictures["mean"].ndim

    def tiles(items: NDArray) -> list[Tile]:
        return [_tile(item, low, high) for item in items[:n]]

    columns: dict[str, list[Tile]] = {}
    if "y" in pictures and pictures["y"].ndim == dimensions:
        seen = seen_entries(pictures)
        columns["observation"] = [_observation_tile(pictures["y"][i], seen[i], low, high) for i in range(n)]
    if "start" in pictures:
        columns["start draw"] = tiles(pictures["start"])
    for k in range(min(DRAWS, pictures["draws"].shape[1])):
        columns[f"draw {k + 1}"] = tiles(pictures["draws"][:, k])
    columns["mean"] = tiles(pictures["mean"])
    columns["std. dev."] = [_std_tile(std, std_limit(pictures)) for std in pictures["std"][:n]]
    if "clean" in pictures:
        columns["clean"] = tiles(pictures["clean"])
    return columns


# Figures by matplotlib


@contextlib.contextmanager
def _figure(
    file: str | Path | IO[bytes], theme: Theme, width: float, height: float, format: str = "png"
) -> Iterator[Any]:
    """A figure in the colours of a theme, which is saved at the end; the global state of pyplot is not used."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    style = {
        "axes.axisbelow": True,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": theme.text,
        "axes.prop_cycle": cycler(color=[theme.main, theme.chosen, theme.refused]),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": theme.text,
        "axes.titlesize": 10,
        "figure.facecolor": theme.page,
        "font.size": 10,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "legend.labelcolor": theme.text,
        "savefig.facecolor": theme.page,
        "svg.hashsalt": "diffem",
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(file, format=format, dpi=120, metadata={"Date": None} if format == "svg" else None)


def _scatter(file: str | Path | IO[bytes], clouds: Mapping[str, NDArray], theme: Theme) -> None:
    """Clouds of vectors, (points, features), the first underneath: coordinate 1 against 2, and against 3."""
    features = next(iter(clouds.values())).shape[1]
    colours = {"start draws": theme.muted, "draws": theme.main, "samples": theme.main, "clean": theme.chosen}
    others = list(range(1, min(features, 3)))
    with _figure(file, theme, 4.2 * max(1, len(others)), 3.9) as figure:
        for axes, other in zip(np.ravel(figure.subplots(1, max(1, len(others)))), others or [None], strict=True):
            for name, points in clouds.items():
                points = points[np.isfinite(points).all(axis=1)][:4000]
                if not len(points):
                    continue
                if other is None:
                    axes.hist(
                        points[:, 0],
                        bins=30,
                        density=True,
                        histtype="step",
                        color=colours[name],
                        label=name,
                        linewidth=1.5,
                    )
                else:
                    size = 6 if len(points) > 500 else 14
                    axes.scatter(
                        points[:, 0], points[:, other], s=size, color=colours[name], alpha=0.6, linewidths=0, label=name
                    )
            axes.set_xlabel("coordinate 1")
            axes.set_ylabel("density" if other is None else f"coordinate {other + 1}")
        handles, labels = axes.get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=len(clouds), markerscale=2)
        for handle in legend.legend_handles:
            handle.set_alpha(1)


def _signals(file: str | Path | IO[bytes], pictures: Pictures, theme: Theme) -> None:
    """Signals (channels, length): the mean with a band of two standard deviations, one row per item."""
    mean, std = pictures["mean"], pictures["std"]
    n, channels, length = min(len(mean), 6), min(mean.shape[1], 3), mean.shape[2]
    time = np.arange(length)
    seen = seen_entries(pictures) if "y" in pictures and pictures["y"].shape[1:] == mean.shape[1:] else None
    with _figure(file, theme, max(7, 3.6 * channels), 0.5 + 1.5 * n) as figure:
        grid = figure.subplots(n, channels, squeeze=False, sharex=True)
        for i in range(n):
            for c in range(channels):
                axes, m, s = grid[i, c], mean[i, c], std[i, c]
                if "start" in pictures:
                    axes.plot(time, pictures["start"][i, c], color=theme.muted, linewidth=0.8, label="start draw")
                axes.fill_between(
                    time, m - 2 * s, m + 2 * s, color=theme.main, alpha=0.25, linewidth=0, label="mean ± 2 std. dev."
                )
                axes.plot(time, m, color=theme.main, linewidth=1.4, label="mean")
                if "clean" in pictures:
                    axes.plot(
                        time, pictures["clean"][i, c], color=theme.chosen, linewidth=1, linestyle="--", label="clean"
                    )
                if seen is not None:
                    where = seen[i, c]
                    axes.plot(
                        time[where], pictures["y"][i, c][where], ".", color=theme.text, markersize=4, label="observed"
                    )
                if i == 0 and channels > 1:
                    axes.set_title(f"channel {c + 1}")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=5)


def _signal_samples(file: str | Path | IO[bytes], samples: NDArray, theme: Theme) -> None:
    columns = min(len(samples), 3)
    k = min(len(samples) // columns * columns, 12)
    with _figure(file, theme, 8, 0.3 + 1.4 * k // columns) as figure:
        grid = figure.subplots(k // columns, columns, squeeze=False, sharex=True, sharey=True)
        for i, axes in enumerate(np.ravel(grid)):
            axes.plot(samples[i, :3].T, linewidth=1)


def draw(folder: Path, pictures: Pictures) -> dict[str, list[bytes]]:
    """Writes the pictures as PNG files into the run folder, and returns their bytes for each theme."""
    mean, samples = pictures["mean"], pictures.get("samples")
    dimensions = mean.ndim - 1
    if samples is not None and not len(samples):
        samples = None
    drawn: dict[str, list[bytes]] = {"reconstructions": [], "samples": []}
    flat = {"start draws": pictures["start"]} if "start" in pictures else {}
    clean = {"clean": pictures["clean"]} if "clean" in pictures else {}
    columns = _image_columns(pictures) if dimensions >= 3 else {}
    rows = list(zip(*columns.values(), strict=True))
    across = 16 if dimensions < 3 or max(_plane(mean[0]).shape) <= 64 else 8
    for theme in THEMES:
        first, second = io.BytesIO(), io.BytesIO()
        if dimensions >= 3:
            image_grid(first, rows, list(columns), theme)
            if samples is not None:
                tiles = [_tile(sample, *_limits(pictures)) for sample in samples[:SAMPLES]]
                image_grid(second, [tiles[k : k + across] for k in range(0, len(tiles), across)], (), theme)
        elif dimensions == 2:
            _signals(first, pictures, theme)
            if samples is not None:
                _signal_samples(second, samples, theme)
        else:
            draws = pictures["draws"]
            _scatter(first, {**flat, "draws": draws.reshape(-1, draws.shape[-1]), **clean}, theme)
            if samples is not None:
                _scatter(second, {**flat, "samples": samples, **clean}, theme)
        for name, picture in (("reconstructions", first.getvalue()), ("samples", second.getvalue())):
            if picture and (theme is LIGHT or len(picture) <= HEAVY):
                drawn[name].append(picture)
    for name, versions in drawn.items():
        if versions:
            files.replace(folder / f"{name}.png", versions[0])
    return drawn


# Figures for the page


def _themed(plot: Callable[[Any, Theme], None], width: float, height: float) -> list[str]:
    """The figure that `plot` draws, as SVG for each theme."""
    versions = []
    for theme in THEMES:
        buffer = io.BytesIO()
        with _figure(buffer, theme, width, height, "svg") as figure:
            plot(figure, theme)
        versions.append(uri(buffer.getvalue(), "image/svg+xml"))
    return versions


def curves(rows: Sequence[Row], chosen: int, score_name: str) -> list[Figure]:
    """A curve over the iterations for each quantity in the rows; `chosen` is the iteration whose model is saved."""
    name = f"{score_name[:1].upper()}{score_name[1:]}"
    wanted = [
        (
            "score",
            score_name,
            f"{name} of held-out observations, lower is better; band: ± one standard error. The table of a finished run is of test observations",
        ),
        (
            "criterion",
            "criterion",
            "Criterion of held-out observations, lower is better: log CRPS + half the log score; it chooses the iteration",
        ),
        (
            "ratio",
            "calibration ratio",
            f"Calibration ratio; band: ± one standard error of its logarithm; shaded: {OVER_CONFIDENT} to {UNDER_CONFIDENT}, "
            "honest uncertainty",
        ),
        ("loss", "loss", "Training loss"),
    ]
    drawn = []
    for key, label, caption in wanted:
        known = [row for row in rows if finite(row, key) is not None]
        if not known or (key == "criterion" and finite(known[0], "ratio") is None):  # for a black box it is the score
            continue
        versions = _themed(lambda figure, theme: _curve(figure, theme, known, key, label, chosen), 4.2, 2.9)  # noqa: B023
        ends = [f"{known[k][key]:.4g} at iteration {known[k]['iteration']}" for k in (0, -1)]
        marked = f"; iteration {chosen} was chosen" if any(row["iteration"] == chosen for row in known) else ""
        alt = f"Curve of the {label} from {ends[0]} to {ends[1]}{marked}"
        drawn.append({"caption": caption, "alt": alt, "versions": versions})
    return drawn


def _curve(figure: Any, theme: Theme, rows: Sequence[Row], key: str, label: str, saved: int) -> None:
    axes = figure.subplots()
    x, y = (np.array([finite(row, name) for row in rows], dtype=float) for name in ("iteration", key))
    error = np.array([finite(row, f"{key}_se") or 0.0 for row in rows])
    low, high = (y * np.exp(-error), y * np.exp(error)) if key == "ratio" else (y - error, y + error)
    if len(rows) > 1 and error.any():
        axes.fill_between(x, low, high, color=theme.main, alpha=0.18, linewidth=0)
    elif error.any():
        axes.errorbar(x, y, (y - low, high - y), color=theme.main, capsize=4)
    if key == "ratio":
        axes.axhspan(OVER_CONFIDENT, UNDER_CONFIDENT, color=theme.muted, alpha=0.15, linewidth=0)
        axes.axhline(1, color=theme.muted, linewidth=0.8, linestyle="--")
        axes.set_ylim(max(0, min(0.5, low.min() - 0.1)), max(1.5, high.max() + 0.1))
    axes.plot(x, y, color=theme.main, linewidth=1, alpha=0.6, zorder=2)
    chosen = np.array([row["iteration"] == saved for row in rows])
    accepted = np.array([bool(row.get("accepted")) for row in rows])
    refused = {"color": theme.refused, "markerfacecolor": theme.page}
    marks = (
        ("accepted", accepted & ~chosen, "o", 5, {"color": theme.main}),
        ("refused", ~accepted & ~chosen, "X", 7, refused),
        ("chosen", chosen, "*", 13, {"color": theme.chosen}),
    )
    for name, which, marker, size, colours in marks:
        if which.any():
            axes.plot(x[which], y[which], marker, markersize=size, label=name, zorder=3, **colours)
    axes.set_xlabel("iteration (0: the start)" if x[0] == 0 else "iteration")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(rows) == 1:
        axes.set_xlim(x[0] - 1, x[0] + 1)
        axes.set_xticks(x)
    figure.legend(loc="outside upper right", ncols=3)


def coverage_curve(ranks: NDArray) -> tuple[NDArray, NDArray]:
    """Levels of the central intervals that leave out 0, 1, ... ranks at either end, and the shares of entries
    inside."""
    out = np.arange((len(ranks) + 1) // 2)
    inside = np.array([ranks[k : len(ranks) - k].sum() for k in out])
    return 1 - 2 * out / len(ranks), inside / ranks.sum()


def calibration(diagnostics: Mapping[str, Any]) -> Figure | None:
    """Coverage against nominal levels and the histogram of ranks, from `diffem diagnose`; None without coverage."""
    found = diagnostics.get("coverage")
    if not found:
        return None
    ranks = np.array(found["ranks"], dtype=float)
    levels, shares = coverage_curve(ranks)
    tarp = diagnostics.get("self_consistency", {}).get("tarp")

    def plot(figure: Any, theme: Theme) -> None:
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color=theme.muted, linewidth=0.8, linestyle="--", label="ideal")
        left.plot(levels, shares, color=theme.main, linewidth=1.2, alpha=0.7)
        errors = 2 * np.array(found["errors"])
        left.errorbar(
            found["levels"],
            found["shares"],
            errors,
            fmt="o",
            color=theme.main,
            capsize=3,
            markersize=5,
            label="held out",
        )
        if tarp:
            left.plot(tarp["levels"], tarp["coverage"], color=theme.chosen, linewidth=1.2, label="simulated (TARP)")
        left.set(xlabel="nominal coverage", ylabel="empirical coverage", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        left.legend(loc="upper left")
        right.bar(np.arange(len(ranks)), ranks / ranks.mean(), width=1, color=theme.main, alpha=0.6, linewidth=0)
        right.axhline(1, color=theme.muted, linewidth=0.8, linestyle="--")
        right.set(xlabel=f"rank among {len(ranks) - 1} draws", ylabel="entries, over what is expected")

    hits = [
        f"{level:.0%} intervals hold {share:.0%}" for level, share in zip(found["levels"], found["shares"], strict=True)
    ]
    return {
        "caption": f"Left: how many of the hidden entries of {found['observations']} held-out observations lie within central "
        "intervals of their draws, ± two standard errors; below the diagonal is over-confident. Right: the ranks of the entries "
        "among their draws; flat is calibrated, heaped at both ends over-confident, in the middle under-confident",
        "alt": f"Calibration: {', '.join(hits)} of the hidden entries",
        "versions": _themed(plot, 8.4, 3.4),
    }
