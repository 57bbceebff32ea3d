"""Tables with missing cells: DiffEM as an imputer of scikit-learn.

A row is an observation. A numeric column is one feature, scaled by its spread. A categorical column is one-hot encoded:
a group of features, one for each level, that are missing together. Missing cells are a mask (:class:`diffem.Mask`); the
masks of the rows determine which cells are hidden in training.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data  # type: ignore[missing-module-attribute]
from torch import Tensor

from diffem import seeding
from diffem.config import load_config
from diffem.corruptions import Mask
from diffem.data import Observations
from diffem.data.observations import LEAST_HELD_OUT
from diffem.em import DiffEM
from diffem.errors import DiffemError
from diffem.posterior import Posterior, from_pretrained
from diffem.samplers import DiffusionSampler, MixtureSampler

FIT = 100  # the least number of rows per component of the mixture that a run starts from
MOST_LEVELS = 20  # of a categorical column; more are allowed if each is found twice on average
NORMAL = 1.349  # interquartile range of the standard normal distribution


class Cells(Mask):
    """The mask of a table: the features of a cell are missing, and hidden, together.

    Arguments:
        noise: Standard deviation of the noise.
        widths: The number of features of each cell of a row.
    """

    def __init__(self, noise: float, widths: Sequence[int]) -> None:
        super().__init__(noise)
        self.widths = tuple(widths)

    def hidden(self, mask: Tensor, generator: torch.Generator) -> Tensor:
        cells = super().hidden(mask[:, : len(self.widths)], generator)
        return cells.repeat_interleave(torch.tensor(self.widths, device=cells.device), 1)


@dataclass(frozen=True)
class Column:
    """Converts a column of a table to features, and back.

    Attributes:
        label: Its name in error messages.
        levels: The levels of a categorical column; None for numbers.
        whole: Whether the numbers are integers.
        low: The smallest observed number.
        high: The largest observed number.
        centre: The median.
        spread: The unit of the feature: a standard deviation that is robust to a few outliers.
    """

    label: str
    levels: list | None = None
    whole: bool = False
    low: float = 0.0
    high: float = 0.0
    centre: float = 0.0
    spread: float = 1.0

    @classmethod
    def learn(cls, label: str, values: np.ndarray, categorical: bool, whole: bool) -> Column:
        """The column with these observed values, of which there must be at least one."""
        if categorical:
            levels = sorted(set(values.tolist()), key=str)
            if len(levels) > max(MOST_LEVELS, len(values) // 2):
                raise DiffemError(
                    f"{label}: holds {len(levels)} different texts in {len(values)} rows; drop a column of names or identifiers"
                )
            return cls(label, levels)
        first, middle, third = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        spread = min(float(values.std()), (third - first) / NORMAL if first < third else np.inf)
        return cls(label, None, whole, float(values.min()), float(values.max()), middle, spread)

    @property
    def width(self) -> int:
        """The number of features; 0 for a constant column, which needs no model."""
        if self.levels is not None:
            return len(self.levels) if len(self.levels) > 1 else 0
        return int(self.low < self.high)

    def encode(self, values: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Features (n, width) of values (n,); NaN where they were not observed."""
        features = np.full((len(values), self.width), np.nan)
        if self.levels is None:
            if self.width:
                features[:, 0] = (values - self.centre) / self.spread
            return features
        known = {level: k for k, level in enumerate(self.levels)}
        found = values[seen].tolist()
        if unknown := [v for v in found if v not in known]:
            raise DiffemError(
                f"{self.label}: holds {unknown[0]!r}, which fit did not see; make it missing, or fit again"
            )
        if self.width:
            features[seen] = np.eye(self.width)[[known[v] for v in found]]
        return features

    def decode(self, features: np.ndarray) -> np.ndarray:
        """Values (n,) of features (n, width): the level with the largest feature, or a number."""
        if self.levels is not None:
            best = features.argmax(1).tolist() if self.width else [0] * len(features)
            found = np.empty(len(best), object)
            found[:] = [self.levels[k] for k in best]
            return found
        values = features[:, 0] * self.spread + self.centre if self.width else np.full(len(features), self.low)
        return values.round().clip(self.low, self.high) if self.whole else values


class DiffEMImputer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Imputes the missing cells of a table by DiffEM; an imputer of scikit-learn.

    A table is an array or a pandas DataFrame, with at least 8 rows to fit. NaN, None and pandas.NA are missing. Text,
    booleans and pandas' categories are categorical; imputed integers are whole numbers within the observed range. The
    result has the form of the input: columns, dtypes, index. Observed cells are not changed.

    Arguments:
        categorical: Numeric columns to treat as categorical: names, or positions.
        integer: Float columns that hold integers: with missing cells, numpy and pandas store integers as floats.
        noise: Standard deviation of the measurement noise, in units of each column's spread.
        settings: Settings of the run, {"section.field": value}, that override the preset `table`.
        random_state: A seed, a numpy RandomState, or None for a new seed at each fit.
        run_folder: Where the run is kept, and resumed if it was interrupted. A temporary folder by default.

    Attributes:
        posterior_: The :class:`diffem.Posterior` of features; None if all columns are constant.
        columns_: The :class:`Column` learned for each column.
        n_features_in_, feature_names_in_: As in scikit-learn.
    """

    def __init__(
        self,
        *,
        categorical: Sequence[str | int] | None = None,
        integer: Sequence[str | int] | None = None,
        noise: float = 0.01,
        settings: Mapping[str, object] | None = None,
        random_state: int | np.random.RandomState | None = None,
        run_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.categorical, self.integer, self.noise = categorical, integer, noise
        self.settings, self.random_state, self.run_folder = settings, random_state, run_folder

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()  # type: ignore[missing-attribute]
        tags.input_tags.allow_nan = tags.input_tags.categorical = tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def fit(self, X: Any, y: object = None) -> DiffEMImputer:
        """Learns from a table X, shape (rows, columns).

        Raises:
            DiffemError: If a column cannot be read, or has no observed cell; the message names the column.
        """
        table = _Table(self, X, fit=True)
        categorical, integer = (self._positions(name, table) for name in ("categorical", "integer"))
        self.columns_ = [table.learn(j, j in categorical, j in integer) for j in range(table.width)]
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        features, observed = self._encode(table)
        some = observed.any(1)  # a row without observed cells carries no information
        self.posterior_ = self._learn(features[some], observed[some]) if features.shape[1] else None
        return self

    def transform(self, X: Any) -> Any:
        """X with missing cells imputed by the posterior mean, or by the most probable level of a categorical column."""
        check_is_fitted(self)
        table = _Table(self, X)
        features, observed = self._encode(table)
        rows = table.incomplete
        if self.posterior_ is not None and len(rows):
            features[rows] = mean(self.posterior_, features[rows], observed[rows])
        return self._fill(table, features)

    def sample(self, X: Any, n: int = 10) -> list:
        """Multiple imputation: n copies of X whose missing cells are imputed by draws from the posterior.

        A row without any observed cell becomes a new row. The same X gives the same draws; a larger n only adds draws.
        """
        check_is_fitted(self)
        if n < 1:
            raise DiffemError(f"n: must be at least 1, got {n}")
        table = _Table(self, X)
        features, observed = self._encode(table)
        rows, drawn = table.incomplete, [features] * n
        if self.posterior_ is not None and len(rows):
            seeds = seeding.item_seeds(self.seed_, 0, "user", rows)
            y = features[rows].astype(np.float32)
            drawn = [features.copy() for _ in range(n)]
            for j, copy in enumerate(drawn):  # not n draws of one call: the rules for pooling need independent ones
                copy[rows] = self.posterior_.sample(y, {"mask": observed[rows]}, seeds=seeding.again(seeds, j))[0]
        return [self._fill(table, each) for each in drawn]

    def _positions(self, name: str, table: _Table) -> set[int]:
        """The positions of the columns named by the argument `name`."""
        found = set()
        for column in getattr(self, name) or ():
            if column in table.names:
                found.add(table.names.index(column))
            elif isinstance(column, int | np.integer) and 0 <= column < table.width:
                found.add(int(column))
            else:
                raise DiffemError(f"{name}: {column!r} is not a column of the table; they are {table.names}")
        return found

    def _encode(self, table: _Table) -> tuple[np.ndarray, np.ndarray]:
        """Features (rows, d), and which of them were observed."""
        parts = [c.encode(*table.read(j, c.levels is not None)) for j, c in enumerate(self.columns_)]
        features = np.concatenate(parts, 1)
        return features, ~np.isnan(features)

    def _fill(self, table: _Table, features: np.ndarray) -> Any:
        """The table with missing cells decoded from the features."""
        parts = np.split(features, np.cumsum([c.width for c in self.columns_])[:-1], 1)
        return table.filled([column.decode(part) for column, part in zip(self.columns_, parts, strict=True)])

    def _learn(self, features: np.ndarray, observed: np.ndarray) -> Posterior:
        corruption = Cells(self.noise, [c.width for c in self.columns_ if c.width])
        components = [k for k in (1, 2, 4) if k == 1 or len(features) >= FIT * k]
        settings = {"em.seed": self.seed_, "start.components": components, **(self.settings or {})}
        observations = Observations(features.astype(np.float32), corruption, {"mask": observed}, source="table")
        with contextlib.ExitStack() as stack:
            folder = self.run_folder or stack.enter_context(tempfile.TemporaryDirectory())
            for _ in DiffEM(load_config("table", settings), observations, folder).iterate():
                pass
            return from_pretrained(os.path.join(folder, "posterior"), corruption=corruption)


def mean(posterior: Posterior, y: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """E[x | y] in one evaluation: E[x | x_t, y] at the largest noise level, where x_t carries no information.

    Arguments:
        posterior: A posterior that was trained on masks.
        y: Observations (B, d), in their units.
        mask: True where y was observed, (B, d).
    """
    sampler, found = posterior.sampler, []
    assert isinstance(sampler, DiffusionSampler | MixtureSampler)
    for rows in np.array_split(np.arange(len(y)), -(-len(y) // posterior.batch)):
        params = {"mask": torch.as_tensor(mask[rows])}
        scaled = torch.where(params["mask"], posterior.units.scale(torch.as_tensor(y[rows])).float(), 0.0)
        with torch.no_grad():
            if isinstance(sampler, MixtureSampler):
                x = sampler.prior.posterior(sampler.corruption.likelihood(scaled, params)).mean
            else:
                sigma = torch.full((len(rows),), sampler.denoiser.config.sigma_max)
                x = sampler.denoiser(torch.zeros_like(scaled), sigma, scaled, params)
        found.append(posterior.units.restore(x.double()).numpy())
    return np.concatenate(found)


class _Table:
    """An array or a pandas DataFrame, read column by column, and returned in the same form.

    Arguments:
        imputer: The imputer; it stores the column names in fit, and checks them later, as scikit-learn requires.
        X: The array or DataFrame.
        fit: Whether it is called by fit.

    Attributes:
        seen: Which cells were observed, (rows, columns).
    """

    def __init__(self, imputer: DiffEMImputer, X: Any, fit: bool = False) -> None:
        least = 2 * LEAST_HELD_OUT if fit else 1
        array = validate_data(imputer, X, reset=fit, dtype=None, ensure_all_finite=False, ensure_min_samples=least)
        self.width = array.shape[1]
        self.names = list(getattr(imputer, "feature_names_in_", range(self.width)))
        self.whole = X if hasattr(X, "iloc") else array
        self.columns = [self.whole.iloc[:, j] if hasattr(X, "iloc") else array[:, j] for j in range(self.width)]
        self.seen = np.stack([~_missing(column) for column in self.columns], 1)

    @property
    def incomplete(self) -> np.ndarray:
        """The rows with missing cells."""
        return np.flatnonzero(~self.seen.all(1))

    def label(self, j: int) -> str:
        """The name of column j in error messages."""
        return f"column {self.names[j]!r}"

    def learn(self, j: int, categorical: bool, whole: bool) -> Column:
        """Learns column j; `categorical` and `whole` are what the user stated."""
        label, kind = self.label(j), self.columns[j].dtype.kind
        if not self.seen[:, j].any():
            raise DiffemError(f"{label}: no row shows it, so it cannot be learned; remove it")
        if kind not in "biufOUT":
            raise DiffemError(f"{label}: holds {self.columns[j].dtype}; give numbers or categories")
        shown = self._objects(j)[self.seen[:, j]].tolist()
        text = not all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in shown)
        if categorical or text or getattr(self.columns[j].dtype, "name", "") == "category":
            if whole:
                raise DiffemError(f"integer: {label} holds categories; name it in one of integer and categorical only")
            categorical = True
        values, seen = self.read(j, categorical)
        return Column.learn(label, values[seen], categorical, whole or all(isinstance(v, int) for v in shown))

    def read(self, j: int, categorical: bool) -> tuple[np.ndarray, np.ndarray]:
        """The values of column j, objects or float64 with NaN, and which of them were observed."""
        seen, values = self.seen[:, j], self._objects(j)
        if categorical:
            if strange := [v for v in values[seen] if isinstance(v, list | dict | set | np.ndarray)]:
                raise DiffemError(f"{self.label(j)}: holds {strange[0]!r}; a category is text or a number")
            return values, seen
        numbers = np.full(len(values), np.nan)
        try:
            numbers[seen] = values[seen].astype(np.float64)
        except (TypeError, ValueError):
            raise DiffemError(f"{self.label(j)}: holds what is not a number, where fit saw numbers") from None
        if np.isinf(numbers).any():
            raise DiffemError(f"{self.label(j)}: holds an infinity; make it missing, or remove its row")
        return numbers, seen

    def _objects(self, j: int) -> np.ndarray:
        column = self.columns[j]
        return column.to_numpy(object) if hasattr(column, "iloc") else column.astype(object)

    def filled(self, values: list[np.ndarray]) -> Any:
        """A copy whose missing cells are taken from `values`, (rows,) for each column."""
        out = self.whole.copy()
        for j, column in enumerate(self.columns):
            rows = np.flatnonzero(~self.seen[:, j])
            if len(rows):
                fill = values[j][rows]
                if column.dtype.kind in "iuf":
                    fill = fill.astype(column.dtype.type)  # also of pandas' nullable dtypes
                if hasattr(column, "iloc"):
                    column = column.copy()
                    column.iloc[rows] = fill
                    out.isetitem(j, column)
                else:
                    out[rows, j] = fill
        return out


def _missing(column: Any) -> np.ndarray:
    """Which entries of an array or a Series (n,) are missing."""
    if hasattr(column, "isna"):
        return column.isna().to_numpy()
    if column.dtype.kind == "f":
        return np.isnan(column)
    if column.dtype.kind != "O":
        return np.zeros(len(column), bool)
    absent = lambda v: v is None or type(v).__name__ == "NAType" or (isinstance(v, float) and v != v)  # noqa: E731
    return np.array([absent(v) for v in column.tolist()], bool)
