"""The curvature of linear least squares on plain rows."""

import numpy as np
import pytest
import torch
from oracles import matrix_error

from skinvert import HessianInverter
from skinvert.curvature import Gram


def test_is_the_second_moment():
    X = torch.randn(7, 3, dtype=torch.float64)
    assert matrix_error(Gram(X).to_dense(), X.mT.numpy() @ X.numpy() / 7) <= 1e-14


def test_weights_are_repetitions():
    X = torch.randn(3, 4, dtype=torch.float64)
    received = Gram(X, torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)).to_dense()
    assert matrix_error(received, Gram(X[[0, 0, 2]]).to_dense().numpy()) <= 1e-14


def test_factor_and_products():
    X = torch.randn(5, 3, dtype=torch.float64)
    A = Gram(X)
    F, V = A.factor(), torch.randn(2, 3, dtype=torch.float64)
    assert F.shape == A.factor_shape == (5, 3)
    np.testing.assert_allclose(F.mT @ F, A.to_dense(), atol=1e-14)
    np.testing.assert_allclose(A.apply(V), V @ A.to_dense(), atol=1e-14)
    np.testing.assert_allclose(A.diagonal(), A.to_dense().diagonal(), atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_whose_squares_leave_the_dtype_are_told(dtype):
    X, limits = np.random.default_rng(0).standard_normal((5, 3)).astype(dtype), np.finfo(dtype)
    for size in (limits.tiny, limits.max**0.7):
        with pytest.raises(ValueError, match="other units"):
            HessianInverter("direct", 1.0).fit(X * dtype(size))
    # Small, and within it; and zeros.
    for size in (10 * (limits.tiny / limits.eps) ** 0.5, 0.0):
        HessianInverter("direct", 1.0).fit(X * dtype(size))
