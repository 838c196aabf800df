"""The diagonal's inverse against NumPy's division."""

import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from skinvert import HessianInverter
from skinvert.methods import Diagonal
from skinvert.operators import Dense, LowRank

# What is tested here is what an approximate method is by definition; tests/methods/test_truth.py holds what it says.
pytestmark = pytest.mark.filterwarnings("ignore:.* is worse than x = 0:sklearn.exceptions.ConvergenceWarning")


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
def test_inverts_the_exact_diagonal(curvature):
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    data = (torch.randn(9, 3, dtype=torch.float64), torch.randint(2, (9,)))
    settings = {"hessian_perturbation": 2.0, "curvature": curvature, "loss": "cross_entropy", "weight_decay": 0.1}
    H = HessianInverter("direct", **settings).fit(net, data).inverse_transform(np.eye(14))
    b = np.random.default_rng(0).standard_normal((19, 14))
    expected = b / np.diag(H)
    x, info = HessianInverter("diagonal", batch_size=4, **settings).fit(net, data).solve(b)
    np.testing.assert_allclose(x, expected, rtol=1e-10)
    true = np.linalg.norm(expected @ H - b, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(info["residual"], true, rtol=1e-8)
    assert info["approximate"] and not info["converged"].any() and info["residual_of_approximation"].max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_perturbation_and_a_pickle(dtype):
    inverse = Diagonal().invert(LowRank(torch.tensor([[1.0, 1e-9]], dtype=dtype)), 1.0)
    b = torch.tensor([[3.0, 4.0]], dtype=dtype)
    expected = torch.tensor([[1.0, 2.0]], dtype=dtype)
    torch.testing.assert_close(pickle.loads(pickle.dumps(inverse)).at(2.0).solve(b).x, expected)
    # The tiny entry of a sum of squares is exact: it counts.
    assert float(inverse.at(0.0).solve(b).x[0, 1]) == pytest.approx(4e18, rel=1e-5)
    assert not inverse.keeps_operator and inverse.positive_definite


def test_a_zero_entry_is_left_out_and_warned_of():
    inverse = Diagonal().invert(Dense(torch.diag(torch.tensor([2.0, 0.0]))), 0.0)
    assert inverse.positive_definite is False
    with pytest.warns(scipy.linalg.LinAlgWarning, match=r"rank 1 of 2.*1 of 2 right-hand sides.*Try"):
        x, info = inverse.solve(torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
    assert x.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert info["converged"].tolist() == [True, False]


def test_a_negative_entry_is_warned_of():
    A = Dense(torch.diag(torch.tensor([2.0, -1.0])))
    with pytest.warns(scipy.linalg.LinAlgWarning, match="indefinite.*-0.5"):
        inverse = Diagonal().invert(A, 0.5)
    assert inverse.positive_definite is False
    torch.testing.assert_close(inverse.solve(torch.tensor([[5.0, 1.0]])).x, torch.tensor([[2.0, -2.0]]))
