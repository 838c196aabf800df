"""Leave-one-out by retraining, against closed forms and against solvers that share no code with it."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import torch
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge, SGDRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from skinvert import HessianInverter, PerSampleGradient
from skinvert.metrics import RowLoss, leave_one_out


def regression(n=20, n_test=5, d=3, seed=0):
    rng = np.random.default_rng(seed)
    X, X_test = rng.standard_normal((n, d)), rng.standard_normal((n_test, d))
    return X, X @ np.ones(d) + rng.standard_normal(n), X_test, rng.standard_normal(n_test)


def counts(n=20):
    X, y, X_test, _ = regression(n)
    return X, np.random.default_rng(1).poisson(np.exp(0.3 * X[:, 0])).astype(float), X_test, np.ones(len(X_test))


def classes(n=40):
    X, y, X_test, y_test = regression(n)
    return X, (y > 0).astype(int), X_test, (y_test > 0).astype(int)


def ridge_without(X, y, alpha, row, weights=None):
    """Return the solution of the normal equations without one row."""
    w = np.ones(len(X)) if weights is None else weights.copy()
    w[row] = 0
    return np.linalg.solve((X * w[:, None]).T @ X + alpha * np.eye(X.shape[1]), X.T @ (w * y))


@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_without_each_row(weighted):
    X, y, X_test, y_test = regression()
    weights = np.random.default_rng(2).uniform(0.5, 2, len(X)) if weighted else None
    theta = np.linalg.solve(*normal_equations(X, y, 2.0, weights))
    before = 0.5 * (X_test @ theta - y_test) ** 2
    after = [0.5 * (X_test @ ridge_without(X, y, 2.0, j, weights) - y_test) ** 2 for j in range(len(X))]
    trainer = Ridge(2.0, fit_intercept=False)
    received = leave_one_out(trainer, X, y, X_test, y_test, sample_weight=weights)
    np.testing.assert_allclose(received, (np.array(after) - before).T, atol=1e-12)


def normal_equations(X, y, alpha, weights):
    w = np.ones(len(X)) if weights is None else weights
    return (X * w[:, None]).T @ X + alpha * np.eye(X.shape[1]), X.T @ (w * y)


def test_chosen_rows_alone():
    X, y, X_test, y_test = regression()
    every = leave_one_out(Ridge(), X, y, X_test, y_test)
    received = leave_one_out(Ridge(), X, y, X_test, y_test, rows=[7, 3])
    np.testing.assert_array_equal(received, every[:, [7, 3]])


def poisson_objective(theta, X, y, weights, total, alpha):
    f = X @ theta
    return (weights @ (np.exp(f) - y * f)) / total + 0.5 * alpha * theta @ theta


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("warm_start", [False, True])
def test_a_mean_objective_keeps_its_share_of_the_penalty(warm_start, weighted):
    X, y, X_test, y_test = counts()
    weights = np.random.default_rng(2).uniform(0.5, 2, len(X)) if weighted else np.ones(len(X))
    trainer = PoissonRegressor(alpha=0.3, fit_intercept=False, tol=1e-12, max_iter=1000)
    received = leave_one_out(
        trainer, X, y, X_test, y_test, rows=[4], sample_weight=weights if weighted else None, warm_start=warm_start
    )
    losses = []
    for kept in (np.ones(len(X)), np.arange(len(X)) != 4):
        # Σw of all rows stays the denominator.
        arguments = (X, y, weights * kept, weights.sum(), 0.3)
        theta = scipy.optimize.minimize(poisson_objective, np.zeros(3), arguments, "BFGS", tol=1e-11).x
        losses.append(np.exp(X_test @ theta) - y_test * (X_test @ theta))
    np.testing.assert_allclose(received[:, 0], losses[1] - losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "scaled"),
    [
        (SGDRegressor, {}, True),
        (MLPRegressor, {"solver": "adam", "batch_size": 5}, True),
        # All rows are one batch, and its penalty is divided by their number.
        (MLPRegressor, {"solver": "adam"}, False),
        (MLPRegressor, {"solver": "lbfgs"}, False),
        (Ridge, {}, False),
    ],
)
def test_whose_penalty_is_scaled(monkeypatch, kind, settings, scaled):
    X, y, X_test, y_test = regression()
    seen, fit = [], kind.fit
    monkeypatch.setattr(kind, "fit", lambda self, X, y: (seen.append((len(X), self.alpha)), fit(self, X, y))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        trainer = kind(alpha=0.1, max_iter=1, **settings)
        leave_one_out(trainer, X, y, X_test, y_test, rows=[0, 1], measurement=lambda model, X, y: model.predict(X))
    alpha = pytest.approx(0.1 * 20 / 19) if scaled else 0.1
    assert seen == [(20, 0.1), (19, alpha), (19, alpha)]


@pytest.mark.parametrize("warm_start", [False, True])
def test_scores_predict_logistic_regression(warm_start):
    X, y, X_test, y_test = classes(1000)
    trainer = LogisticRegression(C=0.5, tol=1e-12, max_iter=10000)
    model = clone(trainer).fit(X, y)
    rows = np.arange(0, 1000, 25)
    received = leave_one_out(trainer, X, y, X_test, y_test, rows=rows, full=model, warm_start=warm_start)
    gradient = PerSampleGradient(model).fit(X, y)
    solved = HessianInverter("direct").fit(model, (X, y)).transform(gradient.transform((X[rows], y[rows])))
    predicted = gradient.transform((X_test, y_test)) @ solved.T / len(X)
    assert np.corrcoef(received.ravel(), predicted.ravel())[0, 1] > 0.999
    assert np.polyfit(predicted.ravel(), received.ravel(), 1)[0] == pytest.approx(1, abs=0.03)


def test_a_solver_that_does_not_move_is_told_of():
    X, y, X_test, y_test = classes(200)
    trainer = LogisticRegression(tol=1e-1)
    with pytest.warns(ConvergenceWarning, match="ended where they began"):
        received = leave_one_out(trainer, X, y, X_test, y_test, rows=[0, 1])
    assert (received == 0).all()


@pytest.mark.parametrize("rows", [None, [7, 3, 0]])
def test_a_row_of_no_weight_is_no_solver_that_does_not_move(rows):
    X, y, X_test, y_test = classes(200)
    weights = np.r_[0.0, np.ones(199)]
    trainer = LogisticRegression(tol=1e-12, solver="newton-cg")
    # A warning would be an error here.
    received = leave_one_out(trainer, X, y, X_test, y_test, rows=rows, sample_weight=weights)
    effects = dict(zip(range(200) if rows is None else rows, received.T, strict=True))
    assert (effects[0] == 0).all()
    assert (effects[3] != 0).any()
    trainer = LogisticRegression(tol=1e-1)
    with pytest.warns(ConvergenceWarning, match="1 of 2 retrainings ended where they began"):
        leave_one_out(trainer, X, y, X_test, y_test, rows=[0, 1], sample_weight=weights)


def test_forests_do_not_begin_at_the_full_one():
    X, y, X_test, y_test = regression()
    trainer = RandomForestRegressor(3, random_state=0)
    received = leave_one_out(trainer, X, y, X_test, y_test, rows=[1], measurement=lambda model, X, y: model.predict(X))
    full, less = clone(trainer).fit(X, y), clone(trainer).fit(np.delete(X, 1, 0), np.delete(y, 1))
    np.testing.assert_array_equal(received[:, 0], less.predict(X_test) - full.predict(X_test))


def test_a_pipeline_and_one_whose_scaler_is_frozen():
    X, y, X_test, y_test = regression()
    scaler = StandardScaler().fit(X)
    expected = leave_one_out(Ridge(), scaler.transform(X), y, scaler.transform(X_test), y_test)
    frozen = leave_one_out(make_pipeline(FrozenEstimator(scaler), Ridge()), X, y, X_test, y_test)
    np.testing.assert_allclose(frozen, expected, atol=1e-12)
    refitted = leave_one_out(make_pipeline(StandardScaler(), Ridge()), X, y, X_test, y_test)
    assert np.abs(refitted - expected).max() > 1e-4


def test_frames_and_sparse_rows():
    X, y, X_test, y_test = classes()
    trainer = LogisticRegression(tol=1e-8)
    expected = leave_one_out(trainer, X, y, X_test, y_test, rows=[0, 1])
    frames = [pd.DataFrame(part, columns=list("abc")) for part in (X, X_test)]
    frames[0].index += 100
    received = leave_one_out(trainer, frames[0], pd.Series(y, frames[0].index), frames[1], y_test, rows=[0, 1])
    np.testing.assert_allclose(received, expected, atol=1e-12)
    received = leave_one_out(trainer, csr_array(X), y, csr_array(X_test), y_test, rows=[0, 1])
    np.testing.assert_allclose(received, expected, atol=1e-12)


def test_the_last_row_of_a_class():
    X, y, X_test, y_test = classes()
    y[3] = 7
    with pytest.raises(ValueError, match=r"The rows left must be of every class. Got none of \[7\]"):
        leave_one_out(LogisticRegression(), X, y, X_test, y_test, rows=[3])
    forest, predict = RandomForestClassifier(3, random_state=0), {"measurement": lambda model, X, y: model.predict(X)}
    assert leave_one_out(forest, X, y, X_test, y_test, rows=[3], **predict).shape == (5, 1)


def train_linear(X, y, sample_weight):
    """Return a module at the minimum of Σ wᵢ (f − y)² / n + ½ μ‖θ‖²."""
    X, y = X.numpy(), y.numpy()
    A = (X * sample_weight[:, None]).T @ X * 2 / len(X) + 0.1 * np.eye(X.shape[1])
    net = nn.Linear(X.shape[1], 1, bias=False).double()
    net.weight.data = torch.from_numpy(np.linalg.solve(A, 2 * X.T @ (sample_weight[:, None] * y) / len(X)).T.copy())
    return net


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_a_callable_that_trains_a_module(n_jobs):
    X, y, X_test, y_test = (torch.from_numpy(part) for part in regression(200))
    y, y_test = y[:, None], y_test[:, None]
    received = leave_one_out(train_linear, X, y, X_test, y_test, rows=[3, 5, 8], loss="mse", n_jobs=n_jobs)
    alpha = 0.1 * len(X) / 2
    full = np.linalg.solve(*normal_equations(X.numpy(), y.numpy()[:, 0], alpha, None))
    for column, row in zip(received.T, [3, 5, 8], strict=True):
        theta = ridge_without(X.numpy(), y.numpy()[:, 0], alpha, row)
        losses = [(X_test.numpy() @ each - y_test.numpy()[:, 0]) ** 2 for each in (theta, full)]
        np.testing.assert_allclose(column, losses[0] - losses[1], atol=1e-12)


def test_the_loss_of_rows_is_what_gradients_are_of():
    generator = torch.manual_seed(0)
    net, X = nn.Linear(3, 2).double(), torch.randn(8, 3, generator=generator, dtype=torch.float64)
    for loss, y in (("mse", X[:, :2] ** 2), (nn.CrossEntropyLoss(torch.tensor([1.0, 3.0])), torch.arange(8) % 2)):
        measure = RowLoss(loss).fit(net, X, y)
        gradients = PerSampleGradient(net, loss=loss).fit_transform(X, y)
        direction, step = torch.randn(net.weight.shape, generator=generator, dtype=torch.float64), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                net.weight += sign * step * direction
            values.append(measure(net, X, y))
            with torch.no_grad():
                net.weight -= sign * step * direction
        received = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose(received, gradients[:, :6] @ direction.flatten(), atol=1e-8)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rows": [20]}, ValueError, r"rows must be one or more in the range \[0, 19\]"),
        ({"rows": [0.5]}, TypeError, "rows must be indices"),
        ({"rows": []}, ValueError, "rows must be one or more"),
        ({"trainer": nn.Linear(3, 1)}, TypeError, "A torch module does not train itself"),
        ({"trainer": Ridge}, TypeError, "trainer must be an instance"),
        ({"measurement": "lss"}, ValueError, 'measurement must be "loss"'),
        ({"measurement": lambda *_: np.zeros(2)}, ValueError, "The measurement must be of shape"),
        ({"measurement": lambda *_: np.full(5, np.nan)}, ValueError, "The measurement must be finite"),
        ({"sample_weight": np.ones(3)}, ValueError, "sample_weight must be of length 20"),
        ({"y_test": np.zeros(4)}, ValueError, "inconsistent numbers of samples"),
        ({"trainer": RandomForestRegressor()}, TypeError, "A scikit-learn model must be one of"),
    ],
)
def test_bad_input(change, error, match):
    X, y, X_test, y_test = regression()
    given = {"trainer": Ridge(), "X": X, "y": y, "X_test": X_test, "y_test": y_test, **change}
    with pytest.raises(error, match=match):
        leave_one_out(**given)


def test_a_trainer_with_its_scaler_held_begins_at_a_full_model_without():
    X, y = load_breast_cancer(return_X_y=True)
    X, y = X[:120], y[:120]
    full = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-12, solver="newton-cholesky")).fit(X, y)
    held = make_pipeline(FrozenEstimator(full[:-1]), LogisticRegression(tol=1e-12, solver="newton-cholesky"))
    received = leave_one_out(held, X, y, X[:30], y[:30], rows=[3, 8], full=full)
    Z = full[:-1].transform(X)
    for j, row in enumerate([3, 8]):
        alone = clone(full[-1]).fit(np.delete(Z, row, 0), np.delete(y, row))
        losses = [-model.predict_log_proba(Z[:30])[np.arange(30), y[:30]] for model in (alone, full[-1])]
        np.testing.assert_allclose(received[:, j], losses[0] - losses[1], rtol=1e-6, atol=1e-9)


def test_a_warm_start_keeps_the_trainer_s_settings():
    X, y = load_breast_cancer(return_X_y=True)
    X, y = StandardScaler().fit_transform(X)[:120], y[:120]
    full = LogisticRegression(C=1.0, tol=1e-12, solver="newton-cholesky").fit(X, y)
    trainer = LogisticRegression(C=0.1, tol=1e-12, solver="newton-cholesky")
    received = leave_one_out(trainer, X, y, X[:30], y[:30], rows=[3], full=full)[:, 0]
    alone = clone(trainer).fit(np.delete(X, 3, 0), np.delete(y, 3))
    losses = [-model.predict_log_proba(X[:30])[np.arange(30), y[:30]] for model in (alone, full)]
    np.testing.assert_allclose(received, losses[0] - losses[1], rtol=1e-6, atol=1e-9)
