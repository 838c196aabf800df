"""Products by a batch's recorded operations, against dense float64 oracles; and which models they serve."""

import gc
import threading
import types
import weakref

import numpy as np
import pytest
import sklearn
import torch
import torch.nn.functional as F
from oracles import Oracle, matrix_error
from problems import LOSSES, MODELS, Net, Problem, problem
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from skinvert import HessianInverter
from skinvert.curvature import products
from skinvert.curvature.base import AT_ONCE
from skinvert.curvature.tangents import Program, UnservedError, program, recorded, rules

N, CLASSES = 10, 3


class Twin(nn.Module):
    """A Linear whose weight is g v / ‖v‖, with the parameters of torch's ``weight_norm`` in its order."""

    def __init__(self, linear):
        super().__init__()
        self.bias = linear.bias
        self.g, self.v = linear.parametrizations.weight.original0, linear.parametrizations.weight.original1

    def forward(self, x):
        return F.linear(x, self.g * self.v / self.v.norm(dim=1, keepdim=True), self.bias)


def mlp(activation, width=5):
    return lambda: nn.Sequential(
        nn.Linear(4, 5), activation, nn.Linear(width, 5), activation, nn.Linear(width, CLASSES)
    )


def cnn(*middle, features):
    return lambda: nn.Sequential(*(layer() for layer in middle), nn.Tanh(), nn.Flatten(), nn.Linear(features, CLASSES))


def normed(norm, *shape):
    def build():
        layer = norm()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
        first = nn.Linear(shape[-1], 5) if len(shape) < 3 else nn.Conv2d(2, 4, 3)
        return nn.Sequential(first, layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))

    return build


def pair(forward, i=4, o=5, out=5, **modules):
    return lambda: Net(forward, a=nn.Linear(i, o), o=nn.Linear(out, CLASSES), **{k: m() for k, m in modules.items()})


def written(h):
    h[:, :2].mul_(2.0)
    return h.tanh()


def filled(h):
    whole = h.new_zeros(len(h), 6)
    whole[:, :5] = h
    return whole.tanh()


def quiet(net, x):
    with torch.no_grad():
        gate = net.b(x)
    return net.o(net.a(x).tanh() * gate)


def inner_gradient(net, x):
    x = x.detach().requires_grad_(True)
    return net.o(torch.autograd.grad(net.a(x).tanh().sum(), x, create_graph=True)[0])


IMAGE, SIGNAL, TOKENS = (2, 6, 6), (2, 6), "tokens"
SERVED = {
    **{
        f"mlp_{name}": (mlp(activation), (4,))
        for name, activation in {
            "tanh": nn.Tanh(),
            "relu": nn.ReLU(),
            "relu_inplace": nn.ReLU(inplace=True),
            "gelu": nn.GELU(),
            "gelu_tanh": nn.GELU("tanh"),
            "silu": nn.SiLU(),
            "silu_inplace": nn.SiLU(inplace=True),
            "softplus": nn.Softplus(),
            "leaky_relu": nn.LeakyReLU(),
            "leaky_relu_inplace": nn.LeakyReLU(0.1, inplace=True),
            "elu": nn.ELU(),
            "elu_inplace": nn.ELU(inplace=True),
            "mish": nn.Mish(),
            "hardswish": nn.Hardswish(),
            "relu6": nn.ReLU6(),
            "sigmoid": nn.Sigmoid(),
            "log_sigmoid": nn.LogSigmoid(),
            "softmax": nn.Softmax(1),
            "prelu": nn.PReLU(),
        }.items()
    },
    "glu": (pair(lambda net, x: net.o(F.glu(net.a(x))), o=10), (4,)),
    "conv": (cnn(lambda: nn.Conv2d(2, 3, 3), nn.ReLU, lambda: nn.Conv2d(3, 2, 2), features=18), IMAGE),
    "conv_strided": (cnn(lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), features=27), IMAGE),
    "conv_with_rest": (cnn(lambda: nn.Conv2d(2, 3, 3, stride=2), features=12), IMAGE),
    "conv_dilated": (cnn(lambda: nn.Conv2d(2, 3, 2, dilation=2, bias=False), features=48), IMAGE),
    "conv_grouped": (
        cnn(lambda: nn.Conv2d(2, 4, 3, groups=2), nn.Tanh, lambda: nn.Conv2d(4, 8, 2, groups=4), features=72),
        IMAGE,
    ),
    "conv_circular": (cnn(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), features=108), IMAGE),
    "conv1d": (cnn(lambda: nn.Conv1d(2, 3, 2, stride=2), lambda: nn.MaxPool1d(2), features=3), SIGNAL),
    "conv3d": (cnn(lambda: nn.Conv3d(1, 2, 2), features=16), (1, 3, 3, 3)),
    "transposed": (
        cnn(
            lambda: nn.Conv2d(2, 3, 3, stride=2),
            nn.Tanh,
            lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1),
            features=72,
        ),
        IMAGE,
    ),
    "transposed_grouped": (
        cnn(lambda: nn.ConvTranspose1d(2, 4, 3, groups=2), nn.Tanh, lambda: nn.Conv1d(4, 2, 2), features=14),
        SIGNAL,
    ),
    "max_pool": (cnn(lambda: nn.Conv2d(2, 3, 3, padding=1), lambda: nn.MaxPool2d(2), features=27), IMAGE),
    "max_pool_overlapping": (
        cnn(lambda: nn.Conv2d(2, 3, 3, padding=1), lambda: nn.MaxPool2d(3, 2, 1), features=27),
        IMAGE,
    ),
    "avg_pool": (cnn(lambda: nn.Conv2d(2, 3, 3, padding=1), lambda: nn.AvgPool2d(2), features=27), IMAGE),
    "avg_pool1d": (cnn(lambda: nn.Conv1d(2, 3, 3), lambda: nn.AvgPool1d(2), features=6), SIGNAL),
    "adaptive_pool": (cnn(lambda: nn.Conv2d(2, 3, 2), lambda: nn.AdaptiveAvgPool2d(2), features=12), IMAGE),
    "global_pool": (cnn(lambda: nn.Conv2d(2, 3, 3), lambda: nn.AdaptiveAvgPool2d(1), features=3), IMAGE),
    "adaptive_max": (cnn(lambda: nn.Conv2d(2, 3, 2), lambda: nn.AdaptiveMaxPool2d(2), features=12), IMAGE),
    "upsample": (
        cnn(lambda: nn.Conv2d(2, 3, 4), lambda: nn.Upsample(scale_factor=2, mode="bilinear"), features=108),
        IMAGE,
    ),
    "pixel_shuffle": (cnn(lambda: nn.Conv2d(2, 4, 3), lambda: nn.PixelShuffle(2), features=64), IMAGE),
    "batch_norm": (normed(lambda: nn.BatchNorm1d(5), 4), (4,)),
    "batch_norm2d": (normed(lambda: nn.BatchNorm2d(4), *IMAGE), IMAGE),
    "batch_norm_plain": (normed(lambda: nn.BatchNorm2d(4, affine=False), *IMAGE), IMAGE),
    "instance_norm": (normed(lambda: nn.InstanceNorm2d(4, affine=True), *IMAGE), IMAGE),
    "layer_norm": (normed(lambda: nn.LayerNorm(5), 4), (4,)),
    "layer_norm_of_tokens": (normed(lambda: nn.LayerNorm(5), 3, 4), (3, 4)),
    "layer_norm_of_images": (normed(lambda: nn.LayerNorm((4, 4)), *IMAGE), IMAGE),
    "layer_norm_no_bias": (normed(lambda: nn.LayerNorm(5, bias=False), 4), (4,)),
    "layer_norm_plain": (normed(lambda: nn.LayerNorm(5, elementwise_affine=False), 4), (4,)),
    "group_norm": (normed(lambda: nn.GroupNorm(2, 4), *IMAGE), IMAGE),
    "group_norm_plain": (normed(lambda: nn.GroupNorm(4, 4, affine=False), *IMAGE), IMAGE),
    "rms_norm": (normed(lambda: nn.RMSNorm(5), 4), (4,)),
    "embedding": (pair(lambda net, x: net.o(net.a(net.e(x).mean(1)).tanh()), e=lambda: nn.Embedding(7, 4)), TOKENS),
    "embedding_padded": (
        pair(lambda net, x: net.o(net.a(net.e(x)).tanh().mean(1)), e=lambda: nn.Embedding(7, 4, padding_idx=2)),
        TOKENS,
    ),
    "positions": (
        pair(lambda net, x: net.o((net.a(x) + net.e(torch.arange(3))).tanh().mean(1)), e=lambda: nn.Embedding(3, 5)),
        (3, 4),
    ),
    "attention": (
        pair(
            lambda net, x: net.o(net.a(net.m(x, x, x)[0]).tanh().mean(1)),
            m=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        (3, 4),
    ),
    "causal": (
        pair(
            lambda net, x: net.o(
                F.scaled_dot_product_attention(net.a(x), net.b(x), net.a(x).sin(), is_causal=True)[:, 1]
            ),
            b=lambda: nn.Linear(4, 5),
        ),
        (3, 4),
    ),
    "transformer": (
        pair(
            lambda net, x: net.o(net.a(net.t(x)).mean(1)),
            t=lambda: nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True),
        ),
        (3, 4),
    ),
    "transformer_norm_first": (
        pair(
            lambda net, x: net.o(net.a(net.t(x))[:, 0]),
            t=lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True),
        ),
        (3, 4),
    ),
    "lstm": (pair(lambda net, x: net.o(net.a(net.r(x)[0][:, -1])), r=lambda: nn.LSTM(2, 4, batch_first=True)), (3, 2)),
    "gru": (pair(lambda net, x: net.o(net.a(net.r(x)[0][:, -1])), r=lambda: nn.GRU(2, 4, batch_first=True)), (3, 2)),
    "residual": (pair(lambda net, x: net.o(x + net.b(net.a(x).tanh())), b=lambda: nn.Linear(5, 4), out=4), (4,)),
    "residual_inplace": (pair(lambda net, x: net.o(net.a(x).sin().add_(x)), o=4, out=4), (4,)),
    "twice": (pair(lambda net, x: net.o(net.a(net.a(x).tanh()).tanh()), o=4, out=4), (4,)),
    "weight_used_again": (pair(lambda net, x: net.o(net.a(F.linear(net.a(x).tanh(), net.a.weight.mT)).tanh())), (4,)),
    "no_grad_branch": (pair(quiet, b=lambda: nn.Linear(4, 5).requires_grad_(False)), (4,)),
    "detached_constant": (
        pair(lambda net, x: net.o((lambda h: (h - h.detach().amax(1, keepdim=True)).softmax(1))(net.a(x)))),
        (4,),
    ),
    "masked": (pair(lambda net, x: net.o(net.a(x).masked_fill_(x[:, :1] > 0, 0.5).tanh())), (4,)),
    "where": (pair(lambda net, x: net.o((lambda h: torch.where(h > 0, h.sin(), h.exp()))(net.a(x)))), (4,)),
    "chunks": (pair(lambda net, x: net.o((lambda p: p[0] * p[1].sigmoid())(net.a(x).chunk(2, 1))), o=10), (4,)),
    "stack": (pair(lambda net, x: net.o(torch.stack([net.a(x), net.a(x).sin()]).amax(0))), (4,)),
    "index": (pair(lambda net, x: net.o(net.a(x)[:, [0, 2, 2, 4, 1]].tanh())), (4,)),
    "sorted": (pair(lambda net, x: net.o(net.a(x).tanh().sort(1)[0].cumsum(1))), (4,)),
    "normalised": (pair(lambda net, x: net.o(F.normalize(net.a(x), dim=1))), (4,)),
    "standardised": (
        pair(lambda net, x: net.o((lambda h: (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True))(net.a(x)))),
        (4,),
    ),
    "logsumexp": (pair(lambda net, x: net.o(net.a(x).logsumexp(1, keepdim=True)), out=1), (4,)),
    "einsum": (pair(lambda net, x: net.o(torch.einsum("bi,bj->bij", net.a(x), x).flatten(1).tanh()), out=20), (4,)),
    "heads": (
        pair(
            lambda net, x: net.o((lambda h: (h @ h.mT).tanh())(net.a(x).unflatten(2, (2, 2)).mT).flatten(1)),
            o=4,
            out=12,
        ),
        (3, 4),
    ),
    "bilinear": (pair(lambda net, x: net.o(net.b(x, net.a(x)).tanh()), b=lambda: nn.Bilinear(4, 5, 5)), (4,)),
    "vmapped": (pair(lambda net, x: net.o(torch.vmap(lambda row: net.a(row).tanh())(x))), (4,)),
    "inner_gradient": (pair(inner_gradient, out=4), (4,)),
    "checkpointed": (
        pair(lambda net, x: net.o(checkpoint(lambda v: net.a(v).tanh(), x, use_reentrant=False))),
        (4,),
    ),
}
# Right too, by the graph: what writes into a view of another tensor, and complex numbers.
UNSERVED = {
    "view_written": (pair(lambda net, x: net.o(written(net.a(x)))), (4,)),
    "view_in_place": (pair(lambda net, x: net.o(F.relu_(net.a(x).view(-1, 5)))), (4,)),
    "filled": (pair(lambda net, x: net.o(filled(net.a(x))), out=6), (4,)),
    "fourier": (pair(lambda net, x: net.o(torch.fft.fft(net.a(x)).abs())), (4,)),
}


def drawn(shape, m):
    return torch.randint(7, (m, 3)) if shape == TOKENS else torch.randn(m, *shape, dtype=torch.float64)


def case_of(build, shape, m=N, batch_size=4):
    module, X = build().double().eval(), drawn(shape, m)
    # Lazy layers see their input.
    module(X[:1])
    y = torch.randint(CLASSES, (m,))
    return Problem("", module, "cross_entropy", F.cross_entropy, None, X, y, batch_size=batch_size)


def curvature_of(case, name):
    return HessianInverter("cg", 0.1, curvature=name, **case.settings()).fit(case.module, case.data).curvature_


def rows(k, p):
    return torch.from_numpy(np.random.default_rng(0).standard_normal((k, p)))


def is_recorded(A):
    """Whether the shares for products with many rows hold nothing but what was recorded."""
    return [isinstance(share, products.Share) and share.alone for share in A._graphs[True].shares]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["hessian", "ggn"])
@pytest.mark.parametrize("model", [*SERVED, *UNSERVED])
def test_products_of_many_rows(model, name):
    case = case_of(*{**SERVED, **UNSERVED}[model])
    A = curvature_of(case, name)
    V = rows((32, 33, 100)[len(model) % 3], A.size)
    expected = V.numpy() @ Oracle(case).curvature(name)
    assert matrix_error(A.apply(V), expected) <= 1e-11
    # As they come: the same program with another number of rows, one of them alone.
    for k in (1, 2, 31):
        assert matrix_error(A.apply(V[:k]), expected[:k]) <= 1e-11
    assert is_recorded(A) == [model in SERVED] * 3


# Between a convolution and units that are off, whose slope is zero for the whole batch.
MOVING = {
    "reflection": lambda: nn.ReflectionPad2d(1),
    "upsample": lambda: nn.Upsample(scale_factor=2),
    "avg_pool": lambda: nn.AvgPool2d(2),
    "max_pool": lambda: nn.MaxPool2d(2),
    "convolution": lambda: nn.Conv2d(2, 3, 2),
    "group_norm": lambda: nn.GroupNorm(1, 2),
}


@pytest.mark.parametrize("name", ["hessian", "ggn"])
@pytest.mark.parametrize("layer", MOVING)
def test_a_batch_in_which_all_units_are_off(layer, name):
    first = [nn.Conv2d(1, 2, 2), MOVING[layer]()]
    off = first[-1] if layer in ("convolution", "group_norm") else first[0]
    nn.init.constant_(off.bias, -50.0)
    case = case_of(lambda: nn.Sequential(*first, nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES)), (1, 6, 6))
    A = curvature_of(case, name)
    expected = Oracle(case).curvature(name)
    assert np.linalg.norm(expected) > 0
    assert matrix_error(A.apply(rows(33, A.size)), rows(33, A.size).numpy() @ expected) <= 1e-11


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_weight_norm(name):
    """Against the same written out: the fused kernel's own second derivative is wrong."""
    net = nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    case = case_of(lambda: net, (4,))
    A, V = curvature_of(case, name), rows(32, 48)
    case.module = nn.Sequential(Twin(net[0]), *net[1:])
    assert matrix_error(A.apply(V), V.numpy() @ Oracle(case).curvature(name)) <= 1e-11
    assert is_recorded(A) == [True] * 3


@pytest.mark.filterwarnings("ignore:The GGN at outputs that are log-probabilities is zero:UserWarning")
@pytest.mark.parametrize("name", ["hessian", "ggn"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", ["mlp", "sequence"])
def test_losses(model, loss, name):
    case = problem(model, loss, weight_decay=0.1, weighted=True)
    A = curvature_of(case, name) if case.counts is None else weighted(case, name)
    V = rows(32, A.size)
    assert matrix_error(A.apply(V), V.numpy() @ Oracle(case).curvature(name)) <= 1e-11
    # The GGN of a loss without a closed form keeps a graph of it.
    assert name == "ggn" or all(is_recorded(A))


def weighted(case, name):
    inverter = HessianInverter("cg", 0.1, curvature=name, **case.settings())
    return inverter.fit(case.module, case.data, sample_weight=case.sample_weight).curvature_


@pytest.mark.parametrize("name", ["hessian", "ggn"])
@pytest.mark.parametrize("model", MODELS)
def test_models_of_the_table(model, name):
    case = problem(model, "class_weights", weighted=True)
    A = weighted(case, name)
    V = rows(33, A.size)
    assert matrix_error(A.apply(V), V.numpy() @ Oracle(case).curvature(name)) <= 1e-11
    assert all(is_recorded(A))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["hessian", "ggn"])
@pytest.mark.parametrize("model", ["mlp_tanh", "conv_grouped", "layer_norm_of_tokens", "group_norm", "attention"])
@pytest.mark.parametrize("m", [1, 2, CLASSES, 5, 32, "p"])
def test_axes_of_equal_length(model, m, name):
    """As many samples as classes, features, rows or parameters: no axis is told by its length."""
    p = case_of(*SERVED[model]).p
    case = case_of(*SERVED[model], m=p if m == "p" else m, batch_size=None)
    A, V = curvature_of(case, name), rows(32, p)
    assert matrix_error(A.apply(V), V.numpy() @ Oracle(case).curvature(name)) <= 1e-11
    assert all(is_recorded(A))


@pytest.mark.parametrize("name", ["hessian", "ggn"])
@pytest.mark.parametrize("chunk", [1, 2000, 4000])
def test_chunks_of_rows(chunk, name, monkeypatch):
    monkeypatch.setattr(program, "CHUNK", chunk)
    monkeypatch.setattr(products, "PLENTY", 0)
    case = case_of(*SERVED["conv"])
    A, V = curvature_of(case, name), rows(33, case.p)
    assert matrix_error(A.apply(V), V.numpy() @ Oracle(case).curvature(name)) <= 1e-11
    assert all(is_recorded(A))


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_what_is_slower_by_the_clock_goes_by_the_graph(name, monkeypatch):
    monkeypatch.setattr(program, "CHUNK", 1)
    seconds = iter(range(100, 0, -1))
    # The program's, then the graph's.
    monkeypatch.setattr(products, "_seconds", lambda *_: next(seconds))
    case = case_of(*SERVED["conv"])
    A, V = curvature_of(case, name), rows(33, case.p)
    assert matrix_error(A.apply(V), V.numpy() @ Oracle(case).curvature(name)) <= 1e-11
    assert is_recorded(A) == [False] * 3


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_the_number_of_rows_alone_decides_how(name):
    """The same call gives the same digits, whatever came before."""
    case = case_of(*SERVED["mlp_tanh"])
    A, V = curvature_of(case, name), rows(AT_ONCE, case.p)
    A._graphs = None
    few = A.apply(V[:3])
    assert list(A._graphs) == [False]
    many = A.apply(V)
    assert is_recorded(A) == [True] * 3
    assert torch.equal(A.apply(V[:3]), few) and torch.equal(A.apply(V), many)
    assert matrix_error(many, V.numpy() @ Oracle(case).curvature(name)) <= 1e-11
    # Of a minibatch there is one product.
    part = A.minibatch(torch.arange(6))
    part.apply(V)
    assert list(part._graphs) == [False]


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_nothing_kept_without_memory(name):
    import sklearn

    case = case_of(*SERVED["mlp_tanh"])
    with sklearn.config_context(working_memory=0):
        A, V = curvature_of(case, name), rows(33, case.p)
        A._graphs = None
        assert matrix_error(A.apply(V), V.numpy() @ Oracle(case).curvature(name)) <= 1e-11
        assert A._graphs is None


class Box:
    """A tensor that autograd has saved."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("name", ["hessian", "ggn"])
@pytest.mark.parametrize("model", ["mlp_relu_inplace", "conv_grouped", "batch_norm2d", "layer_norm", "transformer"])
def test_no_graph_is_held(model, name):
    """Of the first batch, whose graph is measured, nor of the others."""
    boxes = []

    def pack(tensor):
        # Itself, it would hold the graph that holds it.
        box = Box(tensor.detach())
        boxes.append(weakref.ref(box))
        return box

    case = case_of(*SERVED[model])
    A = curvature_of(case, name)
    A._graphs = None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        A.apply(rows(32, case.p))
    gc.collect()
    assert len(boxes) > 10 and all(is_recorded(A))
    assert not [box for box in boxes if box() is not None]


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_no_activation_outlives_its_graph(name):
    """After fit and products of many rows; hooks that gave autograd its own tensors back would hold them for ever."""
    seen = []

    def noted(net, x):
        h = net.a(x).tanh()
        seen.append(weakref.ref(h))
        return net.o(h)

    case = case_of(pair(noted), (4,))
    A = curvature_of(case, name)
    A._graphs = None
    A.apply(rows(32, case.p))
    assert all(is_recorded(A))
    gc.collect()
    assert not [one for one in seen if one() is not None]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("model", SERVED)
def test_bytes_held(model):
    """All tensors that the steps can reach are counted, save those of parameters and of shapes alone."""
    case = case_of(*SERVED[model])
    A = curvature_of(case, "hessian")
    A.apply(rows(32, case.p))
    own = {t.untyped_storage().data_ptr() for t in (*A.objective.model.theta, *A.objective.model.module.buffers())}
    for share in A._graphs[True].shares:
        held = {storage.data_ptr(): storage.nbytes() for storage in reachable(share.products.steps)}
        assert sum(size for place, size in held.items() if place not in own) <= share.nbytes


def reachable(start):
    """Yield the storages that functions, their closures and containers hold."""
    found, seen = [start], set()
    while found:
        one = found.pop()
        if id(one) in seen or isinstance(one, type) or type(one).__name__ in ("module", "OpOverload"):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            if one.device.type != "meta":
                yield one.untyped_storage()
        elif isinstance(one, types.FunctionType):
            found += [cell.cell_contents for cell in one.__closure__ or ()]
        else:
            found += gc.get_referents(one)


def test_hooks_of_the_users():
    """Saved tensors come back as others: a weight as another leaf."""
    case = case_of(*SERVED["layer_norm"])
    with torch.autograd.graph.save_on_cpu():
        A, V = curvature_of(case, "hessian"), rows(32, case.p)
        assert matrix_error(A.apply(V), V.numpy() @ Oracle(case).hessian()) <= 1e-11
    assert all(is_recorded(A))


def test_two_threads():
    """One fitted curvature, from its first products on."""
    case = case_of(*SERVED["logsumexp"])
    expected = Oracle(case).hessian()
    A, V, errors = curvature_of(case, "hessian"), rows(64, case.p), []
    A._graphs = None

    def work(j):
        for _ in range(5):
            errors.append(matrix_error(A.apply(V[32 * j : 32 * j + 32]), V[32 * j : 32 * j + 32].numpy() @ expected))

    threads = [threading.Thread(target=work, args=(j,)) for j in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 10 and max(errors) <= 1e-11


def test_a_model_that_bears_no_recording():
    """Its own error under a dispatch mode, and none without."""

    def fussy(net, x):
        h = net.a(x)
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise ZeroDivisionError
        return net.o(h.tanh())

    case = case_of(*(pair(fussy), (4,)))
    A, V = curvature_of(case, "hessian"), rows(32, case.p)
    assert matrix_error(A.apply(V), V.numpy() @ Oracle(case).hessian()) <= 1e-11
    assert is_recorded(A) == [False] * 3


def test_what_has_no_rule_changes_no_tensor():
    x = torch.rand(5, requires_grad=True)
    kept = x.detach().clone()

    def compute():
        h = x * 1
        return h.exp_()

    record, y = recorded(compute)
    with pytest.raises(UnservedError, match="exp_"):
        Program(record, [x], y)
    torch.testing.assert_close(x.detach(), kept)
    torch.testing.assert_close(y.detach(), kept.exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_rule_is_not_used(dtype, monkeypatch):
    """Products are held against autograd's, part by part: an error in a small part of them shows."""

    def wrong(call, live):
        push = rules._pointwise(call, live)
        return rules.Push(lambda *t: 1.01 * push.along(*t), push.used, push.live, push.held)

    case = case_of(
        lambda: Net(
            lambda net, x: net.o(x) + 1e-4 * net.c(net.a(x).tanh()),
            a=nn.Linear(4, 5),
            c=nn.Linear(5, CLASSES),
            o=nn.Linear(4, CLASSES),
        ),
        (4,),
    )
    case.module, case.X = case.module.to(dtype), case.X.to(dtype)
    monkeypatch.setitem(rules._rules, torch.ops.aten.tanh.default, wrong)
    A = curvature_of(case, "hessian")
    A.apply(rows(32, case.p).to(dtype))
    assert is_recorded(A) == [False] * 3


@pytest.mark.parametrize("k", [2, 33])
@pytest.mark.parametrize("memory", [0, 1024])
def test_the_empirical_fisher_beyond_the_memory_of_its_factor(k, memory, monkeypatch):
    """By its losses, along and back: with weights, of few rows and of many, kept and streamed."""
    import sklearn

    case = problem("mlp", "cross_entropy", 0.1, True)
    with sklearn.config_context(working_memory=memory):
        inverter = HessianInverter("cg", 1.0, curvature="empirical_fisher", **case.settings())
        A = inverter.fit(case.module, case.data, sample_weight=case.sample_weight).curvature_
        V = rows(k, case.p)
        # Of the factor alone.
        monkeypatch.setattr("skinvert.curvature.factored.working_memory", lambda: 0)
        found = A.apply(V)
    assert A._factor is None
    assert matrix_error(found, V.numpy() @ Oracle(case).curvature("empirical_fisher")) <= 1e-11


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
def test_a_batch_that_is_recorded_anew_is_held_against_autograd_once(curvature, monkeypatch):
    torch.manual_seed(0)
    net, X, y = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(40, 6), torch.arange(40) % 3
    held, original = [], products._agree

    def watched(found, wanted):
        held.append(len(found))
        return original(found, wanted)

    monkeypatch.setattr(products, "_agree", watched)
    settings = {"curvature": curvature, "loss": "cross_entropy", "batch_size": 10}
    whole = HessianInverter("cg", 1.0, **settings).fit(net, (X, y)).curvature_
    V = torch.randn(12, whole.size)
    expected = whole.apply(V)
    with sklearn.config_context(working_memory=2e-3):
        A = HessianInverter("cg", 1.0, **settings).fit(net, (X, y)).curvature_
        held.clear()
        for _ in range(3):
            torch.testing.assert_close(A.apply(V), expected)
        assert A._graphs is None
        # Of four batches, each by one recording or by two.
        assert len(held) == 4 * (1 if curvature == "hessian" else 2)
        # By other parameters it is another recording.
        part = A._over(A.objective.restricted(["0.weight"]))
        held.clear()
        part.apply(V[:, :30])
        assert held


def test_a_result_without_a_tangent_is_zero():
    # The kernel and the input have tangents, what comes back has none: the derivative by the bias has none either, and
    # is read all the same.
    torch.manual_seed(0)
    x, weight = torch.randn(2, 1, 5, 5).double(), torch.randn(3, 1, 3, 3).double().requires_grad_(True)
    bias = torch.zeros(3).double().requires_grad_(True)

    def compute():
        y = torch.nn.functional.conv2d(x, weight, bias)
        by_weight, by_bias = torch.autograd.grad(y, [weight, bias], torch.ones_like(y), create_graph=True)
        return (y.square().sum() + (by_weight * weight).sum() + (by_bias * 2.0).sum() * weight.sum()).reshape(1)

    record, value = recorded(compute)
    V = torch.eye(weight.numel()).double()
    found = Program(record, [weight], value)(V)
    (expected,) = torch.autograd.grad(value, weight)
    assert torch.allclose(found[:, 0], expected.reshape(-1), rtol=1e-12)
