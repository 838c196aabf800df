"""Rounds of a rough solve and an exact product, on matrices: against dense solves, however rough the copy is."""

import numpy as np
import pytest
import torch
from oracles import relative_error, solution
from sklearn.exceptions import ConvergenceWarning

from skinvert.methods import CG, Direct
from skinvert.methods.mixed_precision import MixedPrecision, inverted
from skinvert.operators import Dense, DiagonalMatrix
from skinvert.reasons import Reason

P = 12
RNG = np.random.default_rng(0)
B = RNG.standard_normal((4, P))
Q = np.linalg.qr(RNG.standard_normal((P, P)))[0]
# Five eigenvalues.
A = Q @ np.diag(np.resize([1.0, 2.0, 5.0, 10.0, 30.0], P)) @ Q.T


def dense(matrix):
    return Dense(torch.from_numpy(matrix))


def solved(rough, rtol=1e-10, **settings):
    """Return what the rounds make of B with a rough copy of A."""
    inverse = Direct().invert(rough, 0.0)
    return MixedPrecision(dense(A), 0.0, inverse, rtol, **settings).solve(torch.from_numpy(B))


def test_rounds_are_one_krylov_space():
    # Beside the identity they are conjugate residuals: one round an eigenvalue. Alone, a round leaves 29/31 of a row.
    x, info = solved(DiagonalMatrix(torch.ones(P, dtype=torch.float64)))
    assert info["converged"].all()
    assert relative_error(x, solution(A, 0.0, B)) <= 30 * 1e-10


@pytest.mark.parametrize("size", [0.0, 1e-3, 0.1, 0.5])
def test_a_copy_that_is_off(size):
    E = RNG.standard_normal((P, P))
    x, info = solved(dense(A + size * (E + E.T) / np.linalg.norm(E + E.T, 2)))
    assert info["converged"].all()
    assert relative_error(x, solution(A, 0.0, B)) <= 30 * 1e-10


@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")
def test_no_round_makes_a_row_worse():
    E = RNG.standard_normal((P, P))
    with pytest.warns(ConvergenceWarning, match="autocast=None"):
        x, info = solved(dense(E + E.T))
    residual = np.linalg.norm(x.numpy() @ A - B, axis=1) / np.linalg.norm(B, axis=1)
    np.testing.assert_allclose(info["residual"], residual, rtol=1e-6)
    assert (residual <= 1).all() and not info["converged"].all()


def test_an_absolute_tolerance_is_that_of_each_row():
    rows = torch.from_numpy(B * np.array([[1.0], [1e-3], [1e-80], [0.0]]))
    inverse = MixedPrecision(dense(A), 0.0, Direct().invert(dense(A + 0.1 * np.eye(P)), 0.0), 1e-12, atol=1e-2)
    x, info = inverse.solve(rows)
    gap = np.linalg.norm(x.numpy() @ A - rows.numpy(), axis=1)
    assert (gap <= 1e-2).all() and info["converged"].all()
    assert not x[1:].any() and gap[0] > 1e-9


def test_solutions_too_small_for_the_dtype_are_told():
    rows = torch.from_numpy(1e-308 * B)
    with pytest.warns(ConvergenceWarning, match="solutions below the range"):
        _, info = MixedPrecision(dense(30 * A), 0.0, Direct().invert(dense(30 * A), 0.0), 1e-6).solve(1e-2 * rows)
    assert not info["converged"].all() and (info["reason"] == int(Reason.OUT_OF_RANGE)).any()


def test_settings_of_a_method_are_those_of_the_rounds():
    exact, start = dense(A), torch.from_numpy(solution(A, 0.5, B))
    exact.rough = dense(A + 1e-3 * np.eye(P))
    inverse = inverted(CG(rtol=1e-9, atol=1e-12, maxiter=77, x0=start), exact, 0.5)
    assert (inverse.rtol, inverse.atol, inverse.maxiter) == (1e-9, 1e-12, 77)
    x, info = inverse.solve(torch.from_numpy(B))
    # At the solution no round is taken.
    assert "n_iter" not in info and torch.equal(x, start)
    cold = inverse.scale_free().solve(torch.from_numpy(B))
    assert relative_error(cold.x, start) <= 1e-8 and (cold.info["n_iter"] > 0).all()
    assert relative_error(inverse.scale_free().at(2.0).solve(torch.from_numpy(B)).x, solution(A, 2.0, B)) <= 1e-8
