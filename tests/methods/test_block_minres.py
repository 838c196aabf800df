"""Block minimal residuals: few iterations on indefinite matrices, the same solutions, each row judged on its own."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from skinvert.methods import CG, MINRES
from skinvert.operators import Dense
from skinvert.solvers import block_minres

P = 120
RNG = np.random.default_rng(3)
SPECTRA = {
    "condition 1e4": np.concatenate([-np.logspace(-4, -1, 40), np.logspace(-4, 0, 80)]),
    "clusters": np.repeat([-1.0, -0.3, 0.01, 1.0], 30) + 1e-7 * RNG.standard_normal(P),
    "as many of either sign": np.linspace(0.1, 1, 60).repeat(2) * np.tile([-1.0, 1.0], 60),
    "one negative": np.concatenate([[-1e-3], np.logspace(-3, 0, P - 1)]),
    "definite": np.logspace(-3, 0, P),
}


def matrix(eigenvalues, seed=0):
    vectors = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))[0]
    A = (vectors * eigenvalues) @ vectors.T
    return (A + A.T) / 2


def rows(k, p=P, seed=1):
    return np.random.default_rng(seed).standard_normal((k, p))


def solved(A, b, dtype=torch.float64, **settings):
    inverse = MINRES(**{"block": True, **settings}).invert(Dense(torch.from_numpy(A).to(dtype)), 0.0)
    return inverse.solve(torch.from_numpy(b).to(dtype))


def worst(x, expected):
    return float((np.linalg.norm(x.numpy() - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


@pytest.mark.parametrize("kept", [1024, 2])
@pytest.mark.parametrize("k", [8, 40, P + 5])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_solves(spectrum, k, kept, monkeypatch):
    monkeypatch.setattr(block_minres, "KEPT", kept)
    A, b = matrix(SPECTRA[spectrum]), rows(k)
    rtol = 1e-10 if kept > P else 1e-8
    x, info = solved(A, b, rtol=rtol)
    assert info["converged"].all()
    assert worst(x, np.linalg.solve(A, b.T).T) <= 1e4 * rtol
    if kept > P:
        # The space is all there is after P / k iterations; one more where rows check their claims.
        assert int(info["n_iter"].max()) <= -(-P // k) + 3


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_float32_is_near_its_floor(spectrum):
    A, b = matrix(SPECTRA[spectrum]), rows(16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        x, info = solved(A, b, torch.float32)
    size = np.linalg.norm(b, axis=1)
    true = np.linalg.norm(x.double().numpy() @ A - b, axis=1) / size
    # Some eps · ‖A‖ ‖x‖.
    floor = 1e-5 + 20 * np.finfo("f4").eps * np.linalg.norm(np.linalg.solve(A, b.T).T, axis=1) / size
    assert (true <= floor).all()
    assert (true[info["converged"].numpy()] <= 1.3e-5).all()


def test_minimises_each_residual_over_the_space_of_all_rows():
    """After m steps X is the least-squares solution over the rows of B, BA, …, BAᵐ⁻¹."""
    A, b = matrix(SPECTRA["as many of either sign"]), rows(3)
    for m in (1, 2, 5):
        with pytest.warns(ConvergenceWarning):
            x, info = solved(A, b, maxiter=m)
        assert info["n_iter"].tolist() == [m] * 3
        space = np.concatenate([b @ np.linalg.matrix_power(A, j) for j in range(m)])
        K = np.linalg.qr(space.T)[0]
        expected = (K @ np.linalg.lstsq(A @ K, b.T, rcond=None)[0]).T
        np.testing.assert_allclose(x, expected, rtol=1e-7, atol=1e-8)


def test_a_residual_that_a_step_leaves_as_it_is_breaks_nothing():
    # r is orthogonal to Ar, in every first step of these.
    A = np.kron(np.eye(10), [[0.0, 1.0], [1.0, 0.0]]) * np.repeat(np.arange(1.0, 11), 2)
    b = np.zeros((3, 20))
    b[:, ::2] = rows(3, 10)
    x, info = solved(A, b)
    assert info["converged"].all()
    np.testing.assert_allclose(x, np.linalg.solve(A, b.T).T, atol=1e-7)
    one, info = solved(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 0.0]]))
    np.testing.assert_allclose(one, [[0.0, 1.0]], atol=1e-12)
    assert info["n_iter"].tolist() == [2]


def test_eight_rows_of_many_parameters_share_their_space_by_default():
    A = matrix(np.concatenate([-np.logspace(-2, -1, 30), np.logspace(-2, 0, 270)]))
    b = rows(8, 300)
    expected, alone = (solved(A, b, block=block).info["n_products"] for block in (True, False))
    assert solved(A, b, block=None).info["n_products"] == expected < alone / 3
    few = [solved(A, b[:7], block=block).info["n_products"] for block in (None, False)]
    assert few[0] == few[1]
    small, one = matrix(SPECTRA["definite"]), rows(16)
    assert solved(small, one, block=None).info["n_products"] == solved(small, one, block=False).info["n_products"]


def test_costs_what_conjugate_gradients_do_where_these_serve():
    A, b = matrix(np.logspace(-1, 0, 300)), rows(64, 300)
    cg = CG().invert(Dense(torch.from_numpy(A)), 0.0).solve(torch.from_numpy(b)).info["n_products"]
    assert solved(A, b).info["n_products"] <= 1.1 * cg


def test_dependent_and_zero_rows_break_nothing():
    A, b = matrix(SPECTRA["one negative"]), np.repeat(rows(5), 8, axis=0)
    b[3] = 0
    b[4] *= 1e-8
    x, info = solved(A, b, rtol=1e-10)
    kept = np.arange(40) != 3
    assert info["converged"].all() and not x[3].any()
    assert worst(x[kept], np.linalg.solve(A, b[kept].T).T) <= 1e-6
    # Five directions at a time instead of 39; each row's claim is one more.
    assert info["n_products"] <= 5 * int(info["n_iter"].max()) + 3 * 39


def test_rows_leave_when_they_are_done_and_are_judged_on_their_own():
    A, b = matrix(SPECTRA["condition 1e4"]), rows(20)
    b[7] = np.linalg.eigh(A)[1][:, -1]
    with pytest.warns(ConvergenceWarning, match="19 of 20"):
        x, info = solved(A, b, maxiter=2)
    residual = np.linalg.norm(x.numpy() @ A - b, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(info["residual"], residual, rtol=1e-6, atol=1e-14)
    assert info["converged"].tolist() == [i == 7 for i in range(20)] and info["n_iter"][7] == 1


def test_a_row_outside_the_range_leaves_the_others():
    A = matrix(np.concatenate([[0.0], SPECTRA["definite"][1:]]))
    b = rows(10) @ A
    b[4] = np.linalg.eigh(A)[1][:, np.argmin(np.abs(np.linalg.eigvalsh(A)))] + rows(1)[0] @ A
    with pytest.warns(ConvergenceWarning, match="1 of 10.*singular"):
        x, info = solved(A, b)
    assert info["converged"].tolist() == [i != 4 for i in range(10)] and bool(info["stagnated"][4])
    assert worst(x, b @ np.linalg.pinv(A, rcond=1e-10)) <= 1e-5


class Overflowing(Dense):
    """Products of rows with a last entry are beyond the dtype."""

    def apply(self, V):
        return torch.where(V[:, -1:] != 0, torch.inf, super().apply(V))


def test_a_product_that_overflows_ends_its_own_row_alone():
    # Mixed with it every direction overflows, and rows of their own go on.
    A = Overflowing(torch.diag(torch.tensor([1.0, -2.0, 3.0, 4.0])))
    with pytest.warns(ConvergenceWarning, match="1 of 2"):
        x, info = MINRES(block=True).invert(A, 0.0).solve(torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]]))
    np.testing.assert_allclose(x[0], [1, -1 / 2, 1 / 3, 0], rtol=1e-4, atol=1e-6)
    assert info["converged"].tolist() == [True, False] and torch.isfinite(x).all()


def random_system(seed):
    """Any spectrum, any number of rows: b in the range or not, repeated, zero, of many scales."""
    rng = np.random.default_rng(seed)
    p, signs = int(rng.integers(1, 50)), rng.choice([-1.0, 1.0], 50)
    spectra = (
        10 ** rng.uniform(-4, 0, p),
        np.repeat(rng.uniform(0.1, 1, p), 4)[:p],
        np.where(rng.random(p) < 0.3, 0.0, 10 ** rng.uniform(-2, 1, p)),
        10 ** rng.uniform(-8, 0, p),
    )
    A, k = matrix(spectra[seed % 4] * signs[:p], seed), int(rng.choice([1, 3, 16, p + 7]))
    b = rows(k, p, seed) @ (A if seed % 3 else np.eye(p))
    if k > 2:
        b[1], b[2] = b[0], 0.0
    return A, b * 10.0 ** rng.uniform(-12, 12, (k, 1))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("seed", [*range(40), 642, 654])
def test_no_row_is_silently_wrong(seed):
    A, b = random_system(seed)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1.1e-8)):
        x, info = solved(A, b, dtype)
        size = np.linalg.norm(b, axis=1)
        # Of what the dtype holds of A and b.
        A_held, b_held = (torch.from_numpy(part).to(dtype).double().numpy() for part in (A, b))
        true = np.linalg.norm(x.double().numpy() @ A_held - b_held, axis=1) / np.where(size > 0, size, 1.0)
        assert (true[info["converged"].numpy()] <= tolerance).all()
        # Where it is not solved, it is no worse than zero but by rounding.
        assert (true <= 1.001).all()


def test_refuses_another_block():
    with pytest.raises((ValueError, TypeError), match="'block' parameter of MINRES"):
        solved(np.eye(2), np.ones((1, 2)), block="yes")
