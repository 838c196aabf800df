"""The Hessian, and that of a user's own TwiceDifferentiable of only the abstract members."""

import numpy as np
import pytest
import torch
from oracles import matrix_error, relative_error, solution

from skinvert import HessianInverter, TwiceDifferentiable, solve_hvp
from skinvert.parameters import ParameterLayout

N, P = 11, 4
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((N, P)), RNG.integers(0, 2, N).astype(float)
THETA = RNG.standard_normal(P) / 2


class TorchLogistic(TwiceDifferentiable):
    """The abstract members alone, by autograd."""

    def __init__(self):
        self.theta = torch.from_numpy(THETA.copy()).requires_grad_(True)

    @property
    def num_params(self):
        return P

    @property
    def parameters(self):
        return [self.theta]

    def grad(self, x, y, create_graph=False):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ self.theta, y)
        return torch.autograd.grad(loss, self.theta, create_graph=create_graph)[0]

    def hessian(self, x, y):
        return self.mvp(self.grad(x, y, create_graph=True), torch.eye(P, dtype=x.dtype), self.theta)

    @staticmethod
    def mvp(grad_xy, v, backprop_on, *, progress=False):
        variables = backprop_on if isinstance(backprop_on, list) else [backprop_on]
        rows = [torch.cat(torch.autograd.grad(grad_xy, variables, row, retain_graph=True)) for row in v]
        return torch.stack(rows)

    @classmethod
    def tensor_type(cls):
        return torch.Tensor


class NumpyLogistic(TwiceDifferentiable):
    """The abstract members alone, in NumPy: a gradient remembers its Hessian."""

    class Gradient(np.ndarray):
        hessian = None

    @property
    def num_params(self):
        return P

    @property
    def parameters(self):
        return [THETA]

    def grad(self, x, y, create_graph=False):
        assert type(x) is np.ndarray and type(y) is np.ndarray
        gradient = (x.T @ (sigmoid(x @ THETA) - y) / len(y)).view(self.Gradient)
        gradient.hessian = self.hessian(x, y)
        return gradient

    def hessian(self, x, y):
        return logistic_hessian(x, np.ones(len(x)))

    @staticmethod
    def mvp(grad_xy, v, backprop_on, *, progress=False):
        return v @ grad_xy.hessian

    @classmethod
    def tensor_type(cls):
        return np.ndarray


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def logistic_hessian(x, weights):
    s = sigmoid(x @ THETA)
    return (x * (weights * s * (1 - s))[:, None]).T @ x / weights.sum()


OWN = [TorchLogistic, NumpyLogistic]


@pytest.mark.parametrize("model", OWN)
@pytest.mark.parametrize("method", ["direct", "cg", "auto"])
@pytest.mark.parametrize("batch_size", [None, 4, 10])
def test_own_model(model, method, batch_size):
    b = RNG.standard_normal((3, P))
    inverter = HessianInverter(method, 0.1, batch_size=batch_size).fit(model(), (X, Y))
    assert relative_error(inverter.transform(b), solution(logistic_hessian(X, np.ones(N)), 0.1, b)) <= 1e-7


class Placed(TorchLogistic):
    """Says itself what is else read off θ."""

    def __init__(self):
        super().__init__()
        self.dtype, self.device = torch.float64, "cpu"
        self.layout = ParameterLayout(("slope",), ((P,),))


def test_what_a_model_does_not_say_is_read_off_its_parameters():
    b = RNG.standard_normal((3, P))
    fitted = [HessianInverter("direct", 0.1).fit(model(), (X, Y)) for model in (TorchLogistic, NumpyLogistic, Placed)]
    assert [inverter.parameter_names_ for inverter in fitted] == [["parameter0"], ["parameter0"], ["slope"]]
    assert fitted[2].get_feature_names_out()[0] == "slope[0]"
    for inverter in fitted:
        assert inverter.inverse_.dtype == torch.float64
        assert relative_error(inverter.transform(b), solution(logistic_hessian(X, np.ones(N)), 0.1, b)) <= 1e-7
    assert (TorchLogistic().dtype, TorchLogistic().device) == (torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("model", OWN)
def test_own_model_with_sample_weights(model):
    weights = np.arange(N, dtype=float)
    inverter = HessianInverter("direct", 0.1, batch_size=4).fit(model(), (X, Y), sample_weight=weights)
    assert matrix_error(inverter.curvature_.to_dense(), logistic_hessian(X, weights)) <= 1e-14
    assert inverter.curvature_name_ == "hessian"


@pytest.mark.parametrize("model", OWN)
def test_own_model_and_the_functional_face(model):
    b = RNG.standard_normal((3, P))
    x, info = solve_hvp("direct", model(), [(X[:7], Y[:7]), (X[7:], Y[7:])], b, hessian_perturbation=0.1)
    assert relative_error(x, solution(logistic_hessian(X, np.ones(N)), 0.1, b)) <= 1e-12
    assert info["converged"].all()


@pytest.mark.parametrize("model", OWN)
def test_gradient_norm_of_an_own_model(model):
    inverter = HessianInverter("direct", 0.1, batch_size=4).fit(model(), (X, Y))
    assert inverter.gradient_norm_ == pytest.approx(np.linalg.norm(X.T @ (sigmoid(X @ THETA) - Y) / N))


def test_own_model_has_no_other_curvature():
    with pytest.raises(ValueError, match="TorchTwiceDifferentiable"):
        HessianInverter("direct", curvature="ggn").fit(TorchLogistic(), (X, Y))
