"""Every method of the registry against the dense float64 oracle; a new exact method inherits all of it."""

import copy
import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from definitions import DEFINITIONS, EXACT_TO, SETTINGS
from facts import CHOOSING, EVERY, ITERATIVE, KINDS, TIGHT, at_rest
from oracles import oracle_matrix, perturbation_for, relative_error, solution
from problems import number_of_rows, problem, table

from skinvert import HessianInverter

# What solves another system, or by another's work, is in test_every_method alone.
ELSEWHERE = {*CHOOSING, *DEFINITIONS, *EXACT_TO}
EXACT = [name for name in EVERY if name not in ELSEWHERE]


def configured(name):
    return KINDS[name](**SETTINGS[name])


@pytest.mark.one_in(8)
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize(("arguments", "k"), [pytest.param(a, k, id=name) for name, a, k in table()])
def test_solves_the_table(method, arguments, k):
    case = problem(*arguments)
    H = oracle_matrix(case)
    shift = perturbation_for(H, 1e3)
    # Hundreds of products a row: an iterative method takes the many rows on the small models.
    k = "7" if method in ITERATIVE and case.p > 25 else k
    b = case.right_hand_sides(number_of_rows(k, case.p))
    inverter = HessianInverter(configured(method), shift, **case.settings())
    expected = solution(H, shift, b)
    received = inverter.fit(case.module, case.data, case.sample_weight).transform(b)
    assert relative_error(received, expected) <= 1e-10


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("loss", ["class_weights", "mse"])
def test_solves_other_curvatures(method, curvature, loss):
    case = problem("mlp", loss, 0.1, True)
    H = oracle_matrix(case, curvature)
    shift = perturbation_for(H, 1e3)
    b = case.right_hand_sides(7)
    inverter = HessianInverter(configured(method), shift, curvature=curvature, **case.settings())
    expected = solution(H, shift, b)
    received = inverter.fit(case.module, case.data, case.sample_weight).transform(b)
    assert relative_error(received, expected) <= 1e-10


# An iterative method may say that float32 ends above its rtol; its solution is judged here.
@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-3), (torch.float64, 1e-6)])
@pytest.mark.parametrize("model", ["softmax", "mlp", "cnn2d", "transformer"])
def test_solves_in_float32(method, dtype, tolerance, model):
    case = problem(model, "cross_entropy", 0.1)
    H = oracle_matrix(single(case))
    shift = perturbation_for(H, 1e4)
    b = case.right_hand_sides(7).astype(np.float32)
    settings = at_rest(method) if dtype is None else TIGHT[method]
    inverter = HessianInverter(settings, shift, dtype=dtype, **case.settings())
    expected = solution(H, shift, b)
    received = inverter.fit(single(case).module, single(case).data).transform(b)
    assert received.dtype == np.float32
    assert relative_error(received, expected) <= tolerance


@pytest.mark.parametrize("method", EXACT)
def test_reports_the_true_residual(method):
    case = problem("mlp", "mse", 0.1)
    A = oracle_matrix(case) + 3 * np.eye(case.p)
    b = case.right_hand_sides(7)
    inverter = HessianInverter(method, 3.0, **case.settings()).fit(case.module, case.data)
    x, info = inverter.solve(b)
    expected = np.linalg.norm(x @ A - b, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(info["residual"], expected, rtol=1e-3, atol=1e-14)
    np.testing.assert_allclose(inverter.residual(b, x), expected, rtol=1e-3, atol=1e-14)
    assert info["converged"].all()


@pytest.mark.parametrize("method", EXACT)
def test_residual_of_a_wrong_solution(method):
    case = problem("mlp", "mse", 0.1)
    A = oracle_matrix(case) + 3 * np.eye(case.p)
    b, x = case.right_hand_sides(7), case.right_hand_sides(7, seed=1)
    inverter = HessianInverter(configured(method), 3.0, **case.settings()).fit(case.module, case.data)
    expected = np.linalg.norm(x @ A - b, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(inverter.residual(b, x), expected, rtol=1e-10)


@pytest.mark.parametrize("method", EXACT)
def test_inverse_transform_is_the_shifted_curvature(method):
    case = problem("cnn1d", "class_weights", 0.1, True)
    x = case.right_hand_sides(3)
    inverter = HessianInverter(configured(method), 3.0, **case.settings())
    inverter.fit(case.module, case.data, case.sample_weight)
    expected = x @ (oracle_matrix(case) + 3.0 * np.eye(case.p))
    assert relative_error(inverter.inverse_transform(x), expected) <= 1e-12


@pytest.mark.parametrize("method", EXACT)
def test_rows_alone_are_rows_together(method):
    case = problem("mlp", "cross_entropy", 0.1)
    shift = perturbation_for(oracle_matrix(case), 1e3)
    b = case.right_hand_sides(case.p + 5) * np.logspace(-3, 3, case.p + 5)[:, None]
    inverter = HessianInverter(configured(method), shift, **case.settings()).fit(case.module, case.data)
    expected = inverter.transform(b)[::9]
    received = np.concatenate([inverter.transform(row[None]) for row in b[::9]])
    assert relative_error(received, expected) <= 1e-10


@pytest.mark.parametrize("method", EXACT)
def test_zero_and_no_right_hand_sides(method):
    case = problem("linear", "mse")
    inverter = HessianInverter(configured(method), 1.0, **case.settings()).fit(case.module, case.data)
    x, info = inverter.solve(torch.zeros(2, case.p, dtype=torch.float64))
    assert not x.any() and info["converged"].all() and not info["residual"].any()
    assert inverter.transform(torch.zeros(0, case.p, dtype=torch.float64)).shape == (0, case.p)


@pytest.mark.parametrize("method", EXACT)
def test_inverse_operator_is_symmetric_and_inverts(method):
    case = problem("mlp", "mse", 0.1)
    H = oracle_matrix(case)
    shift = perturbation_for(H, 1e3)
    operator = HessianInverter(configured(method), shift, **case.settings()).fit(*parts(case)).aslinearoperator()
    u, v = case.right_hand_sides(2)
    assert (operator @ u) @ v == pytest.approx((operator @ v) @ u, rel=1e-8)
    assert relative_error((operator @ u)[None], solution(H, shift, u[None])) <= 1e-10
    assert relative_error(operator.H.matmat(np.stack([u, v]).T).T, solution(H, shift, [u, v])) <= 1e-10


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("weighted", [False, True])
def test_solves_plain_rows(method, weighted):
    X = np.random.default_rng(0).standard_normal((30, 9))
    weights = np.random.default_rng(1).integers(0, 4, 30).astype(float) if weighted else np.ones(30)
    H = (X * weights[:, None]).T @ X / weights.sum()
    expected = solution(H, 0.01, X)
    received = HessianInverter(configured(method), 0.01).fit(X, sample_weight=weights if weighted else None)
    assert relative_error(received.transform(X), expected) <= 1e-10


def parts(case):
    return case.module, case.data


@cache
def single(case):
    """The problem in float32; its oracle is still float64, at the rounded point."""
    X, y = (t.float() if t.is_floating_point() else t for t in case.data)
    return dataclasses.replace(case, module=copy.deepcopy(case.module).float(), X=X, y=y)
