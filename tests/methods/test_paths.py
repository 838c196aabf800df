"""``HessianInverter.path``: every method that serves many λ against a dense solve of each."""

import warnings

import numpy as np
import pytest
import torch
from definitions import SETTINGS
from facts import ITERATIVE, KINDS, ON_ROWS, PRECISE, TIGHT, at_rest, having

from skinvert import HessianInverter, InversionRegistry, TwiceDifferentiable
from skinvert.curvature import Gram
from skinvert.methods import Arnoldi, Direct
from skinvert.methods.base import InverseOperator
from skinvert.operators import Dense, DiagonalMatrix, LowRank

# What is tested here is what an approximate method is by definition; tests/methods/test_truth.py holds what it says.
pytestmark = pytest.mark.filterwarnings("ignore:.* is worse than x = 0:sklearn.exceptions.ConvergenceWarning")

SHIFTS = np.logspace(-3, 1, 20)
P = 30


def rows(k, p=P, seed=1):
    return np.random.default_rng(seed).standard_normal((k, p))


def solutions(matrix, shifts, b):
    return np.stack([np.linalg.solve(matrix + s * np.eye(len(matrix)), b.T).T for s in shifts])


def close(received, expected):
    size = np.linalg.norm(expected, axis=2)
    return (
        np.linalg.norm(np.asarray(received) - expected, axis=2).max() <= 1e-8 * size.max()
        and (np.linalg.norm(np.asarray(received) - expected, axis=2) <= 1e-8 * size).all()
    )


@pytest.mark.parametrize("k", [1, P + 5])
@pytest.mark.parametrize("n", [50, 12])
@pytest.mark.parametrize("name", PRECISE)
def test_twenty_shifts_each_within_its_own_dense_solve(name, n, k):
    # n = 12 < p: direct works in sample space.
    X, b = rows(n, seed=2), rows(k)
    received = HessianInverter(TIGHT[name], 0.5).fit(X).path(b, SHIFTS)
    assert received.shape == (20, k, P)
    assert close(received, solutions(X.T @ X / n, SHIFTS, b))


@pytest.mark.parametrize("name", [name for name in PRECISE if not KINDS[name].needs_psd])
def test_on_a_model(name):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    data = (torch.randn(25, 3).double(), torch.randint(2, (25,)))
    inverter = HessianInverter(TIGHT[name], 1.0, loss="cross_entropy").fit(net, data)
    H = HessianInverter("direct", 1.0, loss="cross_entropy").fit(net, data).curvature_.to_dense().numpy()
    # Positive definite at each.
    shifts = -np.linalg.eigvalsh(H)[0] + np.logspace(-1, 1, 5)
    b = rows(3, len(H))
    assert close(inverter.path(b, shifts), solutions(H, shifts, b))


@pytest.mark.parametrize("penalty", [0.3, np.linspace(0.1, 2, P)])
def test_sample_space_with_a_penalty(penalty):
    F, b = rows(8, seed=3), rows(7)
    R = np.broadcast_to(penalty, P).copy()
    inverse = Direct().invert(LowRank(torch.from_numpy(F), torch.from_numpy(R)), 0.5)
    assert type(inverse).__name__ == "SampleSpaceInverse"
    shifts = [0.0, 1e-3, 2.0]
    expected = solutions(F.T @ F + np.diag(R), shifts, b)
    assert close(inverse.path(torch.from_numpy(b), shifts), expected)
    for shift, x in zip(shifts, expected, strict=True):
        other = inverse.at(shift)
        received, info = other.solve(torch.from_numpy(b))
        assert np.abs(received.numpy() - x).max() <= 1e-8 * np.abs(x).max()
        assert info["converged"].all()
        assert other.positive_definite
        np.testing.assert_allclose(other.operator.apply(received), b, atol=1e-8)


@pytest.mark.parametrize("penalty", [None, np.concatenate([[0.0], np.ones(P - 1)])])
def test_sample_space_needs_a_shift(penalty):
    R = None if penalty is None else torch.from_numpy(penalty)
    inverse = Direct().invert(LowRank(torch.from_numpy(rows(8)), R), 0.5)
    with pytest.raises(ValueError, match="hessian_perturbation.*> 0"):
        inverse.path(torch.ones(1, P).double(), [0.1, 0.0])


@pytest.mark.parametrize("name", [name for name in ON_ROWS if name not in ITERATIVE])
def test_is_solve_at_each_shift(name):
    X, b, method = rows(50, seed=2), rows(3), KINDS[name](**SETTINGS[name])
    path = HessianInverter(method, 0.5).fit(X).path(b, [0.01, 0.5])
    for shift, x in zip([0.01, 0.5], path, strict=True):
        expected = HessianInverter(method, shift).fit(X).transform(b)
        np.testing.assert_allclose(x, expected, atol=1e-10 * np.abs(expected).max())


def test_one_projection_and_one_product_for_each_shift():
    # Counted by the pieces of the factorisation that it touches: none is made anew.
    inverse = Direct().invert(Dense(torch.from_numpy(np.diag(np.arange(1.0, P + 1)))), 0.5).at(0.1)
    basis = inverse.basis
    inverse.path(torch.from_numpy(rows(3)), SHIFTS)
    assert inverse.at(2.0).basis is basis
    low = Arnoldi(rank=4).invert(Dense(torch.eye(P).double()), 0.5)
    assert low.at(3.0).basis is low.basis


@pytest.mark.parametrize("name", ON_ROWS)
def test_kind_dtype_and_device_are_those_of_b(name):
    X = rows(50, seed=2).astype(np.float32)
    inverter = HessianInverter(at_rest(name), 0.5).fit(X)
    b = torch.from_numpy(rows(2))
    tensor = inverter.path(b, [0.5, 1.0])
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.float64
    array = inverter.path(b.numpy().astype(np.float32), (s for s in [0.5, 1.0]))
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, tensor, rtol=1e-3, atol=1e-4)
    assert inverter.path(b, []).shape == (0, 2, P)


def test_an_inverse_moves_to_another_shift_or_is_none():
    class One(InverseOperator):
        operator = DiagonalMatrix(torch.ones(3))

        def solve(self, B):
            raise AssertionError

    with pytest.raises(TypeError, match="abstract method '?at"):
        One()


def test_a_function_has_no_path():
    @InversionRegistry.register(TwiceDifferentiable, "a_function_without_a_path", overwrite=True)
    def solve(model, training_data, b, hessian_perturbation=0.0):
        return b, {}

    try:
        net = torch.nn.Linear(2, 1)
        inverter = HessianInverter("a_function_without_a_path", loss="mse").fit(
            net, (torch.ones(3, 2), torch.ones(3, 1))
        )
        with pytest.raises(TypeError, match="Call `solve` for each λ"):
            inverter.path(torch.ones(1, 3), [0.1])
    finally:
        del InversionRegistry.registry[TwiceDifferentiable, "a_function_without_a_path"]


@pytest.mark.parametrize("shift", [-1.0, float("nan"), "0.1"])
def test_refuses_a_wrong_shift(shift):
    inverter = HessianInverter("direct", 0.5).fit(rows(50))
    with pytest.raises((ValueError, TypeError), match="hessian_perturbation"):
        inverter.path(rows(1), [0.1, shift])


@pytest.mark.parametrize("rtol", [None, 1e-4, 1e-6, 1e-7])
@pytest.mark.parametrize("shift", [1e-9, 1e-5, 1e-2])
@pytest.mark.parametrize("name", having("rtol"))
@pytest.mark.parametrize("n", [60, 8])
def test_a_path_says_what_solve_says_near_the_tolerance(name, n, shift, rtol):
    X = (rows(n, 12, seed=4) * np.logspace(0, -1, 12)).astype("f4")
    b = torch.from_numpy(rows(4, 12)).float()

    def told(solve):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, info = solve(KINDS[name](rtol=rtol).invert(Gram(torch.from_numpy(X)), shift))
        return info["converged"].tolist(), [str(warning.message) for warning in caught]

    alone, along = told(lambda inverse: inverse.solve(b)), told(lambda inverse: inverse.solve_path(b, [shift])[0])
    assert along[0] == alone[0] or all(along[0])
    assert along[1] == alone[1] or all(along[0])
