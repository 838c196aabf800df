"""Cross-entropy: labels or probabilities of classes against logits, by the softmax."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..._check import must_be
from .base import check_same_shape, check_unit_interval
from .labels import LabelLoss
from .output_hessians import OutputHessian, SoftmaxHessian
from .predictive import Predictive

__all__ = ["Categorical", "CrossEntropy"]


class Categorical(Predictive):
    """One label at each position, by the softmax of logits f (m, K, ...): s = 1."""

    def fisher(self) -> OutputHessian:
        """Return ω (diag(p) − ppᵀ) at each position."""
        return SoftmaxHessian(self.f, self.weight)

    def scores(self, u: torch.Tensor) -> torch.Tensor:
        """Return √ω (p − e_y)."""
        p = self.probabilities()
        label = (u[:, :, None] > p.cumsum(1)[:, None]).sum(2).clamp(max=p.shape[1] - 1)
        drawn = torch.zeros(*u.shape[:2], *p.shape[1:], dtype=p.dtype, device=p.device)
        drawn.scatter_(2, label[:, :, None], 1)
        weight = self.weight.reshape(len(p), 1, 1, -1)
        return (self.score(drawn, p[:, None]) * weight.sqrt()).flatten(2)

    def probabilities(self) -> torch.Tensor:
        """Return p (m, K, positions)."""
        return self.f.reshape(*self.f.shape[:2], math.prod(self.f.shape[2:])).softmax(1)

    def score(self, drawn: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """Return the score of one-hot labels (m, r, K, positions)."""
        return p - drawn


class CrossEntropy(LabelLoss):
    """``nn.CrossEntropyLoss``: −Σ_v q_v log softmax(f)_v, q the weighted, smoothed distribution that the target is.

    Its output Hessian does not depend on q but by its mass Σ_v q_v, and so is its Fisher.
    """

    name = "cross_entropy"
    modules = (nn.CrossEntropyLoss,)
    module: nn.CrossEntropyLoss

    def closed_form(self, f: torch.Tensor, y: torch.Tensor) -> OutputHessian:
        """Return the Fisher."""
        return self.distribution(f, y).fisher()

    def distribution(self, f: torch.Tensor, y: torch.Tensor) -> Categorical:
        """Return the softmax's, of labels that weigh Σ_v q_v."""
        K, smoothing = f.shape[1], self.module.label_smoothing
        w = f.new_ones(K) if self.module.weight is None else self.module.weight.to(f.dtype)
        if y.is_floating_point():
            return Categorical(f, torch.einsum("k,mk...->m...", w, y * (1 - smoothing) + smoothing / K))
        valid = y != self.module.ignore_index
        return Categorical(f, (1 - smoothing) * self.label_weight(f, y) + smoothing / K * w.sum() * valid)

    def check_targets(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise for indices that do not fit; for floats that are no probabilities of each class."""
        if not target.is_floating_point():
            super().check_targets(output, target)
            return
        if target.ndim < 2:
            hint = "Class indices must be integers: try `y.long()` or `y.astype(int)`."
            raise ValueError(must_be("y", "integer class indices or class probabilities (n, c)", target.dtype, hint))
        check_same_shape(output, target)
        check_unit_interval(output, target)
