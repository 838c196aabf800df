"""Minimal residuals on definite, indefinite and singular matrices, against LAPACK in float64."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from skinvert import HessianInverter, solve_hvp
from skinvert.methods import MINRES
from skinvert.models import TorchTwiceDifferentiable
from skinvert.operators import Dense


def matrix(eigenvalues, seed=0):
    """A symmetric float64 matrix with this spectrum."""
    size = len(eigenvalues)
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2


def rows(k, size, seed=1):
    return np.random.default_rng(seed).standard_normal((k, size))


def solve_rows(A, b, shift=0.0, dtype=torch.float64, **settings):
    inverse = MINRES(**settings).invert(Dense(torch.as_tensor(A, dtype=dtype)), shift)
    return inverse.solve(torch.as_tensor(b, dtype=dtype))


@pytest.fixture(params=[False, True], ids=["rows", "block"])
def solve(request):
    """Solve row by row, and by blocks."""
    return partial(solve_rows, block=request.param)


INDEFINITE = np.concatenate([-np.logspace(-1, 0, 12), np.logspace(-1, 1, 28)])


@pytest.mark.parametrize("k", [1, 7, 45])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_indefinite(solve, k, dtype, tolerance):
    # Rows of very different sizes: each is judged on its own.
    A, b = matrix(INDEFINITE), rows(k, 40) * np.logspace(-3, 3, k)[:, None]
    expected = np.linalg.solve(A - 0.05 * np.eye(40), b.T).T
    x, info = solve(A - 0.1 * np.eye(40), b, 0.05, dtype, rtol={torch.float64: 1e-11}.get(dtype))
    error = np.linalg.norm(x.numpy() - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert info["converged"].all() and error.max() <= tolerance


def test_minimises_the_residual_over_the_krylov_space():
    """After m steps x is the least-squares solution over span{b, Ab, …, A^(m-1) b}."""
    A, b = matrix(INDEFINITE), rows(3, 40)
    for m in (1, 2, 5):
        with pytest.warns(ConvergenceWarning):
            x, info = solve_rows(A, b, maxiter=m)
        assert info["n_iter"].tolist() == [m] * 3
        for received, row in zip(x.numpy(), b, strict=True):
            K = np.linalg.qr(np.stack([np.linalg.matrix_power(A, j) @ row for j in range(m)], axis=1))[0]
            expected = K @ np.linalg.lstsq(A @ K, row, rcond=None)[0]
            np.testing.assert_allclose(received, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("eigenvalues", [INDEFINITE, np.repeat([-2.0, 1.0, 5.0, 7.0], 10)], ids=["stopped", "solved"])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_no_product_is_taken_for_a_residual_that_is_known(eigenvalues, started):
    """Four iterations take five products, whether the last one is claimed or broken off; each residual is its x's."""
    A, b = matrix(eigenvalues), rows(3, 40)
    operator, x0 = Counting(A), 0.1 * rows(3, 40, 2) if started else None
    b[1] = 0
    x, info = MINRES(maxiter=4, x0=x0).invert(operator, 0.0).solve(torch.as_tensor(b))
    assert info["n_iter"].tolist() == [4, 0, 4] and operator.calls == 5 + started
    gap, size = np.linalg.norm(x.numpy() @ A - b, axis=1), np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(info["residual"], gap / np.where(size > 0, size, 1), rtol=1e-9, atol=1e-14)


class Counting(Dense):
    """A matrix that counts its products."""

    def __init__(self, A):
        super().__init__(torch.as_tensor(A))
        self.calls = 0

    def apply(self, V):
        self.calls += 1
        return super().apply(V)


def test_rows_leave_when_they_are_done_and_alone_is_together():
    A = matrix(INDEFINITE)
    vectors = np.linalg.eigh(A)[1].T
    b = np.stack([vectors[0], vectors[3] + vectors[20], rows(1, 40)[0], np.zeros(40)])
    x, info = solve_rows(A, b, rtol=1e-12)
    assert info["n_iter"][:2].tolist() == [1, 2] and info["n_iter"][3] == 0 < info["n_iter"][2]
    alone = np.concatenate([solve_rows(A, row[None], rtol=1e-12).x for row in b])
    np.testing.assert_allclose(alone, x, rtol=1e-9, atol=1e-11)
    assert not x[3].any() and info["converged"].all()


def test_starting_point_is_used_and_not_written_to(solve):
    A, b = matrix(INDEFINITE), rows(3, 40)
    x0 = np.linalg.solve(A, b.T).T
    kept = x0.copy()
    x, info = solve(A, b, x0=x0)
    assert info["n_iter"].tolist() == [0, 0, 0] and np.array_equal(x0, kept)
    x, info = solve(A, b, x0=np.ones(40), rtol=1e-11)
    np.testing.assert_allclose(x, kept, rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match="x0 must be of shape"):
        solve(A, b, x0=np.ones((2, 40)))


def test_singular_and_compatible_gives_the_pseudo_inverse(solve):
    A = matrix(np.concatenate([np.zeros(9), INDEFINITE]))
    b = rows(4, 49) @ A
    expected = b @ np.linalg.pinv(A, rcond=1e-10)
    x, info = solve(A, b, rtol=1e-11)
    assert info["converged"].all()
    np.testing.assert_allclose(x, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_and_incompatible_is_flagged_at_the_least_residual(solve, dtype):
    A, b = matrix(np.concatenate([np.zeros(9), INDEFINITE])), rows(4, 49)
    least = np.linalg.norm(b - b @ np.linalg.pinv(A, rcond=1e-10) @ A, axis=1) / np.linalg.norm(b, axis=1)
    with pytest.warns(ConvergenceWarning, match=r"singular.*larger hessian_perturbation"):
        x, info = solve(A, b, dtype=dtype)
    assert info["stagnated"].all() and not info["converged"].any()
    np.testing.assert_allclose(info["residual"], least, rtol=1e-2)
    # Rounding has a part in the null space, and nothing holds x back there: in float64 it is still small.
    assert np.linalg.norm(x, axis=1).max() < {torch.float32: np.inf, torch.float64: 1e3}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_zeros", [1, 20])
def test_a_longer_x_that_takes_nothing_off_the_residual_is_not_kept(solve, n_zeros, dtype):
    # Past the least-squares solution rounding leads along the null space: to 1e8 and more where the last x is kept.
    A, b = matrix(np.concatenate([np.zeros(n_zeros), np.logspace(-6, 1, 40)])), rows(4, 40 + n_zeros)
    pseudo = b @ np.linalg.pinv(A, rcond=1e-10)
    with pytest.warns(ConvergenceWarning):
        x, info = solve(A, b, dtype=dtype)
    least = np.linalg.norm(b - pseudo @ A, axis=1) / np.linalg.norm(b, axis=1)
    # Eigenvalues of 1e-7 of the largest are none in float32.
    assert dtype == torch.float32 or (info["residual"].numpy() <= 1.01 * least).all()
    assert (np.linalg.norm(x, axis=1) <= 100 * np.linalg.norm(pseudo, axis=1)).all()


def test_the_floor_of_float32_is_flagged(solve):
    A, b = matrix(np.concatenate([-np.logspace(-3, 0, 12), np.logspace(-3, 1, 28)])), rows(2, 40)
    with pytest.warns(ConvergenceWarning, match="torch.float64"):
        x, info = solve(A, b, dtype=torch.float32, rtol=1e-12, maxiter=1000)
    assert info["stagnated"].all() and not info["converged"].any()
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("entry", [3.0, -2.0])
def test_one_parameter(solve, entry):
    x, info = solve([[entry]], [[6.0], [1.0]])
    np.testing.assert_allclose(x, [[6 / entry], [1 / entry]])
    assert info["n_iter"].tolist() == [1, 1]


def test_a_matrix_of_zeros(solve):
    with pytest.warns(ConvergenceWarning):
        x, info = solve(np.zeros((2, 2)), np.eye(2))
    assert not x.any() and not info["converged"].any() and info["stagnated"].all()


def test_not_a_number_is_an_error(solve):
    with pytest.raises(FloatingPointError, match="iteration 1"):
        solve([[np.nan]], [[1.0]])


def test_another_perturbation_and_no_right_hand_sides():
    A, b = matrix(INDEFINITE), rows(2, 40)
    inverse = MINRES(rtol=1e-11).invert(Dense(torch.as_tensor(A)), 9.0).at(0.05)
    expected = np.linalg.solve(A + 0.05 * np.eye(40), b.T).T
    np.testing.assert_allclose(inverse.solve(torch.as_tensor(b)).x, expected, rtol=1e-6, atol=1e-9)
    assert inverse.solve(torch.empty(0, 40).double()).x.shape == (0, 40)


@pytest.mark.parametrize(("setting", "value"), [("rtol", -1.0), ("atol", "1"), ("maxiter", 0)])
def test_bad_settings(setting, value):
    with pytest.raises((ValueError, TypeError), match=f"'{setting}' parameter of MINRES"):
        MINRES(**{setting: value}).invert(Dense(torch.eye(2)), 0.0)


def test_an_mlp_stopped_early():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    X, y = torch.randn(60, 6, dtype=torch.float64), torch.randint(3, (60,))
    step = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(20):
        step.zero_grad()
        nn.functional.cross_entropy(net(X), y).backward()
        step.step()
    H = TorchTwiceDifferentiable(net, "cross_entropy").hessian(X, y).numpy() + 1e-2 * np.eye(83)
    assert np.linalg.eigvalsh(H)[0] < -1e-3
    b = rows(5, 83)
    inverter = HessianInverter("minres", 1e-2, loss="cross_entropy", batch_size=17).fit(net, (X, y))
    x, info = inverter.solve(b)
    residual = np.linalg.norm(x @ H - b, axis=1) / np.linalg.norm(b, axis=1)
    assert residual.max() <= 1e-6 and info["converged"].all()
    model = TorchTwiceDifferentiable(net, "cross_entropy")
    again = solve_hvp("minres", model, (X, y), b, hessian_perturbation=1e-2, rtol=1e-10)
    assert np.linalg.norm(again.x @ H - b, axis=1).max() <= 1e-8


@pytest.mark.parametrize("power", [-40, 40])
def test_the_size_of_b_decides_nothing(solve, power):
    """Powers of two change no digit, and so no decision: singular, and beyond what the dtype's rounding allows."""
    singular = np.concatenate([[0.0, 0.0], np.logspace(-1, 1, 18)])
    for A, settings in ((matrix(singular), {}), (matrix(INDEFINITE), {"rtol": 0.0})):
        b = rows(3, len(A))
        with pytest.warns(ConvergenceWarning):
            x, info = solve(A, b, **settings)
        with pytest.warns(ConvergenceWarning):
            scaled, scaled_info = solve(A, 2.0**power * b, **settings)
        torch.testing.assert_close(scaled, 2.0**power * x, rtol=0.0, atol=0.0)
        assert scaled_info["n_iter"].tolist() == info["n_iter"].tolist()
        assert scaled_info["reason"].tolist() == info["reason"].tolist()
