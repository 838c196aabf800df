"""The Fisher of the labels that the model predicts: in closed form, or by labels sampled."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator

from .._check import check_number
from .._memory import working_memory
from .._state import TensorState
from .._types import Batch
from ..data import Batches
from ..models import OutputHessian, leading_length
from .base import Curvature
from .ggn import GGN
from .objective import Objective
from .predictive import SampledHessian, predictive_of

__all__ = ["Fisher", "SampledFisher"]


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
    r"""F = Σᵢ wᵢ s·E_{y∼p(·;xᵢ)}[∇log p ∇log pᵀ] / Σᵢ wᵢ + penalty, for a loss ℓ = −s·log p + const.

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

    name: ClassVar[str] = "fisher"
    of_the_loss: ClassVar[bool] = False

    def __init__(self, objective: Objective, n_labels: int | None = None, seed: int = 0) -> None:
        batch, _ = next(iter(objective.batches))
        predictive = predictive_of(objective.model, objective.model.forward(batch), batch)
        self.n_labels, self._of_data = n_labels, objective
        if n_labels is not None:
            objective = _with_draws(objective, (n_labels, predictive.labels), seed)
        super().__init__(objective)

    def in_float64(self) -> Curvature | None:
        """Return the Fisher in float64; None where labels are sampled: others may be, of probabilities in float64."""
        return super().in_float64() if self.n_labels is None or self.dtype == torch.float64 else None

    @property
    def of_data(self) -> Objective:
        """The objective over batches without draws."""
        return self._of_data

    def data_of(self, batch: Batch) -> Batch:
        """Return the model's part of a batch, which may carry its draws."""
        return batch if self.n_labels is None else batch[0]

    def closed_hessian(self, outputs: torch.Tensor, batch: Batch) -> OutputHessian:
        """Return the Fisher in the outputs: columns of sampled labels, or the closed form."""
        predictive = predictive_of(self.objective.model, outputs, self.data_of(batch))
        return predictive.fisher() if self.n_labels is None else SampledHessian(predictive, batch[1])


@dataclass
class _Drawn:
    """Batches, each with the uniform draws of its rows: the same for a row whatever the batches are."""

    batches: Batches
    shape: tuple[int, ...]
    seed: int

    def __call__(self) -> Iterator[Batch]:
        # Within the open interval in float32 too: the inverse of a distribution function is infinite at its ends.
        tiny, start = float(torch.finfo(torch.float32).eps), 0
        draws = _Draws(self.shape, self.seed)
        for batch in self.batches.raw():
            m, shard = leading_length(batch), self.batches.shard
            rows = torch.arange(start, start + m, device="cpu") if shard is None else shard.numbers(start, m)
            yield (
                batch,
                torch.from_numpy(draws.of(rows).clip(tiny, 1 - tiny)).to(self.batches.device, self.batches.dtype),
            )
            start += m


class _Draws:
    """Uniform draws, a row's own by its number: the same whoever holds the row."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.shape, self.bits, self.place = shape, np.random.PCG64(seed), 0

    def of(self, rows: torch.Tensor) -> np.ndarray:
        """Return the draws (m, *shape) of rows of these numbers (m,)."""
        numbers = rows.numpy()
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
        return np.concatenate([self._run(int(run[0]), len(run)) for run in runs if len(run)])

    def _run(self, first: int, m: int) -> np.ndarray:
        # A draw takes one step of the generator; backwards is round its whole period.
        per_row = math.prod(self.shape)
        self.bits.advance((first * per_row - self.place) % 2**128)
        self.place = (first + m) * per_row
        return np.random.Generator(self.bits).random((m, *self.shape))


def _with_draws(objective: Objective, shape: tuple[int, ...], seed: int) -> Objective:
    drawn = _Drawn(objective.batches, shape, seed)
    # Made anew on every pass where they do not fit: the generator gives the same ones.
    size = objective.batches.n_samples * math.prod(shape) * objective.dtype.itemsize
    kept = None if objective.batches.kept is None or size > working_memory() else list(drawn())
    part = copy.copy(objective)
    part.batches = replace(objective.batches, source=drawn, kept=kept)
    return part
