"""Operators on rows: every face of one is the same symmetric matrix."""

import pickle

import numpy as np
import pytest
import sklearn
import torch

from skinvert.operators import Dense, DiagonalMatrix, LinearOperator, LowRank, Shifted, symmetrise

F = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PENALTY = torch.arange(6, dtype=torch.float64)
MATRIX = F.mT @ F + torch.diag(PENALTY)


class OnlyApply(LinearOperator):
    """The least operator: everything else comes from the base."""

    def __init__(self):
        super().__init__(6, torch.float64, torch.device("cpu"))

    def apply(self, V):
        return V @ MATRIX


OPERATORS = {
    "dense": (Dense(MATRIX), MATRIX),
    "diagonal": (DiagonalMatrix(PENALTY), torch.diag(PENALTY)),
    "low rank": (LowRank(F), F.mT @ F),
    "low rank with a penalty": (LowRank(F, PENALTY), MATRIX),
    "shifted": (Shifted(LowRank(F, PENALTY), 0.5), MATRIX + 0.5 * torch.eye(6)),
    "not shifted": (Shifted(Dense(MATRIX), 0.0), MATRIX),
    "only apply": (OnlyApply(), MATRIX),
}


@pytest.mark.parametrize(("A", "matrix"), OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize("working_memory", [1024, 1e-4])
def test_faces(A, matrix, working_memory):
    V = torch.randn(4, 6, dtype=torch.float64)
    with sklearn.config_context(working_memory=working_memory):
        torch.testing.assert_close(A.apply(V), V @ matrix)
        torch.testing.assert_close(A.to_dense(), matrix)
        torch.testing.assert_close(A.diagonal(), matrix.diagonal())
        scipy_operator = A.aslinearoperator()
        np.testing.assert_allclose(scipy_operator @ V.mT.numpy(), matrix @ V.mT, atol=1e-12)
        np.testing.assert_allclose(scipy_operator.T @ V[0].numpy(), matrix @ V[0], atol=1e-12)
    assert A.shape == (6, 6)


@pytest.mark.parametrize(("A", "matrix"), OPERATORS.values(), ids=OPERATORS.keys())
def test_to_dense_is_the_callers_own(A, matrix):
    expected = matrix.clone()
    A.to_dense().zero_()
    A.diagonal().zero_()
    torch.testing.assert_close(A.to_dense(), expected)


@pytest.mark.parametrize("name", ["dense", "low rank with a penalty", "shifted"])
def test_pickle(name):
    A, matrix = OPERATORS[name]
    torch.testing.assert_close(pickle.loads(pickle.dumps(A)).to_dense(), matrix)


@pytest.mark.parametrize("working_memory", [1024, 1e-4])
def test_symmetrise(working_memory):
    matrix = torch.randn(7, 7, dtype=torch.float64)
    expected = (matrix + matrix.mT) / 2
    with sklearn.config_context(working_memory=working_memory):
        torch.testing.assert_close(symmetrise(matrix), expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_matrix_of_a_factor_is_made_by_stripes(size, dtype):
    rows = torch.randn(30, size, dtype=dtype, generator=torch.Generator().manual_seed(1))
    matrix = LowRank(rows).to_dense()
    expected = rows.double().numpy().T @ rows.double().numpy()
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=100 * torch.finfo(dtype).eps)
    assert torch.equal(matrix, matrix.mT)
