"""A skorch net gives the curvature of its own criterion and ``get_loss``."""

import numpy as np
import pytest
import torch
from oracles import Oracle, matrix_error, oracle_matrix, relative_error, solution
from problems import Problem, problem
from skorch import NeuralNet, NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
from torch import nn

from skinvert import HessianInverter, PerSampleGradient


def initialised(kind, module, criterion, **settings):
    return kind(module, criterion=criterion, batch_size=5, verbose=0, **settings).initialize()


def binary():
    """A network of one logit, (n,) outputs."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)).double()
    X, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(2, (12,)).double()
    loss = nn.functional.binary_cross_entropy_with_logits

    def summed(f, t):
        return loss(f, t, reduction="sum")

    return Problem("binary", module, "bce_with_logits", loss, summed, X, y, 0.1)


def nets():
    weights = torch.linspace(0.5, 2.0, 3, dtype=torch.float64)
    softmax = problem("mlp", "cross_entropy", 0.1)
    weighted = problem("mlp", "class_weights", 0.1)
    regression = problem("mlp", "mse", 0.1)
    one = binary()
    probabilities = nn.Sequential(softmax.module, nn.Softmax(1))
    yield "classifier", softmax, initialised(NeuralNetClassifier, probabilities, nn.NLLLoss)
    yield "classifier on logits", softmax, initialised(NeuralNetClassifier, softmax.module, nn.CrossEntropyLoss)
    settings = {"criterion__weight": weights}
    yield (
        "class weights",
        weighted,
        initialised(NeuralNetClassifier, weighted.module, nn.CrossEntropyLoss, **settings),
    )
    yield "regressor", regression, initialised(NeuralNetRegressor, regression.module, nn.MSELoss)
    yield "binary", one, initialised(NeuralNetBinaryClassifier, one.module, nn.BCEWithLogitsLoss)
    yield "net", regression, initialised(NeuralNet, regression.module, nn.MSELoss)


NETS = {name: (case, net) for name, case, net in nets()}
ALL = pytest.mark.parametrize(("case", "net"), NETS.values(), ids=NETS.keys())


@ALL
@pytest.mark.parametrize("curvature", ["hessian", "empirical_fisher"])
def test_curvature(case, net, curvature):
    inverter = HessianInverter("direct", 5.0, curvature=curvature, weight_decay=0.1)
    inverter.fit(net, (case.X.numpy(), case.y.numpy()))
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case, curvature)) <= 1e-10


@ALL
def test_ggn(case, net):
    if isinstance(net.module_[-1], nn.Softmax):
        pytest.skip("the outputs are probabilities: another Gauss–Newton matrix")
    inverter = HessianInverter("direct", 5.0, curvature="ggn", weight_decay=0.1).fit(net, case.data)
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case, "ggn")) <= 1e-12


@ALL
def test_solution_by_cg_with_weights(case, net):
    counts = np.arange(12)
    weighted = Problem(**{**case.__dict__, "counts": counts})
    H, b = oracle_matrix(weighted), case.right_hand_sides(3)
    inverter = HessianInverter("cg", 5.0, weight_decay=0.1).fit(net, (case.X.numpy(), case.y.numpy()), counts)
    assert relative_error(inverter.transform(b), solution(H, 5.0, b)) <= 1e-7


@ALL
def test_gradients(case, net):
    received = PerSampleGradient(net).fit_transform(case.X.numpy(), case.y.numpy())
    np.testing.assert_allclose(received, Oracle(case).gradient_rows(), rtol=1e-7, atol=1e-10)


@ALL
def test_the_net_is_unchanged(case, net):
    state = [t.detach().clone() for t in net.module_.parameters()]
    mode, criterion = net.module_.training, net.criterion_.reduction
    HessianInverter("direct", 5.0).fit(net, case.data).transform(case.right_hand_sides(1))
    assert net.module_.training == mode and net.criterion_.reduction == criterion
    assert all(torch.equal(a, b) for a, b in zip(state, net.module_.parameters(), strict=True))
