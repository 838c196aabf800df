"""``weight_decay`` by groups of parameters, against torch's own parameter groups."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from skinvert import HessianInverter, TorchTwiceDifferentiable, load

GROUPS = {"0.*": 0.5, "2.weight": 0.25}


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    return net, torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 2, (20,))


def penalised(net, X, y):
    return nn.functional.cross_entropy(net(X), y) + sum(
        0.5 * mu * parameter.square().sum()
        for mu, parameter in zip([0.5, 0.5, 0.25, 0.0], net.parameters(), strict=True)
    )


def test_gradient_and_hessian_are_those_of_the_penalised_loss():
    net, X, y = problem()
    model = TorchTwiceDifferentiable(net, "cross_entropy", weight_decay=GROUPS)
    parameters = list(net.parameters())
    parts = torch.autograd.grad(penalised(net, X, y), parameters, create_graph=True)
    gradient = torch.cat([part.reshape(-1) for part in parts])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient]
    hessian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    torch.testing.assert_close(model.grad(X, y), gradient.detach())
    torch.testing.assert_close(model.hessian(X, y), hessian)
    fitted = HessianInverter("direct", loss="cross_entropy", weight_decay=GROUPS).fit(net, (X, y))
    torch.testing.assert_close(fitted.curvature_.to_dense(), hessian)
    assert fitted.gradient_norm_ == pytest.approx(gradient.norm().item())


@pytest.mark.parametrize("curvature", ["ggn", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("blocks", [None, "layer"])
def test_every_curvature_adds_the_same_diagonal(curvature, blocks):
    net, X, y = problem()
    fits = [
        HessianInverter("direct", 0.1, loss="cross_entropy", curvature=curvature, weight_decay=mu, blocks=blocks)
        for mu in (GROUPS, 0.0)
    ]
    with_, without = (each.fit(net, (X, y)).curvature_.to_dense() for each in fits)
    diagonal = torch.cat([torch.full((n,), mu) for n, mu in ((8, 0.5), (4, 0.25), (2, 0.0))]).double()
    torch.testing.assert_close(with_ - without, diagonal.diag())


def test_one_glob_for_all_is_the_number():
    net, X, y = problem()
    one, both = (
        HessianInverter("ekfac", 0.1, loss="cross_entropy", weight_decay=mu).fit(net, (X, y))
        for mu in (0.3, {"*": 0.3})
    )
    b = np.ones((1, 14))
    np.testing.assert_array_equal(one.transform(b), both.transform(b))


def test_selected_parameters_keep_their_own():
    net, X, y = problem()
    fitted = HessianInverter("direct", 0.1, loss="cross_entropy", params="2.*", weight_decay=GROUPS)
    plain = clone(fitted).set_params(weight_decay=0.0).fit(net, (X, y)).curvature_.to_dense()
    received = fitted.fit(net, (X, y)).curvature_.to_dense() - plain
    torch.testing.assert_close(received.diagonal(), torch.tensor([0.25] * 4 + [0.0] * 2, dtype=torch.float64))


def test_a_tied_parameter_goes_by_each_of_its_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(2, 2, bias=False)
            self.second = nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh())

    for glob in ("first.*", "second.*"):
        model = TorchTwiceDifferentiable(Tied(), "cross_entropy", weight_decay={glob: 0.5})
        torch.testing.assert_close(model.penalty_diagonal(), torch.full((4,), 0.5))


@pytest.mark.parametrize(
    ("weight_decay", "error", "match"),
    [
        ({"3.*": 0.1}, ValueError, "globs that match some of"),
        ({3: 0.1}, ValueError, "globs that match some of"),
        ({"0.*": 0.1, "*": 0.2}, ValueError, "one μ for each parameter. Got 0.1 and 0.2 for '0.weight'"),
        ({"*": -0.1}, ValueError, r"weight_decay\['\*'\] must be a float in the range"),
        ({"*": "a"}, TypeError, r"weight_decay\['\*'\] must be a float"),
        ([0.1], TypeError, "weight_decay must be a float"),
    ],
)
def test_bad_groups(weight_decay, error, match):
    net, X, y = problem()
    with pytest.raises(error, match=match):
        HessianInverter(loss="cross_entropy", weight_decay=weight_decay).fit(net, (X, y))


def test_clones_pickles_and_files_keep_the_groups(tmp_path):
    net, X, y = problem()
    fitted = HessianInverter("direct", 0.1, loss="cross_entropy", curvature="ggn", weight_decay=GROUPS).fit(net, (X, y))
    assert clone(fitted).weight_decay == pickle.loads(pickle.dumps(fitted)).weight_decay == GROUPS
    pytest.importorskip("safetensors")
    fitted.save(tmp_path / "inverse.safetensors")
    assert load(tmp_path / "inverse.safetensors").weight_decay == GROUPS
