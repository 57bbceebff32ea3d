"""Tables: CSV (and TSV) and Parquet with named columns of numbers. Written as CSV under the same names.

y is float64, which holds both whole numbers and missing cells (NaN). Columns of text are refused by name, unless
`--columns` leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffem.errors import DiffemError, optional, suggest

from .source import Block, File, Options, Shape, plausible

ROWS = 16384  # read at a time
SHOWN = 8  # columns listed in an error
EXACT = 2**53  # float64 represents whole numbers exactly up to this


def read(path: Path, name: str, options: Options) -> File:
    """The rows of a table."""
    chosen = None if options.columns is None else [word.strip() for word in options.columns.split(",")]
    count, kinds = 0, {}
    for frame in _frames(path, name, chosen):
        count += len(frame)
        kinds = {column: kinds.get(column, set()) | _kinds(frame[column]) for column in frame}
        _refuse_text(name, frame, kinds)
        if wide := [c for c in frame if kinds[c] == {"i"} and frame[c].notna().any() and frame[c].abs().max() > EXACT]:
            raise DiffemError(
                f"{name}: column {wide[0]!r} holds whole numbers beyond 2^53, not told apart; leave it out"
            )
    if not count:
        raise DiffemError(f"{name}: holds no rows")
    columns = {str(column): _one(kind) for column, kind in kinds.items()}

    def blocks() -> Iterator[Block]:
        for frame in _frames(path, name, chosen):
            yield {"y": np.stack([frame[column].to_numpy(float, na_value=np.nan) for column in frame], 1)}

    return File(name, [(count, (len(columns),))], np.dtype(float), blocks, about={"columns": columns})


def _frames(path: Path, name: str, chosen: list[str] | None) -> Iterator[Any]:
    """The rows of the chosen columns, as data frames that can hold missing whole numbers."""
    return (_parquet if path.suffix.lower() == ".parquet" else _csv)(path, name, chosen)


def _csv(path: Path, name: str, chosen: list[str] | None) -> Iterator[Any]:
    pandas, comma = optional("pandas", "tables"), "\t" if path.suffix.lower() == ".tsv" else ","
    _refuse_unknown(name, chosen, list(pandas.read_csv(path, sep=comma, nrows=0, compression=None).columns))
    frames = pandas.read_csv(
        path,
        sep=comma,
        index_col=False,
        usecols=chosen,
        chunksize=ROWS,
        dtype_backend="numpy_nullable",
        float_precision="round_trip",
        compression=None,
    )
    for frame in frames:
        yield frame if chosen is None else frame[chosen]


def _parquet(path: Path, name: str, chosen: list[str] | None) -> Iterator[Any]:
    pandas, parquet = optional("pandas", "tables"), optional("pyarrow.parquet", "tables")
    with parquet.ParquetFile(path) as file:
        _refuse_unknown(name, chosen, file.schema_arrow.names)
        shape = (file.metadata.num_rows, len(file.schema_arrow.names))
        plausible(name, shape, np.dtype(float), path.stat().st_size)
        for batch in file.iter_batches(ROWS, columns=chosen):
            frame = batch.to_pandas(types_mapper=pandas.ArrowDtype)
            yield frame if chosen is None else frame[chosen]


def _refuse_unknown(name: str, chosen: list[str] | None, columns: list[str]) -> None:
    for word in chosen or ():
        if word not in columns:
            raise DiffemError(f"{name}: --columns: has no column {word!r};{suggest(word, columns)}")


def _kinds(column: Any) -> set[str]:
    """What a column holds in these rows: b (booleans), i (whole numbers), f (floats), t (other); {} if all missing."""
    types = optional("pandas", "tables").api.types
    if not column.notna().any():
        return set()
    if types.is_bool_dtype(column.dtype):
        return {"b"}
    if types.is_integer_dtype(column.dtype):
        return {"i"}
    return {"f"} if types.is_float_dtype(column.dtype) else {"t"}


def _one(kinds: set[str]) -> str:
    return kinds.pop() if len(kinds) == 1 else "f"


def _refuse_text(name: str, frame: Any, kinds: dict[str, set[str]]) -> None:
    for column, kind in kinds.items():
        if "t" in kind:
            values = frame[column].dropna()
            text = values[optional("pandas", "tables").to_numeric(values.astype(str), errors="coerce").isna()]
            fine = [str(other) for other in kinds if "t" not in kinds[other]]
            some = ",".join(fine[:SHOWN]) + (",..." if len(fine) > SHOWN else "") or "NAMES"
            example = str((text if len(text) else values).iloc[0])
            raise DiffemError(
                f"{name}: column {column!r} holds {example!r}, not numbers; leave it out: --columns {some}"
            )


def refuse(kind: str, shape: Shape, dtype: np.dtype) -> None:
    """Raises a DiffemError if items of `shape` cannot be written."""
    if len(shape) != 1:
        raise DiffemError(f"--as {kind}: is for rows of a table; the items have shape {shape}")
    optional("pandas", "tables")


def write(kind: str, path: Path, items: Iterable[np.ndarray], about: dict[str, Any]) -> None:
    """Writes rows under the names of the columns; columns of whole numbers and booleans are written as such."""
    pandas, header = optional("pandas", "tables"), True
    for rows in _together(items):
        columns = about.get("columns") or {f"column {k + 1}": "f" for k in range(rows.shape[1])}
        with np.errstate(over="ignore"):
            single = rows.astype(np.float32)
        exact = np.array_equal(rows, single, equal_nan=True)  # then no digits are written that mean nothing
        frame = pandas.DataFrame(single if exact else rows, columns=list(columns))
        for column, holds in columns.items() if about["whole"] else ():
            if holds == "i":
                frame[column] = frame[column].round().astype("Int64")
            elif holds == "b":
                frame[column] = (frame[column] > 0.5).astype("boolean").where(frame[column].notna())
        frame.to_csv(path, mode="w" if header else "a", header=header, index=False)
        header = False


def _together(items: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    rows: list[np.ndarray] = []
    for row in items:
        rows.append(row)
        if len(rows) == ROWS:
            yield np.stack(rows)
            rows = []
    if rows:
        yield np.stack(rows)
