"""Models and losses that take derivatives themselves, as forces and energies do: right against plain autograd."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from skinvert import HessianInverter, InfluenceFunction, PerSampleGradient

D = torch.float64
N = 8


class Energy(nn.Module):
    """The forces −∂E/∂x by plain operations: the oracle's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4, dtype=D), nn.Linear(4, 1, bias=False, dtype=D)

    def energy(self, x):
        return self.last(torch.tanh(self.first(x))).sum()

    def forward(self, x):
        slope = self.last.weight * (1 - torch.tanh(self.first(x)).square())
        return slope @ self.first.weight


class Marking(Energy):
    """Sets the flag of the input itself."""

    def forward(self, x):
        x.requires_grad = True
        with torch.enable_grad():
            return torch.autograd.grad(self.energy(x), x, create_graph=True)[0]


class MarkingOnce(Energy):
    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_(True)
            return torch.autograd.grad(self.energy(x), x, create_graph=True)[0]


class WritingAndMarking(Marking):
    def forward(self, x):
        return super().forward(x.mul_(2.0) / 2.0)


class Grad(Energy):
    def forward(self, x):
        return torch.func.vmap(torch.func.grad(self.energy))(x)


class Jacrev(Energy):
    def forward(self, x):
        return torch.func.vmap(torch.func.jacrev(self.energy))(x)


class GradAtOnce(Energy):
    def forward(self, x):
        return torch.func.grad(self.energy)(x)


MODELS = [Marking, MarkingOnce, WritingAndMarking, Grad, Jacrev, GradAtOnce]


def data(dtype=D):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(N, 3, generator=generator, dtype=D).to(dtype) for _ in range(2))


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


def oracle(net, curvature, loss=None):
    """Return the mean gradient and the curvature of L."""
    plain, (X, y) = Energy(), data()
    plain.load_state_dict({name: value.double() for name, value in net.state_dict().items()})
    params = list(plain.parameters())
    loss = loss or nn.functional.mse_loss
    gradient = flat(torch.autograd.grad(loss(plain(X), y), params, create_graph=True))
    if curvature == "hessian":
        return gradient.detach(), torch.stack(
            [flat(torch.autograd.grad(g, params, retain_graph=True)) for g in gradient]
        )
    f = plain(X)
    J = torch.stack([flat(torch.autograd.grad(e, params, retain_graph=True)) for e in f.flatten()])
    S = torch.autograd.functional.hessian(lambda f: loss(f, y), f.detach()).reshape(len(J), len(J))
    return gradient.detach(), J.mT @ S @ J


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("method", ["direct", "cg"])
@pytest.mark.parametrize("kind", MODELS)
def test_derivatives_by_the_input(kind, method, curvature):
    net, (X, y) = kind(), data()
    gradient, H = oracle(net, curvature)
    inverter = HessianInverter(method, 30.0, curvature=curvature, loss="mse", batch_size=5).fit(net, (X, y))
    received = inverter.curvature_.apply(torch.eye(len(H), dtype=D))
    np.testing.assert_allclose(received, H, rtol=0, atol=1e-12)
    assert abs(inverter.gradient_norm_ - float(gradient.norm())) <= 1e-12
    rows = PerSampleGradient(net, loss="mse").fit_transform(X, y)
    np.testing.assert_allclose(rows.mean(0), gradient, rtol=0, atol=1e-12)
    assert not X.requires_grad


@pytest.mark.parametrize("kind", MODELS)
def test_scores_and_factors(kind):
    net, plain, (X, y) = kind(), Energy(), data()
    settings = {"loss": "mse", "curvature": "ggn"}
    expected = InfluenceFunction(HessianInverter("direct", 1.0, **settings)).fit(plain, (X, y)).transform((X, y))
    received = InfluenceFunction(HessianInverter("direct", 1.0, **settings)).fit(net, (X, y)).transform((X, y))
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-12)
    # Layers that are differentiated inside are used outside of what factors know.
    with pytest.raises(ValueError, match="outside it too|under torch.func"):
        HessianInverter("kfac", 1.0, loss="mse").fit(net, (X, y))


def test_half_precision_is_seen_under_torch_func():
    class Half(Energy):
        def forward(self, x):
            return torch.func.vmap(torch.func.grad(lambda row: self.energy(row).bfloat16().float()))(x)

    net = copy.deepcopy(Half()).float()
    with pytest.raises(ValueError, match=r"must be in torch\.float32, as θ is\. Got torch\.bfloat16"):
        HessianInverter("direct", 1.0, loss="mse", curvature="ggn").fit(net, tuple(data(torch.float32)))


def twice(output, target):
    slopes = torch.func.vmap(torch.func.grad(lambda row: (row**2).sum()))(output)
    return (slopes - target).square().mean()


def plain_twice(output, target):
    return (2 * output - target).square().mean()


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("method", ["direct", "cg"])
def test_a_loss_that_takes_derivatives(method, curvature):
    net, (X, y) = Energy(), data()
    _, H = oracle(net, curvature, plain_twice)
    inverter = HessianInverter(method, 30.0, curvature=curvature, loss=twice).fit(net, (X, y))
    np.testing.assert_allclose(inverter.curvature_.apply(torch.eye(len(H), dtype=D)), H, rtol=0, atol=1e-12)
