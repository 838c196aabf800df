"""Estimates of a curvature from some of its samples: their mean over all samples is the curvature."""

import numpy as np
import pytest
import sklearn
import torch
from torch import nn

from skinvert.curvature import Gram, build_curvature
from skinvert.data import as_batches
from skinvert.models import TorchTwiceDifferentiable

N = 23
CURVATURES = ["hessian", "ggn", "empirical_fisher"]


def make_curvature(name, weighted=True, loss="cross_entropy", **settings):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    X, y = torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,))
    if isinstance(loss, nn.CrossEntropyLoss):
        y[:5] = 1
    model = TorchTwiceDifferentiable(net, loss, weight_decay=0.3).at_point()
    weights = np.random.default_rng(1).integers(0, 4, N) if weighted else None
    options = {"dtype": torch.float64, "device": torch.device("cpu"), "batch_size": 7, "sample_weight": weights}
    return build_curvature(name, model, as_batches((X, y), **options))


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]), ignore_index=1)])
def test_mean_over_a_partition_is_the_curvature(name, loss):
    A = make_curvature(name, loss=loss)
    expected = A.to_dense()
    parts = torch.randperm(N).split([8, 8, 7])
    received = sum(len(rows) / N * A.minibatch(rows).to_dense() for rows in parts)
    torch.testing.assert_close(received, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CURVATURES)
def test_one_sample(name):
    """(n wᵢ / Σ w) hᵢ + R, against the curvature of that sample alone."""
    A = make_curvature(name)
    weights = A.objective.batches.sample_weight
    i = int(np.argmax(weights))
    decay = 0.3 * torch.eye(A.size, dtype=torch.float64)
    alone = A.minibatch(torch.tensor([i]))
    twice = A.minibatch(torch.tensor([i, i]))
    total = sum(A.minibatch(torch.tensor([j])).to_dense() - decay for j in range(N))
    torch.testing.assert_close(total / N + decay, A.to_dense(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(alone.to_dense(), twice.to_dense(), rtol=1e-12, atol=1e-14)
    assert alone.n_samples == 1 and A.n_samples == N


@pytest.mark.parametrize("name", CURVATURES)
def test_products_and_matrix_agree(name):
    A = make_curvature(name)
    # A product first: what it keeps must not reach the estimates.
    A.apply(torch.randn(2, A.size, dtype=torch.float64))
    part = A.minibatch(torch.tensor([22, 3, 8, 9, 3]))
    V = torch.randn(3, A.size, dtype=torch.float64)
    torch.testing.assert_close(part.apply(V), V @ part.to_dense(), rtol=1e-12, atol=1e-13)


def test_empirical_fisher_from_the_kept_factor():
    rows = torch.tensor([22, 3, 8, 9, 3])
    expected = make_curvature("empirical_fisher").minibatch(rows).to_dense()
    A = make_curvature("empirical_fisher")
    A.apply(torch.zeros(1, A.size, dtype=torch.float64))
    torch.testing.assert_close(A.minibatch(rows).to_dense(), expected, rtol=1e-12, atol=1e-14)


def test_gradient_rows():
    A = make_curvature("empirical_fisher")
    rows, weights = A.gradient_rows()
    assert rows.shape == (N, A.size) and float(weights.sum()) == pytest.approx(1.0)
    expected = A.to_dense() - 0.3 * torch.eye(A.size, dtype=torch.float64)
    torch.testing.assert_close((rows * weights[:, None]).mT @ rows, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weights", [None, torch.tensor([2.0, 0.0, 1.0, 1.0]).double()])
def test_gram(weights):
    X = torch.randn(4, 3, dtype=torch.float64)
    A = Gram(X, weights)
    w = torch.full((4,), 0.25).double() if weights is None else weights / 4
    received = sum(A.minibatch(torch.tensor(pair)).to_dense() for pair in ([0, 3], [2, 1])) / 2
    torch.testing.assert_close(received, X.mT @ (w[:, None] * X))
    rows, shares = A.gradient_rows()
    torch.testing.assert_close(shares, w)
    torch.testing.assert_close(rows[w > 0], X[w > 0])
    assert not rows[w == 0].any()


# -- Batches.take --------------------------------------------------------------------------------------------------


def batches_of(data, **settings):
    return as_batches(data, dtype=torch.float64, device=torch.device("cpu"), **settings)


def test_take_brings_samples_with_their_weights():
    X, y = torch.arange(20.0).reshape(10, 2).double(), torch.arange(10)
    taken = batches_of((X, y), batch_size=3, sample_weight=np.arange(10) + 1).take(torch.tensor([9, 0, 4, 3, 9]))
    ((received, target), weights), *rest = list(taken)
    assert not rest and taken.n_samples == 5
    assert sorted(target.tolist()) == [0, 3, 4, 9, 9]
    assert torch.equal(received, X[target]) and torch.equal(weights, (target + 1).double())


def test_take_keeps_batches_apart_that_cannot_be_joined():
    padded = [(torch.ones(2, 3), torch.tensor([0, 1])), (torch.ones(2, 5), torch.tensor([2, 3]))]
    taken = list(batches_of(padded, sample_weight=[1, 2, 3, 4]).take(torch.tensor([3, 1, 0])))
    assert [batch[0].shape[1] for batch, _ in taken] == [3, 5]
    assert [(batch[1] + 1).tolist() for batch, _ in taken] == [weights.tolist() for _, weights in taken]


def test_take_of_mappings():
    data = [({"a": torch.ones(2, 1) * i}, torch.tensor([2 * i, 2 * i + 1])) for i in range(3)]
    ((inputs, target), _), *rest = list(batches_of(data).take(torch.tensor([5, 1])))
    assert not rest and target.tolist() == [1, 5] and inputs["a"].ravel().tolist() == [0.0, 2.0]


def test_take_needs_kept_batches():
    with sklearn.config_context(working_memory=0):
        batches = batches_of((torch.ones(4, 2), torch.ones(4)))
        with pytest.raises(ValueError, match="working_memory.*another method"):
            batches.take(torch.tensor([0]))
