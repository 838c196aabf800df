"""Rows at θ whose values are differentiated: their gradients in chunks, and their derivatives along directions."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .._check import must_be
from .._memory import rows_within
from .._progress import progress_by
from .._types import Batch
from ..curvature import derivatives_along, gradient_rows, most_directions, split_batch
from ..data import Batches
from ..identity import signs
from ..models import TorchTwiceDifferentiable, leading_length, map_tensors
from ..models.structural_copy import structural_copy
from .measurements import Measurement, RowMeasurement, SetMeasurement, all_outputs

__all__ = ["FixedGradients", "Gradients", "RowSide", "SetSide", "Side", "Streamed", "moved"]


@dataclass
class Streamed:
    """How far directions have met the rows of a side.

    Parameters
    ----------
    rows : int, default=0
        How many they have met: they are passed over.
    forward : bool, default=True
        Whether forward mode served them so far.
    """

    rows: int = 0
    forward: bool = True


class Gradients(ABC):
    """Gradients of values vᵢ, i = 1, …, ``count``, at θ.

    Attributes
    ----------
    model : TorchTwiceDifferentiable
        At θ.
    count : int
        Number of values.
    """

    model: TorchTwiceDifferentiable

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of values."""

    @abstractmethod
    def gradients(self, most: int, start: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield which values, and their gradients (m, p), at most so many at once, without the chunks before ``start``.

        What is left out changes nothing in the others.
        """

    @abstractmethod
    def along(self, X: torch.Tensor, met: Streamed | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield which values, and their derivatives (k, m) along the rows of X (k, p), from where ``met`` has it."""


class Side(Gradients):
    """Values at θ, with their gradients, that can be had at another θ too."""

    @abstractmethod
    def values(self) -> torch.Tensor:
        """Return the values (count,)."""

    @abstractmethod
    def mixed_gradient(self) -> torch.Tensor:
        """Return the gradient (p,) of the values' sum under random signs, which are always the same.

        It tells the gradients by one pass over the rows, also where those of all add up to zero.
        """

    @abstractmethod
    def at(self, step: torch.Tensor) -> Side:
        """Return the same of θ + ``step`` (p,)."""


@dataclass(frozen=True)
class RowSide(Side):
    """One value a row, times the row's share of the weights where ``total`` is given.

    Parameters
    ----------
    model : TorchTwiceDifferentiable
        At θ.
    batches : Batches
        The rows.
    measurement : RowMeasurement
        The values.
    total : float, default=None
        Σw: a value counts wᵢ/Σw; None: 1.
    verbose : int, default=0
        1 shows a progress bar.
    """

    model: TorchTwiceDifferentiable
    batches: Batches
    measurement: RowMeasurement
    total: float | None = None
    verbose: int = 0

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.batches.n_samples

    def gradients(self, most: int, start: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the gradients in chunks, none across two batches."""
        size = min(most, rows_within(3 * self.model.num_params * self.model.dtype.itemsize))
        for place, batch, shares in self.parts(size):
            if place.stop > start:
                yield place, shares[:, None] * self.row_gradients(batch)

    def along(self, X: torch.Tensor, met: Streamed | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the derivatives: in forward mode for few directions, else from the rows' gradients."""
        met = Streamed() if met is None else met
        for place, batch, shares in self.parts():
            # The first batch decides: the others are like it.
            met.forward = met.forward and (place.start > 0 or len(X) <= most_directions(self.model, batch))
            if place.stop <= met.rows:
                continue
            found = self._forward(batch, X) if met.forward else None
            met.forward = found is not None
            yield place, (self._by_gradients(batch, X) if found is None else found) * shares

    def values(self) -> torch.Tensor:
        """Return the values."""
        found = [shares * self._values(batch) for _, batch, shares in self.parts()]
        return torch.cat(found)

    def mixed_gradient(self) -> torch.Tensor:
        """Return the gradient of the values' sum under random signs."""
        total = torch.zeros(self.model.num_params, dtype=self.model.dtype, device=self.model.device)
        own, values = signs(self.count, total), self.measurement.of(self.model)
        for place, batch, shares in self._parts(None):
            outputs = self.model.forward(map_tensors(torch.clone, batch))
            total += self.model.gradient_of((values(outputs, batch) * shares * own[place]).sum())
        return total

    def at(self, step: torch.Tensor) -> RowSide:
        """Return the same of θ + ``step``, without a bar: it is one of many."""
        return replace(self, model=moved(self.model, step), verbose=0)

    def parts(self, most: int | None = None) -> Iterator[tuple[slice, Batch, torch.Tensor]]:
        """Yield which rows, their batch and their shares (m,)."""
        parts = self._parts(most)
        yield from progress_by(parts, lambda part: len(part[2]), "rows", self.verbose, self.count)

    def _parts(self, most: int | None) -> Iterator[tuple[slice, Batch, torch.Tensor]]:
        start = 0
        for batch, weights in self.batches:
            shares = torch.ones_like(weights) if self.total is None else weights / self.total
            for rows, part in split_batch(batch, shares, len(shares) if most is None else most):
                yield slice(start, start + len(part)), rows, part
                start += len(part)

    def row_gradients(self, batch: Batch) -> torch.Tensor:
        """Return the gradients (m, p) of the rows of a batch, without their shares."""
        return gradient_rows(self.model, batch, self.measurement.of(self.model), self.measurement.name)

    def _forward(self, batch: Batch, X: torch.Tensor) -> torch.Tensor | None:
        return derivatives_along(self.model, batch, self.measurement.of(self.model), X)

    def _by_gradients(self, batch: Batch, X: torch.Tensor) -> torch.Tensor:
        size = rows_within(3 * self.model.num_params * self.model.dtype.itemsize)
        rows = split_batch(batch, torch.ones(leading_length(batch), device="cpu"), size)
        return torch.cat([X @ self.row_gradients(part).mT for part, _ in rows], dim=1)

    def _values(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return self.measurement.of(self.model)(self.model.forward(map_tensors(torch.clone, batch)), batch).detach()


@dataclass(frozen=True)
class FixedGradients(Gradients):
    """Gradients that are known.

    Parameters
    ----------
    model : TorchTwiceDifferentiable
        At θ.
    rows : tensor of shape (count, p)
        The gradients.
    """

    model: TorchTwiceDifferentiable
    rows: torch.Tensor

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def gradients(self, most: int, start: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the rows in chunks."""
        for first in range(0, len(self.rows), most):
            part = self.rows[first : first + most]
            if first + len(part) > start:
                yield slice(first, first + len(part)), part

    def along(self, X: torch.Tensor, met: Streamed | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the products with all rows."""
        if met is None or met.rows < len(self.rows):
            yield slice(0, len(self.rows)), X @ self.rows.mT


@dataclass(frozen=True)
class SetSide(Side):
    """Numbers of all the rows together: each one value.

    Parameters
    ----------
    model : TorchTwiceDifferentiable
        At θ.
    batches : Batches
        The rows.
    measurement : SetMeasurement
        The numbers.
    """

    model: TorchTwiceDifferentiable
    batches: Batches
    measurement: SetMeasurement

    @property
    def count(self) -> int:
        """How many numbers."""
        return len(self.measurement.functions)

    def gradients(self, most: int, start: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the gradient of each number, by one backward pass over the rows."""
        outputs, targets = all_outputs(self.model, self.batches)
        free = outputs.requires_grad_(True)
        for j, function in enumerate(self.measurement.functions[start:], start):
            (signal,) = torch.autograd.grad(_number(function, free, targets), free)
            yield slice(j, j + 1), self._pulled(signal)[None]

    def along(self, X: torch.Tensor, met: Streamed | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the derivatives, from the gradients."""
        for place, gradient in self.gradients(1, 0 if met is None else met.rows):
            yield place, X @ gradient.mT

    def values(self) -> torch.Tensor:
        """Return the numbers."""
        outputs, targets = all_outputs(self.model, self.batches)
        return torch.stack([_number(function, outputs, targets).detach() for function in self.measurement.functions])

    def mixed_gradient(self) -> torch.Tensor:
        """Return the gradient of the numbers' sum under random signs."""
        outputs, targets = all_outputs(self.model, self.batches)
        free = outputs.requires_grad_(True)
        numbers = torch.stack([_number(function, free, targets) for function in self.measurement.functions])
        (signal,) = torch.autograd.grad((numbers * signs(self.count, numbers)).sum(), free)
        return self._pulled(signal)

    def at(self, step: torch.Tensor) -> SetSide:
        """Return the same of θ + ``step``."""
        return replace(self, model=moved(self.model, step))

    def _pulled(self, signal: torch.Tensor) -> torch.Tensor:
        total, start = torch.zeros(self.model.num_params, dtype=self.model.dtype, device=self.model.device), 0
        for batch, weights in self.batches:
            part = signal[start : start + len(weights)]
            start += len(weights)
            total += self.model.gradient_of((self.model.forward(map_tensors(torch.clone, batch)) * part).sum())
        return total


def moved(model: TorchTwiceDifferentiable, step: torch.Tensor) -> TorchTwiceDifferentiable:
    """Return the model at θ + ``step`` (p,), by a module of its own over the same frozen tensors."""
    parts = model.layout.split(step.to(model.theta[0]))
    leaves = [(own.detach() + part).requires_grad_(True) for own, part in zip(model.theta, parts, strict=True)]
    swapped = {id(own): leaf for own, leaf in zip(model.theta, leaves, strict=True)}
    near = copy.copy(model)
    near.module = structural_copy(model.module, lambda tensor: swapped.get(id(tensor), tensor))
    near.theta = leaves
    return near


def _number(function: Measurement, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    found = function(outputs, targets)
    if not isinstance(found, torch.Tensor) or found.ndim or not bool(torch.isfinite(found.detach())):
        got = f"{found.detach()}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        raise ValueError(must_be("What measurement returns", "a finite number, as a tensor without an axis", got))
    return found
