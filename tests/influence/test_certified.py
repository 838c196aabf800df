"""Bounds of scores hold against dense float64 inverses, and are as small as asked."""

import copy

import numpy as np
import pytest
import torch
from facts import TIGHT
from oracles import Oracle, solution
from problems import problem
from sklearn.exceptions import ConvergenceWarning

from skinvert import HessianInverter, InfluenceFunction, PerSampleGradient

LAMBDA = 0.05


def single(case):
    """The problem with its parameters and inputs rounded to float32."""
    module = copy.deepcopy(case.module).float()
    X, y = (part.float() if part.is_floating_point() else part for part in case.data)
    return type(case)(**{**vars(case), "module": module, "X": X, "y": y})


def dense(case, curvature, n_test, shift=LAMBDA):
    """gᵀA⁻¹b in float64, of gradients as they are computed; and what other batches change of these, by rounding."""
    A = Oracle(case).curvature(curvature) + shift * np.eye(case.p)
    found = PerSampleGradient(case.module, loss=case.loss).fit(*case.data).transform(case.data)
    gradients = found.double().numpy()
    X = solution(A, 0, gradients)
    sizes = np.outer(np.linalg.norm(gradients[:n_test], axis=1), np.linalg.norm(X, axis=1)) / len(gradients)
    return gradients[:n_test] @ X.T / len(gradients), 10 * torch.finfo(found.dtype).eps * sizes


def scored(case, method, curvature, n_test, rtol, shift=LAMBDA):
    inverter = HessianInverter(method, shift, curvature=curvature, random_state=0, **case.settings())
    influence = InfluenceFunction(inverter, score_rtol=rtol).fit(case.module, case.data)
    return influence, influence.transform((case.X[:n_test], case.y[:n_test]))


@pytest.mark.one_in(2)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_test", [3, 12])
@pytest.mark.parametrize("name", sorted(TIGHT))
def test_bounds_hold(name, n_test, dtype):
    """Whatever the method, at its defaults; most reach what is asked."""
    case = problem("mlp", "cross_entropy")
    case = single(case) if dtype == "float32" else case
    curvature = "empirical_fisher" if name == "harmonic_mean" else "ggn"
    exact, rounding = dense(case, curvature, n_test)
    influence, bounded = scored(case, name, curvature, n_test, np.inf)
    assert bounded.dtype == torch.float64
    assert (np.abs(bounded.numpy() - exact) <= influence.score_error_ + rounding).all()
    assert np.isfinite(influence.score_error_).all()
    influence, refined = scored(case, name, curvature, n_test, 1e-3)
    assert (np.abs(refined.numpy() - exact) <= influence.score_error_ + rounding).all()
    assert influence.score_error_.max() <= 1e-3 * np.sqrt(np.square(exact).mean(1 if n_test == 3 else 0)).max()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rtol", [0.1, 1e-2, 1e-4])
@pytest.mark.parametrize("name", sorted(set(TIGHT) - {"harmonic_mean"}))
def test_as_small_as_asked(name, rtol, dtype):
    case = problem("mlp", "cross_entropy")
    case = single(case) if dtype == "float32" else case
    influence, scores = scored(case, name, "ggn", 5, rtol)
    size = scores.square().mean(1).sqrt().numpy()
    assert (influence.score_error_.max(1) <= 1.0001 * rtol * size).all()
    exact, rounding = dense(case, "ggn", 5)
    assert (np.abs(scores.numpy() - exact) <= influence.score_error_ + rounding).all()


@pytest.mark.parametrize("n_test", [4, 12])
def test_bounds_grow_with_the_norms_of_the_gradients(n_test):
    """‖r‖‖b‖/μ: of one solved row the bounds are as the other side's norms."""
    case = problem("mlp", "cross_entropy")
    influence, _ = scored(case, "ekfac", "ggn", n_test, np.inf)
    norms = PerSampleGradient(case.module, loss=case.loss).fit(*case.data).transform(case.data).norm(dim=1).numpy()
    error = influence.score_error_
    np.testing.assert_allclose(error / error[:, :1], np.tile(norms / norms[0], (n_test, 1)), rtol=1e-9)


def test_of_an_ensemble_and_of_numbers_of_all_rows():
    case = problem("mlp", "cross_entropy")
    inverter = HessianInverter("cg", LAMBDA, curvature="ggn", **case.settings())
    alone = InfluenceFunction(inverter, score_rtol=1e-3).fit(case.module, case.data)
    both = InfluenceFunction(inverter, score_rtol=1e-3).fit([case.module, case.module], case.data)
    torch.testing.assert_close(both.transform(case.data), alone.transform(case.data))
    np.testing.assert_allclose(both.score_error_, alone.score_error_)
    one = InfluenceFunction(inverter, score_rtol=1e-3, measurement=lambda f, y: f.square().mean())
    assert one.fit(case.module, case.data).transform(case.data).shape == (1, 12)
    assert one.score_error_.shape == (1, 12)
    rows, scores = alone.top(case.data, k=3)
    np.testing.assert_allclose(scores, np.take_along_axis(alone.transform(case.data).numpy(), rows.numpy(), 1))


def test_a_hessian_has_a_bound_by_direct_alone():
    """A + λI is positive definite, which a factorisation proves and products do not."""
    case = problem("mlp", "cross_entropy")
    exact, rounding = dense(case, "hessian", 12, 2.0)
    influence, scores = scored(case, "direct", "hessian", 12, 1e-6, 2.0)
    assert (np.abs(scores.numpy() - exact) <= influence.score_error_ + rounding).all()
    assert np.isfinite(influence.score_error_).all()
    with pytest.warns(ConvergenceWarning, match="no error bound"):
        influence, scores = scored(case, "cg", "hessian", 12, 1e-6, 2.0)
    assert np.isnan(influence.score_error_).all()
    np.testing.assert_allclose(scores, exact, rtol=1e-4, atol=1e-6)


def test_error_comes_with_a_transform():
    case = problem("mlp", "cross_entropy")
    influence = InfluenceFunction(HessianInverter("cg", 1.0, curvature="ggn", **case.settings()), score_rtol=0.1)
    influence.fit(case.module, case.data)
    with pytest.raises(AttributeError, match="transform"):
        _ = influence.score_error_
    influence.transform(case.data)
    assert influence.score_error_.shape == (12, 12)
    influence.fit(case.module, case.data)
    with pytest.raises(AttributeError, match="transform"):
        _ = influence.score_error_


@pytest.mark.parametrize("settings", [{"removal": "newton"}, {"normalize": "cosine"}])
def test_other_scores_have_no_bound(settings):
    case = problem("mlp", "cross_entropy")
    influence = InfluenceFunction(HessianInverter("cg", 1.0, **case.settings()), score_rtol=0.1, **settings)
    with pytest.raises(ValueError, match="score_rtol"):
        influence.fit(case.module, case.data)
