"""The Fisher in the outputs by labels that are drawn from what a loss predicts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from .._check import must_be
from .._memory import rows_within
from ..models import OutputHessian, Predictive, TorchTwiceDifferentiable, names_with_predictive

__all__ = ["SampledHessian", "predictive_of"]


class SampledHessian(OutputHessian):
    """The Fisher in the outputs by sampled labels, whose columns are made from their draws.

    Parameters
    ----------
    predictive : Predictive
        The distribution of labels, of a batch of m rows.
    draws : tensor of shape (m, r, labels)
        Uniform.
    """

    def __init__(self, predictive: Predictive, draws: torch.Tensor) -> None:
        self.predictive, self.draws = predictive, draws
        self.rows, self.outputs, self.rank = len(draws), predictive.f[0].numel(), draws.shape[1]

    @property
    def nbytes(self) -> int:
        """The draws and the outputs."""
        return self.draws.nbytes + self.predictive.nbytes

    def products(self, U: torch.Tensor) -> torch.Tensor:
        """Return S Sᵀ u, over the columns in chunks."""
        total = torch.zeros_like(U)
        for _, S in self._chunks():
            total += torch.einsum("mcr,kmr->kmc", S, torch.einsum("mcr,kmc->kmr", S, U))
        return total

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Return the scores of the labels drawn, over √r."""
        return self.predictive.scores(self.draws[:, start:stop]).mT / math.sqrt(self.rank)

    def combined(self, a: torch.Tensor) -> torch.Tensor:
        """Return S a, over the columns in chunks."""
        total = self.predictive.f.new_zeros(self.rows, self.outputs)
        for start, S in self._chunks():
            total += (S @ a[..., start : start + S.shape[2], None]).squeeze(-1)
        return total

    def _chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        step = rows_within(4 * self.predictive.f.nbytes)
        for start in range(0, self.rank, step):
            yield start, self.columns(start, min(start + step, self.rank))


def predictive_of(model: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Any) -> Predictive:
    """Return the labels that the model predicts on a batch; ValueError where its loss is no likelihood."""
    found = model.predictive(outputs, batch)
    if found is None:
        got = "per_sample_loss" if model.own_loss else str(model.loss)
        *names, last = names_with_predictive()
        must = f"the negative log-likelihood of a known distribution: {', '.join(names)} or {last}"
        raise ValueError(must_be("The loss for the Fisher", must, got, 'Try curvature="ggn".'))
    return found
