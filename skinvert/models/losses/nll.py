"""The negative log-likelihood of class labels, of log-probabilities that the model's own log_softmax returns."""

from __future__ import annotations

import torch
from torch import nn

from ..._check import must_be
from .base import Outputs
from .cross_entropy import Categorical
from .labels import LabelLoss
from .output_hessians import DiagonalHessian, OutputHessian

__all__ = ["NLL", "LogProbabilities", "Probabilities"]


class LogProbabilities(Categorical):
    """One label at each position, by log-probabilities f (m, K, ...): the score of label y is e_y, and s = 1."""

    def __init__(self, f: torch.Tensor, weight: torch.Tensor) -> None:
        super().__init__(f, weight)
        p = self.probabilities()
        worst = float((p.sum(1) - 1).abs().max())
        if worst > 1e3 * torch.finfo(p.dtype).eps * p.shape[1]:
            hint = 'Try loss="cross_entropy" for logits, or curvature="hessian".'
            raise ValueError(
                must_be("The outputs for nll", "log-probabilities", f"exp(outputs) {worst:.3g} off 1", hint)
            )

    def fisher(self) -> OutputHessian:
        """Return ω E[e_y e_yᵀ], diagonal."""
        weight = self.weight.reshape(len(self.f), 1, -1)
        return DiagonalHessian(weight * self.moment(self.probabilities()))

    def moment(self, p: torch.Tensor) -> torch.Tensor:
        """Return the diagonal of E[score scoreᵀ]: p."""
        return p

    def probabilities(self) -> torch.Tensor:
        """Return p (m, K, positions)."""
        return self._outputs().exp()

    def score(self, drawn: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """Return e_y."""
        return drawn

    def _outputs(self) -> torch.Tensor:
        m, K = self.f.shape[:2]
        return self.f.reshape(m, K, -1)


class Probabilities(LogProbabilities):
    """The same by probabilities f (m, K, ...), of which a loss takes the logarithm itself: the score is e_y / p."""

    def probabilities(self) -> torch.Tensor:
        """Return p, which the outputs are."""
        return self._outputs()

    def moment(self, p: torch.Tensor) -> torch.Tensor:
        """Return 1 / p, and 0 for what is never drawn."""
        return torch.where(p > 0, 1 / p, 0.0)

    def score(self, drawn: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """Return e_y / p."""
        return torch.where(drawn > 0, drawn / p, 0.0)


class NLL(LabelLoss):
    """``nn.NLLLoss``: −w_y f_y, linear in the outputs."""

    name = "nll"
    modules = (nn.NLLLoss,)
    module: nn.NLLLoss

    def closed_form(self, f: torch.Tensor, y: torch.Tensor) -> OutputHessian:
        """Return zero."""
        return DiagonalHessian(torch.zeros_like(f))

    def distribution(self, f: torch.Tensor, y: torch.Tensor) -> LogProbabilities:
        """Return that of the probabilities exp(f)."""
        return LogProbabilities(f, self.label_weight(f, y))

    @property
    def takes(self) -> Outputs:
        """What the outputs are."""
        return "log_probabilities"
