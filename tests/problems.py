"""The table of problems: small networks × losses, with weight decay, sample weights and batch sizes in turn."""

import itertools
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

N = 12


@dataclass(eq=False)
class Problem:
    """A model, a loss and data; ``eq=False``, so that it is hashable by identity."""

    name: str
    module: nn.Module
    loss: Any
    whole: Any
    summed: Any
    X: torch.Tensor
    y: torch.Tensor
    weight_decay: float = 0.0
    counts: Any = None
    batch_size: int = 7

    @property
    def data(self):
        return (self.X, self.y)

    @property
    def sample_weight(self):
        # Halved: only the proportions of weights count.
        return None if self.counts is None else 0.5 * self.counts

    @property
    def p(self):
        return sum(t.numel() for t in self.module.parameters() if t.requires_grad)

    def settings(self, **other):
        """Keyword arguments of a HessianInverter for this problem."""
        return {"loss": self.loss, "weight_decay": self.weight_decay, "batch_size": self.batch_size, **other}

    def right_hand_sides(self, k, seed=0):
        return np.random.default_rng(seed).standard_normal((k, self.p))


# -- models --------------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Embedding, mean over the sequence, linear."""

    def __init__(self, sparse):
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.out(self.embedding(tokens).mean(1).tanh())


class Tied(nn.Module):
    """An auto-encoder whose decoder is the encoder's own weight; registered twice."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.encoder(x).tanh())


class Reused(nn.Module):
    """One weight in a Linear and again, transposed, in a functional call that no hook sees."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 3)

    def forward(self, x):
        return self.encoder(F.linear(self.encoder(x).tanh(), self.encoder.weight.mT))


class LastState(nn.Module):
    """An LSTM's last state, then linear: no batching rule in torch."""

    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


class Encoder(nn.Module):
    """A transformer encoder layer, by scaled_dot_product_attention."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=4, activation="gelu", batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.layer(x).mean(1))


class FrozenAndDead(nn.Module):
    """A frozen first layer, and a last one that the outputs never meet."""

    def __init__(self):
        super().__init__()
        self.first, self.out, self.dead = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.out(self.first(x).tanh())


class Net(nn.Module):
    """Modules by name, in this order, and a function of them and x."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.of = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.of(self, x)


def _normalised():
    norm = nn.BatchNorm1d(5)
    norm.running_mean, norm.running_var = torch.randn(5) / 2, torch.rand(5) + 0.5
    return nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))


MODELS = {
    "linear": (lambda: nn.Linear(5, 2), (5,)),
    "softmax": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3)), (2, 3)),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "no_bias": (lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.ELU(), nn.Linear(5, 3, bias=False)), (4,)),
    "cnn1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), (2, 6)),
    "cnn2d": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        ),
        (1, 5, 5),
    ),
    "embedding": (lambda: Pooled(sparse=False), (3, "tokens")),
    "sparse_embedding": (lambda: Pooled(sparse=True), (3, "tokens")),
    "batchnorm_dropout": (_normalised, (4,)),
    "tied": (Tied, (4,)),
    "reused": (Reused, (4,)),
    "lstm": (LastState, (3, 2)),
    "transformer": (Encoder, (3, 4)),
    "frozen_and_dead": (FrozenAndDead, (4,)),
    "sequence": (lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Conv1d(4, 3, 1)), (2, 4)),
    "tokenwise": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3, 3)),
}


# -- losses --------------------------------------------------------------------------------------------------------


def _classes(f):
    return torch.randint(f.shape[1], (f.shape[0], *f.shape[2:]))


def _classes_some_ignored(f):
    y = _classes(f)
    y[: len(y) // 4] = 1
    return y


def _weights(f):
    return torch.linspace(0.5, 2.0, f.shape[1], dtype=torch.float64)


def _log(f):
    return F.log_softmax(f, 1)


def _mean_of_cross_entropy(f, y):
    return F.cross_entropy(f, y)


def _sum_of_logistic(f, y):
    return (F.softplus(f) - y * f).sum()


def _each_quartic(f, y):
    return ((f - y) ** 4).reshape(len(f), -1).sum(1)


@dataclass(frozen=True)
class LossCase:
    """What skinvert is given; L and the sum of the sᵢ by torch's own functions; targets for outputs f."""

    given: Any
    function: Any
    targets: Any
    options: Any = lambda f: {}
    average: str = "mean"

    def whole(self, f):
        function = partial(self.function, **self.options(f))
        if self.average == "mean":
            return partial(function, reduction="mean")
        if self.average == "none":
            return lambda f, y: function(f, y, reduction="none").mean()
        return lambda f, y: function(f, y, reduction="sum") / len(f)

    def summed(self, f):
        return partial(self.function, reduction="sum", **self.options(f))

    def loss(self, f):
        return self.given(**self.options(f)) if isinstance(self.given, type) else self.given


def _reduced(function):
    """A per-sample function in the form of torch's, with ``reduction``."""

    def reduce(f, y, reduction):
        return {"mean": torch.mean, "sum": torch.sum, "none": lambda v: v}[reduction](function(f, y))

    return reduce


def _ignored(f):
    return {"weight": _weights(f), "ignore_index": 1}


LOSSES = {
    "cross_entropy": LossCase("cross_entropy", F.cross_entropy, _classes),
    "class_weights": LossCase(nn.CrossEntropyLoss, F.cross_entropy, _classes, lambda f: {"weight": _weights(f)}),
    "ignore_index": LossCase(nn.CrossEntropyLoss, F.cross_entropy, _classes_some_ignored, _ignored),
    "label_smoothing": LossCase(
        nn.CrossEntropyLoss, F.cross_entropy, _classes, lambda f: {"label_smoothing": 0.2, "weight": _weights(f)}
    ),
    "class_probabilities": LossCase("cross_entropy", F.cross_entropy, lambda f: torch.rand_like(f).softmax(1)),
    "mse": LossCase("mse", F.mse_loss, torch.randn_like),
    "mse_sum": LossCase(nn.MSELoss(reduction="sum"), F.mse_loss, torch.randn_like, average="sum"),
    "mse_none": LossCase(nn.MSELoss(reduction="none"), F.mse_loss, torch.randn_like, average="none"),
    "bce_with_logits": LossCase(
        "bce_with_logits", F.binary_cross_entropy_with_logits, lambda f: torch.rand_like(f).round()
    ),
    "pos_weight": LossCase(
        nn.BCEWithLogitsLoss,
        F.binary_cross_entropy_with_logits,
        lambda f: torch.rand_like(f).round(),
        lambda f: {"pos_weight": _weights(f).reshape(-1, *[1] * (f.ndim - 2))},
    ),
    "nll": LossCase("nll", F.nll_loss, _classes),
    "weighted_nll": LossCase(nn.NLLLoss, F.nll_loss, _classes_some_ignored, _ignored),
    "huber": LossCase("huber", F.huber_loss, lambda f: 2 * torch.randn_like(f)),
    "poisson_nll": LossCase("poisson_nll", F.poisson_nll_loss, lambda f: torch.randint(4, f.shape).to(f)),
    "callable_mean": LossCase(_mean_of_cross_entropy, F.cross_entropy, _classes),
    "callable_sum": LossCase(
        _sum_of_logistic,
        F.binary_cross_entropy_with_logits,
        lambda f: torch.rand_like(f).round(),
        average="sum",
    ),
    "callable_each": LossCase(_each_quartic, _reduced(_each_quartic), torch.randn_like),
}

# The negative log-likelihood takes log-probabilities: the network ends in log_softmax.
LOG_PROBABILITIES = ("nll", "weighted_nll")


# -- the table -----------------------------------------------------------------------------------------------------


@cache
def problem(model="mlp", loss="cross_entropy", weight_decay=0.0, weighted=False, batch_size=7, n=N):
    """Return a problem of the table, in float64; the same one for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        build, shape = MODELS[model]
        module = build().double()
        if loss in LOG_PROBABILITIES:
            module = nn.Sequential(module, nn.LogSoftmax(1))
        X = torch.randint(7, (n, shape[0])) if "tokens" in shape else torch.randn(n, *shape, dtype=torch.float64)
        with torch.no_grad():
            f = module.eval()(X).clone()
        module.train()
        case = LOSSES[loss]
        y = case.targets(f)
        counts = np.random.default_rng(1).integers(0, 4, n) if weighted else None
    return Problem(
        f"{model}-{loss}", module, case.loss(f), case.whole(f), case.summed(f), X, y, weight_decay, counts, batch_size
    )


def table(models=tuple(MODELS), losses=tuple(LOSSES)):
    """Yield (id, arguments of ``problem``, k) for every pair; the other axes take turns.

    Per model the losses meet each of the 2 × 2 × 2 settings, in another order for the next model.
    """
    axes = list(itertools.product((0.0, 0.1), (False, True), (7, 6)))
    for i, (model, loss) in enumerate(itertools.product(models, losses)):
        weight_decay, weighted, batch_size = axes[i % 8]
        k = ("1", "7", "p+5")[(i // 8 + i) % 3]
        name = f"{model}-{loss}-decay{weight_decay}-{'weighted' if weighted else 'plain'}-batch{batch_size}-k{k}"
        yield name, (model, loss, weight_decay, weighted, batch_size), k


def number_of_rows(k, p):
    return p + 5 if k == "p+5" else int(k)


def tanh_with(constant):
    """Return tanh whose derivative, right in itself, takes a share of itself as a constant in the second pass."""

    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        def backward(ctx, g):
            slope = 1 - ctx.saved_tensors[0].tanh().square()
            return g * (constant * slope.detach() + (1 - constant) * slope)

    return Tanh.apply
