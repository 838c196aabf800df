"""Weight normalisation and the other parametrizations: second derivatives of the function that torch documents."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import matrix_error, relative_error, solution
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from skinvert import HessianInverter, PerSampleGradient

X, Y = torch.linspace(-1, 2, 40, dtype=torch.float64).sin().reshape(10, 4), torch.arange(10) % 3


def old_weight_norm(layer, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(layer, **settings)


def network(parametrize, bias, **settings):
    torch.manual_seed(3)
    layer = parametrize(nn.Linear(4, 3, bias=bias), **settings)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 3)).double()


def loss_by_hand(net, dim):
    """L as a function of the flat θ, from g, v and b by their formula, and θ."""
    named = dict(net.named_parameters())
    sizes = [tensor.numel() for tensor in named.values()]

    def loss(theta):
        parts = theta.split(sizes)
        q = {name: part.reshape(named[name].shape) for name, part in zip(named, parts, strict=True)}
        g, v = (q[name] for name in named if "original" in name or name.endswith(("weight_g", "weight_v")))
        norms = v.pow(2).sum().pow(0.5) if dim is None else v.pow(2).sum(1 - dim % 2, keepdim=True).pow(0.5)
        h = torch.tanh(X @ (g * v / norms).T + q.get("0.bias", 0.0))
        return F.cross_entropy(h @ q["2.weight"].T + q["2.bias"], Y)

    return loss, torch.cat([tensor.detach().reshape(-1) for tensor in named.values()])


@pytest.mark.parametrize("dim", [0, 1, -2, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, old_weight_norm])
def test_weight_norm(parametrize, bias, dim):
    net = network(parametrize, bias, dim=dim)
    loss, theta = loss_by_hand(net, dim)
    H = torch.autograd.functional.hessian(loss, theta).numpy()
    inverter = HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, (X, Y))
    assert matrix_error(inverter.curvature_.to_dense(), H) <= 1e-12
    rows = PerSampleGradient(net, loss="cross_entropy").fit_transform(X, Y)
    np.testing.assert_allclose(rows.mean(0), torch.func.grad(loss)(theta), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["direct", "cg", "minres"])
def test_solutions(method):
    net = network(parametrizations.weight_norm, True)
    loss, theta = loss_by_hand(net, 0)
    b = np.random.default_rng(0).standard_normal((2, len(theta)))
    x = HessianInverter(method, 2.0, loss="cross_entropy").fit(net, (X, Y)).transform(b)
    assert relative_error(x, solution(torch.autograd.functional.hessian(loss, theta).numpy(), 2.0, b)) <= 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "parametrize", [old_weight_norm, parametrizations.weight_norm, spectral_norm, parametrizations.spectral_norm]
)
def test_ggn(parametrize, bias):
    net = network(parametrize, bias)
    inverter = HessianInverter("direct", 30.0, loss="cross_entropy", curvature="ggn").fit(net, (X, Y))
    params, f = list(net.parameters()), net.eval()(X)
    J = torch.stack([flat(value, params) for value in f.reshape(-1)])
    H = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z.reshape(f.shape), Y), f.detach().reshape(-1))
    assert matrix_error(inverter.curvature_.to_dense(), (J.mT @ H @ J).numpy()) <= 1e-12


@pytest.mark.parametrize(
    "parametrize",
    [
        spectral_norm,
        parametrizations.spectral_norm,
        lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
        lambda layer: parametrizations.orthogonal(layer, orthogonal_map="matrix_exp"),
    ],
    ids=["old spectral", "spectral", "cayley", "matrix_exp"],
)
def test_other_parametrizations_by_differences(parametrize):
    net = network(parametrize, True).eval()
    inverter = HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, (X, Y))
    rows = PerSampleGradient(net, loss="cross_entropy").fit_transform(X, Y)
    params, H, step = list(net.parameters()), [], 1e-5
    np.testing.assert_allclose(rows.mean(0), flat(F.cross_entropy(net(X), Y), params), rtol=1e-9, atol=1e-12)
    for tensor in params:
        for i in range(tensor.numel()):
            slopes = []
            for sign in (1, -1):
                with torch.no_grad():
                    tensor.view(-1)[i] += sign * step
                slopes.append(flat(F.cross_entropy(net(X), Y), params))
                with torch.no_grad():
                    tensor.view(-1)[i] -= sign * step
            H.append((slopes[0] - slopes[1]) / (2 * step))
    assert matrix_error(inverter.curvature_.to_dense(), torch.stack(H).numpy()) <= 1e-6


def flat(value, params):
    parts = torch.autograd.grad(value, params, retain_graph=True)
    return torch.cat([part.reshape(-1) for part in parts])
