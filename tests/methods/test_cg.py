"""Conjugate gradients: honest convergence, negative curvature, stagnation, starting points."""

import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from oracles import oracle_matrix, relative_error, solution
from problems import problem
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from skinvert import HessianInverter
from skinvert.methods import CG, MINRES
from skinvert.operators import Dense, DiagonalMatrix


def stopped_early(seed, steps=3):
    """A small MLP after a few steps of training, its Hessian indefinite."""
    torch.manual_seed(seed)
    X, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(3, (40,))
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(X), y).backward()
        optimiser.step()
    return net, (X, y)


def dense_hessian(net, data):
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    names, shapes = zip(*[(k, v.shape) for k, v in net.named_parameters()], strict=True)

    def loss(flat):
        parts = flat.split([s.numel() for s in shapes])
        values = {k: v.reshape(s) for k, v, s in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(net, values, (data[0],)), data[1])

    return torch.autograd.functional.hessian(loss, theta).numpy()


def relative_residual(A, x, b):
    return np.linalg.norm(x @ A - b, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_indefinite_is_never_called_converged(seed, shift):
    net, data = stopped_early(seed)
    A = dense_hessian(net, data) + shift * np.eye(51)
    b = np.random.default_rng(seed).standard_normal((20, 51))
    inverter = HessianInverter("cg", shift, loss="cross_entropy").fit(net, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        x, info = inverter.solve(b)
    true = relative_residual(A, x, b)
    np.testing.assert_allclose(info["residual"], true, rtol=1e-5, atol=1e-12)
    assert not info["converged"][true > 1e-8].any()
    assert np.isfinite(x).all()


@pytest.mark.parametrize("seed", range(6))
def test_the_perturbation_that_the_warning_names_solves(seed):
    net, data = stopped_early(seed)
    H, b = dense_hessian(net, data), np.random.default_rng(seed).standard_normal((8, 51))
    inverter = HessianInverter("cg", loss="cross_entropy")
    with pytest.warns(ConvergenceWarning, match="hessian_perturbation must be >") as record:
        inverter.fit(net, data).transform(b)
    shift = float(re.search(r"hessian_perturbation=([\d.e+-]+),", str(record[0].message))[1])
    least = -np.linalg.eigvalsh(H)[0]
    assert least < shift <= 2 * least
    x, info = inverter.set_params(hessian_perturbation=shift).fit(net, data).solve(b)
    assert info["converged"].all() and not info["negative_curvature"].any()
    assert relative_error(x, solution(H, shift, b)) <= 1e-6


def test_the_gradient_norm_is_in_the_warning():
    net, data = stopped_early(0)
    inverter = HessianInverter("cg", loss="cross_entropy").fit(net, data)
    with pytest.warns(ConvergenceWarning, match=f"norm at θ is {inverter.gradient_norm_:.3g}"):
        inverter.transform(np.ones((1, 51)))


def test_eigenvalue_in_the_warning_of_a_large_matrix():
    entries = torch.cat([torch.tensor([-0.3]), torch.linspace(0.1, 5, 99)]).double()
    with pytest.warns(ConvergenceWarning, match=re.escape("has eigenvalue -0.3")):
        CG().invert(DiagonalMatrix(entries), 0.0).solve(torch.ones(1, 100, dtype=torch.float64))


def test_each_row_is_judged_alone():
    A = DiagonalMatrix(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64))
    B = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="1 of 3"):
        X, info = CG().invert(A, 0.0).solve(B)
    assert info["converged"].tolist() == [True, False, True]
    assert info["negative_curvature"].tolist() == [False, True, False]
    torch.testing.assert_close(X[0], torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))


def spd(p, condition, seed=0, dtype=torch.float64):
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((p, p)))[0]
    A = (Q * np.logspace(-np.log10(condition), 0, p)) @ Q.T
    return torch.from_numpy((A + A.T) / 2).to(dtype)


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-10])
def test_rtol_is_kept_by_the_true_residual(rtol):
    A, B = spd(50, 1e3), torch.randn(6, 50, dtype=torch.float64)
    X, info = CG(rtol=rtol).invert(Dense(A), 0.0).solve(B)
    true = (X @ A - B).norm(dim=1) / B.norm(dim=1)
    assert bool((true <= rtol).all()) and info["converged"].all()


def test_atol():
    A, B = spd(50, 1e3), 1e-6 * torch.randn(6, 50, dtype=torch.float64)
    _, info = CG(rtol=0.0, atol=1.0).invert(Dense(A), 0.0).solve(B)
    assert info["converged"].all() and not info["n_iter"].any()


@pytest.mark.parametrize("size", [1e-3, 1e3])
@pytest.mark.parametrize("method", [CG, MINRES, partial(MINRES, block=True)])
def test_atol_decides_who_converged(method, size):
    A, B = spd(50, 1e3), size * torch.randn(6, 50, dtype=torch.float64)
    X, info = method(rtol=0.0, atol=0.02 * size).invert(Dense(A), 0.0).solve(B)
    assert info["converged"].all() and bool(((X @ A - B).norm(dim=1) <= 0.02 * size).all())
    with pytest.warns(ConvergenceWarning):
        X, info = method(rtol=0.0, atol=0.02 * size, maxiter=2).invert(Dense(A), 0.0).solve(B)
    assert not info["converged"].any() and bool(((X @ A - B).norm(dim=1) > 0.02 * size).all())


@pytest.mark.parametrize("maxiter", [1, 5])
def test_too_few_iterations_are_said(maxiter):
    A, B = spd(50, 1e3), torch.randn(6, 50, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match=r"6 of 6 .*maxiter"):
        _, info = CG(maxiter=maxiter).invert(Dense(A), 0.0).solve(B)
    assert not info["converged"].any() and (info["n_iter"] == maxiter).all()


def test_stagnation_in_float32_is_said():
    A, B = spd(50, 1e5, dtype=torch.float32), torch.randn(6, 50)
    with pytest.warns(ConvergenceWarning, match=r"dtype=torch\.float64"):
        X, info = CG(rtol=1e-7, maxiter=5000).invert(Dense(A), 0.0).solve(B)
    true = (X.double() @ A.double() - B.double()).norm(dim=1) / B.double().norm(dim=1)
    assert not info["converged"][true > 2e-7].any() and info["stagnated"].all()


def test_float64_cures_the_stagnation():
    A, B = spd(50, 1e5, dtype=torch.float32).double(), torch.randn(6, 50, dtype=torch.float64)
    _, info = CG(rtol=1e-7).invert(Dense(A), 0.0).solve(B)
    assert info["converged"].all() and not info["stagnated"].any()


@pytest.mark.parametrize("rows", [1, 6])
def test_x0_is_copied_and_used(rows):
    A, B = spd(50, 1e3), torch.randn(6, 50, dtype=torch.float64)
    solved = solution(A.numpy(), 0.0, B)[:rows]
    x0 = solved.copy()
    X, info = CG(x0=x0, rtol=1e-6).invert(Dense(A), 0.0).solve(B)
    np.testing.assert_array_equal(x0, solved)
    assert relative_error(X, solution(A.numpy(), 0.0, B)) <= 1e-3
    assert not info["n_iter"][:rows].any() and bool((info["n_iter"][rows:] > 0).all())


@pytest.mark.parametrize("method", [CG, MINRES, partial(MINRES, block=True)])
def test_x0_of_another_dtype(method):
    A, B = spd(20, 1e2), torch.randn(3, 20, dtype=torch.float64)
    X, info = method(x0=torch.ones(20, dtype=torch.float32)).invert(Dense(A), 0.0).solve(B)
    assert X.dtype == torch.float64 and info["converged"].all()
    assert bool(((X @ A - B).norm(dim=1) <= 1e-7 * B.norm(dim=1)).all())


@pytest.mark.parametrize("shape", [(3, 50), (6, 49), (2, 6, 50)])
def test_x0_of_another_shape_is_refused(shape):
    A, B = spd(50, 1e3), torch.randn(6, 50, dtype=torch.float64)
    with pytest.raises(ValueError, match="x0 must be"):
        CG(x0=np.zeros(shape)).invert(Dense(A), 0.0).solve(B)


def test_at_another_perturbation():
    A, B = spd(50, 1e3), torch.randn(6, 50, dtype=torch.float64)
    received = CG(rtol=1e-12).invert(Dense(A), 1.0).at(0.1).solve(B).x
    assert relative_error(received, solution(A.numpy(), 0.1, B)) <= 1e-10


def test_non_finite_products_name_the_iteration():
    with pytest.raises(FloatingPointError, match="iteration 0"):
        CG().invert(Dense(torch.full((2, 2), torch.inf)), 0.0).solve(torch.ones(1, 2))


def test_scale_of_rows_does_not_matter():
    case = problem("mlp", "cross_entropy", 0.1)
    H, b = oracle_matrix(case), case.right_hand_sides(3) * np.array([[1e-12], [1.0], [1e12]])
    inverter = HessianInverter(CG(rtol=1e-12), 2.0, **case.settings()).fit(case.module, case.data)
    assert relative_error(inverter.transform(b), solution(H, 2.0, b)) <= 1e-10
