"""Jackknife+ intervals against refits and the definition of their quantiles, written anew."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.linear_model import GammaRegressor, LinearRegression, LogisticRegression, PoissonRegressor, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from skinvert import HessianInverter, InfluenceFunction

N = 29


def data(seed=0, n=N):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, 3))
    return X, X @ [1.0, -2.0, 0.0] + 1 + rng.standard_normal(n), rng.standard_normal((7, 3))


def by_definition(predictions, residuals, lower, upper):
    """The lower-th and upper-th smallest, counted from one, of predictions (n, n_test); infinite beyond them."""
    n = len(residuals)
    below, above = np.sort(predictions - residuals[:, None], 0), np.sort(predictions + residuals[:, None], 0)
    low = below[lower - 1] if lower >= 1 else np.full(predictions.shape[1], -np.inf)
    return np.column_stack([low, above[upper - 1] if upper <= n else np.full(predictions.shape[1], np.inf)])


def refits(make, X, y, tests, w=None):
    rest = [np.arange(len(y)) != i for i in range(len(y))]
    w = np.ones(len(y)) if w is None else w
    models = [make().fit(X[k], y[k], w[k]) for k in rest]
    own = np.array([model.predict(X[i : i + 1])[0] for i, model in enumerate(models)])
    return np.stack([model.predict(tests) for model in models]), np.abs(y - own)


# (α, n, ⌊α(n + 1)⌋, ⌈(1 − α)(n + 1)⌉), by hand. 0.29 · 100 and 0.07 · 100 are not 29 and 7 in floating point.
INDICES = [
    (0.1, 29, 3, 27),
    (0.1, 28, 2, 27),
    (0.1, 9, 1, 9),
    (0.1, 8, 0, 9),
    (0.5, 9, 5, 5),
    (0.05, 29, 1, 29),
    (0.29, 99, 29, 71),
    (0.07, 99, 7, 93),
    (0.9, 29, 27, 3),
]


@pytest.mark.parametrize(("alpha", "n", "lower", "upper"), INDICES)
def test_ridge_is_n_refits(alpha, n, lower, upper):
    X, y, tests = data(n=n)
    newton = InfluenceFunction(removal="newton", memory=300).fit(Ridge(2.0).fit(X, y), (X, y))
    expected = by_definition(*refits(lambda: Ridge(2.0), X, y, tests), lower, upper)
    np.testing.assert_allclose(newton.jackknife_plus(tests, alpha=alpha), expected, rtol=1e-9)


def test_weighted_ridge_and_rows_of_weight_zero():
    X, y, tests = data(n=31)
    w = np.random.default_rng(1).uniform(0.5, 2, 31)
    # Far off, so that their residuals would count.
    w[[4, 20]], y[[4, 20]] = 0, 50
    newton = InfluenceFunction(removal="newton").fit(Ridge(2.0).fit(X, y, w), (X, y), sample_weight=w)
    kept = w > 0
    expected = by_definition(*refits(lambda: Ridge(2.0), X[kept], y[kept], tests, w[kept]), 15, 15)
    np.testing.assert_allclose(newton.jackknife_plus(tests, alpha=0.5), expected, rtol=1e-9)


def test_first_order_by_the_hat_matrix():
    """θ₍ᵢ₎ is θ − (XᵀX)⁻¹ xᵢ eᵢ, undivided."""
    X, y, tests = data()
    model = LinearRegression().fit(X, y)
    design, points = np.column_stack([X, np.ones(N)]), np.column_stack([tests, np.ones(7)])
    e = y - model.predict(X)
    steps = -np.linalg.solve(design.T @ design, design.T).T * e[:, None]
    residuals = np.abs(y - (model.predict(X) + (design * steps).sum(1)))
    expected = by_definition(model.predict(tests) + steps @ points.T, residuals, 3, 27)
    np.testing.assert_allclose(InfluenceFunction().fit(model, (X, y)).jackknife_plus(tests), expected, rtol=1e-9)


def test_a_network_is_linear_in_the_step():
    """Newton's steps one by one, and the outputs along them by differences."""
    X, y, tests = (torch.from_numpy(part) for part in data())
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double()
    inverter = HessianInverter("direct", 0.3, curvature="ggn", loss="mse", batch_size=10)
    newton = InfluenceFunction(inverter, removal="newton", batch_size=3).fit(net, (X, y))
    theta = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    outputs, residuals = [], []
    for i in range(N):
        step = {name: moved - theta[name] for name, moved in newton.removed_parameters(i).items()}
        ahead, behind = (
            torch.func.functional_call(
                net, {k: theta[k] + h * step[k] for k in theta}, torch.cat([tests, X[i : i + 1]])
            )
            for h in (1e-4, -1e-4)
        )
        found = (net(torch.cat([tests, X[i : i + 1]])) + (ahead - behind) / 2e-4).detach()
        outputs.append(found[:-1].numpy())
        residuals.append(abs(float(found[-1] - y[i])))
    received = newton.jackknife_plus(tests)
    assert isinstance(received, torch.Tensor)
    np.testing.assert_allclose(received, by_definition(np.stack(outputs), np.array(residuals), 3, 27), rtol=1e-6)


def test_poisson_on_the_scale_of_counts():
    X, _, tests = data()
    y = np.random.default_rng(3).poisson(np.exp(0.5 * X[:, 0] + 1)).astype(float)
    model = PoissonRegressor(alpha=0.1, tol=1e-10).fit(X, y)
    newton = InfluenceFunction(removal="newton").fit(model, (X, y))
    expected = by_definition(*refits(lambda: PoissonRegressor(alpha=0.1, tol=1e-10), X, y, tests), 3, 27)
    received = newton.jackknife_plus(tests)
    np.testing.assert_allclose(received, expected, atol=0.05 * np.ptp(y))
    assert np.corrcoef(received.ravel(), expected.ravel())[0, 1] > 0.999


def test_gamma_takes_no_zeros():
    X, y, tests = data()
    model = GammaRegressor(alpha=0.1).fit(X, np.exp(y))
    low, high = InfluenceFunction().fit(model, (X, np.exp(y))).jackknife_plus(tests, alpha=0.5).T
    assert ((low < model.predict(tests)) & (model.predict(tests) < high)).all()


def test_forms_of_inputs():
    X, y, tests = data()
    pipeline = make_pipeline(StandardScaler(), Ridge(2.0)).fit(X, y)
    scaler = pipeline[0]
    alone = InfluenceFunction().fit(pipeline[1], (scaler.transform(X), y)).jackknife_plus(scaler.transform(tests))
    np.testing.assert_allclose(InfluenceFunction().fit(pipeline, (X, y)).jackknife_plus(tests), alone)
    newton = InfluenceFunction(removal="newton").fit(Ridge(2.0).fit(X, y), (X, y))
    expected = newton.jackknife_plus(tests)
    np.testing.assert_allclose(newton.jackknife_plus(pd.DataFrame(tests)), expected)
    np.testing.assert_allclose(newton.jackknife_plus(scipy.sparse.csr_array(tests)), expected)
    np.testing.assert_allclose(newton.jackknife_plus(tests[:1]), expected[:1])
    np.testing.assert_allclose(newton.jackknife_plus((tests, np.zeros(7))), expected)


def test_columns_in_another_order_are_refused():
    rng = np.random.default_rng(0)
    frame, y = pd.DataFrame(rng.standard_normal((20, 3)), columns=list("abc")), rng.standard_normal(20)
    influence = InfluenceFunction().fit(Ridge().fit(frame, y), (frame, y))
    assert influence.jackknife_plus(frame[:2]).shape == (2, 2)
    with pytest.raises(ValueError, match="'c', 'b', 'a'"):
        influence.jackknife_plus(frame[list("cba")])


def test_coverage_of_a_linear_model():
    """Over many draws of data some 90 % of new targets lie in their intervals, with 6 parameters of 19 rows."""
    rng, hits = np.random.default_rng(0), []
    for _ in range(60):
        X, noise = rng.standard_normal((119, 5)), rng.standard_normal(119)
        y = X @ np.arange(5.0) + noise
        newton = InfluenceFunction(removal="newton").fit(LinearRegression().fit(X[:19], y[:19]), (X[:19], y[:19]))
        low, high = newton.jackknife_plus(X[19:]).T
        hits.append(((low <= y[19:]) & (y[19:] <= high)).mean())
    assert math.isclose(np.mean(hits), 0.9, abs_tol=0.03)


def test_refusals():
    X, y, tests = data()
    linear = InfluenceFunction().fit(LinearRegression().fit(X, y), (X, y))
    for alpha in (0, 1, 1.5, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            linear.jackknife_plus(tests, alpha=alpha)
    classes = (y > 0).astype(int)
    logistic = InfluenceFunction().fit(LogisticRegression().fit(X, classes), (X, classes))
    two = InfluenceFunction().fit(LinearRegression().fit(X, np.column_stack([y, y])), (X, np.column_stack([y, y])))
    for other in (logistic, two):
        with pytest.raises(TypeError, match="a regression with one real target a row"):
            other.jackknife_plus(tests)
