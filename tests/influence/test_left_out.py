"""Leave-one-out predictions against refits, closed forms and dense steps in float64."""

import numpy as np
import pytest
import torch
from oracles import Oracle, oracle_matrix, perturbation_for
from problems import problem
from sklearn.linear_model import GammaRegressor, LinearRegression, LogisticRegression, PoissonRegressor, Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from torch import nn

from skinvert import HessianInverter, InfluenceFunction

CASES = [
    ("softmax", "cross_entropy", False),
    ("mlp", "class_weights", True),
    ("linear", "mse", False),
    ("cnn2d", "bce_with_logits", False),
    ("lstm", "callable_each", False),
    ("tied", "huber", True),
]


def regression(n=40, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, 3))
    return X, X @ [1.0, -2.0, 0.0] + 1 + rng.standard_normal(n), rng


@pytest.mark.parametrize("model", [LinearRegression(), Ridge(alpha=3.0), Ridge(alpha=3.0, fit_intercept=False)])
def test_newton_is_leave_one_out_of_least_squares(model):
    X, y, _ = regression()
    newton = InfluenceFunction(removal="newton", memory=500).fit(model.fit(X, y), (X, y))
    received = newton.loo_predict()
    assert received.shape == (40, 1)
    np.testing.assert_allclose(received[:, 0], cross_val_predict(model, X, y, cv=LeaveOneOut()), rtol=1e-9)
    np.testing.assert_array_equal(newton.loo_predict(scale="response"), received)


def test_several_outputs_and_weights():
    X, y, rng = regression()
    Y, w = np.column_stack([y, rng.standard_normal(40)]), rng.uniform(0, 2, 40)
    w[5] = 0
    influence = InfluenceFunction(removal="newton").fit(Ridge(2.0).fit(X, Y, w), (X, Y), sample_weight=w)
    rest = [np.arange(40) != i for i in range(40)]
    expected = [Ridge(2.0).fit(X[k], Y[k], w[k]).predict(X[i : i + 1])[0] for i, k in enumerate(rest)]
    np.testing.assert_allclose(influence.loo_predict(), expected, rtol=1e-8, atol=1e-10)


def test_first_order_is_linear_in_the_step():
    """f + h e: of the residual, what the row's own curvature would divide by 1 − h is not."""
    X, y, _ = regression()
    model = LinearRegression().fit(X, y)
    design = np.column_stack([X, np.ones(40)])
    h, f = (design @ np.linalg.pinv(design)).diagonal(), model.predict(X)
    received = InfluenceFunction().fit(model, (X, y)).loo_predict()[:, 0]
    np.testing.assert_allclose(received, f - h * (y - f), rtol=1e-9)


@pytest.mark.parametrize("removal", ["first_order", "newton"])
@pytest.mark.parametrize(("model", "loss", "weighted"), CASES)
def test_any_model(model, loss, weighted, removal):
    """f + J step of dense steps, J by differences."""
    case = problem(model, loss, 0.1, weighted)
    whole, once = Oracle(case), Oracle(type(case)(**{**vars(case), "counts": None}))
    counts = np.ones(len(case.y)) if case.counts is None else case.counts
    shares = counts / counts.sum()
    shift = 5.0 + perturbation_for(oracle_matrix(case), 1e3)
    H = whole.hessian() + shift * np.eye(whole.p)
    gradients = once.gradient_rows() * whole.scale / once.scale
    curvatures = once.ggn_rows() * whole.scale / once.scale
    inverter = HessianInverter("direct", shift, **case.settings())
    influence = InfluenceFunction(inverter, removal=removal, memory=2000)
    received = influence.fit(case.module, case.data, sample_weight=case.sample_weight).loo_predict()
    for i, share in enumerate(shares):
        A = H if removal == "first_order" else H - share * curvatures[i]
        step = torch.from_numpy(np.linalg.solve(A, share * gradients[i]))
        near = [once.outputs(once.theta + sign * 1e-5 * step, case.X[i : i + 1])[0] for sign in (1, -1)]
        expected = once.outputs(once.theta, case.X[i : i + 1])[0] + (near[0] - near[1]) / 2e-5
        np.testing.assert_allclose(received[i], expected.detach(), rtol=1e-6, atol=1e-8)


def test_the_scale_of_the_response():
    X, _, rng = regression(60)
    counts = rng.poisson(np.exp(0.4 * X[:, 0])).astype(float)
    positive = rng.gamma(2.0, np.exp(0.4 * X[:, 0]))
    two = (X[:, 0] + rng.standard_normal(60) > 0).astype(int)
    three = rng.integers(0, 3, 60)
    for model, y, mean in (
        (PoissonRegressor(alpha=0.1), counts, np.exp),
        (GammaRegressor(alpha=0.1), positive, np.exp),
        (LogisticRegression(), two, lambda f: 1 / (1 + np.exp(-f))),
        (LogisticRegression(), three, lambda f: np.exp(f) / np.exp(f).sum(1, keepdims=True)),
        (LogisticRegression(class_weight="balanced"), two, lambda f: 1 / (1 + np.exp(-f))),
    ):
        influence = InfluenceFunction(HessianInverter("direct", 1e-6), removal="newton").fit(model.fit(X, y), (X, y))
        np.testing.assert_allclose(influence.loo_predict(scale="response"), mean(influence.loo_predict()), rtol=1e-12)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (LogisticRegression(C=0.5, tol=1e-12, max_iter=1000), "predict_proba"),
        (PoissonRegressor(alpha=0.05, tol=1e-12, max_iter=1000), "predict"),
    ],
)
def test_newton_is_nearer_to_refits_than_first_order(model, method):
    """One step of Newton's is not retraining, but its error is of second order in the row's leverage."""
    X, _, rng = regression(60)
    y = rng.poisson(np.exp(0.4 * X[:, 0])).astype(float) if method == "predict" else (X[:, 0] > rng.normal(size=60)) * 1
    refits = cross_val_predict(model, X, y, cv=LeaveOneOut(), method=method)
    refits = refits if method == "predict" else refits[:, 1]
    now = model.fit(X, y).predict(X) if method == "predict" else model.fit(X, y).predict_proba(X)[:, 1]
    errors = {}
    for removal in ("first_order", "newton"):
        influence = InfluenceFunction(removal=removal).fit(model, (X, y))
        errors[removal] = np.abs(influence.loo_predict(scale="response")[:, 0] - refits).max()
    moved = np.abs(now - refits).max()
    assert errors["newton"] < 0.1 * moved
    assert errors["newton"] < errors["first_order"] < moved


def test_an_ensemble_is_the_mean():
    X, y, _ = regression()
    X, y = torch.from_numpy(X), torch.from_numpy(y[:, None])
    nets = [nn.Linear(3, 1).double(), nn.Linear(3, 1).double()]
    inverter = HessianInverter("direct", 0.1, loss="mse")
    alone = [InfluenceFunction(inverter).fit(net, (X, y)).loo_predict() for net in nets]
    both = InfluenceFunction(inverter).fit(nets, (X, y))
    np.testing.assert_allclose(both.loo_predict(), (alone[0] + alone[1]) / 2)
    with pytest.raises(TypeError, match="leverage must be asked of one model"):
        both.leverage()


def test_refusals():
    X, y, _ = regression()
    influence = InfluenceFunction(HessianInverter("direct", 0.1, loss=nn.HuberLoss()))
    influence.fit(nn.Linear(3, 1).double(), (torch.from_numpy(X), torch.from_numpy(y[:, None])))
    with pytest.raises(TypeError, match="a known likelihood. Got HuberLoss"):
        influence.loo_predict(scale="response")
    with pytest.raises(ValueError, match="scale"):
        influence.loo_predict(scale="predict")
