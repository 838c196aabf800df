"""Per-sample gradients and Jacobians against one backward pass a row."""

import numpy as np
import pytest
import torch
from oracles import Oracle
from problems import LOSSES, MODELS, problem

from skinvert import HessianInverter, TorchTwiceDifferentiable
from skinvert.curvature import gradient_rows
from skinvert.curvature.per_sample import jacobian_rows


@pytest.mark.parametrize("model", MODELS)
def test_gradient_rows(model):
    case = problem(model, "class_weights")
    oracle = Oracle(case)
    received = gradient_rows(TorchTwiceDifferentiable(case.module, case.loss).at_point(), case.data)
    expected = oracle.gradient_rows() / oracle.scale
    np.testing.assert_allclose(received, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_rows_of_each_loss(loss):
    case = problem("softmax", loss)
    model = TorchTwiceDifferentiable(case.module, case.loss).at_point()
    model.forward(case.data)
    oracle = Oracle(case)
    received = gradient_rows(model, case.data)
    np.testing.assert_allclose(received, oracle.gradient_rows() / oracle.scale, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model", ["mlp", "cnn2d", "lstm", "transformer", "sequence"])
def test_jacobian_rows(model):
    case = problem(model, "mse")
    oracle = Oracle(case)
    received = jacobian_rows(TorchTwiceDifferentiable(case.module, case.loss).at_point(), case.data)
    expected = torch.autograd.functional.jacobian(
        lambda theta: oracle.outputs(theta, oracle.X).flatten(1), oracle.theta
    )
    torch.testing.assert_close(received, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model", ["mlp", "lstm"])
def test_projected_jacobian_rows(model):
    case = problem(model, "mse")
    adapted = TorchTwiceDifferentiable(case.module, case.loss).at_point()
    S = torch.randn(len(case.y), 3, 2, dtype=torch.float64)
    expected = torch.einsum("mcr,mcp->mrp", S, jacobian_rows(adapted, case.data))
    torch.testing.assert_close(jacobian_rows(adapted, case.data, S), expected)


def test_outputs_of_one_dimension():
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def forward(self, x):
            return self.layer(x)[:, 0]

    X = torch.randn(5, 4)
    model = TorchTwiceDifferentiable(Flat(), "mse").at_point()
    expected = torch.cat([X, torch.ones(5, 1)], dim=1)[:, None]
    torch.testing.assert_close(jacobian_rows(model, (X, torch.zeros(5))), expected)
    torch.testing.assert_close(jacobian_rows(model, (X, torch.zeros(5)), 2 * torch.ones(5, 1, 1)), 2 * expected)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
def test_a_parameter_without_entries(curvature):
    """A disabled adapter of rank 0 changes nothing."""

    class WithEmpty(torch.nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.adapter = torch.nn.Parameter(torch.zeros(0, 4))

    torch.manual_seed(0)
    net, X, y = WithEmpty().double(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    plain = torch.nn.Linear(4, 3).double()
    plain.load_state_dict(net.state_dict(), strict=False)
    settings = {"loss": "cross_entropy", "curvature": curvature}
    with pytest.warns(UserWarning, match="no loss that depends on adapter"):
        received = HessianInverter("direct", 1.0, **settings).fit(net, (X, y)).curvature_.to_dense()
    expected = HessianInverter("direct", 1.0, **settings).fit(plain, (X, y)).curvature_.to_dense()
    torch.testing.assert_close(received, expected)
