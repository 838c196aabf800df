"""Rows are right for every layer and every number of rows: as many as outputs, as one, as parameters."""

import numpy as np
import pytest
import torch
from torch import nn

from skinvert import HessianInverter, PerSampleGradient, TorchTwiceDifferentiable
from skinvert.curvature import products
from skinvert.curvature.per_sample import jacobian_rows
from skinvert.models import plain_functions

C = 3


class Functional(nn.Module):
    def __init__(self, function, *shape):
        super().__init__()
        self.extra = nn.Parameter(torch.rand(*shape) + 0.1)
        self.function = function

    def forward(self, x):
        return self.function(x, self.extra)


class Wrong(torch.autograd.Function):
    """The square, whose rule for batches is right at all sizes but one."""

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]

    @staticmethod
    def vmap(info, in_dims, x):
        return (x.abs() if info.batch_size == C else x.square()), in_dims[0]


LAYERS = {
    **{name: getattr(nn, name) for name in ("RReLU", "LeakyReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish")},
    **{name: getattr(nn, name) for name in ("Softplus", "Softsign", "Tanhshrink", "Softshrink", "Hardshrink")},
    **{name: getattr(nn, name) for name in ("Hardtanh", "Hardswish", "Hardsigmoid", "LogSigmoid", "ReLU6", "PReLU")},
    "PReLU of each": lambda: nn.PReLU(5),
    "prelu": lambda: Functional(nn.functional.prelu, 5),
    "torch.prelu": lambda: Functional(torch.prelu, 1),
    "GLU": lambda: nn.Sequential(nn.Linear(5, 10), nn.GLU()),
    "Threshold": lambda: nn.Threshold(0.1, 0.2),
    "LayerNorm": lambda: nn.LayerNorm(5),
    "RMSNorm": lambda: nn.RMSNorm(5),
    "BatchNorm1d": lambda: nn.BatchNorm1d(5),
    "cdist": lambda: Functional(lambda x, w: torch.exp(-torch.cdist(x, w)), 5, 5),
    "cdist1": lambda: Functional(lambda x, w: torch.exp(-torch.cdist(x, w, p=1.0)), 5, 5),
    "cdist3": lambda: Functional(lambda x, w: torch.exp(-torch.cdist(x, w, p=3.0)), 5, 5),
    "wrong": lambda: Functional(lambda x, w: Wrong.apply(x) * w, 5),
}


def net_of(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), LAYERS[layer](), nn.Linear(5, C)).double().eval()


def data(m):
    return torch.randn(m, 4, dtype=torch.float64), torch.randn(m, C, dtype=torch.float64)


def jacobian_by_hand(net, X):
    """Return J (m, c, p) by one backward pass for each output of each row alone."""
    rows = []
    for i in range(len(X)):
        parts = [torch.autograd.grad(f, list(net.parameters()), retain_graph=True) for f in net(X[i : i + 1])[0]]
        rows.append(torch.stack([torch.cat([part.reshape(-1) for part in each]) for each in parts]))
    return torch.stack(rows)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_ggn_and_gradients(layer):
    net = net_of(layer)
    p = sum(tensor.numel() for tensor in net.parameters())
    for m in (1, C, 5, p):
        X, y = data(m)
        J = jacobian_by_hand(net, X)
        expected = 2 * torch.einsum("mcp,mcq->pq", J, J) / (m * C)
        settings = {"loss": "mse", "curvature": "ggn"}
        ggn = HessianInverter("cg", 1.0, **settings).fit(net, (X, y)).curvature_
        # torch's Hardsigmoid has 1/6 in single precision.
        close = {"rtol": 1e-6, "atol": 1e-7}
        factor = ggn.factor()
        torch.testing.assert_close(factor.mT @ factor, expected, **close)
        torch.testing.assert_close(ggn.diagonal(), expected.diagonal(), **close)
        torch.testing.assert_close(ggn.apply(torch.eye(p, dtype=torch.float64)), expected, **close)
        gradients = PerSampleGradient(net, loss="mse").fit(X, y).transform((X, y))
        by_hand = 2 * torch.einsum("mc,mcp->mp", net(X).detach() - y, J) / C
        torch.testing.assert_close(gradients, by_hand, **close)


@pytest.mark.parametrize("layer", ["PReLU", "prelu", "wrong"])
@pytest.mark.parametrize("plain", [True, False])
def test_each_length_is_tried(layer, plain, monkeypatch):
    # Without the plain operations the batching rule of torch's PReLU is wrong at one length alone.
    if not plain:
        monkeypatch.setattr(plain_functions, "PLAIN", {})
    net = net_of(layer)
    model = TorchTwiceDifferentiable(net, "mse").at_point()
    for m in (7, C, 2, C, 1):
        X, _ = data(m)
        received = jacobian_rows(model, (X, torch.zeros(m, C, dtype=torch.float64)))
        torch.testing.assert_close(received, jacobian_by_hand(net, X))


def test_a_last_chunk_of_as_many_rows_as_outputs():
    net = net_of("PReLU")
    X, y = data(16 + C)
    p = sum(tensor.numel() for tensor in net.parameters())
    b = torch.randn(2, p, dtype=torch.float64)
    received = HessianInverter("direct", 0.1, loss="mse", curvature="ggn", batch_size=16).fit(net, (X, y)).transform(b)
    J = jacobian_by_hand(net, X).flatten(0, 1)
    A = 2 * J.mT @ J / J.shape[0] + 0.1 * torch.eye(p, dtype=torch.float64)
    np.testing.assert_allclose(received, torch.linalg.solve(A, b.T).T, rtol=1e-7, atol=1e-9)


class WrongAtOnce(products._FlatProducts):
    """Products of which a batch of C is wrong, as by a batching rule that takes one axis for another."""

    def _grad(self, v, batched):
        product = super()._grad(v, batched)
        return product.flip(0) if batched and len(v) == C else product


@pytest.mark.parametrize("k", [1, 2, C, 5, 64 + C])
def test_batches_of_products_are_tried(k):
    net = net_of("PReLU")
    X, _ = data(5)
    outputs, theta = net(X), list(net.parameters())
    products = WrongAtOnce(outputs, theta, torch.finfo(outputs.dtype).eps)
    # As on an accelerator: all rows in one pass.
    products.batched = True
    V = torch.randn(k, outputs.numel(), dtype=torch.float64)
    parts = [torch.autograd.grad(outputs, theta, v.reshape(outputs.shape), retain_graph=True) for v in V]
    expected = torch.stack([torch.cat([part.reshape(-1) for part in each]) for each in parts])
    torch.testing.assert_close(products(V), expected)


# -- bags ----------------------------------------------------------------------------------------------------------


class Bags(nn.Module):
    def __init__(self, mode, padding_idx=None, functional=False):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, mode=mode, padding_idx=padding_idx), nn.Linear(4, C)
        self.functional = functional

    def forward(self, x):
        if not self.functional:
            return self.head(self.bag(x))
        # Bags of one length, told by their offsets.
        offsets = torch.arange(0, x.numel(), x.shape[1])
        return self.head(nn.functional.embedding_bag(x.flatten(), self.bag.weight, offsets, mode=self.bag.mode))


def bags_by_hand(model, x, weight, head, bias):
    inside = torch.ones_like(x, dtype=torch.bool) if model.bag.padding_idx is None else x != model.bag.padding_idx
    bags = []
    for indices, kept in zip(x, inside, strict=True):
        rows = torch.stack([weight[i] for i, keep in zip(indices, kept, strict=True) if keep])
        bags.append({"sum": rows.sum(0), "mean": rows.mean(0), "max": rows.amax(0)}[model.bag.mode])
    return torch.stack(bags) @ head.T + bias


@pytest.mark.parametrize(("padding_idx", "functional"), [(None, False), (2, False), (None, True)])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("method", ["direct", "cg"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_embedding_bags(curvature, method, mode, padding_idx, functional):
    torch.manual_seed(1)
    net = Bags(mode, padding_idx, functional).double()
    # No index twice in a bag: a maximum of two equal rows has no derivative.
    x, y = torch.stack([torch.randperm(9)[:4] for _ in range(6)]), torch.randn(6, C, dtype=torch.float64)
    theta = tuple(tensor.detach() for tensor in net.parameters())
    sizes = [tensor.numel() for tensor in theta]

    def joined(blocks):
        return torch.cat([torch.cat([b.reshape(m, -1) for b in row], 1) for m, row in zip(sizes, blocks, strict=True)])

    if curvature == "hessian":
        H = joined(
            torch.autograd.functional.hessian(lambda *t: nn.functional.mse_loss(bags_by_hand(net, x, *t), y), theta)
        )
    else:
        J = torch.autograd.functional.jacobian(lambda *t: bags_by_hand(net, x, *t).flatten(), theta)
        J = torch.cat([part.reshape(6 * C, -1) for part in J], dim=1)
        H = 2 * J.mT @ J / (6 * C)
    b = torch.randn(2, sum(sizes), dtype=torch.float64)
    expected = torch.linalg.solve(H + 3.0 * torch.eye(len(H), dtype=torch.float64), b.T).T
    inverter = HessianInverter(method, 3.0, loss="mse", curvature=curvature).fit(net, (x, y))
    torch.testing.assert_close(inverter.transform(b), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
def test_a_functional_embedding_with_sparse_gradients(curvature):
    class Looked(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.weight, self.sparse = nn.Parameter(torch.randn(5, 3, dtype=torch.float64)), sparse

        def forward(self, x):
            return nn.functional.embedding(x, self.weight, sparse=self.sparse).tanh().sum(1)

    X, y = torch.arange(12).reshape(6, 2) % 5, torch.arange(6) % 3
    sparse, dense = (
        HessianInverter("direct", 1.0, loss="cross_entropy", curvature=curvature).fit(Looked(kind), (X, y))
        for kind in (True, False)
    )
    torch.testing.assert_close(sparse.curvature_.to_dense(), dense.curvature_.to_dense())
