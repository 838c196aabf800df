"""The Gauss–Newton matrix: its identities, and the layered assembly against the factor and the oracle."""

import numpy as np
import pytest
import torch
from oracles import matrix_error, oracle_matrix
from problems import MODELS, Tied, problem
from torch import nn

from skinvert import HessianInverter, TorchTwiceDifferentiable
from skinvert.curvature import GGN, Objective
from skinvert.curvature.layers.found import layers_of
from skinvert.data import as_batches


def ggn_of(module, loss, data, params=None, weights=None, batch_size=5, weight_decay=0.0):
    model = TorchTwiceDifferentiable(module, loss, weight_decay).at_point(params)
    settings = {"dtype": model.dtype, "device": model.device, "batch_size": batch_size, "sample_weight": weights}
    return GGN(Objective(model, as_batches(data, **settings)))


def by_factor(A):
    F = A.factor()
    return F.mT @ F if A.penalty is None else F.mT @ F + torch.diag(A.penalty)


def is_layered(A):
    return A._dense_from_layers(0) is not None


class TwoPaths(nn.Module):
    """Two Linear layers that see the same rows, side by side, and one after them."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 3, bias=False)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.cat([self.left(x).tanh(), self.right(x).sigmoid()], dim=1))


class Functional(nn.Module):
    """A Linear whose weight is also used where no hook sees it, before anything else."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer((x @ self.layer.weight).tanh())


class Twice(nn.Module):
    """One Linear called twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


class Penalised(nn.Module):
    """A Linear beside a bare parameter."""

    def __init__(self):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(3)), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) * self.scale


LAYERED = {
    "one": lambda: nn.Linear(4, 3),
    "two": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "three": lambda: nn.Sequential(nn.Linear(4, 5), nn.ELU(), nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 3)),
    "no bias": lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)),
    "mixed bias": lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)),
    "two paths": TwoPaths,
}

# (module, params): Σ Dᵢ ⊗ aᵢaᵢᵀ would be wrong or incomplete.
NOT_LAYERED = {
    "tied": Tied,
    "functional use": Functional,
    "called twice": Twice,
    "bare parameter": Penalised,
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 3)),
    "rows in a sequence": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 3), nn.Flatten()),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
}


def data_for(module, n=12):
    X = torch.randn(n, 4, dtype=torch.float64)
    with torch.no_grad():
        outputs = module.eval()(X)
    return X, torch.randint(outputs.shape[1], (n,))


@pytest.mark.parametrize("build", LAYERED.values(), ids=LAYERED.keys())
@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.1)])
@pytest.mark.parametrize("weights", [None, np.arange(12.0)])
def test_layered_assembly_is_the_factors(build, loss, weights):
    module = build().double()
    A = ggn_of(module, loss, data_for(module), weights=weights, weight_decay=0.1)
    assert is_layered(A)
    assert matrix_error(A.to_dense(), by_factor(A).numpy()) <= 1e-13


@pytest.mark.parametrize("build", NOT_LAYERED.values(), ids=NOT_LAYERED.keys())
def test_falls_back_where_the_layers_do_not_tell_all(build):
    module = build().double()
    A = ggn_of(module, "cross_entropy", data_for(module))
    assert not is_layered(A)
    assert matrix_error(A.to_dense(), by_factor(A).numpy()) <= 1e-13


@pytest.mark.parametrize("params", ["*.weight", "*.bias", "2.*", "0.weight", ["0.bias", "2.weight"]])
def test_layered_assembly_of_some_parameters(params):
    module = LAYERED["two"]().double()
    data = data_for(module)
    whole, part = ggn_of(module, "cross_entropy", data), ggn_of(module, "cross_entropy", data, params)
    places = torch.cat(
        [torch.arange(whole.size)[whole.objective.layout.slices[n]] for n in part.objective.layout.names]
    )
    assert is_layered(part)
    assert matrix_error(part.to_dense(), by_factor(whole)[places][:, places].numpy()) <= 1e-13


def test_layered_assembly_with_a_frozen_bias():
    module = LAYERED["two"]().double()
    module[0].bias.requires_grad_(False)
    A = ggn_of(module, "cross_entropy", data_for(module))
    assert is_layered(A) and "0.bias" not in A.objective.layout.names
    assert matrix_error(A.to_dense(), by_factor(A).numpy()) <= 1e-13


def test_layers_are_found_by_their_parameters():
    module = LAYERED["two paths"]().double()
    model = TorchTwiceDifferentiable(module, "cross_entropy").at_point()
    found = layers_of(model)
    assert len(found.layers) == 3 and not found.reasons


# Where the outputs are linear in the parameters, the Gauss–Newton matrix is the Hessian.
@pytest.mark.parametrize("model", ["linear", "softmax"])
@pytest.mark.parametrize("loss", ["cross_entropy", "class_weights", "huber", "poisson_nll", "pos_weight", "mse"])
def test_is_the_hessian_of_a_linear_model(model, loss):
    case = problem(model, loss, 0.1, True)
    A = ggn_of(case.module, case.loss, case.data, weights=case.sample_weight, weight_decay=0.1)
    assert matrix_error(A.to_dense(), oracle_matrix(case, "hessian")) <= 1e-12


@pytest.mark.parametrize("model", MODELS)
def test_is_positive_semidefinite(model):
    case = problem(model, "cross_entropy")
    values = torch.linalg.eigvalsh(ggn_of(case.module, case.loss, case.data).to_dense())
    assert values[0] >= -1e-13 * values[-1]


def test_refuses_a_loss_that_is_not_convex():
    case = problem("mlp", "mse")
    with pytest.raises(ValueError, match="convex in the outputs"):
        ggn_of(case.module, lambda f, y: (f - y).cos().sum(1), case.data)


def gaussian_nll(f, y):
    """A mean and a log-variance: never convex in both."""
    return 0.5 * (f[:, 1] + (y - f[:, 0]).square() * torch.exp(-f[:, 1]))


@pytest.mark.parametrize("log_variance", [0.0, 18.0, 24.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refuses_a_loss_that_is_nearly_flat_and_not_convex(log_variance, dtype):
    # In float32 all that it has here is less than rounding makes of what it has at zero.
    torch.manual_seed(0)
    net, X = nn.Linear(3, 2).to(dtype), torch.randn(5, 3, dtype=dtype)
    with torch.no_grad():
        net.bias[1] = log_variance
    with pytest.raises(ValueError, match="convex in the outputs"):
        ggn_of(net, gaussian_nll, (X, X.sum(1)))


@pytest.mark.parametrize("weight", [None, torch.ones(4)])
def test_takes_a_loss_whose_curvature_is_rounding(weight):
    # Confident rows, of a callable: p(1 - p) of about 1e-9, and what float32 makes of it. Weights in float32 meet no
    # outputs in float64.
    torch.manual_seed(0)
    net, X = nn.Linear(3, 4), torch.randn(5, 3)
    with torch.no_grad():
        net.bias[0] = 22.0
    y = torch.zeros(5, dtype=torch.int64)
    A = ggn_of(net, lambda f, y: nn.functional.cross_entropy(f, y, weight, reduction="none"), (X, y)).to_dense()
    expected = ggn_of(net.double(), "cross_entropy", (X.double(), y)).to_dense()
    # 1 - p has the rounding of 1, times the squares of inputs.
    assert float((A - expected).abs().max()) <= 2**-23 * float(X.square().max())


def test_inverter_takes_the_ggn_by_name():
    case = problem("mlp", "cross_entropy", 0.1, True)
    inverter = HessianInverter("direct", curvature="ggn", **case.settings())
    inverter.fit(case.module, case.data, case.sample_weight)
    assert inverter.curvature_name_ == "ggn"
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case, "ggn")) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "loss", ["cross_entropy", torch.nn.CrossEntropyLoss(label_smoothing=0.1), torch.nn.functional.cross_entropy]
)
@pytest.mark.parametrize("size", [1.0, 50.0])
def test_a_confident_classifier_is_convex(loss, dtype, size):
    # diag(p) − ppᵀ cancels to rounding for one-hot p; that must not count as a negative eigenvalue.
    net = torch.nn.Linear(2, 3, bias=False).to(dtype)
    with torch.no_grad():
        net.weight.copy_(size * torch.tensor([[9.0, 9.0], [-8.0, -7.0], [1.0, 0.0]]))
    data = (2 * torch.rand(200, 2), torch.zeros(200, dtype=torch.long))
    inverter = HessianInverter("direct", 1e-2, curvature="ggn", loss=loss).fit(net, data)
    assert inverter.inverse_.positive_definite
