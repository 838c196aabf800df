"""Parameters in units that are orders of magnitude apart: the condition of A says nothing then, that of UAU all."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from torch import nn

from skinvert import HessianInverter, InfluenceFunction
from skinvert.methods import Direct
from skinvert.methods.condition import own_units
from skinvert.methods.dense import CholeskyInverse
from skinvert.operators import Dense

N = 60
SPREAD = {torch.float64: 1e8, torch.float32: 3e4}


def scaled(dtype, psd=True):
    """Return A = diag(d) S diag(d), S of condition 20 or so, and d."""
    rng = np.random.default_rng(0)
    d = np.logspace(0, np.log10(SPREAD[dtype]), 7)
    F = rng.standard_normal((30, 7))
    S = F.T @ F / 30
    A = Dense(torch.from_numpy(d[:, None] * S * d).to(dtype))
    A.is_psd = psd
    return A, S, d


@pytest.mark.parametrize("dtype", SPREAD)
def test_a_matrix_is_solved_in_the_units_of_its_parameters(dtype):
    A, S, d = scaled(dtype)
    Z = np.random.default_rng(1).standard_normal((3, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inverse = Direct().invert(A, 0.0)
        x = inverse.solve(torch.from_numpy(Z * d).to(dtype)).x
    assert isinstance(inverse, CholeskyInverse)
    # Entry by entry, in its own units.
    np.testing.assert_allclose(x.numpy() * d, np.linalg.solve(S, Z.T).T, rtol=1e3 * torch.finfo(dtype).eps)
    torch.testing.assert_close(A.matrix, scaled(dtype)[0].matrix, rtol=0, atol=0)


def test_a_matrix_that_may_be_rounding_is_not_taken_apart():
    # Of a Hessian that is no sum of squares a small entry may be what is left of larger ones.
    A, _, _ = scaled(torch.float64, psd=False)
    assert not isinstance(Direct().invert(A, 0.0), CholeskyInverse)


def test_a_dead_parameter_is_left_out_as_before():
    matrix = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    A = Dense(matrix)
    A.is_psd = True
    assert own_units(matrix.diagonal()) is None
    x = Direct().invert(A, 0.0).solve(torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)).x
    np.testing.assert_allclose(x, [[1.0, 0.0, 0.5]])


def dollars(dtype=np.float64):
    rng = np.random.default_rng(0)
    size = 1e7 if dtype == np.float64 else 1e4
    X = np.c_[rng.uniform(size, 5 * size, N), rng.normal(size=(N, 3))].astype(dtype)
    return X, (X[:, 1:] @ [1.0, 2.0, 3.0] + rng.normal(size=N)).astype(dtype)


def hat_values(X, alpha=0.0):
    """Return those of ridge regression, by inputs of mean 0 and variance 1, in which the penalty is α / s² a column."""
    mean, s = X.mean(0), X.std(0)
    Z, back = np.c_[(X - mean) / s, np.ones(N)], np.c_[np.diag(1 / s), np.zeros(4)]
    return np.einsum("ij,jk,ik->i", Z, np.linalg.inv(Z.T @ Z + alpha * back.T @ back), Z)


def test_a_column_in_dollars_hides_no_other():
    X, y = dollars()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        influence = InfluenceFunction(removal="newton").fit(Ridge(1.0).fit(X, y), (X, y))
        np.testing.assert_allclose(influence.leverage(), hat_values(X, 1.0), rtol=1e-8)
        removed = influence.removed_parameters([0])
    again = Ridge(1.0).fit(X[1:], y[1:])
    np.testing.assert_allclose(removed["coef"].numpy().ravel(), again.coef_, rtol=1e-8)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_in_float32_a_column_of_ten_thousands_hides_no_other(curvature):
    X, y = dollars(np.float32)
    net = nn.Linear(4, 1)
    inverter = HessianInverter("direct", curvature=curvature, loss="mse")
    influence = InfluenceFunction(inverter).fit(net, (torch.from_numpy(X), torch.from_numpy(y)[:, None]))
    np.testing.assert_allclose(influence.leverage(), hat_values(X.astype(float)), rtol=1e-3)


def test_what_is_left_out_for_its_units_is_told():
    # The intercepts' null direction leaves no Cholesky factor, and the other columns are beyond eps of the first.
    X, _ = dollars()
    y = np.random.default_rng(2).integers(3, size=N)
    model = LogisticRegression(C=100.0).fit(10 * X, y)
    with pytest.warns(scipy.linalg.LinAlgWarning, match="directions of A .* in other units.*StandardScaler"):
        HessianInverter("direct").fit(model, (10 * X, y))


def test_a_null_direction_in_equal_units_is_not_told(recwarn):
    X, _ = dollars()
    X, y = (X - X.mean(0)) / X.std(0), np.random.default_rng(2).integers(3, size=N)
    HessianInverter("direct").fit(LogisticRegression().fit(X, y), (X, y))
    twice = np.c_[X, X[:, :1]]
    HessianInverter("direct").fit(LinearRegression().fit(twice, y), (twice, y))
    # Nor one of small parameters that is null by itself.
    HessianInverter("direct").fit(np.c_[X[:, :1], 1e-6 * X[:, 1:2], 1e-6 * X[:, 1:2]])
    assert not [warning for warning in recwarn if "units" in str(warning.message)]


def test_another_perturbation_tells_too():
    X, y = dollars()
    inverter = HessianInverter("direct", 1e-3).fit(Ridge(1e-6).fit(10 * X, y), (10 * X, y))
    b = np.random.default_rng(3).standard_normal((1, 5))
    both = pytest.warns(scipy.linalg.LinAlgWarning, match="outside its range")
    with both, pytest.warns(scipy.linalg.LinAlgWarning, match="in other units"):
        inverter.path(b, [0.0, 1e-9])
