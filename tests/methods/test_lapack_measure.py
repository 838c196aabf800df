"""LAPACK's own measure of a solver: ‖b − A x‖₁ / (‖A‖₁ ‖x‖₁ eps) < 30, over its types of symmetric matrices.

Anderson et al. (1999), LAPACK Working Note 41, "Installation Guide for LAPACK", sec. 6: the types of the tests of
xPO and xSY, and the threshold 30.
"""

import numpy as np
import pytest
import torch

from skinvert.methods import Direct
from skinvert.operators import Dense

SIZES = [2, 3, 5, 10, 30, 70, 130]
DTYPES = [torch.float32, torch.float64]
THRESHOLD = 30


def of_condition(n, condition, signs=False):
    """Random eigenvectors, and eigenvalues from 1 down to 1/condition in geometric steps."""
    rng = np.random.default_rng(n)
    Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    values = condition ** (-np.arange(n) / (n - 1))
    return (Q * values * (rng.choice([-1.0, 1.0], n) if signs else 1.0)) @ Q.T


def without(A, k):
    """Row and column k are zero."""
    A[k] = A[:, k] = 0
    return A


TYPES = {
    "diagonal": lambda n, _: np.diag(np.linspace(1.0, 2.0, n)),
    "condition 2": lambda n, _: of_condition(n, 2.0),
    "first row zero": lambda n, _: without(of_condition(n, 2.0), 0),
    "last row zero": lambda n, _: without(of_condition(n, 2.0), n - 1),
    "middle row zero": lambda n, _: without(of_condition(n, 2.0), n // 2),
    "condition √(0.1/eps)": lambda n, facts: of_condition(n, np.sqrt(0.1 / facts.eps)),
    "condition 0.1/eps": lambda n, facts: of_condition(n, 0.1 / facts.eps),
    "near underflow": lambda n, facts: of_condition(n, 2.0) * np.sqrt(facts.tiny),
    "near overflow": lambda n, facts: of_condition(n, 2.0) * np.sqrt(facts.max) / 100,
    "indefinite": lambda n, _: of_condition(n, 10.0, signs=True),
}


def measure(A, x, b, eps):
    """The largest ratio of the rows, in float64, and scaled so that nothing overflows."""
    scale = np.abs(A).max()
    gap = np.abs(b / scale - x @ (A / scale)).sum(1)
    return (gap / (np.abs(A / scale).sum(0).max() * np.abs(x).sum(1) * eps)).max()


@pytest.mark.filterwarnings("ignore:A = H", "ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", TYPES)
def test_direct(name, n, dtype):
    facts = torch.finfo(dtype)
    A = TYPES[name](n, facts)
    A = torch.tensor((A + A.T) / 2, dtype=dtype)
    # In the range of A, where that is less than everything.
    b = torch.tensor(np.random.default_rng(0).uniform(-1, 1, (3, n)), dtype=dtype) @ A
    x = Direct().invert(Dense(A), 0.0).solve(b).x
    numbers = [tensor.double().numpy() for tensor in (A, x, b)]
    assert measure(*numbers, facts.eps) < THRESHOLD
    assert measure(numbers[0], (1 + 100 * facts.eps) * numbers[1], numbers[2], facts.eps) > 1
