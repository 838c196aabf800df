"""Hooks that change gradients are no part of the loss: never called, and the derivatives are the loss's own."""

import copy

import numpy as np
import pytest
import torch
from oracles import Oracle, matrix_error, oracle_matrix
from problems import problem
from torch import nn
from torch.autograd.graph import register_multi_grad_hook

from skinvert import HessianInverter, InfluenceFunction, PerSampleGradient

CALLED = []


def clamp(gradient):
    CALLED.append("clamp")
    return gradient.clamp(-1e-3, 1e-3)


def clamp_all(gradients):
    CALLED.append("clamp_all")


class Hooked(nn.Module):
    """An MLP that clips the gradient of its hidden units, as one did with LSTMs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        h = torch.tanh(self.net[0](x))
        if h.requires_grad:
            with h.register_hook(clamp):
                h.register_hook(clamp).remove()
            h.register_hook(clamp)
            register_multi_grad_hook([h], clamp_all)
        return self.net[2](h)


def in_forward(net):
    return Hooked(net)


def full_backward_hook(net):
    net[2].register_full_backward_hook(lambda module, inputs, outputs: tuple(map(clamp, inputs)))
    return net


def backward_pre_hook(net):
    net[2].register_full_backward_pre_hook(lambda module, outputs: tuple(map(clamp, outputs)))
    return net


def legacy_backward_hook(net):
    net[1].register_backward_hook(lambda module, inputs, outputs: tuple(map(clamp, inputs)))
    return net


def on_a_parameter(net):
    net[0].weight.register_hook(clamp)
    return net


HOOKS = [in_forward, full_backward_hook, backward_pre_hook, legacy_backward_hook, on_a_parameter]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_derivatives_are_the_loss_s_own(hook):
    case = problem("mlp", "cross_entropy")
    net = hook(copy.deepcopy(case.module))
    CALLED.clear()
    for curvature in ("hessian", "ggn", "empirical_fisher"):
        for method in ("direct", "cg"):
            inverter = HessianInverter(method, 30.0, loss="cross_entropy", curvature=curvature, batch_size=5)
            inverter.fit(net, case.data)
            received = inverter.curvature_.apply(torch.eye(inverter.n_features_in_, dtype=torch.float64))
            assert matrix_error(received, oracle_matrix(case, curvature)) <= 1e-12
            assert abs(inverter.gradient_norm_ - np.linalg.norm(Oracle(case).gradient())) <= 1e-12
    rows = PerSampleGradient(net, loss="cross_entropy").fit_transform(*case.data)
    np.testing.assert_allclose(rows, Oracle(case).gradient_rows(), rtol=1e-9, atol=1e-12)
    assert not CALLED


@pytest.mark.parametrize("method", ["ekfac", "kfac"])
@pytest.mark.parametrize("hook", HOOKS[1:], ids=lambda hook: hook.__name__)
def test_factors_and_scores_are_the_plain_model_s(hook, method):
    case = problem("mlp", "cross_entropy")

    def scores(net):
        inverter = HessianInverter(method, 1.0, loss="cross_entropy")
        return InfluenceFunction(inverter).fit(net, case.data).transform(case.data)

    expected = scores(case.module)
    np.testing.assert_allclose(scores(hook(copy.deepcopy(case.module))), expected, rtol=1e-9, atol=1e-12)


def test_the_user_s_own_hooks_stay():
    case = problem("mlp", "cross_entropy")
    net = full_backward_hook(copy.deepcopy(case.module))
    HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, case.data)
    CALLED.clear()
    nn.functional.cross_entropy(net(case.X), case.y).backward()
    assert CALLED == ["clamp"]
