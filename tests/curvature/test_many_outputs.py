"""Many outputs a row: tokens, pixels, classes. The same numbers in any memory, and none of them (m, c, c)."""

import pytest
import sklearn
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from skinvert import HessianInverter, SampledFisher, TorchTwiceDifferentiable
from skinvert.curvature import GGN, Fisher, Objective
from skinvert.data import as_batches

N, T, V = 6, 4, 3


class Tokens(nn.Module):
    """A class for each of T tokens, along dimension 1."""

    def __init__(self, V, width=3):
        super().__init__()
        self.embedding, self.out = nn.Embedding(V, width), nn.Linear(width, V)

    def forward(self, tokens):
        return self.out(self.embedding(tokens).tanh()).mT


def tokens(V=V, n=N, T=T, seed=0):
    torch.manual_seed(seed)
    net = Tokens(V).double()
    X, y = torch.randint(V, (n, T)), torch.randint(V, (n, T))
    # Ignored positions, of different numbers in each row; one row of nothing else.
    y[0, 1:], y[1, :1], y[2] = -100, -100, -100
    return net, X, y


def pixels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, V, 1)).double()
    y = torch.randint(V, (N, 2, 2))
    y[0, 0, 1] = -100
    return net, torch.randn(N, 1, 3, 3, dtype=torch.float64), y


WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
LOSSES = {
    "plain": {},
    "weighted": {"weight": WEIGHT},
    "smoothed": {"weight": WEIGHT, "label_smoothing": 0.3},
    "sum": {"reduction": "sum"},
}


def oracle(net, X, y, options):
    """JᵀHJ of all the data at once, with H the Hessian of L in all outputs, by torch's own differentiation."""
    f = net(X).detach()
    names = dict(net.named_parameters())
    J = torch.cat(
        [
            part.flatten(f.ndim).flatten(0, f.ndim - 1)
            for part in torch.func.jacrev(lambda theta: torch.func.functional_call(net, theta, (X,)))(names).values()
        ],
        dim=1,
    )

    def L(flat):
        value = F.cross_entropy(flat.reshape(f.shape), y, **options)
        return value / len(y) if options.get("reduction") == "sum" else value

    return J.mT @ torch.autograd.functional.hessian(L, f.reshape(-1)) @ J


def curvature(kind, net, X, y, loss, batch_size=4, **options):
    model = TorchTwiceDifferentiable(net, loss).at_point(options.pop("params", None))
    batches = as_batches((X, y), dtype=model.dtype, device=model.device, batch_size=batch_size)
    return kind(Objective(model, batches), **options)


def error(received, expected):
    return float((received.detach() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("problem", [tokens, pixels])
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("kind", [GGN, Fisher])
def test_positions_and_ignored_targets(problem, options, kind):
    net, X, y = problem()
    expected = oracle(net, X, y, options)
    A = curvature(kind, net, X, y, nn.CrossEntropyLoss(**options))
    assert error(A.to_dense(), expected) <= 1e-13
    assert error(A.apply(torch.eye(A.size, dtype=torch.float64)), expected) <= 1e-13
    assert error(A.factor().mT @ A.factor(), expected) <= 1e-13
    assert error(A.diagonal(), expected.diagonal()) <= 1e-13
    rows = torch.cat([F.mT @ F for F in A.sample_factors()])
    assert error(rows.sum(0) / A.objective.weight_sum, expected) <= 1e-13


CLOSED, BY_AUTOGRAD = nn.CrossEntropyLoss(), lambda f, y: F.cross_entropy(f, y.clamp(min=0))


@pytest.mark.parametrize("working_memory", [1e-5, 1e-3])
@pytest.mark.parametrize(("kind", "loss"), [(GGN, CLOSED), (GGN, BY_AUTOGRAD), (Fisher, CLOSED)])
def test_chunks_of_rows_and_columns_change_nothing(kind, working_memory, loss):
    net, X, y = tokens()
    whole = curvature(kind, net, X, y, loss)
    V = torch.randn(5, whole.size, dtype=torch.float64)
    expected = whole.to_dense(), whole.apply(V), whole.diagonal()
    factors = whole.kronecker_factors().blocks
    with sklearn.config_context(working_memory=working_memory):
        part = curvature(kind, net, X, y, loss)
        received = part.to_dense(), part.apply(V), part.diagonal()
        blocks = part.kronecker_factors().blocks
        assert error(part.factor().mT @ part.factor(), expected[0]) <= 1e-13
    assert max(error(a, b) for a, b in zip(received, expected, strict=True)) <= 1e-13
    for a, b in zip(blocks, factors, strict=True):
        assert error(a.left, b.left) <= 1e-13 and error(a.right, b.right) <= 1e-13


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())
def test_the_layered_diagonal_is_exact_with_ignored_positions(options):
    net, X, y = tokens()
    expected = oracle(net, X, y, options)
    A = curvature(GGN, net, X, y, nn.CrossEntropyLoss(**options))
    factors = A.kronecker_factors()
    bases = [block.decompose()[0] for block in factors.blocks]
    for block, basis, received in zip(factors.blocks, bases, factors.refit(bases), strict=True):
        right = torch.eye(len(block.right), dtype=torch.float64) if basis.right is None else basis.right
        Q = torch.kron(basis.left.contiguous(), right.contiguous())
        place = block.index.reshape(-1)
        diagonal = (Q.mT @ expected[place][:, place] @ Q).diagonal()
        assert error(received.reshape(-1), diagonal) <= 1e-12


def test_fewer_parameters_than_outputs():
    # 12 outputs a row against 3 parameters: by products, which are fewer than the factor's columns.
    net, X, y = tokens()
    A = curvature(GGN, net, X, y, "cross_entropy", params="out.bias")
    expected = oracle(net, X, y, {})[-V:, -V:]
    assert A.factor_shape == (N * T * V, V)
    assert error(A.to_dense(), expected) <= 1e-13 and error(A.diagonal(), expected.diagonal()) <= 1e-13


@pytest.mark.parametrize("method", ["direct", "cg", "ekfac", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confident_language_model(method, dtype):
    # Its second derivatives are rounding; a dense eigendecomposition of them did not converge in float32.
    net, X, y = tokens(V=11, T=7)
    net = net.to(dtype)
    with torch.no_grad():
        net.out.weight.mul_(200)
    inverter = HessianInverter(method, 0.1, curvature="ggn", loss="cross_entropy").fit(net, (X, y))
    assert bool(torch.isfinite(inverter.transform(torch.ones(2, inverter.n_features_in_, dtype=dtype))).all())


def largest_allocation(function):
    """The most bytes that one operation asks for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    return max(event.self_cpu_memory_usage for event in found.events())


SAMPLED = SampledFisher(2)


@pytest.mark.parametrize("chosen", ["ggn", "fisher", SAMPLED, "sampled_fisher", "sampled_ggn"])
def test_products_take_a_few_numbers_an_output(chosen):
    c, n = 400, 32
    torch.manual_seed(0)
    net, X, y = nn.Linear(2, c), torch.randn(n, 2), torch.randint(c, (n,))
    inverter = HessianInverter("cg", 10.0, curvature=chosen, loss="cross_entropy")
    allocated = largest_allocation(lambda: inverter.fit(net, (X, y)).transform(torch.randn(1, 3 * c)))
    # (m, c, c) floats are 20 MB, and (m, c) 51 kB.
    assert allocated < 4 * n * c * 20


def test_a_vocabulary_of_thousands():
    net, X, y = tokens(V=2000, n=3, T=32)
    net = net.float()
    inverter = HessianInverter("cg", 1.0, curvature="ggn", loss="cross_entropy", batch_size=2).fit(net, (X, y))
    b = torch.randn(1, inverter.n_features_in_)
    x, info = inverter.solve(b)
    assert bool(info["converged"].all())
    # A matrix-free oracle: the same product by double backward of the loss through the outputs.
    theta, f = list(net.parameters()), net(X)
    dummy = torch.zeros_like(f, requires_grad=True)
    pulled = torch.autograd.grad(f, theta, dummy, create_graph=True)
    along = sum((p * v).sum() for p, v in zip(pulled, inverter.unflatten(x).values(), strict=True))
    (Jx,) = torch.autograd.grad(along, dummy, retain_graph=True)
    free = f.detach().double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(free, y), free, create_graph=True)
    (HJx,) = torch.autograd.grad(gradient, free, Jx.double())
    back = torch.cat([g.reshape(-1) for g in torch.autograd.grad(f, theta, HJx.float())])
    assert float((back + x[0] - b[0]).norm() / b.norm()) <= 2e-5


def test_too_many_passes_for_kronecker_factors_name_the_sampled_ggn():
    net, X, y = tokens(V=120, T=48)
    with pytest.raises(ValueError, match=r"5,760 outputs.*SampledGGN\(\)"):
        HessianInverter("ekfac", 1.0, loss="cross_entropy").fit(net, (X, y))
    inverter = HessianInverter("ekfac", 1.0, curvature="sampled_ggn", loss="cross_entropy").fit(net, (X, y))
    assert bool(torch.isfinite(inverter.transform(torch.ones(1, inverter.n_features_in_, dtype=torch.float64))).all())


def test_a_dense_output_hessian_that_cannot_fit_is_told_before_it_is_made(monkeypatch):
    monkeypatch.setattr("skinvert._memory.available_memory", lambda _: 2**20)
    net, X, y = tokens(V=60, T=8)
    A = curvature(GGN, net, X, y, lambda f, y: F.cross_entropy(f, y.clamp(min=0)))
    assert bool(torch.isfinite(A.apply(torch.ones(1, A.size, dtype=torch.float64))).all())
    with pytest.raises(MemoryError, match="output Hessian of 480 outputs.*loss module"):
        next(A.factor_chunks())


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "huber", "poisson_nll"])
def test_other_losses_over_positions(loss):
    net, X, _ = pixels()
    y = torch.randint(2, (N, V, 2, 2)).double()
    A = curvature(GGN, net, X, y, loss)
    f = net(X).detach()
    J = torch.func.jacrev(lambda theta: torch.func.functional_call(net, theta, (X,)))(dict(net.named_parameters()))
    J = torch.cat([part.flatten(f.ndim).flatten(0, f.ndim - 1) for part in J.values()], dim=1)
    name = {"mse": "mse_loss", "huber": "huber_loss", "poisson_nll": "poisson_nll_loss"}.get(
        loss, "binary_cross_entropy_with_logits"
    )
    H = torch.autograd.functional.hessian(lambda flat: getattr(F, name)(flat.reshape(f.shape), y), f.reshape(-1))
    expected = J.mT @ H @ J
    assert error(A.to_dense(), expected) <= 1e-13
    assert error(A.apply(torch.eye(A.size, dtype=torch.float64)), expected) <= 1e-13


def test_a_loss_of_many_outputs_that_is_not_convex_is_refused_without_its_hessian():
    torch.manual_seed(0)
    net, X = nn.Linear(2, 300).double(), torch.randn(4, 2, dtype=torch.float64)
    # One negative direction of 300, and of a hundredth of the others' size.
    slopes = torch.ones(300, dtype=torch.float64)
    slopes[7] = -0.01
    with pytest.raises(ValueError, match="convex in the outputs.*-0.02"):
        curvature(GGN, net, X, X, lambda f, y: (slopes * (f - y.sum(1, keepdim=True)) ** 2).sum(1))
    # Confident rows: all of their second derivatives are rounding.
    with torch.no_grad():
        net.weight.mul_(1e3)
    A = curvature(GGN, net, X, net(X).argmax(1), lambda f, y: F.cross_entropy(f, y))
    assert A.size == 900
