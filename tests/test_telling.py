"""Every warning points at the user's line, whatever rooms and libraries lie between."""

import inspect
import warnings

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn

from skinvert import HessianInverter, HessianInverterCV, InfluenceFunction, make_quadratic_scorer, solve_hvp
from skinvert.methods import CG
from skinvert.metrics import leave_one_out


def rows(n=20, p=6):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, p)) * np.logspace(0, 2, p), rng.standard_normal((3, p))


def network():
    torch.manual_seed(0)
    X, y = torch.randn(20, 3), torch.randint(0, 2, (20,))
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), X, y


SHORT = CG(maxiter=1, rtol=1e-12)


def classes():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((30, 2))
    return X, (X[:, 0] + rng.standard_normal(30) > 0).astype(int)


def fitted_influence(**settings):
    net, X, y = network()
    inverter = HessianInverter(SHORT, 0.1, curvature="ggn", loss="cross_entropy")
    return InfluenceFunction(inverter, **settings).fit(net, (X, y)), (X, y)


def solve():
    X, b = rows()
    HessianInverter(SHORT).fit(X).solve(b)


def with_a_bar():
    X, b = rows()
    HessianInverter(SHORT, verbose=1).fit(X).transform(b)


def along_a_path():
    X, b = rows()
    HessianInverter(SHORT).fit(X).path(b, [1e-3, 1e-2])


def fit_and_transform():
    X, _ = rows()
    HessianInverter(SHORT).fit_transform(X)


def in_a_pipeline():
    X, b = rows()
    pipe = make_pipeline(FunctionTransformer(), HessianInverter(SHORT)).fit(X)
    pipe.transform(b)


def in_a_pipeline_at_once():
    X, _ = rows()
    make_pipeline(FunctionTransformer(), HessianInverter(SHORT)).set_output(transform="pandas").fit_transform(X)


def of_a_function():
    net, X, y = network()
    solve_hvp("cg", net, (X, y), np.ones((1, 26)), hessian_perturbation=0.1, loss="cross_entropy", maxiter=1, rtol=1e-9)


def differentiated():
    X, b = rows()
    free = torch.from_numpy(b).requires_grad_()
    HessianInverter(SHORT).fit(X).transform(free).sum().backward()


def in_quadratic_forms():
    X, b = rows()
    HessianInverter(SHORT, 0.1).fit(X).quadratic(b)


def held_out_scores():
    net, X, y = network()
    indefinite = HessianInverter("cg", curvature="hessian", loss="cross_entropy").fit(net, (X, y))
    indefinite.score((X, y))


def of_a_grid_of_models():
    net, X, y = network()
    grid = {"inverter__hessian_perturbation": [0.1, 1.0]}
    influence = InfluenceFunction(HessianInverter(SHORT, curvature="ggn", loss="cross_entropy", model=net))
    cross_val_score(influence, X.numpy(), y.numpy(), cv=2)
    GridSearchCV(influence, grid, cv=2).fit(X.numpy(), y.numpy()).transform((X.numpy(), y.numpy()))


def as_a_scipy_operator():
    X, b = rows()
    operator = HessianInverter(SHORT).fit(X).aslinearoperator()
    scipy.sparse.linalg.gmres(np.eye(len(b[0])), b[0], M=operator, maxiter=1)


def in_a_search():
    X, _ = rows()
    b, grid = X[:2], {"hessian_perturbation": [1.0]}
    GridSearchCV(HessianInverter(SHORT), grid, cv=2, scoring=make_quadratic_scorer(b)).fit(X)


def in_cross_validation():
    X, b = rows()
    HessianInverterCV([1e-3, 1.0], method=SHORT, cv=2).fit(X).transform(b)


def in_threads():
    X, b = rows()
    inverter = HessianInverter(SHORT).fit(X)
    Parallel(n_jobs=1)(delayed(inverter.transform)(b) for _ in range(2))


def in_blocks_of_dask():
    X, b = rows()
    blocks = pytest.importorskip("dask.array").from_array(b, chunks=(1, -1))
    HessianInverter(SHORT).fit(X).transform(blocks).compute(scheduler="synchronous")


def scores():
    influence, test = fitted_influence()
    influence.transform(test)


def own_scores():
    influence, _ = fitted_influence()
    influence.self_influence()


def largest_scores():
    influence, test = fitted_influence(verbose=1)
    influence.top(test, k=2)


def of_groups():
    influence, test = fitted_influence()
    influence.group_effect([[0, 1], [2]], test)


def by_newton():
    influence, test = fitted_influence(removal="newton")
    influence.transform(test)


def leverages():
    influence, _ = fitted_influence()
    influence.leverage()


def left_out():
    influence, _ = fitted_influence()
    influence.loo_predict()


def features():
    influence, test = fitted_influence()
    influence.feature_influence([0], test)


def of_an_ensemble():
    net, X, y = network()
    inverter = HessianInverter(SHORT, 0.1, curvature="ggn", loss="cross_entropy")
    InfluenceFunction(inverter).fit([net, net], (X, y)).transform((X, y))


def without_a_bound():
    net, X, y = network()
    inverter = HessianInverter("cg", 0.1, curvature="hessian", loss="cross_entropy")
    InfluenceFunction(inverter, score_rtol=1e-3).fit(net, (X, y)).transform((X, y))


def retraining_that_ends_where_it_began():
    X, y = classes()
    leave_one_out(LogisticRegression(tol=10.0, max_iter=5), X, y, X[:3], y[:3], rows=[0, 1], verbose=1)


CALLS = [
    solve,
    with_a_bar,
    along_a_path,
    fit_and_transform,
    in_a_pipeline,
    in_a_pipeline_at_once,
    of_a_function,
    differentiated,
    in_quadratic_forms,
    held_out_scores,
    of_a_grid_of_models,
    as_a_scipy_operator,
    in_a_search,
    in_cross_validation,
    in_threads,
    in_blocks_of_dask,
    scores,
    own_scores,
    largest_scores,
    of_groups,
    by_newton,
    leverages,
    left_out,
    features,
    of_an_ensemble,
    without_a_bound,
    retraining_that_ends_where_it_began,
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_warnings_point_here(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    ours = [one for one in found if issubclass(one.category, ConvergenceWarning)]
    assert ours, "nothing warned"
    assert {one.filename for one in ours} == {__file__}
    lines, first = inspect.getsourcelines(call)
    assert all(first < one.lineno < first + len(lines) for one in ours)
