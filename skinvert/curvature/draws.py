"""Curvatures estimated from draws: each row of the data has its own, which no batch size changes."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator

from .._check import check_number, must_be
from .._memory import working_memory
from .._state import TensorState
from .._types import Batch
from ..data import Batches
from ..models import leading_length
from .base import Curvature
from .ggn import GGN
from .objective import Objective

__all__ = ["Drawn", "Sampled", "with_draws"]


class Sampled(TensorState, BaseEstimator):
    """Settings of a curvature that is estimated from draws.

    Parameters
    ----------
    n_samples : int, default=1
        Draws a row, ≥ 1.
    random_state : int, default=None
        Seed of the draws; None is the estimator's own, and 0 without one.

    Attributes
    ----------
    curvature : str
        The name of what the mean over seeds is; on the class.
    """

    curvature: ClassVar[str]

    def __init__(self, n_samples: int = 1, *, random_state: int | None = None) -> None:
        self.n_samples = n_samples
        self.random_state = random_state

    def build(self, objective: Objective) -> Curvature:
        """Return the operator over all the data."""
        owner, seed = type(self).__name__, 0 if self.random_state is None else self.random_state
        n_samples = check_number(self.n_samples, "n_samples", owner=owner, low=1, integer=True)
        return self.drawn(objective, n_samples, check_number(seed, "random_state", owner=owner, low=0, integer=True))

    @abstractmethod
    def drawn(self, objective: Objective, n_samples: int, seed: int) -> Curvature:
        """Return the operator, of checked settings."""


class Drawn(GGN):
    """A GGN whose output Hessian may be an estimate from draws, which come beside each batch.

    Attributes
    ----------
    n_draws : int or None
        Of a row; None draws nothing.
    """

    n_draws: int | None = None
    _of_data: Objective

    def in_float64(self) -> Curvature | None:
        """Return the same in float64; None where there are draws: others may follow from outputs in float64."""
        return super().in_float64() if self.n_draws is None or self.dtype == torch.float64 else None

    @property
    def of_data(self) -> Objective:
        """The objective over batches without draws."""
        return self._of_data

    def draws_of(self, batch: Batch, count: int) -> torch.Tensor:
        """Return the draws (m, r, count) of a batch's rows; raise where the first batch's were of another number."""
        draws: torch.Tensor = batch[1]
        if draws.shape[2] != count:
            hint = "Draws have one size for all rows: pad them to one length, or try an exact curvature."
            got = f"outputs that take {count} draws a row after {draws.shape[2]}"
            raise ValueError(must_be("The outputs for a curvature by draws", "of one shape in all batches", got, hint))
        return draws

    def data_of(self, batch: Batch) -> Batch:
        """Return the model's part of a batch, which may carry its draws."""
        return batch if self.n_draws is None else batch[0]


@dataclass
class _Draws:
    """Batches, each with the draws of its rows: the same for a row whatever the batches are, and whoever holds it."""

    batches: Batches
    shape: tuple[int, ...]
    seed: int
    signs: bool

    def __call__(self) -> Iterator[Batch]:
        bits, place, start = np.random.PCG64(self.seed), 0, 0
        for batch in self.batches.raw():
            m, shard, parts = leading_length(batch), self.batches.shard, []
            rows = torch.arange(start, start + m, device="cpu") if shard is None else shard.numbers(start, m)
            for first, count in _runs(rows.numpy()):
                # To the row's own place in the sequence; backwards is round its whole period.
                bits.advance((first * self._words - place) % 2**128)
                parts.append(self._of(np.random.Generator(bits), (count, *self.shape)))
                place = (first + count) * self._words
            yield batch, torch.from_numpy(np.concatenate(parts)).to(self.batches.device, self.batches.dtype)
            start += m

    @property
    def _words(self) -> int:
        """How many numbers of the generator, of 64 bits, the draws of a row take: whole ones."""
        count = math.prod(self.shape)
        return math.ceil(count / 64) if self.signs else count

    def _of(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        if self.signs:
            rows, count = shape[0], math.prod(shape[1:])
            bits = np.frombuffer(generator.bytes(8 * rows * self._words), np.uint8).reshape(rows, -1)
            return 1 - 2 * np.unpackbits(bits, axis=1, count=count).reshape(shape).astype(np.int8)
        # Within the open interval in float32 too: the inverse of a distribution function is infinite at its ends.
        tiny = float(torch.finfo(torch.float32).eps)
        return generator.random(shape).clip(tiny, 1 - tiny)


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Return the first of numbers that follow each other, and how many do, for each run of them."""
    stops = [*(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    starts = [0, *stops[:-1]]
    return [(int(numbers[start]), stop - start) for start, stop in zip(starts, stops, strict=True)]


def with_draws(objective: Objective, shape: tuple[int, ...], seed: int, *, signs: bool = False) -> Objective:
    """Return an objective whose batches come with draws (m, *shape) in (0, 1), or of −1 and 1."""
    drawn = _Draws(objective.batches, shape, seed, signs)
    # Made anew on every pass where they do not fit: the generator gives the same ones.
    size = objective.batches.n_samples * math.prod(shape) * objective.dtype.itemsize
    kept = None if objective.batches.kept is None or size > working_memory() else list(drawn())
    part = copy.copy(objective)
    part.batches = replace(objective.batches, source=drawn, kept=kept)
    return part
