"""The curvature of linear least squares on plain rows."""

import numpy as np
import torch
from oracles import matrix_error

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
