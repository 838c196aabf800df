"""Fitted scikit-learn models: L is scikit-learn's own objective, written here in NumPy from its documentation.

Its gradient is taken by complex steps, which are exact, and its Hessian by central differences of that gradient.
"""

import copy
import inspect
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_linnerud
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import (
    GammaRegressor,
    Lasso,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    PoissonRegressor,
    Ridge,
    SGDClassifier,
)
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeRegressor
from sklearn.utils.class_weight import compute_class_weight
from skorch.helper import SliceDataset
from torch.utils.data import TensorDataset

from skinvert import HessianInverter, PerSampleGradient, SampledFisher, SklearnTwiceDifferentiable, solve_hvp

# -- data --------------------------------------------------------------------------------------------------------------


def iris():
    data = load_iris()
    X = StandardScaler().fit_transform(data.data)[::2]
    # Unbalanced, and strings in no order of their own.
    keep = np.r_[0:25, 25:40, 50:62]
    return X[keep], np.array(["versicolor", "setosa", "aster"])[data.target[::2][keep]]


def cancer():
    data = load_breast_cancer()
    return StandardScaler().fit_transform(data.data[:90, :4]), data.target[:90] * 5 - 2


def diabetes():
    data = load_diabetes()
    return 20 * data.data[:80, :5], data.target[:80] / 50


def exercise():
    data = load_linnerud()
    return StandardScaler().fit_transform(data.data), StandardScaler().fit_transform(data.target)


def several_labels():
    X, y = exercise()
    return X, (y > 0).astype(int)


COUNTS = np.random.default_rng(0).integers(0, 4, 200).astype(float)

LOGISTIC = {"tol": 1e-12, "max_iter": 10_000}
# Its rate falls by five after 600 epochs without progress, down to 1e-6: what noise is left is that small.
SGD = {
    "loss": "log_loss",
    "learning_rate": "adaptive",
    "eta0": 0.1,
    "n_iter_no_change": 600,
    "tol": 1e-9,
    "max_iter": 20_000,
    "random_state": 0,
}
GLM = {"tol": 1e-12, "max_iter": 10_000, "solver": "newton-cholesky"}
MLP = {"hidden_layer_sizes": (3,), "solver": "lbfgs", "tol": 1e-14, "max_iter": 20_000, "random_state": 0}

# The model, its data, its weights, and how near to zero its own solver brings the gradient.
FITS = {
    "least squares": (LinearRegression(), diabetes, False, 1e-12),
    "least squares without intercept, weighted": (LinearRegression(fit_intercept=False), diabetes, True, 1e-12),
    "least squares of three outputs": (LinearRegression(), exercise, True, 1e-12),
    "ridge": (Ridge(alpha=3.0), diabetes, False, 1e-12),
    "ridge, weighted": (Ridge(alpha=30.0), diabetes, True, 1e-12),
    "ridge without intercept": (Ridge(alpha=30.0, fit_intercept=False), diabetes, False, 1e-12),
    "ridge of three outputs": (Ridge(alpha=np.array([1.0, 10.0, 0.1])), exercise, True, 1e-12),
    "binary": (LogisticRegression(C=0.3, **LOGISTIC), cancer, False, 1e-7),
    "binary, weighted": (LogisticRegression(C=0.03, solver="newton-cholesky", **LOGISTIC), cancer, True, 1e-7),
    "binary, balanced": (LogisticRegression(C=10.0, class_weight="balanced", **LOGISTIC), cancer, False, 1e-7),
    "binary, balanced, weighted": (LogisticRegression(C=0.1, class_weight="balanced", **LOGISTIC), cancer, True, 1e-7),
    "binary, class weights": (LogisticRegression(class_weight={-2: 4.0, 3: 0.5}, **LOGISTIC), cancer, True, 1e-7),
    "binary, no penalty": (LogisticRegression(C=np.inf, fit_intercept=False, **LOGISTIC), cancer, False, 1e-6),
    "binary by liblinear": (
        LogisticRegression(solver="liblinear", fit_intercept=False, C=0.2, class_weight="balanced", **LOGISTIC),
        cancer,
        True,
        1e-6,
    ),
    "softmax": (LogisticRegression(C=0.5, **LOGISTIC), iris, False, 1e-6),
    "softmax, weighted": (LogisticRegression(C=5.0, **LOGISTIC), iris, True, 1e-6),
    "softmax, balanced": (LogisticRegression(C=0.1, class_weight="balanced", **LOGISTIC), iris, True, 1e-6),
    "softmax, class weights": (
        LogisticRegression(class_weight={"aster": 7.0}, fit_intercept=False, **LOGISTIC),
        iris,
        False,
        1e-6,
    ),
    "sgd": (SGDClassifier(alpha=0.1, **SGD), cancer, False, 1e-4),
    "sgd, weighted, balanced": (SGDClassifier(alpha=0.3, class_weight="balanced", **SGD), cancer, True, 1e-4),
    "sgd against the rest": (SGDClassifier(alpha=0.1, **SGD), iris, False, 1e-4),
    "sgd against the rest, weighted, balanced": (
        SGDClassifier(alpha=0.1, class_weight="balanced", **SGD),
        iris,
        True,
        1e-4,
    ),
    "poisson": (PoissonRegressor(alpha=0.2, **GLM), diabetes, False, 1e-9),
    "poisson, weighted": (PoissonRegressor(alpha=0.2, fit_intercept=False, **GLM), diabetes, True, 1e-9),
    "gamma": (GammaRegressor(alpha=0.5, **GLM), diabetes, True, 1e-9),
    "mlp, softmax": (MLPClassifier(alpha=2.0, activation="tanh", **MLP), iris, False, 1e-5),
    "mlp, binary": (MLPClassifier(alpha=2.0, activation="logistic", **MLP), cancer, True, 1e-5),
    "mlp, several labels": (MLPClassifier(alpha=0.5, activation="tanh", **MLP), several_labels, False, 1e-5),
    "mlp, regression": (MLPRegressor(alpha=5.0, activation="tanh", **MLP), diabetes, True, 1e-5),
    # Stopped early: at the optimum some row sits on a kink.
    "mlp, two layers of relu": (
        MLPRegressor(alpha=5.0, activation="relu", **{**MLP, "hidden_layer_sizes": (3, 2), "max_iter": 5}),
        diabetes,
        False,
        None,
    ),
    # 26 of 52 rows at a time: the penalty counts twice.
    "mlp by adam": (
        MLPClassifier((3,), alpha=2.0, batch_size=26, max_iter=2, random_state=0),
        iris,
        False,
        None,
    ),
}
if "loss" in MLPRegressor().get_params():
    FITS["mlp, poisson"] = (MLPRegressor("poisson", alpha=1.0, activation="tanh", **MLP), diabetes, False, 1e-5)

ALL = pytest.mark.parametrize("name", FITS)


def takes_weights(function):
    """Whether this scikit-learn has them: MLPs and balanced class weights had none at first."""
    return "sample_weight" in inspect.signature(function).parameters


@pytest.fixture(scope="module")
def fits():
    """Return a function that fits by name, once each: model, X, y, weights or None."""
    kept = {}

    def fit(name):
        if name not in kept:
            model, load, weighted, _ = FITS[name]
            X, y = load()
            weights = COUNTS[: len(X)] if weighted and takes_weights(model.fit) else None
            settings = {} if weights is None else {"sample_weight": weights}
            with warnings.catch_warnings():
                # Some solvers are asked for more digits than they have.
                warnings.simplefilter("ignore")
                model = clone(model).fit(X, y, **settings)
                if isinstance(model, MLPClassifier | MLPRegressor) and FITS[name][-1]:
                    # L-BFGS stops on a relative decrease of 2e-9; begun again, it comes closer.
                    model.set_params(warm_start=True)
                    for _ in range(60):
                        model.fit(X, y, **settings)
                kept[name] = (model, X, y, weights)
        return kept[name]

    return fit


# -- scikit-learn's objectives -----------------------------------------------------------------------------------------


def parameters_of(model):
    if hasattr(model, "coefs_"):
        return [*model.coefs_, *model.intercepts_]
    coef = np.atleast_2d(model.coef_)
    return [coef, np.broadcast_to(model.intercept_, len(coef))] if model.fit_intercept else [coef]


def flat(model):
    return np.concatenate([part.ravel() for part in parameters_of(model)])


def objective(model, X, y, weights):
    """Return θ -> L, for real or complex θ."""
    shapes = [part.shape for part in parameters_of(model)]
    w = np.ones(len(X)) if weights is None else weights
    loss, ridge = mlp(model, X, y, w) if hasattr(model, "coefs_") else LINEAR[type(model)](model, X, y, w)

    def L(theta):
        parts = np.split(theta, np.cumsum([np.prod(shape, dtype=int) for shape in shapes])[:-1])
        parts = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        coefs = parts[: len(model.coefs_)] if hasattr(model, "coefs_") else parts[:1]
        squares = sum((np.atleast_1d(ridge)[:, None] * coef.reshape(np.size(ridge), -1) ** 2).sum() for coef in coefs)
        return loss(forward(model, X, parts)) + squares / 2

    return L


def forward(model, X, parts):
    if not hasattr(model, "coefs_"):
        return X @ parts[0].T + (parts[1] if len(parts) > 1 else 0)
    n_layers = len(model.coefs_)
    activation = {
        "tanh": np.tanh,
        "logistic": lambda z: 1 / (1 + np.exp(-z)),
        "relu": lambda z: np.where(z.real > 0, z, 0),
    }[model.activation]
    a = X
    for i in range(n_layers):
        a = a @ parts[i] + parts[n_layers + i]
        a = a if i == n_layers - 1 else activation(a)
    return a


def log_loss(f, k):
    """−log p_k of a softmax over f, or of one logit for k in {0, 1}."""
    if f.shape[1] == 1:
        return np.log(1 + np.exp(f[:, 0])) - k * f[:, 0]
    return np.log(np.exp(f).sum(1)) - f[np.arange(len(f)), k]


def squares(model, X, y, w):
    y = y.reshape(len(y), -1)
    # ‖y − Xw‖² + α‖w‖², over 2 Σw.
    return lambda f: (w @ (f - y) ** 2).sum() / (2 * w.sum()), np.array(getattr(model, "alpha", 0.0)) / w.sum()


def logistic(model, X, y, w):
    c = compute_class_weight(model.class_weight, classes=model.classes_, y=y, **weights_of(w))
    k = np.searchsorted(model.classes_, y)
    s = w * c[k]
    # C Σ s ℓ + ½ ‖W‖², over C Σ s.
    return lambda f: s @ log_loss(f, k) / s.sum(), 1 / (model.C * s.sum())


def weights_of(w):
    return {"sample_weight": w} if takes_weights(compute_class_weight) else {}


def stochastic(model, X, y, w):
    c = compute_class_weight(model.class_weight, classes=model.classes_, y=y)
    k = np.searchsorted(model.classes_, y)

    def loss(f):
        if f.shape[1] == 1:
            return (w * c[k]) @ log_loss(f, k) / w.sum()
        each = [(w * np.where(k == j, c[j], 1)) @ log_loss(f[:, [j]], k == j) for j in range(f.shape[1])]
        return sum(each) / w.sum()

    # (1/n) Σ w c ℓ + α ‖W‖² / 2, times n / Σw.
    return loss, model.alpha * len(w) / w.sum()


def poisson(model, X, y, w):
    return lambda f: w @ (np.exp(f[:, 0]) - y * f[:, 0]) / w.sum(), model.alpha


def gamma(model, X, y, w):
    return lambda f: w @ (f[:, 0] + y * np.exp(-f[:, 0])) / w.sum(), model.alpha


LINEAR = {
    LinearRegression: squares,
    Ridge: squares,
    LogisticRegression: logistic,
    SGDClassifier: stochastic,
    PoissonRegressor: poisson,
    GammaRegressor: gamma,
}


def mlp(model, X, y, w):
    share = 1.0 if model.solver == "lbfgs" else len(X) / model.batch_size
    ridge = model.alpha * share / w.sum()
    if isinstance(model, MLPRegressor):
        if model.loss == "poisson":
            return lambda f: w @ (np.exp(f[:, 0]) - y * f[:, 0]) / w.sum(), ridge
        return lambda f: (w @ (f - y.reshape(len(y), -1)) ** 2).sum() / (2 * w.sum()), ridge
    if y.ndim == 2:
        return lambda f: sum(w @ log_loss(f[:, [j]], y[:, j]) for j in range(f.shape[1])) / w.sum(), ridge
    k = np.searchsorted(model.classes_, y)
    return lambda f: w @ log_loss(f, k) / w.sum(), ridge


def gradient(L, theta):
    steps = 1e-30j * np.eye(len(theta))
    return np.array([L(theta + step).imag / 1e-30 for step in steps])


def hessian(L, theta, h=1e-5):
    columns = [(gradient(L, theta + e) - gradient(L, theta - e)) / (2 * h) for e in h * np.eye(len(theta))]
    return (np.array(columns) + np.array(columns).T) / 2


# -- against them ------------------------------------------------------------------------------------------------------


@ALL
def test_hessian(name, fits):
    model, X, y, weights = fits(name)
    expected = hessian(objective(model, X, y, weights), flat(model))
    inverter = HessianInverter("direct", 1e3).fit(model, (X, y), weights)
    received = inverter.curvature_.to_dense().numpy()
    assert np.abs(received - expected).max() <= 2e-9 * np.abs(expected).max()


@ALL
def test_gradient(name, fits):
    # Beside the optimum, where it is not small.
    model, X, y, weights = fits(name)
    theta = flat(model)
    moved = theta + 0.1 * np.random.default_rng(1).standard_normal(len(theta))
    expected = gradient(objective(model, X, y, weights), moved)
    inverter = HessianInverter("cg", 1e3).fit(with_parameters(model, moved), (X, y), weights)
    np.testing.assert_allclose(inverter.curvature_.objective.gradient.numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [name for name, fit in FITS.items() if fit[-1] is not None])
def test_the_gradient_vanishes_at_the_fitted_optimum(name, fits):
    model, X, y, weights = fits(name)
    received = HessianInverter("cg", 1e3).fit(model, (X, y), weights).gradient_norm_
    assert received <= FITS[name][-1]


@ALL
def test_ggn_and_per_sample_gradients(name, fits):
    model, X, y, weights = fits(name)
    inverter = HessianInverter("direct", 1e3, curvature="ggn").fit(model, (X, y), weights)
    if not hasattr(model, "coefs_"):
        # Linear in its parameters.
        expected = HessianInverter("cg", 1e3).fit(model, (X, y), weights).curvature_.to_dense()
        torch.testing.assert_close(inverter.curvature_.to_dense(), expected, rtol=1e-11, atol=1e-14)
    rows = PerSampleGradient(model).fit(X, y, weights).transform((X, y))
    penalty = inverter.curvature_.objective.model.penalty_gradient().numpy()
    mean = np.average(rows, axis=0, weights=weights) + penalty
    np.testing.assert_allclose(mean, inverter.curvature_.objective.gradient.numpy(), rtol=1e-9, atol=1e-12)


def jacobian(model, X, h=1e-30):
    """Return ∂f/∂θ (n, c, p) by complex steps."""
    shapes, theta = [part.shape for part in parameters_of(model)], flat(model)
    stops = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])[:-1]

    def outputs(theta):
        parts = [part.reshape(shape) for part, shape in zip(np.split(theta, stops), shapes, strict=True)]
        return forward(model, X, parts)

    return np.stack([outputs(theta + 1j * h * row).imag / h for row in np.eye(len(theta))], axis=2)


def penalty(model, X, y, w):
    """Return its second derivatives (p,)."""
    layered = hasattr(model, "coefs_")
    ridge = np.atleast_1d((mlp(model, X, y, w) if layered else LINEAR[type(model)](model, X, y, w))[1])
    n_coefs = len(model.coefs_) if layered else 1
    parts = parameters_of(model)
    coefs = [np.repeat(ridge, coef.size // len(ridge)) for coef in parts[:n_coefs]]
    return np.concatenate([*coefs, *(np.zeros(intercept.size) for intercept in parts[n_coefs:])])


@pytest.mark.parametrize(
    "name",
    [
        "least squares without intercept, weighted",
        "least squares of three outputs",
        "ridge, weighted",
        "ridge of three outputs",
        "mlp, regression",
    ],
)
def test_the_fisher_of_half_squared_error(name, fits):
    """ℓ = ½ ‖f − y‖² is −log p of unit variance: Σ wᵢ Jᵢᵀ Jᵢ / Σ wᵢ, beside the penalty."""
    model, X, y, weights = fits(name)
    J, w = jacobian(model, X), np.ones(len(X)) if weights is None else weights
    expected = np.einsum("n,ncp,ncq->pq", w / w.sum(), J, J) + np.diag(penalty(model, X, y, w))
    received = HessianInverter("direct", 1.0, curvature="fisher").fit(model, (X, y), weights).curvature_.to_dense()
    np.testing.assert_allclose(received, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())
    drawn = HessianInverter("direct", 1.0, curvature=SampledFisher(1000)).fit(model, (X, y), weights)
    error = np.linalg.norm(drawn.curvature_.to_dense().numpy() - expected)
    assert 0 < error <= 0.1 * np.linalg.norm(expected)


def with_parameters(model, theta):
    """Return a copy at another θ."""
    model = copy.deepcopy(model)
    shapes = [part.shape for part in parameters_of(model)]
    parts = np.split(theta, np.cumsum([np.prod(shape, dtype=int) for shape in shapes])[:-1])
    parts = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    if hasattr(model, "coefs_"):
        n_layers = len(model.coefs_)
        model.coefs_, model.intercepts_ = parts[:n_layers], parts[n_layers:]
    else:
        model.coef_ = parts[0].reshape(model.coef_.shape)
        model.intercept_ = parts[1] if model.fit_intercept else model.intercept_
    return model


def test_mlp_of_several_outputs_is_what_back_propagation_differentiates():
    # scikit-learn reports half the *mean* over outputs, and descends half the sum.
    X, y = exercise()
    model = MLPRegressor(
        hidden_layer_sizes=(3,), alpha=2.0, activation="tanh", batch_size=5, max_iter=3, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y)
    steps = []
    for start in range(0, len(X), 5):
        rows = slice(start, start + 5)
        lists = [[None] * model.n_layers_ for _ in range(4)]
        lists[0][0] = X[rows]
        _, coefs, intercepts = model._backprop(X[rows], y[rows], *([None] * takes_weights(model._backprop)), *lists)
        steps.append(np.concatenate([part.ravel() for part in [*coefs[:2], *intercepts[:2]]]))
    received = HessianInverter("cg", 1e3).fit(model, (X, y)).curvature_.objective.gradient
    np.testing.assert_allclose(received.numpy(), np.mean(steps, axis=0), rtol=1e-10, atol=1e-13)


# -- names, totals -----------------------------------------------------------------------------------------------------


def test_names_shapes_and_order(fits):
    model, X, y, _ = fits("softmax")
    inverter = HessianInverter("direct").fit(model, (X, y))
    assert inverter.parameter_names_ == ["coef", "intercept"]
    received = inverter.unflatten(flat(model)[None])
    np.testing.assert_array_equal(received["coef"][0], model.coef_)
    np.testing.assert_array_equal(received["intercept"][0], model.intercept_)
    assert inverter.get_feature_names_out()[:2].tolist() == ["coef[0,0]", "coef[0,1]"]


def test_names_shapes_and_order_of_an_mlp(fits):
    model, X, y, _ = fits("mlp, softmax")
    inverter = HessianInverter("direct", 1.0).fit(model, (X, y))
    assert inverter.parameter_names_ == ["coefs.0", "coefs.1", "intercepts.0", "intercepts.1"]
    received = inverter.unflatten(flat(model)[None])
    np.testing.assert_array_equal(received["coefs.0"][0], model.coefs_[0])
    np.testing.assert_array_equal(received["intercepts.1"][0], model.intercepts_[1])


def test_params_choose_the_coefficients(fits):
    model, X, y, _ = fits("ridge")
    whole = HessianInverter("direct").fit(model, (X, y)).curvature_.to_dense()
    part = HessianInverter("direct", params="coef").fit(model, (X, y)).curvature_.to_dense()
    torch.testing.assert_close(part, whole[:5, :5])


def test_the_totals_are_those_of_the_fit_when_given():
    X, y = iris()
    model = LogisticRegression(C=0.1, class_weight="balanced", **LOGISTIC).fit(X, y)
    fold = np.r_[0:30, 40:52]
    whole = HessianInverter("direct").fit(model, (X, y))
    given = HessianInverter("direct").fit(SklearnTwiceDifferentiable(model, y), (X[fold], y[fold]))
    left = HessianInverter("direct").fit(model, (X[fold], y[fold]))
    torch.testing.assert_close(given.curvature_.penalty, whole.curvature_.penalty)
    assert not torch.allclose(left.curvature_.penalty, whole.curvature_.penalty, rtol=1e-2)


def test_score_keeps_the_totals_of_the_fit():
    X, y = diabetes()
    model = Ridge(alpha=30.0).fit(X[:60], y[:60])
    inverter = HessianInverter("direct", 0.1).fit(model, (X[:60], y[:60]))
    received = inverter.score(X[60:], y[60:])
    # The held-out quadratic of DESIGN, in NumPy: R of the 60 fitted rows, H̄ and h of the 20 others.
    Z, T = np.c_[X, np.ones(80)], np.diag([0.5] * 5 + [0.0])
    A = Z[:60].T @ Z[:60] / 60 + T + 0.1 * np.eye(6)
    G = Z[60:] * (X[60:] @ model.coef_ + model.intercept_ - y[60:])[:, None]
    z = np.linalg.solve(A, G.T).T
    along = (z @ Z[60:].T) ** 2
    quadratic = (along.sum(1) - np.diag(along)) / 19
    expected = np.mean((G * z).sum(1) - quadratic / 2 - np.einsum("ij,jk,ik->i", z, T, z) / 2)
    assert received == pytest.approx(expected, rel=1e-10)


def test_per_sample_gradients_of_other_rows_keep_the_class_weights_of_the_fit():
    X, y = cancer()
    model = LogisticRegression(class_weight="balanced", **LOGISTIC).fit(X, y)
    whole = PerSampleGradient(model).fit(X, y).transform((X, y))
    part = PerSampleGradient(model).fit(X, y).transform((X[:7], y[:7]))
    np.testing.assert_allclose(part, whole[:7], rtol=1e-12)


def test_the_functional_face_and_grad_and_hessian(fits):
    model, X, y, _ = fits("softmax")
    adapted = SklearnTwiceDifferentiable(model)
    expected = hessian(objective(model, X, y, None), flat(model))
    np.testing.assert_allclose(adapted.hessian(X, y).numpy(), expected, atol=1e-9)
    b = np.random.default_rng(0).standard_normal((2, len(expected)))
    x, _ = solve_hvp("direct", adapted, (X, y), b, hessian_perturbation=0.1)
    np.testing.assert_allclose(x, np.linalg.solve(expected + 0.1 * np.eye(len(expected)), b.T).T, rtol=1e-7)


# -- forms of data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "float32", "list", "column", "slice dataset"])
def test_forms_of_data(kind):
    X, y = cancer()
    model = LogisticRegression(C=0.3, **LOGISTIC).fit(X, y)
    expected = HessianInverter("direct").fit(model, (X, y)).curvature_.to_dense()
    X = X.astype(np.float32).astype(float)
    given = {
        "tensor": (torch.from_numpy(X), torch.from_numpy(y)),
        "float32": (X.astype(np.float32), y.astype(np.float32)),
        "list": (X.tolist(), y.tolist()),
        "column": (X, y[:, None]),
        "slice dataset": (SliceDataset(TensorDataset(torch.from_numpy(X), torch.from_numpy(y))), y),
    }[kind]
    received = HessianInverter("direct").fit(model, given).curvature_.to_dense()
    torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-7)


def test_data_frames_are_checked_by_name():
    pandas = pytest.importorskip("pandas")
    X, y = cancer()
    frame = pandas.DataFrame(X, columns=list("abcd"))
    model = LogisticRegression(C=0.3, **LOGISTIC).fit(frame, pandas.Series(y))
    expected = HessianInverter("direct").fit(model, (frame, y)).curvature_.to_dense()
    received = HessianInverter("direct", model=model).fit(frame, pandas.Series(y)).curvature_.to_dense()
    torch.testing.assert_close(received, expected)
    with pytest.raises(ValueError, match="feature names"):
        HessianInverter("direct").fit(model, (frame[list("badc")], y))


def test_float32_is_taken_when_asked(fits):
    model, X, y, _ = fits("softmax, balanced")
    expected = HessianInverter("direct", 0.1).fit(model, (X, y)).curvature_.to_dense()
    received = HessianInverter("direct", 0.1, dtype="float32").fit(model, (X, y)).curvature_.to_dense()
    assert received.dtype == torch.float32
    torch.testing.assert_close(received.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.cuda
@ALL
def test_on_a_gpu(name, fits):
    model, X, y, weights = fits(name)
    expected = HessianInverter("direct", 10.0, curvature="ggn").fit(model, (X, y), weights)
    inverter = HessianInverter("direct", 10.0, curvature="ggn", device="cuda").fit(model, (X, y), weights)
    received = inverter.curvature_.to_dense()
    assert received.device.type == "cuda"
    torch.testing.assert_close(received.cpu(), expected.curvature_.to_dense())
    assert inverter.score(X, y) == pytest.approx(expected.score(X, y), rel=1e-9)
    rows = PerSampleGradient(model, device="cuda").fit(X, y, weights).transform((X, y))
    np.testing.assert_allclose(rows, PerSampleGradient(model).fit(X, y, weights).transform((X, y)), atol=1e-12)


def test_the_model_is_unchanged(fits):
    model, X, y, _ = fits("mlp, softmax")
    before = flat(model)
    HessianInverter("direct", 1.0).fit(model, (X, y)).transform(np.ones((1, len(before))))
    np.testing.assert_array_equal(flat(model), before)


# -- refusals ----------------------------------------------------------------------------------------------------------


def with_l1(ratio):
    """Return a logistic regression with some L1, as this scikit-learn spells it."""
    spelt = LogisticRegression().get_params().get("penalty", "deprecated") == "deprecated"
    settings = {} if spelt else {"penalty": "elasticnet"}
    return LogisticRegression(l1_ratio=ratio, solver="saga", tol=1, **settings)


REFUSED = {
    "lasso": (Lasso(), diabetes, TypeError, "one of LinearRegression.*Got a Lasso.*register_model"),
    "forest": (RandomForestClassifier(2), cancer, TypeError, "Got a RandomForestClassifier"),
    "tree": (DecisionTreeRegressor(), diabetes, TypeError, "Got a DecisionTreeRegressor"),
    "svm": (SVC(), cancer, TypeError, "Got a SVC"),
    "scaler": (StandardScaler(), diabetes, TypeError, "Got a StandardScaler"),
    "l1": (with_l1(1), cancer, ValueError, "penalty .* must be l2 or none"),
    "elasticnet": (with_l1(0.5), cancer, ValueError, "l2 or none"),
    "liblinear": (LogisticRegression(solver="liblinear"), cancer, ValueError, "It penalises the intercept"),
    "search": (LogisticRegressionCV(Cs=[1.0]), cancer, ValueError, "must be a LogisticRegression"),
    "hinge": (SGDClassifier(), cancer, ValueError, "loss of a SGDClassifier must be 'log_loss'"),
    "sgd l1": (SGDClassifier(loss="log_loss", penalty="l1"), cancer, ValueError, "penalty .* must be 'l2' or None"),
    "positive": (Ridge(positive=True), diabetes, ValueError, "positive of a Ridge must be False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused(name):
    model, load, error, match = REFUSED[name]
    X, y = load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = clone(model).fit(X, y)
    with pytest.raises(error, match=match):
        HessianInverter().fit(model, (X, y))


@pytest.mark.parametrize(
    "model", [LogisticRegression(), MLPRegressor(), Ridge()], ids=lambda model: type(model).__name__
)
def test_an_unfitted_model_names_the_way_out(model):
    with pytest.raises(NotFittedError, match="must be fitted.*SharedModel.*FrozenEstimator"):
        HessianInverter().fit(model, diabetes())


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"loss": "mse"}, "loss must be left at its default"), ({"weight_decay": 1.0}, "weight_decay must be left at")],
)
def test_loss_and_weight_decay_are_the_model_s_own(settings, match, fits):
    model, X, y, _ = fits("ridge")
    with pytest.raises(ValueError, match=match):
        HessianInverter(**settings).fit(model, (X, y))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda X, y: (X, np.where(y == 3, 4, y)), ValueError, r"classes_ \[-2, 3\]. Got 4 instead"),
        (lambda X, y: (X, y.astype(str)), ValueError, "must be labels among"),
        (lambda X, y: (X, np.c_[y, y]), ValueError, "1D array of labels"),
        (lambda X, y: (X[:, :3], y), ValueError, "3 features"),
        (lambda X, y: (X, y[:-1]), ValueError, "same length"),
        (lambda X, y: [(X, y)], TypeError, r"an \(X, y\) tuple for a LogisticRegression"),
        (lambda X, y: (X * np.nan, y), ValueError, "NaN"),
    ],
)
def test_wrong_data_are_refused(change, error, match, fits):
    model, X, y, _ = fits("binary")
    with pytest.raises(error, match=match):
        HessianInverter().fit(model, change(X, y))


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("ridge", lambda y: np.c_[y, y], r"of shape \(n, 1\)"),
        ("poisson", lambda y: y - 10, "non-negative"),
        ("gamma", lambda y: y * 0, "positive"),
        ("binary, balanced", lambda y: y * 0 + 3, "rows of every class"),
        ("mlp, several labels", lambda y: 2 * y, "0 or 1"),
    ],
)
def test_wrong_targets_are_refused(name, change, match, fits):
    model, X, y, _ = fits(name)
    with pytest.raises(ValueError, match=match):
        HessianInverter().fit(model, (X, change(y)))


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_kronecker_factors_of_a_linear_model_are_those_of_its_layer(method):
    X, y = load_iris(return_X_y=True)
    fitted = LogisticRegression(C=0.5, max_iter=2000).fit(X, y)
    layer = torch.nn.Linear(4, 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(fitted.coef_))
        layer.bias.copy_(torch.tensor(fitted.intercept_))
    b = np.random.default_rng(0).standard_normal((3, 15))
    # One uniform penalty, which the model's own intercepts do not have: without them both are the same system.
    settings = {"params": ["coef"]}, {"params": ["weight"], "loss": "cross_entropy", "weight_decay": 1 / (0.5 * len(y))}
    received = (
        HessianInverter(method, 0.1, check_residual=False, **settings[0]).fit(fitted, (X, y)).transform(b[:, :12])
    )
    expected = HessianInverter(method, 0.1, check_residual=False, **settings[1]).fit(
        layer, (torch.tensor(X), torch.tensor(y))
    )
    np.testing.assert_allclose(received, expected.transform(b[:, :12]), rtol=1e-8)
