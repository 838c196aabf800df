"""Conjugate gradients that start where another method leads, against dense float64 solves."""

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from skinvert import HessianInverter, PerSampleGradient
from skinvert.methods import CG, EKFAC, MINRES, Diagonal, Direct, Nystroem
from skinvert.methods.base import InverseOperator, Method
from skinvert.operators import Dense
from skinvert.results import InverseHvpResult

P, SHIFT = 30, 1e-3
RNG = np.random.default_rng(0)
X = RNG.standard_normal((50, P)) * np.geomspace(1, 0.05, P)
H = X.T @ X / 50
A = H + SHIFT * np.eye(P)
B = RNG.standard_normal((9, P))
SOLUTION = np.linalg.solve(A, B.T).T


class Leads(Method):
    """Rows of the user's own times the dense solution of A + λI, whatever sign or size."""

    name = "leads"

    def __init__(self, *, times=1.0):
        self.times = times

    def invert(self, A, hessian_perturbation, verbose=0):
        return Led(A, hessian_perturbation, torch.as_tensor(self.times))


class Led(InverseOperator):
    name = "leads"

    def __init__(self, A, shift, times):
        self.curvature, self.hessian_perturbation, self.times = A, shift, times

    def solve(self, B):
        matrix = self.curvature.to_dense() + self.hessian_perturbation * torch.eye(B.shape[1], dtype=B.dtype)
        return InverseHvpResult(self.times.to(B)[..., None] * torch.linalg.solve(matrix, B.T).T, {})

    def at(self, shift):
        return Led(self.curvature, shift, self.times)


def inverse(dtype=torch.float64, matrix=H, shift=SHIFT, **settings):
    return CG(**settings).invert(Dense(torch.from_numpy(matrix).to(dtype)), shift)


def solved(b=B, dtype=torch.float64, matrix=H, shift=SHIFT, **settings):
    return inverse(dtype, matrix, shift, **settings).solve(torch.from_numpy(b).to(dtype))


def residual(x, b=B, matrix=A):
    return np.linalg.norm(x.double().numpy() @ matrix - b, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
@pytest.mark.parametrize(
    "start", ["nystroem", Nystroem(rank=20), "jacobi", CG(maxiter=5, rtol=1e-9), MINRES(rtol=1e-3)]
)
def test_every_start_leads_to_the_solution(start, dtype, rtol, block):
    x, info = solved(dtype=dtype, start=start, rtol=rtol, block=block)
    assert info["converged"].all() and residual(x).max() <= 1.1 * rtol
    np.testing.assert_allclose(info["residual"], residual(x), rtol=0.3, atol=1e-10 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("block", [False, True])
def test_a_good_start_takes_fewer_iterations(block):
    _, cold = solved(rtol=1e-2, block=block)
    _, warm = solved(rtol=1e-2, block=block, start=MINRES(rtol=0.03))
    # Rows of a block share their directions: which of them ends first is the rounding's of the machine.
    fewer = warm["n_iter"].sum() < cold["n_iter"].sum() if block else (warm["n_iter"] < cold["n_iter"]).all()
    assert fewer


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("times", [1.0, 100.0, 1.0 + np.arange(9.0)])
def test_a_start_of_the_right_direction_takes_none(times, dtype, block):
    # In float32 100 x has two digits less, to be told from b.
    rtol = 1e-2 if dtype == torch.float32 else 1e-8
    x, info = solved(dtype=dtype, start=Leads(times=times), block=block, rtol=rtol)
    assert not info["n_iter"].any() and info["converged"].all()
    assert residual(x).max() <= 1.1 * rtol and info["n_products"] == len(B)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("times", [-1.0, 0.0, 1e12, np.nan, np.inf])
def test_a_start_that_leads_nowhere_is_zero(times, block):
    each = np.where(np.arange(9) % 2, times, 1.0)
    x, info = solved(start=Leads(times=each), block=False, rtol=1e-6)
    cold = solved(block=False, rtol=1e-6)
    odd = np.arange(9) % 2 == 1
    assert not info["n_iter"][~odd].any()
    torch.testing.assert_close(x[odd], cold.x[odd], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(info["n_iter"][odd], cold.info["n_iter"][odd])
    together = solved(start=Leads(times=times), block=block, rtol=1e-6)
    assert together.info["converged"].all() and residual(together.x).max() <= 1.1e-6


@pytest.mark.parametrize("times", [np.nan, np.inf])
def test_a_row_without_a_number_spoils_no_other(times):
    # The size of A is found from the first product, which must not meet it.
    each = np.where(np.arange(9) % 2, times, 1.0)
    x, info = solved(dtype=torch.float32, matrix=1e-25 * H, shift=1e-25 * SHIFT, start=Leads(times=each), rtol=1e-3)
    assert info["n_iter"][::2].tolist() == [0] * 5 and (info["n_iter"][1::2] > 0).all()
    assert info["converged"].all() and residual(x.double() * 1e-25).max() <= 1.1e-3


@pytest.mark.parametrize("seed", range(5))
def test_no_start_is_worse_than_zero_in_the_norm_of_a(seed):
    times = np.random.default_rng(seed).standard_normal(9) * 10
    rough = Leads(times=times) if seed % 2 else Nystroem(rank=3 + seed, tol=0.0)
    with pytest.warns(ConvergenceWarning, match="cg did not converge"):
        x, _ = solved(start=rough, maxiter=1, rtol=0.0, block=False)

    def energy(x):
        off = x.numpy() - SOLUTION
        return ((off @ A) * off).sum(1)

    assert (energy(x) <= energy(0 * x) * (1 + 1e-12)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("block", [False, True])
def test_rows_of_any_scale(size, dtype, block):
    sizes = np.where(np.arange(9) % 3, 1.0, size)[:, None]
    for of_a in (1e-6, 1.0, 1e6) if size < 1e30 or dtype == torch.float64 else (1.0, 1e6):
        x, info = solved(B * sizes, dtype, H * of_a, SHIFT * of_a, start=Nystroem(rank=25), rtol=1e-4, block=block)
        assert info["converged"].all() and residual(x * of_a / torch.from_numpy(sizes)).max() <= 1.1e-4
    zeros = B * (np.arange(9) > 0)[:, None]
    x, info = solved(zeros, dtype, start="nystroem", rtol=1e-3, block=block)
    assert not x[0].any() and info["converged"].all() and info["n_iter"][0] == 0


def test_a_singular_start_is_no_error_and_tells_nothing():
    # Of rank 3, at λ = 0, with b outside its range: the start's own warnings are not the solution's.
    low = X[:3].T @ X[:3] / 3
    b = B @ low
    x, info = solved(b, matrix=low, shift=0.0, start=Direct())
    assert info["converged"].all() and residual(x, b, low).max() <= 2e-8
    assert info["n_iter"].max() <= 1
    with pytest.warns(ConvergenceWarning) as told:
        _, info = solved(matrix=low, shift=0.0, start=Direct())
    assert not info["converged"].any()
    assert all("cg did not" in str(warning.message) or "for cg" in str(warning.message) for warning in told)


def test_an_indefinite_start_is_taken():
    class Negative(Leads):
        def invert(self, A, hessian_perturbation, verbose=0):
            return Diagonal().invert(Dense(torch.diag(torch.linspace(-1.0, 2.0, P, dtype=torch.float64))), 0.0)

    x, info = solved(start=Negative())
    assert info["converged"].all() and residual(x).max() <= 1.1e-8


def test_the_start_moves_with_the_perturbation():
    moved = inverse(start=Leads(), rtol=1e-8).at(0.5)
    x, info = moved.solve(torch.from_numpy(B))
    assert not info["n_iter"].any() and moved.start.hessian_perturbation == 0.5
    assert residual(x, matrix=H + 0.5 * np.eye(P)).max() <= 1e-8
    for shift, result in zip((0.1, 1.0), moved.solve_path(torch.from_numpy(B), (0.1, 1.0)), strict=True):
        assert not result.info["n_iter"].any()
        assert residual(result.x, matrix=H + shift * np.eye(P)).max() <= 1e-8
    far = moved.scale_free()
    assert far.start is not None and not far.solve(torch.from_numpy(B)).info["n_iter"].any()


def test_two_starts_are_refused():
    with pytest.raises(ValueError, match="x0 must be None beside start='jacobi'. Got both"):
        inverse(start="jacobi", x0=np.ones(P))
    fitted = HessianInverter(CG(start="jacobi"), SHIFT).fit(X)
    with pytest.raises(ValueError, match="x0 must be None beside start='diagonal'. Got both"):
        fitted.solve(B, B)


@pytest.mark.parametrize(
    ("start", "match"), [("ilu", "start must be one of"), ("ekfac", "start must be a method that")]
)
def test_what_is_no_start_is_refused(start, match):
    with pytest.raises(ValueError, match=match):
        inverse(start=start)
    with pytest.raises(ValueError, match="preconditioner must be one of"):
        inverse(preconditioner="ilu")


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = torch.randn(60, 4).double(), torch.randint(0, 3, (60,))
    return net, data, PerSampleGradient(net, loss="cross_entropy").fit(*data).transform(data)[:5]


@pytest.mark.parametrize("start", ["ekfac", "kfac", EKFAC(approx="reduce")])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_kronecker_factors_of_a_network_lead_to_the_dense_solution(start, curvature):
    net, data, b = network()
    shift = 0.01 if curvature == "ggn" else 1.0
    settings = {"hessian_perturbation": shift, "curvature": curvature, "loss": "cross_entropy"}
    expected = HessianInverter("direct", **settings).fit(net, data).transform(b)
    fitted = HessianInverter(CG(start=start, rtol=1e-10), **settings).fit(net, data)
    x, info = fitted.solve(b)
    assert info["converged"].all()
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(fitted.path(b, [shift])[0], expected, rtol=1e-6, atol=1e-8)
    again = pickle.loads(pickle.dumps(fitted))
    torch.testing.assert_close(again.transform(b), x, rtol=1e-12, atol=1e-14)


def test_settings_are_cloned_copied_and_stored():
    method = CG(start=EKFAC(approx="reduce"))
    for other in (clone(method), copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert other.start is not method.start and other.start.approx == "reduce"
    assert clone(method).set_params(start__approx="expand").start.approx == "expand" and method.start.approx == "reduce"
    mine = Nystroem(rank=5)
    inverse(start=mine)
    assert mine.get_params() == Nystroem(rank=5).get_params()


def test_solutions_from_a_start_are_differentiable():
    fitted = HessianInverter(CG(start="jacobi", rtol=1e-12), 0.3).fit(X)
    dense = torch.from_numpy(np.linalg.inv(H + 0.3 * np.eye(P)))
    b = torch.from_numpy(B).requires_grad_()
    received = torch.autograd.grad(fitted.transform(b).square().sum() / 2, b)[0]
    torch.testing.assert_close(received, b.detach() @ dense @ dense, rtol=1e-8, atol=1e-9)
