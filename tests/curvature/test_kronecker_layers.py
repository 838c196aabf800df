"""Kinds of layers and of calls in (E)KFAC: against twins of plain layers, and the exact diagonal in each eigenbasis."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import sklearn
import torch
import torch.nn.functional as F
from kronecker_oracles import Conv1D, KroneckerOracle
from oracles import Oracle
from torch import nn

from skinvert import HessianInverter, SampledFisher, load
from skinvert.methods import EKFAC, KFAC

METHODS = {"kfac": KFAC, "ekfac": EKFAC}
N, T, E = 7, 4, 6


def double(net, seed=0):
    """The net in double precision, all its parameters random: norms start at one and zero."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return net


def fitted(net, X, y, method="ekfac", **settings):
    settings = {"loss": "cross_entropy", "batch_size": 3, **settings}
    return HessianInverter(method, 0.1, **settings).fit(net, (X, y))


def dense(inverter):
    return inverter.inverse_.operator.to_dense().numpy() - 0.1 * np.eye(inverter.n_features_in_)


def assert_close(received, expected, tolerance=1e-9):
    assert np.linalg.norm(received - expected) <= tolerance * np.linalg.norm(expected)


class Problem:
    """What the dense oracle takes: a classification with the mean cross-entropy."""

    weight_decay, counts = 0.0, None

    def __init__(self, module, X, y):
        self.module, self.X, self.y = module, X, y
        self.whole, self.summed = F.cross_entropy, lambda f, y: F.cross_entropy(f, y, reduction="sum")


def check_exact_diagonals(net, X, y):
    """EKFAC's eigenvalues are the diagonal of the exact GGN in each eigenbasis; those of norms are it as they are."""
    H = torch.from_numpy(Oracle(Problem(net, X, y)).ggn())
    factors = fitted(net, X, y).curvature_.kronecker_factors()
    bases = [block.decompose()[0] for block in factors.blocks]
    for block, basis, received in zip(factors.blocks, bases, factors.refit(bases), strict=True):
        right = torch.eye(block.index.shape[1], dtype=torch.float64) if basis.right is None else basis.right
        Q = torch.kron(basis.left.contiguous(), right.contiguous())
        index = block.index.reshape(-1)
        assert_close(received.reshape(-1).numpy(), (Q.mT @ H[index[:, None], index] @ Q).diagonal().numpy())
    if len(factors.rest):
        assert_close(factors.rest_diagonal.numpy(), H.diagonal()[factors.rest].numpy())
    return factors


# -- transformers ------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, batch_first, positions=None, mask=False):
        super().__init__()
        self.batch_first, self.mask = batch_first, mask
        self.tokens = nn.Embedding(9, E)
        self.positions = nn.Embedding(8, E) if positions else None
        self.kind = positions
        layer = nn.TransformerEncoderLayer(E, 2, 5, dropout=0.3, batch_first=batch_first, norm_first=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.encoder = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(E))
        self.head = nn.Linear(E, 3)

    def forward(self, x):
        h = self.tokens(x)
        if self.positions is not None:
            places = torch.arange(x.shape[1])
            h = h + self.positions(places[None] if self.kind == "row" else places)
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=h.dtype) if self.mask else None
        if self.batch_first:
            return self.head(self.encoder(h, mask=causal).mean(1))
        return self.head(self.encoder(h.transpose(0, 1), mask=causal)[-1])


class RMSNorm(nn.Module):
    """As in Gemma: the scale is 1 + w."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class GPT(nn.Module):
    """A block as in GPT-2, with the linear layer of transformers, positions (1, T), and a bare causal attention."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(5, E), nn.Embedding(8, E)
        self.ln_1, self.ln_2, self.ln_f = nn.LayerNorm(E), RMSNorm(E), nn.RMSNorm(E)
        self.c_attn, self.c_proj = Conv1D(3 * E, E), Conv1D(E, E)
        self.c_fc, self.c_out = Conv1D(8, E), Conv1D(E, 8)
        self.lm_head = nn.Linear(E, 5, bias=False)

    def forward(self, x):
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1])[None])
        q, k, v = (one.unflatten(2, (2, -1)).transpose(1, 2) for one in self.c_attn(self.ln_1(h)).split(E, 2))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.c_proj(seen.transpose(1, 2).flatten(2))
        h = h + self.c_out(F.gelu(self.c_fc(self.ln_2(h))))
        return self.lm_head(self.ln_f(h))[:, -1]


def tokens(m=N, length=T, vocabulary=5, classes=3):
    generator = torch.Generator().manual_seed(1)
    X = torch.randint(vocabulary, (m, length), generator=generator)
    return X, torch.randint(classes, (m,), generator=generator)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Encoder(True),
        lambda: Encoder(False),
        lambda: Encoder(True, "row", mask=True),
        lambda: Encoder(True, "axis"),
        GPT,
    ],
    ids=["batch first", "time first", "positions (1, T)", "positions (T,)", "gpt"],
)
def test_a_small_transformer_needs_no_params(build):
    net = double(build())
    factors = check_exact_diagonals(net, *tokens())
    norms = [m for m in net.modules() if type(m).__name__.endswith("Norm")]
    assert len(factors.rest) == sum(q.numel() for m in norms for q in m.parameters())


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("m", [1, 2, 8])
def test_samples_are_found_whatever_the_lengths(approx, m):
    # As many samples as rows each: time first and batch first are the same model.
    net, (X, y) = double(Encoder(False)), tokens(m, m)
    settings = Encoder(True).double()
    settings.load_state_dict(net.state_dict())
    received, expected = (dense(fitted(one, X, y, KFAC(approx=approx), batch_size=8)) for one in (net, Last(settings)))
    assert_close(received, expected)


class Last(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.tokens, self.encoder, self.head = net.tokens, net.encoder, net.head

    def forward(self, x):
        return self.head(self.encoder(self.tokens(x))[:, -1])


# -- attention ---------------------------------------------------------------------------------------------------------


class Attending(nn.Module):
    """Keys and values of one sequence, queries of another."""

    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2, **settings)
        self.head = nn.Linear(E, 3)

    def sides(self, x):
        a = self.attention
        q, k, v = x[:, :2, :E], x[..., : a.kdim], x[..., : a.vdim].tanh()
        return (q, k, v) if a.batch_first else tuple(one.transpose(0, 1) for one in (q, k, v))

    def forward(self, x):
        padding = x[..., 0] > 1
        padding[:, 0] = False
        seen = self.attention(*self.sides(x), key_padding_mask=padding, need_weights=False)[0]
        return self.head(seen.mean(1 if self.attention.batch_first else 0))


class Twin(nn.Module):
    """The same of four ``Linear`` layers and a softmax."""

    def __init__(self, net):
        super().__init__()
        a = net.attention
        self.net, self.heads = [net], a.num_heads
        weights = (
            a.in_proj_weight.chunk(3) if a.kdim == a.vdim == E else [getattr(a, f"{c}_proj_weight") for c in "qkv"]
        )
        biases = [None] * 3 if a.in_proj_bias is None else a.in_proj_bias.chunk(3)
        self.projections = nn.ModuleList(linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out, self.head = linear(a.out_proj.weight, a.out_proj.bias), copy.deepcopy(net.head)

    def forward(self, x):
        a = self.net[0].attention
        padding = x[..., 0] > 1
        padding[:, 0] = False
        sides = self.net[0].sides(x)
        sides = sides if a.batch_first else [one.transpose(0, 1) for one in sides]
        q, k, v = (
            layer(one).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, one in zip(self.projections, sides, strict=True)
        )
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
        if a.add_zero_attn:
            scores = torch.cat((scores, torch.zeros_like(scores[..., :1])), -1)
            v = torch.cat((v, torch.zeros_like(v[:, :, :1])), 2)
        return self.head(self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)).mean(1))


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def order_of(net, twin):
    """Where the parameters of the attention lie in a flat row of its twin."""
    start, places = 0, {}
    for name, parameter in twin.named_parameters():
        places[name] = start + np.arange(parameter.numel())
        start += parameter.numel()
    packed = {
        "attention.in_proj_weight": [f"projections.{j}.weight" for j in range(3)],
        "attention.in_proj_bias": [f"projections.{j}.bias" for j in range(3)],
        "attention.out_proj.weight": ["out.weight"],
        "attention.out_proj.bias": ["out.bias"],
        **{f"attention.{part}_proj_weight": [f"projections.{j}.weight"] for j, part in enumerate("qkv")},
    }
    return np.concatenate([places[one] for name, _ in net.named_parameters() for one in packed.get(name, [name])])


ATTENTIONS = {
    "batch first": {"batch_first": True},
    "time first": {},
    "no bias": {"bias": False},
    "zero row": {"add_zero_attn": True, "batch_first": True},
    "other sizes": {"kdim": 3, "vdim": 2, "batch_first": True},
}


@pytest.mark.parametrize("settings", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize(("method", "curvature"), [("kfac", "empirical_fisher"), ("ekfac", "ggn")])
def test_an_attention_is_its_four_linear_layers(settings, method, curvature):
    torch.manual_seed(0)
    net = double(Attending(**settings))
    X, y = torch.randn(N, T, E, dtype=torch.float64), torch.randint(3, (N,))
    twin = Twin(net)
    torch.testing.assert_close(net.eval()(X), twin(X))
    order = order_of(net, twin)
    received, expected = (dense(fitted(one, X, y, method, curvature=curvature)) for one in (net, twin))
    assert_close(received, expected[np.ix_(order, order)])
    assert "forward" not in net.attention.__dict__


@pytest.mark.parametrize("params", ["*in_proj_bias", "*in_proj_weight", "*out_proj*", "head*"])
def test_a_part_of_an_attention(params):
    torch.manual_seed(0)
    net = double(Attending(batch_first=True))
    X, y = torch.randn(N, T, E, dtype=torch.float64), torch.randint(3, (N,))
    inverter = fitted(net, X, y, "kfac", params=params)
    twin = Twin(net)
    chosen = {"*in_proj_bias": "projections*bias", "*in_proj_weight": "projections*weight", "*out_proj*": "out*"}
    assert_close(dense(inverter), dense(fitted(twin, X, y, "kfac", params=chosen.get(params, params))))


def test_an_attentions_own_rows_are_named():
    net = double(Attending(add_bias_kv=True, batch_first=True))
    X, y = torch.randn(N, T, E, dtype=torch.float64), torch.randint(3, (N,))
    with pytest.raises(ValueError, match="attention.bias_k .an attention's own row") as error:
        fitted(net, X, y)
    assert "out_proj" not in str(error.value)


def test_an_attention_with_a_forward_of_its_own_is_named():
    class Other(nn.MultiheadAttention):
        pass

    net = double(Attending(batch_first=True))
    net.attention = Other(E, 2, batch_first=True).double()
    X, y = torch.randn(N, T, E, dtype=torch.float64), torch.randint(3, (N,))
    with pytest.raises(ValueError, match="a Other"):
        fitted(net, X, y)


# -- norms -------------------------------------------------------------------------------------------------------------


class LayerNorm2d(nn.LayerNorm):
    """As in ConvNeXt: over the channels, which come second."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


NORMS = {
    "layer": (lambda: nn.LayerNorm((4, 3)), (4, 3)),
    "layer, rows": (lambda: nn.LayerNorm(3), (4, 3)),
    "layer, no bias": (lambda: nn.LayerNorm(3, bias=False), (4, 3)),
    "rms": (lambda: nn.RMSNorm(3), (4, 3)),
    "one plus": (lambda: RMSNorm(3), (4, 3)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "instance": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 3)),
    "batch": (lambda: nn.BatchNorm1d(4), (4, 3)),
    "batch, flat": (lambda: nn.BatchNorm1d(12), (12,)),
    "channels": (lambda: LayerNorm2d(4), (4, 3, 1)),
    "batch, 2d": (lambda: nn.BatchNorm2d(2), (2, 2, 3)),
    # In training it takes GPUs alone.
    "batch, of processes": (lambda: nn.SyncBatchNorm(2).eval(), (2, 2, 3)),
}


@pytest.mark.parametrize(("norm", "shape"), NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_norms_have_their_exact_diagonal(norm, shape, method):
    torch.manual_seed(0)
    net = double(nn.Sequential(norm(), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)))
    X, y = torch.randn(N, *shape, dtype=torch.float64), torch.randint(3, (N,))
    net(X)
    q = sum(one.numel() for one in net[0].parameters())
    expected = np.diag(Oracle(Problem(net, X, y)).ggn())[:q] + 0.3
    received = dense(fitted(net, X, y, method, weight_decay=0.3))
    assert_close(received[:q, :q], np.diag(expected))
    assert not received[:q, q:].any()


# -- calls -------------------------------------------------------------------------------------------------------------


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.fc(self.norm(self.fc(x)).tanh())).tanh())


class Folded(nn.Module):
    """Rows of samples on one axis, sample by sample."""

    def __init__(self, order="samples first"):
        super().__init__()
        self.fc, self.norm, self.head, self.order = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), order

    def forward(self, x):
        m = len(x)
        if self.order == "time first":
            return self.head(self.norm(self.fc(x.transpose(0, 1).flatten(0, 1))).tanh().unflatten(0, (-1, m)).mean(0))
        return self.head(self.norm(self.fc(x.flatten(0, 1))).tanh().unflatten(0, (m, -1)).mean(1))


def rows(seed=0):
    torch.manual_seed(seed)
    return torch.randn(N, T, 4, dtype=torch.float64), torch.randint(3, (N,))


def test_a_layer_called_twice_sees_the_rows_of_both_calls():
    net = double(Repeated())
    X, y = rows()
    check_exact_diagonals(net, X[:, 0], y)
    factors = fitted(net, X[:, 0], y).curvature_.kronecker_factors()
    # A by hand: both inputs of each sample, with the bias's coordinate.
    x = X[:, 0]
    second = net.norm(net.fc(x)).tanh()
    a = torch.cat([torch.cat((one, torch.ones(N, 1)), 1) for one in (x, second)])
    assert_close(factors.blocks[0].right.numpy(), (a.mT @ a / N).detach().numpy())


def test_samples_folded_with_their_rows():
    net = double(Folded())
    factors = check_exact_diagonals(net, *rows())
    X, y = rows()
    a = torch.cat((X.flatten(0, 1), torch.ones(N * T, 1)), 1)
    assert_close(factors.blocks[0].right.numpy(), (a.mT @ a / N).numpy())
    with pytest.raises(ValueError, match="fc.weight .sees the samples mixed, or in another order"):
        fitted(double(Folded("time first")), X, y)


@pytest.mark.parametrize("axes", [(3, 4), (2, 3, 4)])
def test_linear_layers_on_more_axes(axes):
    torch.manual_seed(0)
    net = double(nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2 * int(np.prod(axes[:-1])), 3)))
    X, y = torch.randn(N, *axes, dtype=torch.float64), torch.randint(3, (N,))
    oracle = KroneckerOracle(net, X, y, lambda f, t: F.cross_entropy(f, t, reduction="sum"))
    assert_close(dense(fitted(net, X, y, "kfac")), oracle.kfac())


class Branch(nn.Module):
    """Uses its weights once more where a row is large, which the first rows are not; or calls another layer there."""

    def __init__(self, outside):
        super().__init__()
        self.fc, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.outside = outside

    def forward(self, x):
        h = self.other(self.fc(x).tanh())
        large = x.abs().amax(1, keepdim=True) > 100
        if not large.any():
            return self.head(h)
        again = F.linear(h, self.fc.weight) if self.outside else self.fc(h)
        return self.head(torch.where(large, again, h))


@pytest.mark.parametrize("method", METHODS)
def test_weights_used_outside_in_later_rows_only(method):
    torch.manual_seed(0)
    net, X, y = double(Branch(True)), torch.randn(40, 4, dtype=torch.float64), torch.randint(3, (40,))
    fitted(net, X, y, method, batch_size=10)
    X[33] = 101
    with pytest.raises(ValueError, match="fc.weight .its weights are used outside it too"):
        fitted(net, X, y, method, batch_size=10)
    received = dense(fitted(net, X, y, METHODS[method](unsupported="diagonal"), batch_size=10))
    exact = np.diag(Oracle(Problem(net, X, y)).ggn())
    assert_close(received[:20, :20], np.diag(exact[:20]))
    # A further call is a further row.
    assert np.isfinite(dense(fitted(double(Branch(False)), X, y, method, batch_size=10))).all()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize(("method", "curvature"), [("kfac", "ggn"), ("ekfac", "fisher"), ("ekfac", "empirical_fisher")])
def test_no_layer_with_factors(method, curvature):
    net, (X, y) = double(Recurrent()), rows()
    with pytest.raises(ValueError, match=r"lstm.weight_ih_l0 .a LSTM.*EKFAC\(unsupported=\"diagonal\"\)"):
        fitted(net, X, y, method)
    settings = {"params": "lstm.*", "curvature": curvature, "weight_decay": 0.2}
    received = dense(fitted(net, X, y, METHODS[method](unsupported="diagonal"), **settings))
    exact = fitted(net, X, y, "direct", **settings).curvature_.to_dense().numpy()
    assert_close(received, np.diag(np.diag(exact)))


def test_the_rest_takes_no_jacobian_of_the_layers(monkeypatch):
    net, (X, y) = double(Recurrent()), rows()
    seen = []
    from skinvert.curvature import ggn

    whole = ggn.jacobian_rows

    def watched(*args):
        found = whole(*args)
        seen.append(found.shape[-1])
        return found

    monkeypatch.setattr(ggn, "jacobian_rows", watched)
    fitted(net, X, y, METHODS["ekfac"](unsupported="diagonal"))
    assert seen and set(seen) == {sum(q.numel() for q in net.lstm.parameters())}


def test_a_layer_without_entries_is_named():
    net = double(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))
    with warnings.catch_warnings():
        # It has nothing to initialise.
        warnings.simplefilter("ignore", UserWarning)
        net[0].hidden = nn.Linear(4, 0).double()
    X, y = torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 3
    net[0].register_forward_hook(lambda module, args, result: result + module.hidden(*args).sum(1, keepdim=True))
    with pytest.raises(ValueError, match=r"0\.hidden\.weight \(a Linear with a parameter without entries\)"):
        fitted(net, X, y)
    inverter = fitted(net, X, y, EKFAC(unsupported="diagonal"))
    assert torch.isfinite(inverter.transform(torch.ones(1, inverter.n_features_in_, dtype=torch.float64))).all()


@pytest.mark.parametrize("unsupported", ["error", "diagonal"])
def test_gradients_scaled_by_what_else_is_in_a_batch_are_never_taken(unsupported):
    net = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(ValueError, match="without scale_grad_by_freq"):
        fitted(net, *tokens(), EKFAC(unsupported=unsupported))


def test_a_layer_in_another_dtype_is_told():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    net[0].register_forward_hook(lambda module, args, result: result.double())
    net[1].register_forward_pre_hook(lambda module, args: (args[0].float(),))
    X, y = torch.randn(N, 4), torch.randint(3, (N,))
    with pytest.raises(ValueError, match="The result of 0 must be torch.float32, as its parameters are"):
        fitted(net, X, y)


def test_sampled_labels():
    net, (X, y) = double(Repeated()), rows()
    sampled = HessianInverter("ekfac", 0.1, loss="cross_entropy", curvature=SampledFisher(400)).fit(net, (X[:, 0], y))
    exact = fitted(net, X[:, 0], y, "ekfac", curvature="fisher")
    np.testing.assert_allclose(np.trace(dense(sampled)), np.trace(dense(exact)), rtol=0.15)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:e?kfac is worse than x = 0")
@pytest.mark.parametrize("build", [lambda: double(Encoder(False)), lambda: double(GPT())])
def test_memory_changes_nothing(build):
    net, (X, y) = build(), tokens()
    b = torch.randn(5, sum(q.numel() for q in net.parameters()), dtype=torch.float64)
    expected = fitted(net, X, y).transform(b)
    with sklearn.config_context(working_memory=0.01):
        received = fitted(net, X, y).transform(b)
    assert_close(received.numpy(), expected.numpy())


OFFLOADED = {
    "encoder": (lambda: Encoder(False), tokens),
    "gpt": (GPT, tokens),
    "attention": (lambda: Attending(kdim=8, vdim=7, batch_first=True), lambda: rows_of(8)),
    "called twice": (Repeated, lambda: rows_of(4, False)),
    "folded": (Folded, lambda: rows_of(4)),
}


def rows_of(width, sequence=True):
    generator = torch.Generator().manual_seed(1)
    shape = (N, T, width) if sequence else (N, width)
    X = torch.randn(shape, dtype=torch.float64, generator=generator)
    return X, torch.randint(3, (N,), generator=generator)


@pytest.mark.parametrize(("build", "data"), OFFLOADED.values(), ids=OFFLOADED)
@pytest.mark.parametrize("method", METHODS.values())
def test_offloaded_factors_are_the_same(method, build, data, tmp_path):
    net, (X, y) = double(build()), data()
    plain, offloaded = (
        fitted(net, X, y, method(offload=offload), weight_decay=0.1, check_residual=False)
        for offload in (None, tmp_path)
    )
    b = torch.randn(3, plain.n_features_in_, dtype=torch.float64)
    assert torch.equal(offloaded.transform(b), plain.transform(b))
    assert torch.equal(offloaded.inverse_.operator.apply(b), plain.inverse_.operator.apply(b))


def test_what_does_not_fit_says_so_before_it_starts(monkeypatch):
    from skinvert import _memory

    net, X, y = double(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 3))), torch.randn(5, 40), torch.randint(3, (5,))
    needed = 8 * 2 * (30**2 + 41**2 + 3**2 + 31**2)
    monkeypatch.setattr(_memory, "available_memory", lambda device: needed)
    with pytest.raises(MemoryError, match='The Kronecker factors.*Try offload.*`params`.*method="cg"'):
        fitted(net, X.double(), y)


def test_rows_are_multiplied_in_chunks(monkeypatch):
    net, (X, y) = double(GPT()), tokens()
    inverse = fitted(net, X, y).inverse_
    b = torch.randn(9, inverse.operator.size, dtype=torch.float64)
    expected, seen = inverse.apply(b), []
    whole = type(inverse.basis)._combination
    monkeypatch.setattr(type(inverse.basis), "_combination", lambda self, V: seen.append(len(V)) or whole(self, V))
    with sklearn.config_context(working_memory=2 * 4 * b.shape[1] * 8 / 2**20):
        assert_close(inverse.apply(b).numpy(), expected.numpy())
    assert seen == [2, 2, 2, 2, 1]


@pytest.mark.filterwarnings("ignore:e?kfac is worse than x = 0")
@pytest.mark.parametrize("method", METHODS)
def test_groups_are_saved(method, tmp_path):
    torch.manual_seed(0)
    net = double(nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.GroupNorm(3, 6), nn.Flatten(), nn.Linear(18, 3)))
    X, y = torch.randn(N, 4, 4, dtype=torch.float64), torch.randint(3, (N,))
    inverter = fitted(net, X, y, method)
    b = torch.randn(3, inverter.n_features_in_, dtype=torch.float64)
    inverter.save(tmp_path / "file")
    assert torch.equal(load(tmp_path / "file").transform(b), inverter.transform(b))
    assert torch.equal(pickle.loads(pickle.dumps(inverter.inverse_)).solve(b).x, inverter.transform(b))


def _diagonal_cases():
    torch.manual_seed(3)
    tokens = torch.randint(7, (9, 5))
    norm = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3, bias=False))
    twice = nn.Linear(4, 4)
    conv = nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    return {
        "norm": (norm, torch.randn(9, 4)),
        "called twice": (nn.Sequential(twice, nn.Tanh(), twice, nn.Linear(4, 3)), torch.randn(9, 4)),
        "groups": (conv, torch.randn(9, 4, 5)),
        "embedding": (nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3)), tokens),
        "recurrent": (Gated(), torch.randn(9, 5, 4)),
    }


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


@pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher", "fisher", "sampled_ggn"])
@pytest.mark.parametrize("name", _diagonal_cases())
def test_the_diagonal_is_that_of_the_matrix(name, curvature):
    net, X = _diagonal_cases()[name]
    net = net.double().eval()
    X = X.double() if X.is_floating_point() else X
    y, weights = torch.randint(3, (9,), generator=torch.Generator().manual_seed(0)), np.arange(9.0)
    settings = {"curvature": curvature, "loss": "cross_entropy", "weight_decay": 0.1, "batch_size": 4}
    A = HessianInverter("diagonal", 1.0, **settings).fit(net, (X, y), sample_weight=weights).curvature_
    F = A.factor()
    torch.testing.assert_close(A.diagonal(), (F.mT @ F).diagonal() + 0.1, rtol=1e-9, atol=1e-12)
    last = HessianInverter("diagonal", 1.0, params=list(A.objective.model.layout.names)[-1], **settings)
    A = last.fit(net, (X, y), sample_weight=weights).curvature_
    torch.testing.assert_close(A.diagonal(), A.factor().square().sum(0) + 0.1, rtol=1e-9, atol=1e-12)


def test_the_diagonal_of_layers_takes_no_factor(monkeypatch):
    monkeypatch.setattr("skinvert.curvature.factored.Factored.diagonal", None)
    net, X = _diagonal_cases()["norm"]
    data = X, torch.randint(3, (9,), generator=torch.Generator().manual_seed(0))
    A = HessianInverter("cg", 1.0, curvature="ggn", loss="cross_entropy").fit(net.eval(), data).curvature_
    assert float(A.diagonal().min()) >= 0
