"""Tables: scikit-learn's interface, forms in and out, categories, and the posterior of a Gaussian table against its formula."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks

from diffem import DiffemError, DiffEMImputer
from diffem.tables import Cells, Column

TINY = {
    "network.width": 8,
    "network.depth": 1,
    "em.iterations": 1,
    "m_step.steps": 2,
    "m_step.first_steps": 2,
    "sampler.steps": 2,
    "start.ranks": [1],
    "start.components": [1],
    "start.iterations": 3,
}


def tiny(**arguments) -> DiffEMImputer:
    return DiffEMImputer(settings=TINY, random_state=0, **arguments)


def people(rows: int = 60) -> pd.DataFrame:
    """One column of each kind, with gaps."""
    rng = np.random.default_rng(0)
    index = [f"row {i}" for i in range(rows)]
    table = pd.DataFrame({"height": rng.normal(170, 10, rows)}, index=index)
    table["weight"] = (table["height"] - 100 + rng.normal(0, 8, rows)).astype("float32")
    table["children"] = pd.array(rng.integers(0, 4, rows), dtype="Int64")
    table["visits"] = rng.integers(1, 9, rows).astype(float)
    table["town"] = rng.choice(["Ulm", "Bonn", "Kiel"], rows)
    table["grade"] = pd.Categorical(rng.choice(["low", "high"], rows), ["low", "middle", "high"], ordered=True)
    table["smokes"] = rng.choice([True, False], rows).astype(object)
    table["one"] = 7.0
    for j in range(table.shape[1]):
        table.iloc[rng.choice(rows, 12, replace=False), j] = None
    table.iloc[3] = None
    return table


@parametrize_with_checks([tiny()])  # no failure is expected
def test_scikit_learn(estimator, check):
    check(estimator)


def test_a_frame_comes_back_in_its_form():
    table = people()
    before, imputer = table.copy(), tiny(integer=["visits"])
    for filled in (imputer.fit_transform(table), *imputer.sample(table, 3)):
        assert not filled.isna().any().any()
        assert filled.where(table.notna()).astype(table.dtypes).equals(table)  # what was observed is unchanged
        assert list(filled.dtypes) == list(table.dtypes)
        assert filled.index.equals(table.index)
        assert filled["visits"].isin(range(1, 9)).all()
        assert filled["children"].between(0, 3).all()
        assert filled["town"].isin(["Ulm", "Bonn", "Kiel"]).all()
        assert filled["smokes"].map(type).eq(bool).all()
        assert (filled["one"] == 7).all()
    pd.testing.assert_frame_equal(table, before)
    assert list(imputer.get_feature_names_out()) == list(table)
    assert imputer.n_features_in_ == 8


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_array_comes_back_in_its_form(dtype):
    X = np.random.default_rng(0).normal(1e9, 1e3, (40, 3)).astype(dtype)
    X[::3, 1] = X[1::3, 2] = np.nan
    filled = tiny().fit_transform(X)
    assert filled.dtype == dtype
    assert not np.isnan(filled).any()
    np.testing.assert_array_equal(filled[~np.isnan(X)], X[~np.isnan(X)])
    assert abs(filled[::3, 1] - 1e9).max() < 1e4


def test_text_in_an_array_and_a_frame_by_set_output():
    X = np.array([[float(i % 5), "even" if i % 2 == 0 else "odd"] for i in range(40)], dtype=object)
    X[3, 1] = X[4, 0] = None
    filled = tiny().fit_transform(X)
    assert isinstance(filled[4, 0], float)
    assert filled[3, 1] in ("even", "odd")
    frame = tiny().set_output(transform="pandas").fit_transform(X)
    assert list(frame) == ["x0", "x1"]


def test_a_seed_gives_the_same_tables():
    table = people()
    first, again, other = tiny().fit(table), tiny().fit(table), tiny().set_params(random_state=1).fit(table)
    pd.testing.assert_frame_equal(first.transform(table), again.transform(table))
    a, b = first.sample(table, 2), again.sample(table, 3)
    for k in range(2):
        pd.testing.assert_frame_equal(a[k], b[k])
    assert not a[0].equals(a[1])
    assert not a[0].equals(other.sample(table, 1)[0])


def test_a_run_folder_is_kept(tmp_path):
    table = people()
    first = tiny(run_folder=tmp_path / "run").fit(table)
    assert (tmp_path / "run" / "posterior" / "model.safetensors").exists()
    again = tiny(run_folder=tmp_path / "run").fit(table)  # is finished already
    pd.testing.assert_frame_equal(first.transform(table), again.transform(table))


def test_a_constant_table_needs_no_model():
    table = pd.DataFrame({"a": [1.0] * 9 + [None], "b": ["x"] * 9 + [None]})
    imputer = DiffEMImputer().fit(table)
    assert imputer.posterior_ is None
    assert imputer.transform(table).iloc[9].tolist() == [1.0, "x"]


def test_a_category_is_one_group():
    column = Column("column 'c'", ["a", "b", "c"])
    values, seen = np.array(["b", None, "a"], object), np.array([True, False, True])
    features = column.encode(values, seen)
    np.testing.assert_array_equal(features, [[0, 1, 0], [np.nan] * 3, [1, 0, 0]])
    assert column.decode(np.array([[0.2, 0.5, 0.3], [-0.1, 0.4, 0.7]])).tolist() == ["b", "c"]
    y = torch.randn(2000, 5)
    _, (_, hidden) = Cells(0.1, [1, 3, 1]).thin(y, {}, torch.Generator().manual_seed(0))
    mask = hidden["mask"]
    assert (mask[:, 1:4].all(1) | ~mask[:, 1:4].any(1)).all()
    assert mask.float().mean(0) == pytest.approx(0.3, abs=0.04)


def test_whole_numbers_are_rounded_into_the_observed_range():
    column = Column.learn("column 'n'", np.array([2.0, 3.0, 9.0]), categorical=False, whole=True)
    raw = (np.array([[1.2], [4.4], [30.0]]) - column.centre) / column.spread
    assert column.decode(raw).tolist() == [2, 4, 9]


def test_a_few_values_far_out_do_not_set_the_unit():
    values = np.random.default_rng(0).normal(5, 2, 1000)
    values[:3] = 1e6
    column = Column.learn("column 'n'", values, categorical=False, whole=False)
    assert column.centre == pytest.approx(5, abs=0.3)
    assert column.spread == pytest.approx(2, rel=0.1)


@pytest.fixture(scope="module")
def gaussian():
    """A Gaussian table in unlike units, with 30 % missing, and an imputer fitted to it."""
    rng = np.random.default_rng(0)
    covariance = np.array([[1, 0.8, -0.5], [0.8, 1, -0.3], [-0.5, -0.3, 1]])
    scale, centre = np.array([2e4, 0.1, 12.0]), np.array([5e4, 0.3, 45.0])
    X = centre + scale * rng.multivariate_normal(np.zeros(3), covariance, 2000)
    X[rng.random(X.shape) < 0.3] = np.nan
    settings = {"em.iterations": 3, "start.components": [1]}
    return X, centre, scale, covariance, DiffEMImputer(random_state=0, settings=settings).fit(X)


def test_the_posterior_of_a_gaussian_table(gaussian):
    X, centre, scale, covariance, imputer = gaussian
    rows = np.flatnonzero(np.isnan(X[:, 0]) & ~np.isnan(X[:, 1:]).any(1))[:150]
    seen = (X[rows, 1:] - centre[1:]) / scale[1:]
    weights = np.linalg.solve(covariance[1:, 1:], covariance[1:, 0])
    mean, variance = seen @ weights, 1 - covariance[0, 1:] @ weights
    found = (imputer.transform(X[rows])[:, 0] - centre[0]) / scale[0]
    assert np.sqrt(((found - mean) ** 2).mean()) < 0.1
    draws = (np.array(imputer.sample(X[rows], 20))[..., 0] - centre[0]) / scale[0]
    assert abs(draws.mean(0) - mean).mean() < 0.15
    assert draws.var(0, ddof=1).mean() == pytest.approx(variance, rel=0.2)  # it was fitted to 1,800 rows


def test_a_row_without_any_observed_cell_becomes_a_new_one(gaussian):
    _X, centre, scale, covariance, imputer = gaussian
    new = (np.array(imputer.sample(np.full((500, 3), np.nan), 1))[0] - centre) / scale
    np.testing.assert_allclose(np.cov(new.T), covariance, atol=0.2)


@pytest.mark.parametrize(
    ("change", "arguments", "text"),
    [
        ({"a": np.nan}, {}, "column 'a': no row shows it, so it cannot be learned; remove it"),
        ({"a": np.inf}, {}, "column 'a': holds an infinity; make it missing, or remove its row"),
        ({"a": pd.Timestamp("2020")}, {}, "column 'a': holds datetime64[us]; give numbers or categories"),
        ({"a": 1j}, {}, "column 'a': holds complex128; give numbers or categories"),
        ({"a": [[1]] * 20}, {}, "column 'a': holds [1]; a category is text or a number"),
        ({}, {"integer": ["z"]}, "integer: 'z' is not a column of the table; they are ['a', 'b']"),
        ({}, {"categorical": [2]}, "categorical: 2 is not a column of the table; they are ['a', 'b']"),
        (
            {},
            {"integer": ["b"]},
            "integer: column 'b' holds categories; name it in one of integer and categorical only",
        ),
    ],
)
def test_what_is_refused(change, arguments, text):
    table = pd.DataFrame({"a": np.arange(20.0), "b": ["x", "y"] * 10}).assign(**change)
    with pytest.raises(DiffemError) as caught:
        tiny(**arguments).fit(table)
    assert str(caught.value) == text


def test_what_is_refused_after_fit():
    table = pd.DataFrame({"a": np.arange(20.0), "b": ["x", "y"] * 10})
    imputer = tiny().fit(table)
    for change, text in (
        ({"b": "z"}, "column 'b': holds 'z', which fit did not see; make it missing, or fit again"),
        ({"a": "z"}, "column 'a': holds what is not a number, where fit saw numbers"),
    ):
        with pytest.raises(DiffemError) as caught:
            imputer.transform(table.assign(**change))
        assert str(caught.value) == text
    with pytest.raises(DiffemError, match=r"^n: must be at least 1, got 0$"):
        imputer.sample(table, 0)
    with pytest.raises(ValueError, match="minimum of 8"):
        tiny().fit(table[:7])


def test_a_column_of_identifiers_is_refused():
    table = pd.DataFrame({"a": np.arange(60.0), "id": [f"patient {k}" for k in range(60)]})
    table.loc[3, "a"] = np.nan
    with pytest.raises(DiffemError, match=r"column 'id': holds 60 different texts in 60 rows; drop a column of names"):
        DiffEMImputer().fit(table)
