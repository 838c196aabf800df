"""The Hessian from the layers, against dense float64 oracles; None where a layer sees anything but one row a sample."""

import pytest
import torch
import torch.nn.functional as F
from oracles import Oracle, matrix_error
from problems import Net, Problem
from torch import nn

from skinvert import HessianInverter
from skinvert.curvature import hessian
from skinvert.curvature.layers import hessian_diagonal_from_layers, hessian_from_layers, second_order

N = 11


def chain(*widths, activation=nn.Tanh, bias=True):
    layers = [nn.Linear(i, o, bias=bias) for i, o in zip(widths, widths[1:], strict=False)]
    parts = [part for layer in layers for part in (layer, activation())]
    return nn.Sequential(*parts[:-1])


def frozen(net, *names):
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in names)
    return net


def skip(net, x):
    h = net.a(x).tanh()
    return net.c(torch.cat([h, net.b(h).tanh()], 1))


MODELS = {
    "one_layer": lambda: chain(4, 3),
    "two_layers": lambda: chain(4, 5, 3),
    "three_layers": lambda: chain(4, 5, 6, 3),
    "four_layers": lambda: chain(4, 6, 5, 4, 3, activation=nn.GELU),
    "narrow": lambda: chain(4, 2, 1, 3),
    "equal_widths": lambda: chain(4, 4, 4, 3),
    "no_bias": lambda: chain(4, 5, 6, 3, bias=False),
    "some_biases": lambda: Net(lambda net, x: net.b(net.a(x).tanh()), a=nn.Linear(4, 5, bias=False), b=nn.Linear(5, 3)),
    "relu": lambda: chain(4, 6, 5, 3, activation=nn.ReLU),
    "relu_inplace": lambda: chain(4, 6, 5, 3, activation=lambda: nn.ReLU(inplace=True)),
    "silu_inplace": lambda: chain(4, 6, 5, 3, activation=lambda: nn.SiLU(inplace=True)),
    "frozen_weight": lambda: frozen(chain(4, 5, 6, 3), "2.weight"),
    "frozen_bias": lambda: frozen(chain(4, 5, 6, 3), "0.bias", "4.bias"),
    "frozen_layer": lambda: frozen(chain(4, 5, 6, 3), "2.weight", "2.bias"),
    "layer_norm_between": lambda: nn.Sequential(
        nn.Linear(4, 5), nn.LayerNorm(5, elementwise_affine=False), nn.Tanh(), nn.Linear(5, 3)
    ),
    "softmax_between": lambda: chain(4, 5, 6, 3, activation=lambda: nn.Softmax(1)),
    "skip": lambda: Net(skip, a=nn.Linear(4, 5), b=nn.Linear(5, 2), c=nn.Linear(7, 3)),
    "residual": lambda: Net(
        lambda net, x: net.c((lambda h: h + net.b(h).tanh())(net.a(x).tanh())),
        a=nn.Linear(4, 5),
        b=nn.Linear(5, 5),
        c=nn.Linear(5, 3),
    ),
    "branches": lambda: Net(
        lambda net, x: net.c(net.a(x).tanh() * net.b(x).sigmoid()),
        a=nn.Linear(4, 5),
        b=nn.Linear(4, 5),
        c=nn.Linear(5, 3),
    ),
    "sum_of_branches": lambda: Net(
        lambda net, x: net.a(x) + net.c(net.b(x).tanh()), a=nn.Linear(4, 3), b=nn.Linear(4, 5), c=nn.Linear(5, 3)
    ),
    "product_of_outputs": lambda: Net(lambda net, x: net.a(x) * net.b(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3)),
    "other_order": lambda: Net(
        lambda net, x: net.a(net.b(net.c(x).tanh()).tanh()), a=nn.Linear(6, 3), b=nn.Linear(5, 6), c=nn.Linear(4, 5)
    ),
    "input_again": lambda: Net(
        lambda net, x: net.b(torch.cat([net.a(x).tanh(), x], 1)), a=nn.Linear(4, 5), b=nn.Linear(9, 3)
    ),
    "scaled_by_input": lambda: Net(
        lambda net, x: net.b(net.a(x).tanh() * x[:, :1]), a=nn.Linear(4, 5), b=nn.Linear(5, 3)
    ),
    "mixed_features": lambda: Net(
        lambda net, x: net.b(net.a(x).tanh().flip(1).cumsum(1)), a=nn.Linear(4, 5), b=nn.Linear(5, 3)
    ),
    "detached_constant": lambda: Net(
        lambda net, x: net.b((lambda h: (h - h.detach().amax(1, keepdim=True)).softmax(1))(net.a(x))),
        a=nn.Linear(4, 5),
        b=nn.Linear(5, 3),
    ),
}
# One row a sample, of three axes.
LONG = {
    "one_position": lambda: Net(
        lambda net, x: net.b(net.a(x[:, None]).tanh())[:, 0], a=nn.Linear(4, 5), b=nn.Linear(5, 3)
    ),
    "some_of_one_position": lambda: Net(
        lambda net, x: net.b(net.a(x[:, None]).tanh()[:, 0]), a=nn.Linear(4, 5), b=nn.Linear(5, 3)
    ),
}
# Not one row a sample by each layer, once.
OTHERS = {
    "called_twice": lambda: Net(
        lambda net, x: net.b(net.a(net.a(x).tanh()).tanh()), a=nn.Linear(4, 4), b=nn.Linear(4, 3)
    ),
    "two_positions": lambda: Net(
        lambda net, x: net.b(net.a(torch.stack([x, x.sin()], 1)).tanh().sum(1)), a=nn.Linear(4, 5), b=nn.Linear(5, 3)
    ),
    "weight_outside": lambda: Net(
        lambda net, x: net.b(net.a(x).tanh()) + (x @ net.a.weight.mT)[:, :3], a=nn.Linear(4, 5), b=nn.Linear(5, 3)
    ),
    "bias_outside": lambda: Net(
        lambda net, x: net.b(net.a(x).tanh()) + net.a.bias[:3], a=nn.Linear(4, 5), b=nn.Linear(5, 3)
    ),
    "tied": lambda: Net(
        lambda net, x: net.b(F.linear(net.a(x).tanh(), net.a.weight.mT)), a=nn.Linear(4, 5), b=nn.Linear(4, 3)
    ),
    "a_norm_with_weights": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)),
}
LOSSES = {
    "cross_entropy": F.cross_entropy,
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), ignore_index=1),
    "mse": F.mse_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "huber": F.huber_loss,
}


def case_of(build, loss="cross_entropy", weight_decay=0.0, counts=None, batch_size=4):
    module, whole = build().double(), LOSSES[loss]
    X, y = torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 3
    if loss in ("mse", "huber"):
        y = 2 * torch.randn(N, 3, dtype=torch.float64)
    elif loss == "bce_with_logits":
        y = torch.rand(N, 3, dtype=torch.float64).round()
    given = whole if isinstance(whole, nn.Module) else loss
    return Problem("", module, given, whole, None, X, y, weight_decay, counts, batch_size)


def curvature_of(case, **settings):
    inverter = HessianInverter("cg", 0.1, curvature="hessian", **case.settings(**settings))
    return inverter.fit(case.module, case.data, sample_weight=case.sample_weight).curvature_


def from_layers(A):
    """The matrix without the penalty, symmetric already."""
    matrix = hessian_from_layers(A.objective)
    torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=1e-13 * float(matrix.abs().max() + 1))
    return matrix


@pytest.mark.parametrize("model", [*MODELS, *LONG])
def test_models(model):
    case = case_of({**MODELS, **LONG}[model])
    assert matrix_error(from_layers(curvature_of(case)), Oracle(case).hessian()) <= 1e-12


@pytest.mark.parametrize("model", [*MODELS, *LONG])
def test_diagonals_of_models(model):
    case = case_of({**MODELS, **LONG}[model])
    found, expected = hessian_diagonal_from_layers(curvature_of(case).objective), Oracle(case).hessian().diagonal()
    assert matrix_error(found, expected) <= 1e-12


@pytest.mark.parametrize("model", OTHERS)
def test_diagonals_where_a_weight_is_used_elsewhere(model):
    """None from the layers, which say nothing of another use; right by products."""
    case = case_of(OTHERS[model], weight_decay=0.1)
    A = curvature_of(case)
    assert hessian_diagonal_from_layers(A.objective) is None
    assert matrix_error(A.diagonal(), Oracle(case).hessian().diagonal()) <= 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_diagonals_of_losses_weights_and_penalty(loss, monkeypatch):
    """By a product for each parameter tensor, to hold it against; with chunks and pushes of a few rows."""
    monkeypatch.setattr(second_order, "CHUNK", 3)
    case = case_of(MODELS["skip"], loss, weight_decay=0.1, counts=torch.arange(N).numpy() % 4)
    A, rows = curvature_of(case), []
    apply = type(A).apply
    monkeypatch.setattr(type(A), "apply", lambda self, V: rows.append(len(V)) or apply(self, V))
    assert matrix_error(A.diagonal(), Oracle(case).hessian().diagonal()) <= 1e-12
    assert rows == [1] * 6


def test_a_use_of_a_weight_that_no_gradient_tells():
    """Of (w − w₀)² at w = w₀ the gradient is zero: a product tells that the diagonal is not that of the layers."""
    one = nn.Linear(4, 5)
    start = one.weight.detach().clone().double()

    def forward(net, x):
        gap = (net.a.weight - start).square().sum()
        return net.b(net.a(x).tanh()) + F.pad(gap[None], (0, 2))

    case = case_of(lambda: Net(forward, a=one, b=nn.Linear(5, 3)))
    A, expected = curvature_of(case), Oracle(case).hessian().diagonal()
    assert matrix_error(hessian_diagonal_from_layers(A.objective), expected) > 1e-2
    assert matrix_error(A.diagonal(), expected) <= 1e-12


@pytest.mark.parametrize("model", OTHERS)
def test_what_sees_more_than_a_row(model):
    """None or right; and right by products in any case."""
    case = case_of(OTHERS[model])
    A, expected = curvature_of(case), Oracle(case).hessian()
    matrix = hessian_from_layers(A.objective)
    assert matrix is None or matrix_error(matrix, expected) <= 1e-12 or not hessian.agrees(A, matrix, A.eps)
    assert matrix_error(A.to_dense(), expected) <= 1e-12


@pytest.mark.parametrize("model", ["called_twice", "two_positions", "a_norm_with_weights"])
def test_none_where_a_layer_is_called_again_or_sees_more(model):
    assert hessian_from_layers(curvature_of(case_of(OTHERS[model])).objective) is None


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_weights_and_penalty(loss):
    case = case_of(MODELS["skip"], loss, weight_decay=0.1, counts=torch.arange(N).numpy() % 4)
    A = curvature_of(case)
    expected = Oracle(case, penalty=0.0).hessian()
    assert matrix_error(from_layers(A), expected) <= 1e-12
    assert matrix_error(A.to_dense(), Oracle(case).hessian()) <= 1e-12


@pytest.mark.parametrize("chunk", [1, 3, 512])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 11])
def test_batches_and_chunks(batch_size, chunk, monkeypatch):
    monkeypatch.setattr(second_order, "CHUNK", chunk)
    case = case_of(MODELS["three_layers"], batch_size=batch_size)
    assert matrix_error(from_layers(curvature_of(case)), Oracle(case).hessian()) <= 1e-12


@pytest.mark.parametrize("params", ["0.*", ["0.weight", "4.bias"], ["*.bias"], ["4.weight", "2.weight"]])
def test_some_parameters(params):
    case = case_of(MODELS["three_layers"])
    A, names = curvature_of(case, params=params), [name for name, _ in case.module.named_parameters()]
    sizes = [t.numel() for t in case.module.parameters()]
    kept = torch.cat(
        [torch.full((size,), name in A.objective.layout.names) for name, size in zip(names, sizes, strict=True)]
    ).numpy()
    expected = Oracle(case).hessian()[kept][:, kept]
    assert matrix_error(from_layers(A), expected) <= 1e-12
    assert matrix_error(A.to_dense(), expected) <= 1e-12


def test_to_dense_is_by_the_layers(monkeypatch):
    """Not by p products, which are only tried with one."""
    A, rows = curvature_of(case_of(MODELS["three_layers"])), []
    apply = type(A).apply
    monkeypatch.setattr(type(A), "apply", lambda self, V: rows.append(len(V)) or apply(self, V))
    A.to_dense()
    assert rows == [1]
