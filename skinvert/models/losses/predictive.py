"""The distribution of labels that a loss is the negative log-likelihood of."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..._check import must_be
from .output_hessians import OutputHessian

__all__ = ["IndependentLabels", "Predictive"]


class Predictive(ABC):
    r"""The labels y that the outputs f of a batch predict: ℓ = Σₑ ωₑ (−s·log p(yₑ | f)) + const, labels e of a sample.

    ωₑ ≥ 0 is what the loss makes of the true target: its class weight, zero where it is ignored. It does not belong to
    the distribution, and stays as it is when labels are drawn.

    Parameters
    ----------
    f : tensor of shape (m, ...)
        Outputs.
    weight : tensor of shape (m, ...), default=None
        ωₑ, of as many entries a row as there are labels; None is 1 for each output.
    """

    def __init__(self, f: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        self.f = f
        self.weight = torch.ones_like(f) if weight is None else weight

    @property
    def labels(self) -> int:
        """How many labels one sample has; each takes one uniform number."""
        return self.weight[0].numel()

    @property
    def nbytes(self) -> int:
        """What is held."""
        return self.f.nbytes + self.weight.nbytes

    def fisher(self) -> OutputHessian:
        """Return Σₑ ωₑ s·E[∇_f log p ∇_f log pᵀ] in closed form."""
        hint = "Try curvature=SampledFisher(n_samples=10)."
        raise ValueError(must_be(f"The Fisher of {type(self).__name__}", "known in closed form", "no `fisher`", hint))

    @abstractmethod
    def scores(self, u: torch.Tensor) -> torch.Tensor:
        """Return √(s ω) ∇_f log p (m, r, c), signs aside, of labels drawn by uniforms u (m, r, labels) in (0, 1).

        Flat in the order of the outputs; r is any number of draws.
        """


class IndependentLabels(Predictive):
    """One label an output, each independent of the others."""

    def scores(self, u: torch.Tensor) -> torch.Tensor:
        """Return the scores of the outputs one by one."""
        m = len(self.f)
        return self.score(self.f.reshape(m, 1, -1), u) * self.weight.reshape(m, 1, -1).sqrt()

    @abstractmethod
    def score(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return √s ∇_f log p (m, r, c), signs aside, of labels drawn for outputs f (m, 1, c) by u (m, r, c)."""
