"""What displays draw: the numbers in their artists, their attributes, and clear errors."""

import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import auc

from skinvert import HessianInverter, HessianInverterCV, InfluenceFunction
from skinvert.metrics import RemovalCurve, leave_one_out, removal_curve
from skinvert.plotting import (
    DetectionDisplay,
    LeaveOneOutDisplay,
    PathDisplay,
    RemovalDisplay,
    SpectrumDisplay,
    TopRowsDisplay,
)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def regression():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((30, 4))
    y = X @ np.arange(4.0) + rng.standard_normal(30)
    model = Ridge(alpha=0.1).fit(X, y)
    return model, X, y


@pytest.fixture(scope="module")
def influence(regression):
    model, X, y = regression
    return InfluenceFunction(HessianInverter("direct", 1e-3)).fit(model, (X, y))


@pytest.fixture(scope="module")
def search():
    X = np.random.default_rng(0).standard_normal((40, 10))
    return HessianInverterCV([1.0, 1e-3, 1e-1], cv=4).fit(X)


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_leave_one_out_retrains(regression, influence):
    model, X, y = regression
    rows = [3, 7]
    display = LeaveOneOutDisplay.from_estimator(influence, model, X, y, X[:5], y[:5], rows=rows, name="Ridge")
    actual = leave_one_out(model, X, y, X[:5], y[:5], rows=rows)
    predicted = influence.transform((X[:5], y[:5]))[:, rows]
    np.testing.assert_allclose(display.points_.get_offsets(), np.c_[actual.ravel(), predicted.ravel()])
    assert display.correlation == pytest.approx(np.corrcoef(actual.ravel(), predicted.ravel())[0, 1])
    assert display.slope == pytest.approx(np.linalg.lstsq(actual.reshape(-1, 1), predicted.ravel())[0][0])
    assert labels(display.ax_) == [f"Ridge: r = {display.correlation:.3f}, slope {display.slope:.2f}"]
    assert display.line_.get_slope() == 1


def test_leave_one_out_of_tensors_on_given_axes():
    figure, ax = plt.subplots()
    display = LeaveOneOutDisplay.from_predictions(torch.tensor([1.0, 1.0]), [0.0, 0.0], ax=ax)
    assert (display.ax_, display.figure_) == (ax, figure)
    assert np.isnan(display.slope)
    assert np.isnan(display.correlation)


def test_another_measurement_is_no_leave_one_out_loss(regression):
    model, X, y = regression
    other = InfluenceFunction(measurement=lambda outputs, targets: outputs[:, 0]).fit(model, (X, y))
    with pytest.raises(ValueError, match=r'measurement must be "loss" here.*from_predictions'):
        LeaveOneOutDisplay.from_estimator(other, model, X, y, X[:2], y[:2])


def test_detection_finds_what_auc_counts(regression, influence):
    rng = np.random.default_rng(1)
    wrong, scores = rng.random(60) < 0.3, rng.standard_normal(60)
    display = DetectionDisplay.from_predictions(torch.from_numpy(scores), wrong, name="random")
    x, found = display.line_.get_data()
    for m in (0, 7, 60):
        assert x[m] == pytest.approx(m / 60)
        assert found[m] == pytest.approx(wrong[np.argsort(-scores)[:m]].sum() / wrong.sum())
    # The area under found by inspected is share / 2 + (1 - share) AUC.
    assert auc(x, found) == pytest.approx(wrong.mean() / 2 + (1 - wrong.mean()) * display.auc)
    assert labels(display.ax_) == ["perfect", "chance", f"random, AUC {display.auc:.3f}"]

    second = DetectionDisplay.from_estimator(influence, np.arange(30) < 5)
    np.testing.assert_array_equal(second.scores, influence.self_influence())


def test_curves_of_detection_share_axes():
    first = DetectionDisplay.from_predictions([1.0, 2.0], [False, True], name="a")
    second = DetectionDisplay.from_predictions([2.0, 1.0], [False, True], name="b", ax=first.ax_)
    assert second.ax_ is first.ax_
    assert labels(first.ax_) == ["perfect", "chance", "a, AUC 1.000", "b, AUC 0.000"]


def test_removal_draws_the_mean_and_its_error(regression, influence):
    model, X, y = regression
    display = RemovalDisplay.from_estimator(influence, model, X, y, X[:6], y[:6], fractions=[0.4, 0.1, 0])
    scores = influence.transform((X[:6], y[:6])).sum(0)
    n_removed, changes = removal_curve(scores, model, X, y, X[:6], y[:6], fractions=[0, 0.1, 0.4])
    drawn, mean = display.line_.get_data()
    np.testing.assert_array_equal(drawn, n_removed)
    np.testing.assert_allclose(mean, changes.mean(1))
    upper = display.band_.get_paths()[0].vertices[:, 1].max()
    assert upper == pytest.approx((changes.mean(1) + changes.std(1, ddof=1) / np.sqrt(6)).max())
    assert mean[-1] > 0


def test_removal_must_be_a_curve():
    with pytest.raises(ValueError, match=r"curve must be n_removed \(m,\) and changes"):
        RemovalDisplay(RemovalCurve(np.arange(3), np.ones((2, 4))))


def test_path_of_a_search(search):
    b = np.random.default_rng(1).standard_normal((3, 10))
    display = PathDisplay.from_estimator(search, b)
    order = [1, 2, 0]
    x, mean = display.score_line_.lines[0].get_data()
    np.testing.assert_array_equal(x, [1e-3, 1e-1, 1.0])
    np.testing.assert_allclose(mean, np.asarray(search.cv_results_["mean_test_score"])[order])
    np.testing.assert_allclose(display.deviation, np.asarray(search.cv_results_["std_test_score"])[order])
    assert display.residual_line_.get_ydata().max() < 1e-12
    assert display.residual_ax_ is not display.ax_
    assert display.chosen_line_.get_xdata() == [search.hessian_perturbation_] * 2
    assert labels(display.ax_) == ["held-out score", "largest residual", f"λ = {search.hessian_perturbation_:.3g}"]


def test_residuals_along_a_path_are_those_of_each_lambda(regression):
    model, X, y = regression
    rough = HessianInverter("kfac", 1e-2, curvature="ggn", check_residual=False).fit(model, (X, y))
    b, shifts = np.random.default_rng(1).standard_normal((4, 5)), [1e-2, 1.0]
    display = PathDisplay.from_estimator(rough, b, hessian_perturbations=shifts)
    H = rough.curvature_.to_dense().numpy()
    for row, shift in zip(display.residuals, shifts, strict=True):
        x = HessianInverter("kfac", shift, curvature="ggn", check_residual=False).fit(model, (X, y)).transform(b)
        expected = np.linalg.norm(x @ H + shift * x - b, axis=1) / np.linalg.norm(b, axis=1)
        np.testing.assert_allclose(row, expected, atol=1e-12)
    np.testing.assert_allclose(display.residual_line_.get_ydata(), display.residuals.max(1))


def test_relative_lambdas_are_drawn_where_they_lie():
    X = np.random.default_rng(0).standard_normal((40, 10))
    search = HessianInverterCV(["1e-2 rel", "1 rel"], cv=3).fit(X)
    mean = np.trace(X.T @ X / 40) / 10
    np.testing.assert_allclose(PathDisplay.from_estimator(search).hessian_perturbations, [1e-2 * mean, mean])


def test_an_indefinite_lambda_is_marked():
    display = PathDisplay.from_predictions([0.0, 0.1, 1.0], [-np.inf, 1.0, 2.0])
    np.testing.assert_array_equal(display.indefinite_.get_offsets()[:, 0], [0.0])
    np.testing.assert_array_equal(display.score_line_.lines[0].get_xdata(), [0.1, 1.0])
    assert display.ax_.get_xscale() == "symlog"
    display.figure_.canvas.draw()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([1.0, 2.0],), "scores and residuals must be given"),
        (([1.0, -2.0], [0.0, 1.0]), "hessian_perturbations must be non-negative"),
        (([1.0, 2.0], [0.0, 1.0, 2.0]), r"scores must be of shape \(2,\)"),
        (([1.0, 2.0], [0.0, np.nan]), "scores must be finite, or -inf"),
    ],
)
def test_bad_paths(arguments, match):
    with pytest.raises(ValueError, match=match):
        PathDisplay(*arguments)


def test_a_path_needs_right_hand_sides_or_a_search(search):
    with pytest.raises(ValueError, match="b and hessian_perturbations must be given"):
        PathDisplay.from_estimator(search.inverter_)
    with pytest.raises(ValueError, match="None for a search"):
        PathDisplay.from_estimator(search, hessian_perturbations=[1.0])


def test_spectrum_by_rank(regression):
    model, X, y = regression
    inverter = HessianInverter("direct", 0.5).fit(model, (X, y))
    display = SpectrumDisplay.from_estimator(inverter)
    Z = np.c_[X, np.ones(30)]
    H = Z.T @ Z / 30 + np.diag([0.1 / 30] * 4 + [0])
    rank, sizes = display.positive_.get_data()
    np.testing.assert_array_equal(rank, [1, 2, 3, 4, 5])
    np.testing.assert_allclose(sizes, np.linalg.eigvalsh(H)[::-1])
    assert display.negative_ is None
    assert display.level_.get_ydata() == [0.5, 0.5]
    assert labels(display.ax_) == ["positive", "λ = 0.5"]


def test_negative_eigenvalues_and_zeros_are_told_apart():
    display = SpectrumDisplay.from_predictions([1e-17, 3.0, -2.0, 1.0, -4.0])
    np.testing.assert_array_equal(display.positive_.get_ydata(), [3.0, 1.0])
    np.testing.assert_array_equal(display.negative_.get_ydata(), [4.0, 2.0])
    assert display.positive_.get_color() != display.negative_.get_color()
    assert labels(display.ax_) == ["positive (1 more are 0)", "negative, by size"]


def test_eigenvalues_that_a_factor_of_few_rows_leaves_out_are_counted():
    X = np.random.default_rng(0).standard_normal((3, 12))
    display = SpectrumDisplay.from_estimator(HessianInverter("direct", 0.5).fit(X))
    assert display.n_zero == 9
    np.testing.assert_allclose(display.positive_.get_ydata(), np.linalg.eigvalsh(X @ X.T / 3)[::-1])


def test_density_bars_hold_the_whole_spectrum(regression):
    model, X, y = regression
    inverter = HessianInverter("cg", 0.5, random_state=0).fit(model, (X, y))
    spectrum = inverter.spectrum()
    display = SpectrumDisplay([1.0, 2.0, -3.0, 4.0], weights=[0.1, 0.2, 0.3, 0.4], hessian_perturbation=0.5).plot()
    assert sum(bar.get_height() for bar in display.positive_) == pytest.approx(0.7)
    assert sum(bar.get_height() for bar in display.negative_) == pytest.approx(0.3)
    assert display.level_.get_xdata() == [0.5, 0.5]
    drawn = SpectrumDisplay.from_predictions(spectrum)
    assert (drawn.weights is None) == spectrum.exact


def test_top_rows_as_pictures(regression, influence):
    _, X, y = regression
    display = TopRowsDisplay.from_estimator(influence, X[:2], y[:2], train=(X, y), k=3, image_shape=(2, 2))
    scores = influence.transform((X[:2], y[:2]))
    order = np.argsort(-scores, axis=1)[:, :3]
    assert display.axes_.shape == (2, 4)
    for i in range(2):
        np.testing.assert_array_equal(display.axes_[i, 0].images[0].get_array(), X[i].reshape(2, 2))
        for ax, row in zip(display.axes_[i, 1:], order[i], strict=True):
            np.testing.assert_array_equal(ax.images[0].get_array(), X[row].reshape(2, 2))
            assert ax.get_title() == f"{y[row]:.3g}: {scores[i, row]:+.2g}"


def test_harmful_rows_as_a_table_with_names():
    frame = pd.DataFrame({"age": [31.0, 45.0, 28.0], "town": ["Ulm", "Bern", "Graz"]}, index=["ann", "bob", "cid"])
    scores, y = [[0.5, -0.25, -1.0]], pd.Series(["no", "yes", "no"], index=frame.index)
    display = TopRowsDisplay.from_predictions(
        scores, test=(frame[:1], y[:1]), train=(frame, y), k=2, harmful=True, row_names=frame.index
    )
    expected = [
        ["test", "", "no", "31", "Ulm"],
        ["cid", "-1", "no", "28", "Graz"],
        ["bob", "-0.25", "yes", "45", "Bern"],
    ]
    assert display.table(0) == expected
    (table,) = display.axes_[0, 0].tables
    cells = {place: cell.get_text().get_text() for place, cell in table.get_celld().items()}
    assert [cells[0, j] for j in range(5)] == ["row", "score", "target", "age", "town"]
    assert [[cells[i + 1, j] for j in range(5)] for i in range(3)] == expected


def test_bad_top_rows(regression, influence):
    _, X, y = regression
    with pytest.raises(ValueError, match="the 30 rows that the influence was fitted on"):
        TopRowsDisplay.from_estimator(influence, X[:2], y[:2], train=(X[:9], y[:9]))
    with pytest.raises(TypeError, match=r"train must be a tuple \(X, y\)"):
        TopRowsDisplay.from_estimator(influence, X[:2], y[:2], train=X)
    with pytest.raises(ValueError, match="image_shape must be of 4 numbers"):
        TopRowsDisplay.from_estimator(influence, X[:2], y[:2], train=(X, y), image_shape=(3, 3))
    with pytest.raises(ValueError, match=r"rows must be in \[0, 29\]"):
        TopRowsDisplay([[30]], [[1.0]], test=(X[:1], y[:1]), train=(X, y))
    with pytest.raises(ValueError, match=r"scores must be of shape \(n_test, 30\)"):
        TopRowsDisplay.from_predictions(np.ones((2, 9)), test=(X[:2], y[:2]), train=(X, y))


def test_report_shows_rows_spectrum_and_bars():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.standard_normal((40, 2)), columns=["a", "b"]).add_prefix("x_")
    frame.index = [f"row{i}" for i in range(40)]
    y = np.where(frame["x_a"] > 0, "yes", "no")
    model = LogisticRegression().fit(frame, y)
    influence = InfluenceFunction(HessianInverter("direct", 1e-2)).fit(model, (frame, y))
    figure = influence.report(frame[:4], y[:4], n_rows=2, k=3)
    figure.canvas.draw()
    histogram, spectrum, *bars = figure.axes
    assert sum(bar.get_height() for bar in histogram.patches) == 40
    assert f"row{influence.self_influence().argmax()} (" in histogram.get_title()
    assert len(spectrum.lines[0].get_ydata()) == 3
    assert len(bars) == 2
    scores = influence.transform((frame[:2], y[:2]))
    for ax, line in zip(bars, scores, strict=True):
        ranked = np.argsort(-line, kind="stable")
        shown = [*ranked[:3], *ranked[-3:]]
        assert [label.get_text() for label in ax.get_yticklabels()] == [f"row{i}" for i in shown]
        np.testing.assert_allclose([bar.get_width() for bar in ax.patches], line[shown])
    assert "40 rows, 3 parameters; hessian by direct, λ = 0.01" in figure.get_suptitle()


def test_report_with_pictures_and_without_a_spectrum(regression, influence, monkeypatch):
    _, X, y = regression
    monkeypatch.setattr("skinvert.plotting.summary.SPECTRUM", 4)
    figure = influence.report(X, y, n_rows=2, k=2, train=(X, y), image_shape=(2, 2))
    pictures = [ax for ax in figure.axes if ax.images]
    assert len(pictures) == 2 * 2 * 3
    assert not any(ax.get_ylabel() == "Eigenvalue" for ax in figure.axes)
    with pytest.raises(ValueError, match="train and image_shape must be given both"):
        influence.report(X, y, train=(X, y))


def test_report_is_of_one_model(regression):
    model, X, y = regression
    ensemble = InfluenceFunction().fit([model, model], (X, y))
    with pytest.raises(TypeError, match="members_"):
        ensemble.report(X, y)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"skinvert\[plot\]"):
        LeaveOneOutDisplay.from_predictions([1.0], [1.0])


def test_rows_are_places_whatever_set_output_asks_for():
    X, y = load_iris(return_X_y=True)
    frame = pd.DataFrame(X, index=[f"flower {i}" for i in range(150)], columns=list("abcd"))
    model = LogisticRegression(max_iter=1000).fit(frame, y)
    influence = InfluenceFunction().fit(model, (frame, y))
    expected = influence.top((frame[:3], y[:3]), k=4)
    influence.set_output(transform="pandas")
    display = TopRowsDisplay.from_estimator(influence, frame[:3], y[:3], train=(frame, y), k=4)
    np.testing.assert_array_equal(display.rows, expected.rows)
    figure = influence.report(frame[:3], y[:3], k=2)
    assert any("flower" in text.get_text() for ax in figure.findobj(plt.Axes) for text in ax.get_yticklabels())
