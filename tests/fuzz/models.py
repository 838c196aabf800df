"""Random small models: layers of every kind that torch users have, by name, so that a failing case can be read."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

# -- layers ------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "tanh": lambda c: nn.Tanh(),
    "relu": lambda c: nn.ReLU(),
    "prelu": lambda c: nn.PReLU(),
    "prelu_channels": lambda c: nn.PReLU(c),
    "elu": lambda c: nn.ELU(),
    "gelu": lambda c: nn.GELU(),
    "silu": lambda c: nn.SiLU(),
    "softplus": lambda c: nn.Softplus(),
    "hardsigmoid": lambda c: nn.Hardsigmoid(),
    "hardtanh": lambda c: nn.Hardtanh(),
    "hardswish": lambda c: nn.Hardswish(),
    "leaky_relu": lambda c: nn.LeakyReLU(),
    "rrelu": lambda c: nn.RReLU(),
    "sigmoid": lambda c: nn.Sigmoid(),
    "mish": lambda c: nn.Mish(),
    "selu": lambda c: nn.SELU(inplace=True),
    "softsign": lambda c: nn.Softsign(),
    "softmax": lambda c: nn.Softmax(-1),
    "square": lambda c: Square(),
    "dropout": lambda c: nn.Sequential(nn.Dropout(0.5), nn.Tanh()),
}


class Square(nn.Module):
    """An activation of one's own, as a plain function."""

    def forward(self, x):
        return x.square() - 0.3 * x


class Residual(nn.Module):
    """x + W x."""

    def __init__(self, c):
        super().__init__()
        self.inner = nn.Linear(c, c)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self, c):
        super().__init__()
        self.layer = nn.Linear(c, c)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class TiedPair(nn.Module):
    """Two layers with one weight."""

    def __init__(self, c):
        super().__init__()
        self.first, self.second = nn.Linear(c, c), nn.Linear(c, c)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Transposed(nn.Module):
    """A weight used again, outside of its layer."""

    def __init__(self, c):
        super().__init__()
        self.layer = nn.Linear(c, c)

    def forward(self, x):
        return F.linear(torch.tanh(self.layer(x)), self.layer.weight.mT)


class Branches(nn.Module):
    """Rows of positive first entry see one layer, the others another."""

    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Linear(c, c), nn.Linear(c, c)

    def forward(self, x):
        return torch.where(x[:, :1] > 0, self.a(x), self.b(x))


class RareBranch(nn.Module):
    """A layer that only some rows call: a batch without them does not reach it."""

    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Linear(c, c), nn.Linear(c, c)

    def forward(self, x):
        which = x[:, 0] > 0
        out = torch.zeros_like(x)
        if which.any():
            out = out.index_put((which,), self.a(x[which]))
        if (~which).any():
            out = out.index_put((~which,), self.b(x[~which]))
        return out


class Outer(nn.Module):
    """A Bilinear layer of x with itself."""

    def __init__(self, c):
        super().__init__()
        self.layer = nn.Bilinear(c, c, c)

    def forward(self, x):
        return self.layer(x, torch.tanh(x))


class Scale(nn.Module):
    """A bare parameter, and a buffer."""

    def __init__(self, c):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(c) + 0.5)
        self.register_buffer("offset", torch.randn(c))

    def forward(self, x):
        return x * self.scale + self.offset


class Attribute(nn.Module):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self, c):
        super().__init__()
        self.prototypes = torch.randn(c, c)

    def forward(self, x):
        return torch.tanh(x) @ self.prototypes.to(x.dtype)


class ParametersInLists(nn.Module):
    """Weights in a ParameterList."""

    def __init__(self, c):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(c, c) / c) for _ in range(2)])

    def forward(self, x):
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x


def rms_norm(c):
    """Of a written eps: torch's own is that of the dtype, so that the oracle's copy in float64 is another model."""
    return nn.RMSNorm(c, eps=1e-5)


def batch_norm(kind, c):
    norm = kind(c)
    norm.running_mean, norm.running_var = torch.randn(c) / 2, torch.rand(c) + 0.5
    return norm


# c features in, c out.
VECTOR = {
    "linear": lambda c: nn.Linear(c, c),
    "no_bias": lambda c: nn.Linear(c, c, bias=False),
    "weight_norm": lambda c: parametrizations.weight_norm(nn.Linear(c, c)),
    "weight_norm_no_bias": lambda c: parametrizations.weight_norm(nn.Linear(c, c, bias=False)),
    "spectral_norm": lambda c: parametrizations.spectral_norm(nn.Linear(c, c)),
    "orthogonal": lambda c: parametrizations.orthogonal(nn.Linear(c, c), use_trivialization=False),
    "batch_norm": lambda c: batch_norm(nn.BatchNorm1d, c),
    "layer_norm": nn.LayerNorm,
    "rms_norm": rms_norm,
    "residual": Residual,
    "twice": Twice,
    "tied": TiedPair,
    "transposed": Transposed,
    "branches": Branches,
    "rare_branch": RareBranch,
    "bilinear": Outer,
    "scale": Scale,
    "attribute": Attribute,
    "parameter_list": ParametersInLists,
    "frozen": lambda c: nn.Linear(c, c).requires_grad_(False),
}


class Transposing(nn.Module):
    """A layer of channels on a sequence (m, T, c)."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.mT).mT


class First(nn.Module):
    """A recurrent layer's outputs, without its state."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


class SelfAttention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, c, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(c, 2, batch_first=True, **settings)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


class OwnAttention(nn.Module):
    """Attention by torch's function."""

    def __init__(self, c):
        super().__init__()
        self.qkv = nn.Linear(c, 3 * c)

    def forward(self, x):
        return x + F.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1))


# (m, T, 4) in, (m, T', 4) out.
SEQUENCE = {
    "tokenwise": lambda c: nn.Linear(c, c),
    "conv1d": lambda c: Transposing(nn.Conv1d(c, c, 2)),
    "conv1d_same": lambda c: Transposing(nn.Conv1d(c, c, 3, padding="same", padding_mode="circular")),
    "conv1d_groups": lambda c: Transposing(nn.Conv1d(c, c, 2, groups=2)),
    "conv1d_depthwise": lambda c: Transposing(nn.Conv1d(c, c, 2, groups=c, bias=False)),
    "conv1d_dilated": lambda c: Transposing(nn.Conv1d(c, c, 2, dilation=2, padding=1)),
    "lstm": lambda c: First(nn.LSTM(c, c, batch_first=True)),
    "gru": lambda c: First(nn.GRU(c, c, batch_first=True)),
    "rnn": lambda c: First(nn.RNN(c, c, batch_first=True)),
    "attention": SelfAttention,
    "attention_no_bias": lambda c: SelfAttention(c, bias=False),
    "own_attention": OwnAttention,
    "encoder": lambda c: nn.TransformerEncoderLayer(c, 2, 6, batch_first=True, activation="gelu"),
    "layer_norm": nn.LayerNorm,
    "rms_norm": rms_norm,
}

# (m, 2, h, w) in, (m, 2, h', w') out.
IMAGE = {
    "conv2d": lambda: nn.Conv2d(2, 2, 2),
    "conv2d_strided": lambda: nn.Conv2d(2, 2, 2, stride=2, padding=1),
    "conv2d_reflect": lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect", bias=False),
    "conv2d_groups": lambda: nn.Conv2d(2, 2, 2, groups=2),
    "conv_transpose": lambda: nn.ConvTranspose2d(2, 2, 2),
    "group_norm": lambda: nn.GroupNorm(2, 2),
    "instance_norm": lambda: nn.InstanceNorm2d(2, affine=True),
    "batch_norm2d": lambda: batch_norm(nn.BatchNorm2d, 2),
    "max_pool": lambda: nn.MaxPool2d(2, 1),
    "weight_norm2d": lambda: parametrizations.weight_norm(nn.Conv2d(2, 2, 2)),
}


class Head(nn.Module):
    """The mean over all but rows and the last dimension (or the second, of an image), then a Linear."""

    def __init__(self, c, outputs, dim):
        super().__init__()
        self.out, self.dim = nn.Linear(c, outputs), dim

    def forward(self, x):
        while x.ndim > 2:
            x = x.mean(self.dim)
        return self.out(x)


class ChannelsFirst(nn.Module):
    """(m, T, c) to (m, c, T), as cross_entropy takes sequences."""

    def forward(self, x):
        return x.mT


class Tokens(nn.Module):
    """Embedded tokens; ``bag`` sums them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        bag = {"bag_mean": "mean", "bag_sum": "sum"}.get(kind)
        padding = 1 if kind == "padded" else None
        self.embedding = nn.EmbeddingBag(5, 4, mode=bag) if bag else nn.Embedding(5, 4, padding_idx=padding)

    def forward(self, x):
        z = self.embedding(x)
        return z if z.ndim == 2 else z.mean(1)


class TiedTokens(nn.Module):
    """A language model's embedding, used again for its logits (m, V, T)."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(torch.tanh(self.mix(self.embedding(x))), self.embedding.weight).mT


class Dead(nn.Module):
    """A model with a layer that no output meets."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.dead = inner, nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)


def build(case):
    """Return the module of a case, in float32 or float64, in training mode, and its inputs (n, ...)."""
    n, outputs = case.n, case.outputs
    if case.domain == "vector":
        parts = [nn.Linear(3, 4), *_between(case, VECTOR, 4), nn.Linear(4, outputs)]
        X = torch.randn(n, 3)
    elif case.domain == "sequence":
        parts = [nn.Linear(2, 4), *_between(case, SEQUENCE, 4)]
        parts += [nn.Linear(4, outputs), ChannelsFirst()] if case.dense else [Head(4, outputs, 1)]
        X = torch.randn(n, 6, 2)
    elif case.domain == "image":
        parts = [nn.Conv2d(1, 2, 2), *(IMAGE[name]() for name in case.layers)]
        parts += [nn.Tanh(), nn.Conv2d(2, outputs, 1)] if case.dense else [nn.Tanh(), Head(2, outputs, -1)]
        X = torch.randn(n, 1, 6, 6)
    else:
        parts = [TiedTokens()] if case.dense else [Tokens(case.layers[0]), nn.Tanh(), nn.Linear(4, outputs)]
        X = torch.randint(5, (n, 3))
    module = nn.Sequential(*parts)
    if case.log_probabilities:
        module = nn.Sequential(module, nn.LogSoftmax(1))
    if case.dead:
        module = Dead(module)
    module = module.to(case.model_dtype)
    if X.is_floating_point():
        X = (case.input_scale * X).to(case.model_dtype)
    return module, X


def _between(case, layers, c):
    # Channels of a sequence do not come second.
    plain = {"prelu_channels": "prelu"} if case.domain == "sequence" else {}
    pairs = zip(case.activations, case.layers, strict=True)
    return [part for f, name in pairs for part in (ACTIVATIONS[plain.get(f, f)](c), layers[name](c))]


TOKENS = ("plain", "padded", "bag_mean", "bag_sum")
