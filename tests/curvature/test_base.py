"""Every curvature: one definition over all the data, whatever the batches; an honest operator."""

import numpy as np
import pytest
import sklearn
import torch
from oracles import Oracle, matrix_error, oracle_matrix
from problems import LOSSES, MODELS, problem
from torch import nn

from skinvert import TorchTwiceDifferentiable
from skinvert.curvature import Objective, build_curvature
from skinvert.curvature.saved import counted
from skinvert.data import as_batches

# Convex in the outputs, so that the Gauss–Newton matrix exists.
PAIRS = [(model, loss) for i, model in enumerate(MODELS) for loss in list(LOSSES)[i % 4 :: 4]]


def curvature_of(case, name, **batches):
    model = TorchTwiceDifferentiable(case.module, case.loss, case.weight_decay).at_point()
    settings = {"batch_size": case.batch_size, "sample_weight": case.sample_weight, **batches}
    return build_curvature(name, model, as_batches(case.data, dtype=model.dtype, device=model.device, **settings))


# The Fisher has oracles of its own, in test_fisher.
CURVATURES = ["hessian", "ggn", "empirical_fisher"]


@pytest.mark.parametrize("name", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize(("model", "loss"), PAIRS)
def test_is_its_definition(name, model, loss):
    i = PAIRS.index((model, loss))
    case = problem(model, loss, 0.1 * (i % 2), i % 3 == 0, 7)
    received = curvature_of(case, name).to_dense()
    assert matrix_error(received, oracle_matrix(case, name)) <= 1e-11


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("model", ["mlp", "lstm", "embedding", "sequence"])
def test_products_are_those_of_the_matrix(name, model):
    case = problem(model, "class_weights", 0.1, True)
    V = torch.from_numpy(case.right_hand_sides(5))
    expected = V.numpy() @ oracle_matrix(case, name)
    assert matrix_error(curvature_of(case, name).apply(V), expected) <= 1e-12


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("model", ["mlp", "cnn2d", "transformer"])
def test_passes_the_dot_test(name, model):
    case = problem(model, "mse", 0.1)
    A = curvature_of(case, name)
    u, v = torch.from_numpy(case.right_hand_sides(2))
    assert torch.allclose(u @ A.apply(v[None])[0], v @ A.apply(u[None])[0], rtol=1e-10)


@pytest.mark.parametrize("name", CURVATURES)
def test_faces_agree(name):
    case = problem("cnn1d", "ignore_index", 0.1, True)
    A = curvature_of(case, name)
    dense = A.to_dense()
    assert torch.equal(dense, dense.mT)
    torch.testing.assert_close(A.apply(torch.eye(A.size, dtype=A.dtype)), dense, rtol=0, atol=1e-13)
    torch.testing.assert_close(A.diagonal(), dense.diagonal(), rtol=0, atol=1e-13)
    columns = case.right_hand_sides(4).T
    np.testing.assert_allclose(A.aslinearoperator() @ columns, dense.numpy() @ columns, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_factor(name, weight_decay):
    case = problem("cnn1d", "class_weights", weight_decay, True)
    A = curvature_of(case, name)
    F = A.factor()
    penalty = torch.zeros(A.size) if A.penalty is None else A.penalty
    assert F.shape == A.factor_shape
    assert matrix_error(F.mT @ F + torch.diag(penalty), oracle_matrix(case, name)) <= 1e-12


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("model", ["mlp", "lstm", "cnn2d"])
@pytest.mark.parametrize("loss", ["ignore_index", "mse"])
def test_batch_size_and_memory_change_nothing(name, model, loss):
    case = problem(model, loss, 0.1, True)
    V = torch.from_numpy(case.right_hand_sides(3))
    whole = curvature_of(case, name, batch_size=None)
    with sklearn.config_context(working_memory=0.01):
        small = curvature_of(case, name, batch_size=5)
        assert small.objective.batches.kept is None or small.objective.batches.kept
        received = [small.to_dense(), small.diagonal(), small.apply(V), small.objective.gradient]
    expected = [whole.to_dense(), whole.diagonal(), whole.apply(V), whole.objective.gradient]
    torch.testing.assert_close(received, expected, rtol=1e-12, atol=1e-13)


def test_graphs_are_kept_only_while_they_fit():
    case = problem("mlp", "mse")
    V = torch.from_numpy(case.right_hand_sides(1))
    large, small = curvature_of(case, "hessian"), curvature_of(case, "hessian")
    large.apply(V)
    with sklearn.config_context(working_memory=0.001):
        small.apply(V)
    assert large._graphs is not None and small._graphs is None


# A mean of the batches' means would count the last row 99 times.
@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("loss", ["cross_entropy", "class_weights", "mse", "mse_sum", "callable_sum", "callable_each"])
def test_99_rows_and_one(name, loss):
    case = problem("softmax", loss, n=100)
    received = curvature_of(case, name, batch_size=99).to_dense()
    assert matrix_error(received, Oracle(case).curvature(name)) <= 1e-12


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("loss", ["ignore_index", "weighted_nll"])
@pytest.mark.parametrize("model", ["softmax", "sequence"])
def test_a_batch_of_ignored_targets(name, loss, model):
    # The first quarter of the targets is ignored: the first batch has no valid one.
    case = problem(model, loss)
    received = curvature_of(case, name, batch_size=3).to_dense()
    assert (case.y[:3] == 1).all()
    assert matrix_error(received, oracle_matrix(case, name)) <= 1e-12


@pytest.mark.parametrize("loss", list(LOSSES))
def test_gradient(loss):
    case = problem("mlp", loss, 0.1, True)
    A = curvature_of(case, "hessian")
    expected = Oracle(case).gradient()
    np.testing.assert_allclose(A.objective.gradient.numpy(), expected, rtol=1e-10, atol=1e-13)
    assert A.gradient_norm == pytest.approx(np.linalg.norm(expected))


def test_scale_of_the_losses():
    case = problem("mlp", "ignore_index", 0.0, True)
    assert curvature_of(case, "hessian").objective.scale == pytest.approx(Oracle(case).scale)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_only_proportions_of_weights_count(factor):
    case = problem("mlp", "class_weights", 0.1, True)
    received = curvature_of(case, "hessian", sample_weight=factor * case.counts).to_dense()
    assert matrix_error(received, oracle_matrix(case)) <= 1e-12


def test_unreached_parameters_have_zero_curvature():
    case = problem("frozen_and_dead", "cross_entropy")
    with pytest.warns(UserWarning, match=r"dead\.weight, dead\.bias"):
        A = curvature_of(case, "hessian").to_dense()
    assert A.shape == (21, 21) and not A[15:].any() and not A[:, 15:].any() and A[:15].any()


def test_random_outputs_are_refused():
    class Noisy(nn.Linear):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, training=True)

    case = problem("linear", "mse")
    model = TorchTwiceDifferentiable(Noisy(5, 2).double(), "mse").at_point()
    with pytest.raises(ValueError, match="same on every call"):
        Objective(model, as_batches(case.data, dtype=model.dtype, device=model.device))


def test_outputs_that_mix_rows_are_refused():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    case = problem("linear", "mse")
    model = TorchTwiceDifferentiable(Centred(5, 2).double(), "mse").at_point()
    with pytest.raises(ValueError, match="row's own"):
        Objective(model, as_batches(case.data, dtype=model.dtype, device=model.device))


def test_a_graph_that_was_given_up_is_not_counted():
    """A recording without rules is one: what a batch is kept by afterwards is another graph."""
    x, kept = torch.ones(1000, requires_grad=True), []

    def compute():
        x.exp().sin()
        kept.append(x.exp())
        return kept[0].square()

    _, size = counted(compute)
    # The exponential saves its result, and the square what it is of.
    assert size == 2 * 4000
    _, size = counted(lambda: x.exp().sin().detach())
    assert size == 0
