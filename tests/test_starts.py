"""A start for one call, ``solve(b, x0)``, against dense float64 solves."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from skinvert import HessianInverter, HessianInverterCV, InversionRegistry, TorchTwiceDifferentiable
from skinvert.methods import CG, MINRES, LiSSA

P, SHIFT = 30, 1e-3
RNG = np.random.default_rng(0)
X = RNG.standard_normal((50, P)) * np.geomspace(1, 0.05, P)
B = RNG.standard_normal((3, P))
A = X.T @ X / 50 + SHIFT * np.eye(P)
SOLUTION = np.linalg.solve(A, B.T).T
FORMS = {
    "cg": CG(block=False),
    "cg, block": CG(block=True),
    "cg, jacobi": CG(preconditioner="jacobi"),
    "minres": MINRES(block=False),
    "minres, block": MINRES(block=True),
}


def fitted(method="cg", dtype=np.float64, shift=SHIFT, **settings):
    return HessianInverter(method, shift, **settings).fit(X.astype(dtype))


def error(x, expected=SOLUTION):
    x = np.asarray(x, dtype=np.float64)
    return (np.linalg.norm(x - expected, axis=1) / np.linalg.norm(expected, axis=1)).max()


def residual(x, b=B):
    return np.linalg.norm(x @ A - b, axis=1) / np.linalg.norm(b, axis=1)


def near(size=1e-4):
    """Return rows whose residuals are ``size``, not of b's own Krylov space."""
    off = np.random.default_rng(9).standard_normal(B.shape)
    off *= size * np.linalg.norm(B, axis=1, keepdims=True) / np.linalg.norm(off @ A, axis=1, keepdims=True)
    return SOLUTION + off


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FORMS)
def test_a_near_start_takes_fewer_iterations_to_the_solution(name, dtype):
    tolerance = {np.float32: 1e-3, np.float64: 1e-9}[dtype]
    inverter = fitted(clone(FORMS[name]).set_params(rtol=tolerance), dtype)
    _, cold = inverter.solve(B)
    x, warm = inverter.solve(B, near(10 * tolerance))
    assert (warm["n_iter"] < cold["n_iter"]).all() and (warm["n_iter"] > 0).all()
    assert warm["converged"].all() and residual(x).max() <= 1.1 * tolerance
    again = inverter.solve(B)
    np.testing.assert_array_equal(again.info["n_iter"], cold["n_iter"])


@pytest.mark.parametrize("name", FORMS)
def test_the_solution_itself_takes_none(name):
    x, info = fitted(FORMS[name]).solve(B, SOLUTION)
    assert info["n_iter"].tolist() == [0, 0, 0] and info["converged"].all()
    np.testing.assert_array_equal(x, SOLUTION)


def test_lissa_starts_there_too():
    inverter = fitted(LiSSA(rtol=1e-4, maxiter=10_000), shift=0.3)
    solution = np.linalg.solve(A + (0.3 - SHIFT) * np.eye(P), B.T).T
    x, info = inverter.solve(B, solution)
    assert info["n_iter"].tolist() == [0, 0, 0] and error(x, solution) <= 1e-12
    assert (inverter.solve(B).info["n_iter"] > 0).all()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["array", "tensor", "float32 tensor", "list", "frame"])
@pytest.mark.parametrize("shape", [(3, P), (1, P), (P,)])
def test_every_shape_and_kind(name, kind, shape):
    b = np.tile(B[:1], (3, 1))
    x0 = np.broadcast_to(SOLUTION[:1], (3, P))[: shape[0] if len(shape) > 1 else 1].reshape(shape)
    kinds = {
        "array": lambda x: x.copy(),
        "tensor": torch.tensor,
        "float32 tensor": lambda x: torch.tensor(x, dtype=torch.float32),
        "list": lambda x: x.tolist(),
        "frame": lambda x: pd.DataFrame(x.reshape(-1, P)),
    }
    given = kinds[kind](x0)
    before = copy.deepcopy(given)
    x, info = fitted(clone(FORMS[name]).set_params(rtol=1e-5)).solve(b, given)
    assert info["n_iter"].tolist() == [0, 0, 0]
    assert np.array_equal(np.asarray(given), np.asarray(before)) and type(x) is np.ndarray
    x += 1.0
    assert np.array_equal(np.asarray(given), np.asarray(before))


def test_it_takes_the_place_of_the_setting_for_one_call():
    inverter = fitted(CG(x0=1e3 * np.ones(P), rtol=1e-9))
    setting, call = inverter.solve(B).info["n_iter"], inverter.solve(B, SOLUTION).info["n_iter"]
    assert (setting > 0).all() and not call.any()
    np.testing.assert_array_equal(inverter.method_.x0, 1e3 * np.ones(P))
    np.testing.assert_array_equal(inverter.solve(B).info["n_iter"], setting)
    assert not pickle.loads(pickle.dumps(inverter)).solve(B, SOLUTION).info["n_iter"].any()
    assert not clone(inverter).fit(X).solve(B, SOLUTION).info["n_iter"].any()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e-300, 1e-60, 1e-30, 1e-12, 1e12, 1e30, 1e60, 1e290])
def test_a_start_is_scaled_as_its_row(name, dtype, size):
    sizes = np.array([[1.0], [size], [1 / size if size > 1e-300 else 1.0]])
    inverter = fitted(clone(FORMS[name]).set_params(rtol=1e-4), dtype)
    for kind in (np.asarray, torch.from_numpy):
        x, info = inverter.solve(kind(B * sizes), kind(SOLUTION * sizes))
        assert not np.asarray(info["n_iter"]).any() and np.asarray(info["converged"]).all()
        assert error(np.asarray(x) / sizes) <= 1e-3
    # One row for all: far off for the others, which are right all the same.
    x, info = inverter.solve(B * sizes, SOLUTION[1] * size)
    assert info["n_iter"][1] == 0 and info["converged"].all()
    assert residual(x / sizes).max() <= 2e-4


def test_a_start_that_the_operator_s_dtype_cannot_hold_is_none():
    inverter = fitted("cg", np.float32)
    x, info = inverter.solve(B, SOLUTION * 1e200)
    np.testing.assert_array_equal(x, inverter.transform(B))
    assert info["converged"].all()


@pytest.mark.parametrize("blocks", ["parameter", {"whole": "*"}])
@pytest.mark.parametrize("method", [CG(rtol=1e-8), MINRES(rtol=1e-8)])
def test_each_block_starts_at_its_part(method, blocks):
    torch.manual_seed(0)
    net = nn.Linear(4, 2).double()
    data = torch.randn(40, 4).double(), torch.randn(40, 2).double()
    inverter = HessianInverter(method, 0.1, loss="mse", blocks=blocks).fit(net, data)
    b = torch.randn(3, 10, dtype=torch.float64)
    ones = torch.cat([data[0], torch.ones(40, 1)], 1)
    # weight (2, 4), then bias (2,): mse divides by n · c.
    G = torch.kron(torch.eye(2), ones.T @ ones / 40).double()
    order = [0, 1, 2, 3, 5, 6, 7, 8, 4, 9]
    G = G[order][:, order] + 0.1 * torch.eye(10)
    if blocks == "parameter":
        G[:8, 8:] = G[8:, :8] = 0
    solution = torch.linalg.solve(G, b.T).T
    _, info = inverter.solve(b, solution)
    assert not any(part["n_iter"].any() for part in info["blocks"])
    assert all(part["n_iter"].any() for part in inverter.solve(b).info["blocks"])


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, P), (3, P + 1), (P + 1,), (3, 1), (1, 3, P), ()])
def test_another_shape_is_refused(shape):
    for x0 in (np.ones(shape), torch.ones(shape)):
        with pytest.raises(ValueError, match=r"x0 must be of shape \(3, 30\), \(1, p\) or \(p,\)\. Got shape"):
            fitted().solve(B, x0)


@pytest.mark.parametrize(
    ("x0", "fault", "match"),
    [
        (np.full(P, np.nan), ValueError, "x0 must be finite"),
        (np.full((3, P), np.inf), ValueError, "x0 must be finite"),
        (torch.full((1, P), torch.nan), ValueError, "x0 must be finite"),
        (torch.ones(3, P, dtype=torch.complex64), TypeError, "x0 must be dense and real"),
        (np.ones(P) * 1j, ValueError, "x0 must be real"),
        (np.array(["a"] * P), ValueError, "x0 must be numeric"),
    ],
)
def test_what_is_no_start_is_refused(x0, fault, match):
    for inverter in (fitted(), fitted("minres", np.float32)):
        with pytest.raises(fault, match=match):
            inverter.solve(B * 1e-100, x0)


@pytest.mark.parametrize("method", ["direct", "arnoldi", "nystroem", "diagonal", "harmonic_mean"])
def test_a_method_that_factorises_says_so(method):
    with pytest.raises(ValueError, match=f"x0 must be None for a method that factorises.*{method}.*try method=.cg"):
        fitted(method).solve(B, B)


def test_a_function_says_so():
    @InversionRegistry.register(TorchTwiceDifferentiable, "of_no_start", overwrite=True)
    def _(model, training_data, b, hessian_perturbation):
        return b, {}

    net = nn.Linear(2, 1, bias=False)
    inverter = HessianInverter("of_no_start", 0.1, loss="mse").fit(net, (torch.eye(2), torch.zeros(2, 1)))
    with pytest.raises(ValueError, match="x0 must be None for a method that is a function"):
        inverter.solve(torch.ones(1, 2), torch.ones(1, 2))


def test_a_frame_s_columns_must_be_those_of_the_parameters():
    names = [f"c{i}" for i in range(P)]
    inverter = HessianInverter("cg", SHIFT).fit(pd.DataFrame(X, columns=names))
    frame = pd.DataFrame(SOLUTION, columns=names)
    b = pd.DataFrame(B, columns=names)
    assert not inverter.solve(b, frame).info["n_iter"].any()
    with pytest.raises(ValueError, match="in this order"):
        inverter.solve(b, frame[names[::-1]])


# -- derivatives -------------------------------------------------------------------------------------------------------


def test_the_start_is_a_constant_of_derivatives():
    inverter = fitted(CG(rtol=1e-13), shift=0.3)
    dense = torch.from_numpy(np.linalg.inv(A + (0.3 - SHIFT) * np.eye(P)))
    b, x0 = torch.from_numpy(B).requires_grad_(), torch.from_numpy(SOLUTION).requires_grad_()
    weights = torch.from_numpy(RNG.standard_normal((3, P)))
    x = inverter.solve(b, x0).x
    received = torch.autograd.grad((weights * x.square()).sum(), [b, x0], allow_unused=True, create_graph=True)
    assert received[1] is None
    torch.testing.assert_close(received[0], (2 * weights * (b @ dense)) @ dense, rtol=1e-8, atol=1e-9)
    second = torch.autograd.grad(received[0].sum(), b)[0]
    torch.testing.assert_close(second, (2 * weights * (torch.ones_like(b) @ dense)) @ dense, rtol=1e-8, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_jacobians_solve_without_the_start():
    inverter = fitted(CG(rtol=1e-12), shift=0.3)
    dense = torch.from_numpy(np.linalg.inv(A + (0.3 - SHIFT) * np.eye(P)))
    b, x0 = torch.from_numpy(B[:1]), torch.from_numpy(SOLUTION[:1])
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        received = jacobian(lambda rows: inverter.solve(rows, x0).x)(b)
        torch.testing.assert_close(received[0, :, 0], dense, rtol=1e-8, atol=1e-9)


def test_the_backward_pass_does_not_start_there():
    # From a start for b, the solve for a gradient of other size would have farther to go.
    inverter, starts = fitted(CG(rtol=1e-10), shift=0.3), []
    inverse = inverter.inverse_
    solve = type(inverse).solve

    def seen(self, rows):
        starts.append(self.x0 is not None)
        return solve(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(inverse), "solve", seen)
        b = torch.from_numpy(B).requires_grad_()
        inverter.solve(b, B).x.sum().backward()
    assert starts == [True, False]


def test_the_search_hands_it_on():
    search = HessianInverterCV([0.1, 1.0], method="cg", cv=2).fit(X)
    x, _ = search.solve(B)
    assert not search.solve(B, x).info["n_iter"].any()


def test_warm_or_cold_an_unsolved_row_is_told():
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        _, info = fitted(CG(rtol=1e-14, maxiter=1)).solve(B, near(1e-2))
    assert not info["converged"].any()
