"""DataInf against the dense mean of the samples' own inverses, written from the paper."""

import pickle

import numpy as np
import pytest
import sklearn
import torch
from torch import nn

from skinvert import HessianInverter
from skinvert.curvature import Gram
from skinvert.methods import HarmonicMean

# What is tested here is what an approximate method is by definition; tests/methods/test_truth.py holds what it says.
pytestmark = pytest.mark.filterwarnings("ignore:.* is worse than x = 0:sklearn.exceptions.ConvergenceWarning")


def harmonic_mean(G, w, shift, b):
    """Σ (wᵢ / Σw) (gᵢgᵢᵀ + diag(shift))⁻¹ b for rows b, each inverse by LU."""
    D = np.diag(np.broadcast_to(shift, G.shape[1:]))
    inverses = [np.linalg.inv(np.outer(g, g) + D) for g in G]
    return b @ np.einsum("i,ipq->pq", w / w.sum(), np.stack(inverses))


@pytest.mark.parametrize("working_memory", [1024, 0])
@pytest.mark.parametrize("k", [1, 7, 10])
def test_plain_rows(k, working_memory):
    rng = np.random.default_rng(0)
    X, w, b = rng.standard_normal((12, 5)), rng.integers(0, 3, 12), rng.standard_normal((k, 5))
    expected = harmonic_mean(X, w, 0.1, b)
    with sklearn.config_context(working_memory=working_memory):
        x, info = HessianInverter("harmonic_mean", 0.1).fit(X, sample_weight=w).solve(b)
    np.testing.assert_allclose(x, expected, rtol=1e-10)
    exact = (X * w[:, None]).T @ X / w.sum() + 0.1 * np.eye(5)
    gap = np.linalg.norm(expected @ exact - b, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(info["residual"], gap, rtol=1e-8)
    assert info["approximate"] and not info["converged"].any() and np.isnan(info["residual_of_approximation"]).all()


def test_a_model_with_weight_decay_and_weights():
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    X, y = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)
    w = np.arange(9.0)
    G = np.stack([gradient(net, X[i : i + 1], y[i : i + 1]) for i in range(9)])
    b = np.random.default_rng(0).standard_normal((4, G.shape[1]))
    inverter = HessianInverter("harmonic_mean", 0.05, loss="mse", weight_decay=0.2, batch_size=4)
    inverter.fit(net, (X, y), sample_weight=w)
    expected = harmonic_mean(G, w, 0.05 + 0.2, b)
    np.testing.assert_allclose(inverter.transform(b), expected, rtol=1e-8)
    assert inverter.curvature_name_ == "empirical_fisher"
    loaded = pickle.loads(pickle.dumps(inverter))
    assert not hasattr(loaded, "curvature_")
    np.testing.assert_allclose(loaded.transform(b), expected, rtol=1e-8)


def gradient(net, x, y):
    loss = nn.functional.mse_loss(net(x), y)
    return torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, list(net.parameters()))]).numpy()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_another_perturbation(dtype, tolerance):
    X, b = np.random.default_rng(0).standard_normal((6, 3)), np.ones((1, 3))
    inverse = HarmonicMean().invert(Gram(torch.as_tensor(X, dtype=dtype)), 1.0).at(0.01)
    expected = harmonic_mean(X, np.ones(6), 0.01, b)
    np.testing.assert_allclose(inverse.solve(torch.as_tensor(b, dtype=dtype)).x, expected, rtol=tolerance)


def test_one_parameter_and_no_right_hand_sides():
    inverse = HarmonicMean().invert(Gram(torch.tensor([[2.0], [0.0]])), 1.0)
    torch.testing.assert_close(inverse.solve(torch.tensor([[10.0]])).x, torch.tensor([[6.0]]))
    assert inverse.solve(torch.empty(0, 1)).x.shape == (0, 1)


def test_no_perturbation_is_an_error():
    with pytest.raises(ValueError, match="hessian_perturbation for harmonic_mean must be > 0"):
        HessianInverter("harmonic_mean").fit(np.eye(3))


def test_another_curvature_is_an_error_that_names_the_right_one():
    net, data = nn.Linear(2, 1), (torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"gradient_rows.*empirical_fisher"):
        HessianInverter("harmonic_mean", 1.0, curvature="ggn", loss="mse").fit(net, data)
