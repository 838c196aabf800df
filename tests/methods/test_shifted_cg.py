"""Paths by one Krylov run, against dense solves of every λ."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from skinvert.methods import CG
from skinvert.operators import Dense, DiagonalMatrix
from skinvert.solvers.shifted_cg import shifted_cg


def matrix(condition, p=120, seed=0):
    vectors = np.linalg.qr(np.random.default_rng(seed).standard_normal((p, p)))[0]
    found = (vectors * np.logspace(-np.log10(condition), 0, p)) @ vectors.T
    return (found + found.T) / 2


def rows(k, p=120, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((k, p)))


def dense(A, shifts, B):
    return np.stack([np.linalg.solve(A + s * np.eye(len(A)), B.numpy().astype(float).T).T for s in shifts])


def errors(X, expected):
    return np.linalg.norm(X.numpy() - expected, axis=2) / np.linalg.norm(expected, axis=2)


class Counted(Dense):
    products = 0

    def apply(self, V):
        self.products += len(V)
        return super().apply(V)


@pytest.mark.parametrize("k", [1, 7, 125])
@pytest.mark.parametrize("condition", [1e1, 1e4])
def test_twenty_shifts_each_within_its_own_dense_solve(condition, k):
    A, B, shifts = matrix(condition), rows(k), np.logspace(-np.log10(condition), 1, 20)
    operator = Counted(torch.from_numpy(A))
    X, info = shifted_cg(operator, B, shifts, 1e-10, 0.0, 1000)
    assert not X.isnan().any()
    assert errors(X, dense(A, shifts, B)).max() <= 1e-8
    assert X.shape == (20, k, 120)
    assert info["converged"].all()
    residual = np.stack([(x @ (A + s * np.eye(120)) - B.numpy()) for x, s in zip(X.numpy(), shifts, strict=True)])
    true = np.linalg.norm(residual, axis=2) / B.norm(dim=1).numpy()
    np.testing.assert_allclose(info["residual"], true, rtol=1e-3)
    assert info["n_products"] == operator.products


def test_costs_about_one_solve():
    # 20 shifts: a run at the smallest, and one product per λ for the true residuals.
    A, B, shifts = matrix(1e3), rows(7), np.logspace(-2, 1, 20)
    operator = Counted(torch.from_numpy(A))
    shifted_cg(operator, B, shifts, 1e-8, 0.0, 1000)
    path, operator.products = operator.products, 0
    shifted_cg(operator, B, shifts[:1], 1e-8, 0.0, 1000)
    assert path <= operator.products + 19 * 7 + 2 * 7


def test_polishes_what_rounding_leaves():
    # The run's own residual falls below what float64 can hold: only the polish reaches the tolerance everywhere.
    A, B, shifts = matrix(1e6), rows(3), np.logspace(-6, 0, 12)
    X, info = shifted_cg(Dense(torch.from_numpy(A)), B, shifts, 1e-10, 0.0, 1000)
    assert info["converged"].all()
    assert errors(X, dense(A, shifts, B)).max() <= 1e-8


def test_order_and_repetition_of_shifts_do_not_matter():
    A, B = matrix(1e3), rows(3)
    shifts = np.array([1.0, 1e-3, 0.1, 1e-3])
    X, _ = shifted_cg(Dense(torch.from_numpy(A)), B, shifts, 1e-10, 0.0, 1000)
    assert errors(X, dense(A, shifts, B)).max() <= 1e-8
    assert torch.equal(X[1], X[3])


def test_many_decades_do_not_underflow():
    A, B, shifts = matrix(1e4), rows(3), np.array([0.0, 1e-4, 1.0, 1e6, 1e30])
    for rtol in (1e-8, 0.0):
        maxiter = 1000 if rtol else 200
        X, _ = shifted_cg(Dense(torch.from_numpy(A)), B, shifts, rtol, 0.0, maxiter)
        assert torch.isfinite(X).all()
        assert errors(X[1:], dense(A, shifts[1:], B)).max() <= 1e-4


def test_float32():
    A, B, shifts = matrix(1e2), rows(7).float(), np.logspace(-2, 1, 20)
    X, info = shifted_cg(Dense(torch.from_numpy(A).float()), B, shifts, 1e-5, 0.0, 1000)
    assert X.dtype == torch.float32
    assert info["converged"].all()
    assert errors(X, dense(A, shifts, B)).max() <= 1e-3


def test_rows_together_are_rows_alone():
    A, B, shifts = Dense(torch.from_numpy(matrix(1e3))), rows(4), [1e-3, 0.1]
    # Of very different sizes, and one zero.
    B = B * torch.tensor([[1.0], [1e6], [0.0], [1e-6]]).double()
    together, info = shifted_cg(A, B, shifts, 1e-10, 0.0, 1000)
    assert info["converged"].all()
    for j in range(4):
        alone = shifted_cg(A, B[j : j + 1], shifts, 1e-10, 0.0, 1000)[0][:, 0]
        torch.testing.assert_close(together[:, j], alone, rtol=1e-9, atol=1e-9 * float(B[j].abs().max()))


def test_rows_in_chunks():
    from sklearn import config_context

    A, B, shifts = Dense(torch.from_numpy(matrix(1e2))), rows(9), [1e-2, 0.1]
    expected = shifted_cg(A, B, shifts, 1e-10, 0.0, 1000)[0]
    with config_context(working_memory=0.02):
        torch.testing.assert_close(shifted_cg(A, B, shifts, 1e-10, 0.0, 1000)[0], expected)


def test_an_indefinite_curvature_fails_only_where_it_is_indefinite():
    values = np.concatenate([[-0.5], np.linspace(0.1, 3, 59)])
    A, B = DiagonalMatrix(torch.from_numpy(values)), rows(3, 60)
    shifts = [0.1, 1.0, 0.7]
    X, info = shifted_cg(A, B, shifts, 1e-10, 0.0, 1000)
    assert info["converged"].tolist() == [[False] * 3, [True] * 3, [True] * 3]
    assert info["negative_curvature"].tolist() == [[True] * 3, [False] * 3, [False] * 3]
    assert errors(X[1:], dense(np.diag(values), shifts[1:], B)).max() <= 1e-8
    # A row that met it is left alone.
    assert info["n_products"] < 1000
    with pytest.warns(ConvergenceWarning, match=r"must be > 0\.5"):
        results = CG(rtol=1e-10).invert(A, 0.1).solve_path(B, shifts)
    assert [info["negative_curvature"].all() for _, info in results] == [True, False, False]


def test_too_few_iterations_are_told():
    A = Dense(torch.from_numpy(matrix(1e4)))
    _, info = shifted_cg(A, rows(3), [1e-4, 1.0], 1e-10, 0.0, 3)
    assert not info["converged"][0].any()
    with pytest.warns(ConvergenceWarning, match="maxiter"):
        CG(rtol=1e-10, maxiter=3).invert(A, 0.0).solve_path(rows(3), [1e-4, 1.0])


def test_edges():
    A = DiagonalMatrix(torch.tensor([2.0]).double())
    assert shifted_cg(A, torch.ones(3, 1).double(), [], 1e-8, 0.0, 10)[0].shape == (0, 3, 1)
    assert shifted_cg(A, torch.ones(0, 1).double(), [1.0], 1e-8, 0.0, 10)[0].shape == (1, 0, 1)
    torch.testing.assert_close(
        shifted_cg(A, torch.ones(1, 1).double(), [0.0, 2.0], 1e-8, 0.0, 10)[0].flatten(),
        torch.tensor([0.5, 0.25]).double(),
    )
    with pytest.raises(ValueError, match="hessian_perturbation"):
        shifted_cg(A, torch.ones(1, 1).double(), [-1.0], 1e-8, 0.0, 10)
    with pytest.raises(FloatingPointError, match="iteration 0"):
        shifted_cg(DiagonalMatrix(torch.tensor([np.nan])), torch.ones(1, 1), [1.0], 1e-8, 0.0, 10)
