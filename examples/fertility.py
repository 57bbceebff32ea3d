"""Two tables with missing cells: births per woman by country and year (statsmodels), and diabetes (scikit-learn).

Of the births, 52 years of 200 countries, a gap of ten years is hidden in half of the countries; of the diabetes table,
30 % of the cells. `python examples/fertility.py`: about two minutes on one core.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from gallery import DRAWS, coverage, interval, rmse, save, write
from sklearn.datasets import load_diabetes
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer
from sklearn.linear_model import BayesianRidge

import diffem

GAP = 10  # years


def births() -> pd.DataFrame:
    """Births per woman, a row for each country of which something is known, a column for each year."""
    try:
        from statsmodels.datasets import fertility
    except ImportError:
        sys.exit("statsmodels: not found; pip install 'diffem-torch[benchmarks]'")
    data = fertility.load_pandas().data.set_index("Country Name")
    return (
        data.drop(columns=["Country Code", "Indicator Name", "Indicator Code"])
        .dropna(how="all")
        .dropna(axis=1, how="all")
    )


def gaps(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A gap of ten years in half of the rows."""
    rows, years = shape
    begin = rng.integers(0, years - GAP + 1, (rows, 1))
    year = np.arange(years)
    return (rng.random((rows, 1)) < 0.5) & (year >= begin) & (year < begin + GAP)


def study(table: pd.DataFrame, hide: np.ndarray, rivals: dict) -> tuple[dict, dict, list]:
    """RMSE by method and coverage on the hidden cells that are known; the filled tables, and draws."""
    hidden = hide & table.notna().to_numpy()
    seen = table.mask(hidden)
    imputer = diffem.DiffEMImputer(random_state=0)
    filled = {"diffem": imputer.fit_transform(seen)} | {name: fill(seen) for name, fill in rivals.items()}
    truth = table.to_numpy()[hidden]
    draws = np.stack([one.to_numpy() for one in imputer.sample(seen, n=DRAWS)])
    errors = {name: rmse(np.asarray(a)[hidden] - truth) for name, a in filled.items()}
    return errors, {"diffem": coverage(draws[:, hidden], truth)}, [seen, filled, draws, hidden]


def main() -> None:
    rng = np.random.default_rng(0)
    usual = {
        "IterativeImputer": lambda t: IterativeImputer(BayesianRidge(), random_state=0).fit_transform(t),
        "KNNImputer": lambda t: KNNImputer().fit_transform(t),
    }
    over_time = {"linear in time": lambda t: t.interpolate(axis=1, limit_direction="both")}
    table = births()
    errors, covered, (seen, filled, draws, hidden) = study(table, gaps(table.shape, rng), usual | over_time)
    diabetes = load_diabetes(as_frame=True, scaled=False).data
    diabetes = (diabetes - diabetes.mean()) / diabetes.std()
    others, also, _ = study(diabetes, rng.random(diabetes.shape) < 0.3, usual)
    figures = {
        "RMSE, births per woman": errors,
        "coverage of 90 % intervals, births": covered,
        "RMSE, diabetes [standard deviations]": others,
        "coverage of 90 % intervals, diabetes": also,
    }

    # the countries whose hidden years are farthest from a straight line
    bend = np.where(hidden, np.abs(np.asarray(filled["linear in time"]) - table.to_numpy()), 0).max(1)
    low, high = interval(draws)
    figure, axes = plt.subplots(2, 3, figsize=(9, 4.6), sharex=True, layout="constrained")
    years = table.columns.astype(int)
    for ax, i in zip(axes.flat, np.argsort(-bend)[:18:3], strict=True):
        gap = np.flatnonzero(hidden[i])
        wide = np.arange(max(gap[0] - 1, 0), min(gap[-1] + 2, len(years)))
        ax.fill_between(years[wide], low[i, wide], high[i, wide], color="tab:orange", alpha=0.3, label="90 % interval")
        ax.plot(years, seen.iloc[i], "k.", ms=3, label="known")
        ax.plot(years[gap], table.iloc[i, gap], "o", color="0.5", mfc="none", ms=4, label="hidden")
        ax.plot(years[wide], filled["diffem"].iloc[i, wide], color="tab:orange", label="diffem")
        ax.plot(years[wide], filled["IterativeImputer"][i, wide], color="tab:blue", lw=1, label="IterativeImputer")
        ax.set_title(table.index[i], fontsize=9)
    axes[0, 0].legend(fontsize=7)
    figure.supylabel("births per woman", fontsize=9)
    save("fertility", figure)
    write("fertility", figures, observations=len(table), hidden=int(hidden.sum()))


if __name__ == "__main__":
    main()
