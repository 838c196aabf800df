"""The held-out quadratic against its formula, row by row."""

import dataclasses

import numpy as np
import pytest
from oracles import Oracle, held_out_quadratic, oracle_matrix, perturbation_for, solution
from problems import problem
from sklearn.exceptions import ConvergenceWarning

from skinvert import HessianInverter

FAMILY = [("mlp", "cross_entropy"), ("mlp", "class_weights"), ("cnn1d", "mse"), ("sequence", "ignore_index")]


def held_out(model, loss, weight_decay):
    """The last rows of a larger draw; the model is that of the smaller one, for the seed is the same."""
    case, more = problem(model, loss, weight_decay), problem(model, loss, weight_decay, n=21)
    return dataclasses.replace(case, X=more.X[-9:], y=more.y[-9:])


def expected_score(case, test, curvature, shift, weights):
    train, unweighted = oracle_matrix(case, curvature), Oracle(test)
    if weights is not None:
        unweighted.__dict__["kappa"] = Oracle(dataclasses.replace(test, counts=weights)).scale / unweighted.scale
    kappa = unweighted.__dict__.get("kappa", 1.0)
    g = kappa * unweighted.gradient_rows()
    h = np.einsum("ip,iq->ipq", g, g) if curvature == "empirical_fisher" else kappa * unweighted.ggn_rows()
    w = np.ones(len(g)) if weights is None else weights.astype(float)
    return held_out_quadratic(solution(train, shift, g), g, h, unweighted.penalty.numpy(), w)


@pytest.mark.parametrize(("model", "loss"), FAMILY)
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
@pytest.mark.parametrize("weights", [None, np.array([1, 0, 2, 1, 3, 1, 1, 0, 2])])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_score_of_a_model(model, loss, curvature, weights, weight_decay):
    case, test = problem(model, loss, weight_decay), held_out(model, loss, weight_decay)
    shift = perturbation_for(oracle_matrix(case, curvature), 100)
    inverter = HessianInverter("direct", shift, **case.settings(curvature=curvature)).fit(case.module, case.data)
    expected = expected_score(case, test, curvature, shift, weights)
    assert inverter.score(test.data, sample_weight=weights) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", ["direct", "cg", "auto"])
def test_score_by_each_method(method):
    case, test = problem("mlp", "cross_entropy", 0.1), held_out("mlp", "cross_entropy", 0.1)
    inverter = HessianInverter(method, 2.0, model=case.module, **case.settings()).fit(*case.data)
    expected = expected_score(case, test, "hessian", 2.0, None)
    assert inverter.score(*test.data) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("weights", [None, np.array([1, 0, 2, 1, 3, 1, 1])])
def test_score_of_plain_rows(weights):
    rng = np.random.default_rng(0)
    X, held = rng.standard_normal((30, 5)), rng.standard_normal((7, 5))
    Z = solution(X.T @ X / 30, 0.1, held)
    w = np.ones(7) if weights is None else weights.astype(float)
    expected = held_out_quadratic(Z, held, np.einsum("ip,iq->ipq", held, held), np.zeros(5), w)
    received = HessianInverter("direct", 0.1).fit(X).score(held, sample_weight=weights)
    assert received == pytest.approx(expected, rel=1e-10)


def test_weight_two_is_not_a_row_twice_for_a_row_leaves_all_of_itself_out():
    rng = np.random.default_rng(0)
    inverter, held = HessianInverter("direct", 0.1).fit(rng.standard_normal((30, 5))), rng.standard_normal((7, 5))
    assert inverter.score(held, sample_weight=np.full(7, 3.0)) == pytest.approx(inverter.score(held))


@pytest.mark.parametrize("method", ["direct", "cg"])
@pytest.mark.filterwarnings("ignore:A = H:scipy.linalg.LinAlgWarning")
@pytest.mark.filterwarnings("ignore:hessian_perturbation must be:sklearn.exceptions.ConvergenceWarning")
def test_indefinite_scores_minus_infinity(method):
    case, test = problem("mlp", "mse"), held_out("mlp", "mse", 0.0)
    inverter = HessianInverter(method, **case.settings()).fit(case.module, case.data)
    with pytest.warns(ConvergenceWarning, match="not positive definite"):
        assert inverter.score(test.data) == -np.inf


def test_batch_size_changes_nothing():
    case, test = problem("mlp", "class_weights", 0.1), held_out("mlp", "class_weights", 0.1)
    scores = [
        HessianInverter("direct", 2.0, **case.settings(batch_size=size)).fit(case.module, case.data).score(test.data)
        for size in (None, 2, 5)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-12)


def test_one_held_out_row_is_refused():
    case = problem("mlp", "mse", 0.1)
    inverter = HessianInverter("direct", 2.0, **case.settings()).fit(case.module, case.data)
    with pytest.raises(ValueError, match="at least two"):
        inverter.score((case.X[:1], case.y[:1]))
