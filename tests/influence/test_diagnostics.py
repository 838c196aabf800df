"""Diagnostics against statsmodels, and where that has none against refits by numpy."""

import copy
import warnings

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from oracles import Oracle, oracle_matrix, perturbation_for, solution
from problems import problem, table
from sklearn.datasets import make_regression
from sklearn.linear_model import GammaRegressor, LinearRegression, LogisticRegression, PoissonRegressor, Ridge
from statsmodels.tools.sm_exceptions import SingularMatrixWarning
from torch import nn

from skinvert import HessianInverter, InfluenceFunction

N, P = 60, 4
CASES = list(table())[::17]
NAMES = ("leverage", "residuals", "studentized_internal", "studentized_external", "cooks_distance", "dffits", "dfbetas")


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, P)) * [1, 0.5, 2, 1] + [0, 1, 0, -1], rng


def linear(weighted=False):
    X, rng = inputs()
    y = X @ [1.0, -2.0, 0.5, 0.0] + 3 + rng.standard_normal(N)
    y[7] += 8
    return X, y, rng.uniform(0.2, 3, N) if weighted else None


def counts():
    X, rng = inputs(1)
    return X, rng.poisson(np.exp(0.3 * X[:, 0] - 0.2 * X[:, 2] + 0.5)).astype(float)


def classes():
    X, rng = inputs(2)
    return X, (rng.random(N) < 1 / (1 + np.exp(-X[:, 0] + 0.5 * X[:, 2]))).astype(int)


def twin(model, shape="column"):
    """A torch layer at a scikit-learn model's parameters."""
    net = nn.Linear(P, 1).double()
    net.weight.data = torch.from_numpy(np.atleast_2d(model.coef_).copy())
    net.bias.data = torch.as_tensor(np.atleast_1d(model.intercept_).copy())
    return net if shape == "column" else nn.Sequential(net, nn.Flatten(0))


def of_ols(X, y, w):
    """OLSInfluence; a weighted fit is that of rows times √w, of which statsmodels' for WLS is none."""
    root = np.ones(N) if w is None else np.sqrt(w)
    design = sm.add_constant(X, prepend=False)
    found = sm.OLS(root * y, root[:, None] * design).fit().get_influence()
    with warnings.catch_warnings():
        # A fit without a row may lose a parameter.
        warnings.simplefilter("ignore", SingularMatrixWarning)
        _ = found.dfbetas  # Cached.
    return {
        "leverage": found.hat_matrix_diag,
        "residuals": found.resid,
        "studentized_internal": found.resid_studentized_internal,
        "studentized_external": found.resid_studentized_external,
        "cooks_distance": found.cooks_distance[0],
        "dffits": found.dffits[0],
        "dfbetas": found.dfbetas,
    }


def of_glm(X, y, family, **weights):
    design = sm.add_constant(X, prepend=False)
    results = sm.GLM(y, design, family=family, **weights).fit(tol=1e-14, maxiter=100)
    found = results.get_influence()
    h = found.hat_matrix_diag
    return results.params, {
        "leverage": h,
        "residuals": results.resid_pearson,
        "studentized_internal": found.resid_studentized,
        "studentized_external": found.resid_studentized,
        "cooks_distance": found.cooks_distance[0],
        "dffits": found.resid_studentized * np.sqrt(h / (1 - h)),
        "dfbetas": found.dfbetas,
    }


def compare(found, expected, names=NAMES):
    for name in names:
        np.testing.assert_allclose(vars(found)[name], expected[name], rtol=1e-8, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["scikit-learn", "column", "flat", "sum"])
def test_linear_regression_is_statsmodels(kind, weighted):
    X, y, w = linear(weighted)
    model = LinearRegression().fit(X, y, w)
    if kind == "scikit-learn":
        influence = InfluenceFunction().fit(model, (X, y), sample_weight=w)
    else:
        target = torch.from_numpy(y if kind == "flat" else y[:, None])
        loss = nn.MSELoss(reduction="sum") if kind == "sum" else "mse"
        inverter = HessianInverter("direct", loss=loss, batch_size=17)
        net = twin(model, "flat" if kind == "flat" else "column")
        influence = InfluenceFunction(inverter, memory=1000).fit(net, (torch.from_numpy(X), target), sample_weight=w)
    found, expected = influence.diagnostics(), of_ols(X, y, w)
    compare(found, expected)
    np.testing.assert_allclose(influence.leverage(), expected["leverage"], rtol=1e-9)
    np.testing.assert_allclose([found.df_model, found.df_residual], [P + 1, N - P - 1], rtol=1e-9)


def test_weights_are_those_of_wls():
    """A Gaussian GLM's variance weights: the statistics that do not leave a row's dispersion out."""
    X, y, w = linear(True)
    results = sm.WLS(y, sm.add_constant(X, prepend=False), weights=w).fit()
    found = InfluenceFunction().fit(LinearRegression().fit(X, y, w), (X, y), sample_weight=w).diagnostics()
    np.testing.assert_allclose(found.dispersion, results.scale, rtol=1e-9)
    _, expected = of_glm(X, y, sm.families.Gaussian(), var_weights=w)
    compare(found, expected, ("leverage", "studentized_internal", "cooks_distance"))


def test_a_row_of_weight_zero_is_no_row():
    X, y, w = linear(True)
    w[[3, 30]] = 0
    found = InfluenceFunction().fit(LinearRegression().fit(X, y, w), (X, y), sample_weight=w).diagnostics()
    kept = w > 0
    rest = LinearRegression().fit(X[kept], y[kept], w[kept])
    expected = InfluenceFunction().fit(rest, (X[kept], y[kept]), sample_weight=w[kept]).diagnostics()
    compare_kept = {name: vars(expected)[name] for name in NAMES}
    for name in NAMES:
        np.testing.assert_allclose(vars(found)[name][kept], compare_kept[name], rtol=1e-8, atol=1e-8)
        np.testing.assert_array_equal(vars(found)[name][~kept], 0)


GLMS = {
    "logistic": (classes, sm.families.Binomial(), "bce_with_logits"),
    "poisson": (counts, sm.families.Poisson(), nn.PoissonNLLLoss(log_input=True)),
}


def glm(kind, w=None):
    X, y = GLMS[kind][0]()
    if kind == "logistic":
        return X, y, LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-13, max_iter=200).fit(X, y, w)
    return X, y, PoissonRegressor(alpha=0, solver="newton-cholesky", tol=1e-13).fit(X, y, w)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("torch_model", [False, True])
@pytest.mark.parametrize("kind", GLMS)
def test_glms_are_statsmodels(kind, torch_model, weighted):
    """One step, at a dispersion of 1. Weights are statsmodels' ``var_weights``: by ``freq_weights`` it takes the

    leverage of all copies of a row, which is ours too, beside the residual of one.
    """
    w = np.random.default_rng(5).integers(1, 4, N).astype(float) if weighted else None
    X, y, model = glm(kind, w)
    params, expected = of_glm(X, y, GLMS[kind][1], **({"var_weights": w} if weighted else {}))
    if weighted:
        _, counted = of_glm(X, y, GLMS[kind][1], freq_weights=w)
        np.testing.assert_allclose(counted["leverage"], expected["leverage"], rtol=1e-9)
    np.testing.assert_allclose([*model.coef_.ravel(), *np.ravel(model.intercept_)], params, rtol=1e-9)
    data = (torch.from_numpy(X), torch.from_numpy(y[:, None].astype(float))) if torch_model else (X, y)
    inverter = HessianInverter("direct", loss=GLMS[kind][2]) if torch_model else None
    influence = InfluenceFunction(inverter).fit(twin(model) if torch_model else model, data, sample_weight=w)
    compare(influence.diagnostics(), expected)
    np.testing.assert_allclose(influence.leverage(), expected["leverage"], rtol=1e-8)


def test_class_weights_count_as_weights():
    X, y = classes()
    settings = {"solver": "newton-cholesky", "tol": 1e-13, "max_iter": 200}
    model = LogisticRegression(C=np.inf, class_weight={0: 1.0, 1: 2.5}, **settings).fit(X, y)
    _, expected = of_glm(X, y, sm.families.Binomial(), var_weights=np.where(y == 1, 2.5, 1.0))
    compare(InfluenceFunction().fit(model, (X, y)).diagnostics(), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_is_refits(weighted):
    """Each row left out in turn at the same α, by numpy; degrees of freedom from the hat matrix of each refit."""
    X, y, w = linear(weighted)
    w = np.ones(N) if w is None else w
    design, alpha = np.column_stack([X, np.ones(N)]), 5.0
    penalty = np.diag([alpha] * P + [0.0])

    def fit(kept):
        A = design[kept].T @ (w[kept, None] * design[kept]) + penalty
        theta = np.linalg.solve(A, design[kept].T @ (w[kept] * y[kept]))
        h = w[kept] * np.einsum("ip,pq,iq->i", design[kept], np.linalg.inv(A), design[kept])
        squares = w[kept] * (y[kept] - design[kept] @ theta) ** 2
        return theta, h, squares.sum() / (kept.sum() - h.sum()), A

    theta, h, phi, A = fit(np.ones(N, dtype=bool))
    r = np.sqrt(w) * (y - design @ theta)
    found = InfluenceFunction().fit(Ridge(alpha=alpha).fit(X, y, w), (X, y), sample_weight=w).diagnostics()
    np.testing.assert_allclose(found.dispersion, phi, rtol=1e-9)
    np.testing.assert_allclose(found.df_model, h.sum(), rtol=1e-9)
    for i in range(N):
        moved, _, without, _ = fit(np.arange(N) != i)
        external = r[i] / np.sqrt(without * (1 - h[i]))
        fits = np.sqrt(w) * (design @ (theta - moved))
        expected = {
            "leverage": h[i],
            "residuals": r[i],
            "studentized_internal": r[i] / np.sqrt(phi * (1 - h[i])),
            "studentized_external": external,
            "cooks_distance": fits @ fits / (phi * h.sum()),
            "dffits": fits[i] / np.sqrt(without * h[i]),
            "dfbetas": (theta - moved) / np.sqrt(without * np.diag(np.linalg.inv(A))),
        }
        for name in NAMES:
            np.testing.assert_allclose(vars(found)[name][i], expected[name], rtol=1e-8, atol=1e-8, err_msg=name)


@pytest.mark.parametrize(("arguments", "k"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_leverage_of_any_model(arguments, k):
    case = problem(*arguments)
    shift = 5.0 + perturbation_for(oracle_matrix(case), 1e3)
    whole, once = Oracle(case), Oracle(type(case)(**{**vars(case), "counts": None}))
    counted = np.ones(len(case.y)) if case.counts is None else case.counts
    H = whole.hessian() + shift * np.eye(whole.p)
    inverter = HessianInverter("direct", shift, **case.settings())
    try:
        own = once.ggn_rows() * whole.scale / once.scale
        received = InfluenceFunction(inverter).fit(case.module, case.data, sample_weight=case.sample_weight).leverage()
    except ValueError as error:
        assert "convex in the outputs" in str(error)
        return
    expected = [np.trace(solution(H, 0, share * h)) for h, share in zip(own, counted / counted.sum(), strict=True)]
    np.testing.assert_allclose(received, expected, rtol=1e-7, atol=1e-10)


def test_a_row_that_decides_a_parameter_alone():
    X, y, _ = linear()
    X = np.column_stack([X[:, :3], np.arange(N) == 7])
    found = InfluenceFunction().fit(LinearRegression().fit(X, y), (X, y)).diagnostics()
    np.testing.assert_allclose(found.leverage[7], 1)
    assert np.isnan(found.studentized_internal[7])
    assert np.isnan(found.dfbetas[7]).all()
    others = np.arange(N) != 7
    # statsmodels divides by √(1 − h) of that row too, whose h some processors round to more than 1.
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = of_ols(X, y, None)
    for name in NAMES:
        np.testing.assert_allclose(vars(found)[name][others], expected[name][others], rtol=1e-7, atol=1e-8)


def test_refusals():
    X, y, _ = linear()
    two = LinearRegression().fit(X, np.column_stack([y, y]))
    several = InfluenceFunction().fit(two, (X, np.column_stack([y, y])))
    with pytest.raises(ValueError, match="of one output. Got 2 outputs instead. `leverage"):
        several.diagnostics()
    np.testing.assert_allclose(several.leverage(), 2 * of_ols(X, y, None)["leverage"])
    positive = np.exp(y / 10)
    gamma = InfluenceFunction().fit(GammaRegressor(alpha=0).fit(X, positive), (X, positive))
    with pytest.raises(TypeError, match="The loss must be squared error, a logistic loss or Poisson's"):
        gamma.diagnostics()
    huber = InfluenceFunction(HessianInverter("direct", loss=nn.HuberLoss()))
    huber.fit(twin(LinearRegression().fit(X, y)), (torch.from_numpy(X), torch.from_numpy(y[:, None])))
    with pytest.raises(TypeError, match="Got HuberLoss"):
        huber.diagnostics()
    few = InfluenceFunction().fit(LinearRegression().fit(X[:5], y[:5]), (X[:5], y[:5]))
    with pytest.raises(ValueError, match="more than the 5 parameters that they decide. Got 5"):
        few.diagnostics()


@pytest.mark.filterwarnings("ignore")
def test_an_inverse_of_another_matrix_is_refused():
    X, y, _ = linear()
    model = LinearRegression().fit(X, y)
    for inverter in (HessianInverter("direct", 1e-3, curvature="empirical_fisher"), HessianInverter("diagonal")):
        with pytest.raises(ValueError, match="must be that of the GGN, .* off a solution"):
            InfluenceFunction(inverter).fit(model, (X, y)).diagnostics()
    dependent = np.column_stack([X, X[:, 0]])
    influence = InfluenceFunction().fit(LinearRegression().fit(dependent, y), (dependent, y))
    with pytest.raises(ValueError, match="linearly dependent columns"):
        influence.diagnostics()


def test_iterative_and_float32():
    X, y, _ = linear()
    model = LinearRegression().fit(X, y)
    expected = of_ols(X, y, None)
    found = InfluenceFunction(HessianInverter("cg")).fit(model, (X, y)).diagnostics()
    for name in NAMES:
        np.testing.assert_allclose(vars(found)[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    net = copy.deepcopy(twin(model)).float()
    data = (torch.from_numpy(X).float(), torch.from_numpy(y[:, None]).float())
    found = InfluenceFunction(HessianInverter("direct", loss="mse")).fit(net, data).diagnostics()
    for name in NAMES:
        np.testing.assert_allclose(vars(found)[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_pipeline_of_many_rows_and_chunks():
    X, y = make_regression(400, 30, noise=5.0, random_state=0)
    model = LinearRegression().fit(X, y)
    few = InfluenceFunction(memory=4 * 31 * 8 * 7).fit(model, (X, y)).diagnostics()
    whole = InfluenceFunction().fit(model, (X, y)).diagnostics()
    for name in NAMES:
        np.testing.assert_allclose(vars(few)[name], vars(whole)[name], rtol=1e-9, atol=1e-12)
