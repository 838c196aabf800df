"""Random losses: what skinvert is given, L on all the data at once by torch's own functions, and Σ sᵢ and its scale."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Loss:
    """A loss of outputs f (n, ...).

    ``summed(f, y)`` is Σ sᵢ of some rows; ``denominator(f, y)`` Σ mᵢ, so that L = Σ sᵢ / Σ mᵢ.
    """

    given: Any
    summed: Any
    denominator: Any
    targets: Any
    # The generalised Gauss–Newton matrix is defined (convex in f), and is the Fisher.
    convex: bool = True
    is_fisher: bool = False
    refused: bool = False


def rows(f, y):
    return float(len(f))


def elements(f, y):
    return float(f.numel())


def labels(f):
    return torch.randint(f.shape[1], (f.shape[0], *f.shape[2:]))


def some_ignored(f, value=-100):
    y = labels(f)
    flat = y.reshape(-1)
    flat[torch.randperm(len(flat))[: len(flat) // 3]] = value
    return y


def class_weights(f):
    return torch.linspace(0.5, 2.0, f.shape[1], dtype=torch.float64)


def weighted(f):
    w = class_weights(f)
    return Loss(
        nn.CrossEntropyLoss(weight=w),
        lambda f, y: F.cross_entropy(f, y, weight=w.to(f.dtype), reduction="sum"),
        lambda f, y: float(w[y[y != -100]].sum()),
        some_ignored,
        is_fisher=True,
    )


def ignoring(f):
    return Loss(
        nn.CrossEntropyLoss(ignore_index=0),
        lambda f, y: F.cross_entropy(f, y, ignore_index=0, reduction="sum"),
        lambda f, y: float((y != 0).sum()),
        lambda f: some_ignored(f, 0),
        is_fisher=True,
    )


def smoothed(f):
    return Loss(
        nn.CrossEntropyLoss(label_smoothing=0.2),
        lambda f, y: F.cross_entropy(f, y, label_smoothing=0.2, reduction="sum"),
        lambda f, y: float(y.numel()),
        labels,
    )


def probabilities(f):
    return Loss(
        "cross_entropy",
        lambda f, y: F.cross_entropy(f, y, reduction="sum"),
        lambda f, y: float(f.numel() / f.shape[1]),
        lambda f: torch.rand_like(f).softmax(1),
    )


def simple(given, function, targets, denominator, **facts):
    return lambda f: Loss(given() if isinstance(given, type) else given, function, denominator, targets, **facts)


def cross_entropy_sum(f, y):
    return F.cross_entropy(f, y, reduction="sum")


def _mean_callable(f, y):
    return F.cross_entropy(f, y)


def _sum_callable(f, y):
    # Torch's own threshold of 20 drops 2e-9 of the slope.
    return (F.softplus(f, threshold=100.0) - y * f).sum()


def _each_callable(f, y):
    return (f - y).pow(4).flatten(1).sum(1)


def _ignoring_callable(f, y):
    return F.cross_entropy(f, y, ignore_index=0)


def gaussian_nll(f, y):
    """Heteroscedastic: outputs are a mean and a log-variance, targets (n,)."""
    return (0.5 * (f[:, 1] + (y - f[:, 0]).square() * torch.exp(-f[:, 1]))).mean()


def weighting(f):
    w = class_weights(f).float()
    given = lambda f, y: F.cross_entropy(f, y, weight=w.to(f.dtype))  # noqa: E731
    return Loss(
        given,
        lambda f, y: F.cross_entropy(f, y, weight=w.to(f.dtype), reduction="sum"),
        lambda f, y: float(w[y].sum()),
        labels,
        is_fisher=False,
        refused=True,
    )


def bits(f):
    return torch.rand_like(f).round()


LOSSES = {
    "cross_entropy": simple("cross_entropy", cross_entropy_sum, labels, lambda f, y: float(y.numel()), is_fisher=True),
    "cross_entropy_sum": simple(nn.CrossEntropyLoss(reduction="sum"), cross_entropy_sum, labels, rows, is_fisher=True),
    "weighted": weighted,
    "ignoring": ignoring,
    "smoothed": smoothed,
    "probabilities": probabilities,
    "mse": simple("mse", lambda f, y: F.mse_loss(f, y, reduction="sum"), torch.randn_like, elements, is_fisher=True),
    "mse_sum": simple(
        nn.MSELoss(reduction="sum"),
        lambda f, y: F.mse_loss(f, y, reduction="sum"),
        torch.randn_like,
        rows,
        is_fisher=True,
    ),
    "bce": simple(
        "bce_with_logits",
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"),
        bits,
        elements,
        is_fisher=True,
    ),
    "bce_pos_weight": simple(
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)),
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, pos_weight=torch.tensor(3.0).to(f), reduction="sum"),
        bits,
        elements,
    ),
    "huber": simple(
        "huber", lambda f, y: F.huber_loss(f, y, reduction="sum"), lambda f: 2 * torch.randn_like(f), elements
    ),
    "poisson": simple(
        "poisson_nll",
        lambda f, y: F.poisson_nll_loss(f, y, reduction="sum"),
        lambda f: torch.randint(4, f.shape).to(f),
        elements,
        is_fisher=True,
    ),
    "nll": simple("nll", lambda f, y: F.nll_loss(f, y, reduction="sum"), labels, lambda f, y: float(y.numel())),
    "callable_mean": simple(_mean_callable, cross_entropy_sum, labels, lambda f, y: float(y.numel())),
    "callable_sum": simple(
        _sum_callable, lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"), bits, rows
    ),
    "callable_each": simple(_each_callable, lambda f, y: (f - y).pow(4).sum(), torch.randn_like, rows),
    "callable_gaussian": simple(
        gaussian_nll,
        lambda f, y: gaussian_nll(f, y) * len(f),
        lambda f: torch.randn(len(f), dtype=f.dtype),
        rows,
        convex=False,
    ),
    "callable_weighted": weighting,
    "callable_ignoring": lambda f: Loss(
        _ignoring_callable,
        lambda f, y: F.cross_entropy(f, y, ignore_index=0, reduction="sum"),
        lambda f, y: float((y != 0).sum()),
        lambda f: some_ignored(f, 0),
        refused=True,
    ),
}
CLASSIFYING = {
    "cross_entropy",
    "cross_entropy_sum",
    "weighted",
    "ignoring",
    "smoothed",
    "probabilities",
    "nll",
    "callable_mean",
    "callable_weighted",
    "callable_ignoring",
}
