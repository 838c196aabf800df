"""The columns of a factor at the outputs, made when they are pulled back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._memory import rows_within
from ..models import OutputHessian

__all__ = ["Columns"]


class Columns:
    """The directions √wᵢ Sᵢ eⱼ, j = 1, …, r, of a batch, made in chunks that fit the memory.

    Parameters
    ----------
    hessian : OutputHessian
        Of the m rows, with its factor S.
    weights : tensor of shape (m,)
        The w.
    shape : torch.Size
        Of the outputs, (m, ...).
    """

    def __init__(self, hessian: OutputHessian, weights: torch.Tensor, shape: torch.Size) -> None:
        self.hessian, self.roots, self.shape = hessian, weights.sqrt(), shape

    def __len__(self) -> int:
        """Return r."""
        return self.hessian.rank

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the directions (m, ...)."""
        step = rows_within(4 * self.hessian.rows * self.hessian.column_numbers * self.roots.element_size())
        for start in range(0, len(self), step):
            part = self.between(start, min(start + step, len(self)))
            for direction in part.unbind(2):
                yield direction.reshape(self.shape)

    def between(self, start: int, stop: int) -> torch.Tensor:
        """Return the directions start, …, stop − 1, flat, in columns (m, c, stop − start)."""
        return self.hessian.columns(start, stop) * self.roots[:, None, None]

    def combined(self, a: torch.Tensor) -> torch.Tensor:
        """Return Σⱼ aⱼ times the directions, (m, ...)."""
        return (self.hessian.combined(a.to(self.roots)) * self.roots[:, None]).reshape(self.shape)

    @property
    def row_numbers(self) -> int:
        """How many numbers a row takes while they are pulled back."""
        held = self.hessian.nbytes // (self.hessian.rows * self.roots.element_size())
        return held + 4 * self.hessian.column_numbers
