"""Numbers of a whole test set to score: smooth forms of accuracy, AUROC, the worst group's loss, fairness gaps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .._check import check_number, must_be
from .._types import Array
from ..models import Margin
from .measurements import Measurement

__all__ = ["AUROC", "Accuracy", "FairnessGap", "WorstGroupLoss"]


@dataclass(frozen=True)
class Accuracy:
    r"""Mean of σ(mᵢ / T), with mᵢ = fᵧ − log Σ_{k≠y} exp fₖ the margin of the true class.

    A smooth form of the accuracy, which it becomes as T → 0 (of two classes; of more, mᵢ > 0 says p > ½). At T = 1 it
    is the mean probability of the true class.

    Parameters
    ----------
    temperature : float, default=1.0
        T > 0.

    Examples
    --------
    >>> outputs, targets = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    >>> round(float(Accuracy()(outputs, targets)), 4), round(float(Accuracy(0.01)(outputs, targets)), 4)
    (0.5749, 0.5)
    """

    temperature: float = 1.0

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return it, of logits (n, c), or of one logit (n,) or (n, 1), and class indices (n,)."""
        return torch.sigmoid(_margin(outputs, targets) / _positive(self.temperature)).mean()


@dataclass(frozen=True)
class AUROC:
    r"""Mean over pairs of a positive and a negative row of σ((f₊ − f₋) / T).

    A smooth form of the area under the ROC curve, which it becomes as T → 0.

    Parameters
    ----------
    temperature : float, default=1.0
        T > 0, on the scale of the logits.

    Examples
    --------
    >>> outputs, targets = torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([1, 1, 0, 0])
    >>> round(float(AUROC(0.01)(outputs, targets)), 4)
    0.75
    """

    temperature: float = 1.0

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return it, of one logit (n,) or (n, 1), or those of two classes (n, 2), and labels 0 and 1 (n,)."""
        f, y = _binary_logit(outputs), targets.reshape(-1)
        positive, negative = f[y == 1], f[y == 0]
        if not len(positive) * len(negative) or len(positive) + len(negative) < len(y):
            raise ValueError(must_be("The targets for AUROC", "0 and 1, some of each", f"{y.unique().tolist()[:10]}"))
        return torch.sigmoid((positive[:, None] - negative) / _positive(self.temperature)).mean()


@dataclass(frozen=True)
class WorstGroupLoss:
    r"""T log(1/K Σ_g exp(ℓ_g / T)) of the mean losses ℓ_g of K groups.

    A smooth form of max_g ℓ_g, from below by at most T log K; the mean over groups as T → ∞.

    Parameters
    ----------
    groups : array or tensor of shape (n_test,)
        The test rows' groups.
    temperature : float, default=0.1
        T > 0, on the scale of the loss.
    loss : callable, default=None
        (outputs, targets) -> one loss a row (n_test,); None is the cross-entropy of logits (n_test, c), or of one.

    Examples
    --------
    >>> outputs, targets = torch.tensor([[0.0, 0.0], [1.0, -1.0]]), torch.tensor([0, 1])
    >>> round(float(WorstGroupLoss([0, 1], temperature=1e-3)(outputs, targets)), 3)
    2.126
    """

    groups: Array
    temperature: float = 0.1
    loss: Measurement | None = None

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return it, of outputs and targets of the rows that ``groups`` are of."""
        losses = self.loss(outputs, targets) if self.loss is not None else _cross_entropy(outputs, targets)
        members = _members(self.groups, len(losses), losses.device)
        means = torch.stack([losses[own].mean() for own in members.values()])
        T = _positive(self.temperature)
        return T * (torch.logsumexp(means / T, 0) - torch.log(means.new_tensor(float(len(means)))))


@dataclass(frozen=True)
class FairnessGap:
    r"""E[p | a = 1] − E[p | a = 0]: how much more probable the model finds the positive class in one group.

    The gap of demographic parity, of probabilities in place of decisions, which makes it smooth; with ``given=1``, over
    rows of this label alone, that of equal opportunity.

    Parameters
    ----------
    groups : array or tensor of shape (n_test,)
        a: 0 or 1 (or False and True) of each test row.
    given : int, default=None
        The label of the rows that count; None: all.

    Examples
    --------
    >>> outputs, targets = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([1, 0, 1])
    >>> round(float(FairnessGap([1, 0, 0])(outputs, targets)), 4)
    0.3808
    """

    groups: Array
    given: int | None = None

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return it, of one logit (n,) or (n, 1), or those of two classes (n, 2), and labels 0 and 1 (n,)."""
        p = torch.sigmoid(_binary_logit(outputs))
        members = _members(self.groups, len(p), p.device)
        counted = torch.ones_like(p, dtype=torch.bool) if self.given is None else targets.reshape(-1) == self.given
        found = [members[a] & counted if a in members else torch.zeros_like(counted) for a in (1, 0)]
        if set(members) != {0, 1} or not all(bool(each.any()) for each in found):
            raise ValueError(must_be("groups for FairnessGap", "0 and 1, with rows of each", f"{[*members][:10]}"))
        return p[found[0]].mean() - p[found[1]].mean()


def _margin(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    margin = Margin()
    margin.check(outputs.detach(), targets)
    return margin.per_sample(outputs, targets)


def _binary_logit(outputs: torch.Tensor) -> torch.Tensor:
    if outputs.ndim == 2 and outputs.shape[1] == 2:
        return outputs[:, 1] - outputs[:, 0]
    if outputs.ndim > 2 or (outputs.ndim == 2 and outputs.shape[1] != 1):
        raise ValueError(must_be("The outputs", "the logits of two classes, or one", f"shape {tuple(outputs.shape)}"))
    return outputs.reshape(-1)


def _cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        f = outputs.reshape(-1)
        return F.binary_cross_entropy_with_logits(f, targets.reshape(-1).to(f.dtype), reduction="none")
    return F.cross_entropy(outputs, targets, reduction="none")


def _members(groups: Array, n: int, device: torch.device) -> dict[object, torch.Tensor]:
    """Return which rows are of each group."""
    labels = torch.as_tensor(groups, device=device)
    if labels.shape != (n,):
        raise ValueError(must_be("groups", f"one for each of the {n} test rows", f"shape {tuple(labels.shape)}"))
    if bool((labels != labels).any()):
        raise ValueError(must_be("groups", "known for each of the test rows", "NaN", "Give such rows a number."))
    return {value.item(): labels == value for value in labels.unique()}


def _positive(temperature: float) -> float:
    value: float = check_number(temperature, "temperature", low=0.0)
    if value == 0:
        raise ValueError(must_be("temperature", "positive", "0", "Scores need a smooth form."))
    return value
