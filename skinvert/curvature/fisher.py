"""The Fisher of the labels that the model predicts, and the empirical Fisher of the true ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator

from .._memory import rows_within, working_memory
from .._progress import progress
from .._state import TensorState
from .._validation import check_number
from ..data import Batches
from ..models import DiagonalHessian, FactoredHessian, OutputHessian, leading_length
from ..operators import KroneckerFactors, LinearOperator, LowRank, add_to_diagonal, symmetrise
from .base import Curvature, Objective
from .columns import Columns
from .ggn import GGN, split_batch
from .kronecker import Signals, kronecker_factors
from .predictive import SampledHessian, predictive_of
from .rows import gradient_rows

__all__ = ["EmpiricalFisher", "Fisher", "SampledFisher"]


class SampledFisher(TensorState, BaseEstimator):
    """Settings of the Fisher by sampled labels: ``HessianInverter(curvature=SampledFisher(n_samples=10))``.

    Its mean over seeds is ``curvature="fisher"``, which takes no samples; its cost is that of ``n_samples`` outputs,
    however many the model has. Each row of the data has its own draws, which no batch size changes.

    Parameters
    ----------
    n_samples : int, default=1
        Labels drawn per row, ≥ 1. The standard error falls with the root of n · n_samples.
    random_state : int, default=None
        Seed of the draws; None is the estimator's own, and 0 without one.

    Examples
    --------
    >>> SampledFisher(n_samples=100)
    SampledFisher(n_samples=100)
    """

    def __init__(self, n_samples: int = 1, *, random_state: int | None = None) -> None:
        self.n_samples = n_samples
        self.random_state = random_state

    def build(self, objective: Objective) -> Fisher:
        """Return the operator over all the data."""
        n_samples = check_number(self.n_samples, "n_samples", owner="SampledFisher", low=1, integer=True)
        seed = 0 if self.random_state is None else self.random_state
        return Fisher(
            objective, n_samples, check_number(seed, "random_state", owner="SampledFisher", low=0, integer=True)
        )


class Fisher(GGN):
    r"""F = Σᵢ wᵢ s·E_{y∼p(·|xᵢ)}[∇log p ∇log pᵀ] / Σᵢ wᵢ + penalty, for a loss ℓ = −s·log p + const.

    s is 1 for ``cross_entropy``, ``nll`` and ``poisson_nll``, 2/c for ``mse`` over c outputs (unit variance), 1/c for
    ``bce_with_logits``. The expectation is over the labels that the model itself predicts; class weights and ignored
    targets stay those of the true ones. It equals the GGN where the output Hessian of the loss does not depend on the
    label: ``cross_entropy``, ``mse``, ``bce_with_logits`` and ``poisson_nll`` of logarithms. For ``nll`` of
    log-probabilities it is that of ``cross_entropy``, where the GGN, of a loss linear in them, is zero.

    Parameters
    ----------
    objective : Objective
        Model, data and denominators.
    n_labels : int or None
        Labels drawn per row; None takes the expectation in closed form.
    seed : int
        Of the draws.

    References
    ----------
    Martens (2020), "New insights and perspectives on the natural gradient method", secs. 5 and 9.2.
    """

    def __init__(self, objective: Objective, n_labels: int | None = None, seed: int = 0) -> None:
        batch, _ = next(iter(objective.batches))
        f = objective.model.forward(batch)
        self.predictive = predictive_of(objective.model, f, batch)
        self.n_labels = n_labels
        if n_labels is not None:
            objective = _with_draws(objective, (n_labels, self.predictive.draws_per_sample(f)), seed)
        super().__init__(objective)

    def data_of(self, batch: Any) -> Any:
        """Return the model's part of a batch, which may carry its draws."""
        return batch if self.n_labels is None else batch[0]

    def closed_hessian(self, outputs: torch.Tensor, batch: Any) -> OutputHessian | None:
        """Return the Fisher in the outputs: columns of sampled labels, or the closed form; None is the loss's own."""
        y = self.data_of(batch)[1]
        if self.n_labels is not None:
            return SampledHessian(self.predictive, outputs, y, batch[1])
        diagonal = self.predictive.hessian_diagonal(outputs, y)
        return super().closed_hessian(outputs, batch) if diagonal is None else DiagonalHessian(diagonal)


@dataclass
class _Drawn:
    """Batches, each with the uniform draws of its rows: the same for a row whatever the batches are."""

    batches: Batches
    shape: tuple[int, ...]
    seed: int

    def __call__(self) -> Iterator[Any]:
        generator = np.random.default_rng(self.seed)
        # Within the open interval in float32 too: the inverse of a distribution function is infinite at its ends.
        tiny = float(torch.finfo(torch.float32).eps)
        for batch in self.batches.raw():
            draws = generator.random((leading_length(batch), *self.shape)).clip(tiny, 1 - tiny)
            yield batch, torch.from_numpy(draws).to(self.batches.device, self.batches.dtype)


def _with_draws(objective: Objective, shape: tuple[int, ...], seed: int) -> Objective:
    drawn = _Drawn(objective.batches, shape, seed)
    # Made anew on every pass where they do not fit: the generator gives the same ones.
    size = objective.batches.n_samples * math.prod(shape) * objective.dtype.itemsize
    kept = None if objective.batches.kept is None or size > working_memory() else list(drawn())
    part = copy.copy(objective)
    part.batches = replace(objective.batches, source=drawn, kept=kept)
    return part


class EmpiricalFisher(Curvature):
    r"""E = Σᵢ wᵢ gᵢgᵢᵀ / Σᵢ wᵢ + penalty, with gᵢ = ∇ℓᵢ of the true labels, the penalty left out of gᵢ.

    Neither the Fisher nor the Gauss–Newton matrix: its size follows the residuals, and at an interpolating minimum it
    is zero.

    References
    ----------
    Kunstner, Balles & Hennig (2019), "Limitations of the empirical Fisher approximation", eq. 3.
    """

    is_psd = True

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self.hint = ""
        self._factor: torch.Tensor | None = None

    _transient = ("_graphs", "_factor")

    @property
    def factor_shape(self) -> tuple[int, int]:
        """(n, p), known before the factor is built."""
        return (self.objective.batches.n_samples, self.size)

    def factor(self, verbose: int = 0) -> torch.Tensor:
        """Return F (n, p) with E = FᵀF + diag(penalty): the rows √(wᵢ/Σw) gᵢ."""
        return torch.cat(list(self.factor_chunks(verbose)))

    def factor_chunks(self, verbose: int = 0) -> Iterator[torch.Tensor]:
        """Yield the factor in chunks of rows that fit the working memory."""
        chunk = rows_within(3 * self.size * self.dtype.itemsize)
        for batch, weights in progress(self.objective.batches, "per-sample gradients", verbose):
            for rows, part in split_batch(batch, weights, chunk):
                yield self._factor_of(rows, part)

    def gradient_rows(self, verbose: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gᵢ (n, p), and wᵢ/Σw (n,)."""
        batches = progress(self.objective.batches, "per-sample gradients", verbose)
        parts = [(self._gradients(batch), weights / self.objective.weight_sum) for batch, weights in batches]
        return torch.cat([rows for rows, _ in parts]), torch.cat([weights for _, weights in parts])

    def minibatch(self, rows: torch.Tensor) -> LinearOperator:
        """Return an unbiased estimate from the samples ``rows`` (m,): rows of F where it is kept."""
        if self._factor is None:
            return super().minibatch(rows)
        share = math.sqrt(self.n_samples / len(rows))
        return LowRank(share * self._factor[rows.to(self.device)], self.penalty)

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return (V Fᵀ) F plus the penalty's share; F is kept where it fits the working memory."""
        if self._factor is None and self.factor_shape[0] * self.size * self.dtype.itemsize <= working_memory():
            self._factor = self.factor()
        product = torch.zeros_like(V)
        for rows in self.factor_chunks() if self._factor is None else [self._factor]:
            product += (V @ rows.mT) @ rows
        return product if self.penalty is None else product + V * self.penalty

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (p, p), by one GEMM per chunk of the factor."""
        matrix = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for rows in self.factor_chunks(verbose):
            matrix.addmm_(rows.mT, rows)
        return symmetrise(add_to_diagonal(matrix, self.penalty))

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal, from the squares of the factor."""
        diagonal = sum(
            (rows.square().sum(0) for rows in self.factor_chunks()),
            start=torch.zeros((), dtype=self.dtype, device=self.device),
        )
        return diagonal if self.penalty is None else diagonal + self.penalty

    def signals(self, batch: Any, weights: torch.Tensor) -> Signals:
        """Return √(wᵢ / Σ w) at each row's own loss ℓᵢ."""
        model = self.objective.model
        outputs = model.forward(batch)
        losses = model.per_sample_loss(outputs, batch)
        factor = FactoredHessian(torch.full_like(losses.detach(), self.objective.scale)[:, None, None])
        columns = Columns(factor, (weights / self.objective.weight_sum).to(losses), losses.shape)
        return Signals(losses, columns, model.mass(outputs, batch))

    def kronecker_factors(
        self, approx: str = "expand", unsupported: str = "error", verbose: int = 0
    ) -> KroneckerFactors:
        """Return the factors of each layer, of the true labels' gradients."""
        return kronecker_factors(self, approx, unsupported, verbose)

    def sample_factors(self) -> Iterator[torch.Tensor]:
        """Yield Fᵢ = gᵢᵀ (m, 1, p), with FᵢᵀFᵢ = gᵢgᵢᵀ, each row's own term without its weight."""
        for batch, _ in self.objective.batches:
            yield self._gradients(batch)[:, None]

    def _factor_of(self, batch: Any, weights: torch.Tensor) -> torch.Tensor:
        return self._gradients(batch) * (weights / self.objective.weight_sum).sqrt()[:, None]

    def _gradients(self, batch: Any) -> torch.Tensor:
        return self.objective.scale * gradient_rows(self.objective.model, batch)
