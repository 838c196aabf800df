"""Losses: callables are classified once, and what is no average of per-sample losses is refused."""

import pytest
import torch
import torch.nn.functional as F
from oracles import matrix_error, oracle_matrix
from problems import problem
from torch import nn

from skinvert import HessianInverter


def fitted(case, loss, batch_size=5):
    return HessianInverter("direct", 50.0, loss=loss, batch_size=batch_size).fit(case.module, case.data)


# Values that vmap cannot see: the callable is asked row by row.
def with_item(f, y):
    return F.cross_entropy(f, y) if f.sum().item() > -1e9 else f.sum()


class OwnMean(nn.Module):
    def forward(self, f, y):
        return F.cross_entropy(f, y)


CALLABLES = {"function": F.cross_entropy, "branching": with_item, "module": OwnMean()}


@pytest.mark.parametrize("loss", CALLABLES.values(), ids=CALLABLES.keys())
@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_callable_mean(loss, batch_size):
    case = problem("mlp", "cross_entropy")
    received = fitted(case, loss, batch_size).curvature_.to_dense()
    assert matrix_error(received, oracle_matrix(case)) <= 1e-12


@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_callable_of_one_value_a_row(batch_size):
    case = problem("mlp", "callable_each")
    received = fitted(case, case.loss, batch_size).curvature_.to_dense()
    assert matrix_error(received, oracle_matrix(case)) <= 1e-12


@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_callable_sum(batch_size):
    case = problem("mlp", "callable_sum")
    received = fitted(case, case.loss, batch_size).curvature_.to_dense()
    assert matrix_error(received, oracle_matrix(case)) <= 1e-12


NEITHER = {
    "maximum": lambda f, y: F.cross_entropy(f, y, reduction="none").max(),
    "squared mean": lambda f, y: F.cross_entropy(f, y) ** 2,
    "mean by class weight": lambda f, y: F.cross_entropy(f, y, weight=torch.tensor([1.0, 5, 9], dtype=f.dtype)),
    "root of a sum": lambda f, y: F.cross_entropy(f, y, reduction="sum").sqrt(),
}


@pytest.mark.parametrize("loss", NEITHER.values(), ids=NEITHER.keys())
def test_neither_mean_nor_sum(loss):
    with pytest.raises(ValueError, match="a mean or a sum"):
        fitted(problem("mlp", "cross_entropy"), loss)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_neither_mean_nor_sum_is_seen_where_each_batch_has_one_class(batch_size):
    case = problem("mlp", "cross_entropy")
    order = case.y.argsort()
    counts = torch.bincount(case.y)
    assert (counts > 0).all()
    starts = [0, *counts.cumsum(0).tolist()]
    parts = [order[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    batches = [(case.X[i], case.y[i]) for part in parts for i in part.split(batch_size)]
    with pytest.raises(ValueError, match="a mean or a sum"):
        HessianInverter("direct", 50.0, loss=NEITHER["mean by class weight"]).fit(case.module, batches)


def test_a_user_module_that_means_something_else():
    class Weighted(nn.MSELoss):
        def forward(self, f, y):
            value = super().forward(f, y)
            return 2 * value if self.reduction == "mean" else value

    case = problem("mlp", "mse")
    with pytest.raises(ValueError, match="average or sum"):
        fitted(case, Weighted())


def test_the_users_loss_keeps_its_reduction_and_tensors():
    case = problem("mlp", "class_weights")
    weight = case.loss.weight
    HessianInverter("direct", 50.0, loss=case.loss, dtype="float32").fit(case.module, case.data)
    assert case.loss.reduction == "mean" and case.loss.weight is weight and weight.dtype == torch.float64
