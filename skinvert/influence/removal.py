"""What removing training rows does to θ: to first order, or with their own curvature taken out of H too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch

from .._check import must_be
from .._memory import check_memory, rows_within
from .._types import Batch
from ..curvature import Objective, gauss_newton
from ..models import map_tensors
from .sides import RowSide

__all__ = ["FirstOrder", "Newton", "Removal", "Solve"]

# Rows (k, p) to (H + λI)⁻¹ of each.
Solve: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class Removal(ABC):
    """The change of θ where rows are left out of Σ wᵢℓᵢ / Σ wᵢ, its denominator and the penalty as they were.

    Parameters
    ----------
    side : RowSide
        The training rows' losses, each times its share wᵢ/Σw.
    solve : callable
        B (k, p) -> (H + λI)⁻¹ B.
    """

    def __init__(self, side: RowSide, solve: Solve) -> None:
        self.side, self.solve = side, solve

    @abstractmethod
    def size(self, most: int) -> int:
        """Return of how many rows, at most so many, the steps are made at once."""

    @abstractmethod
    def steps_of(self, batch: Batch, shares: torch.Tensor, start: int) -> torch.Tensor:
        """Return the change of θ (m, p) that leaving out each row of a batch makes; ``start`` is the first one's."""

    def parts(self, most: int) -> Iterator[tuple[slice, Batch, torch.Tensor]]:
        """Yield which rows, the rows, and the change of θ (m, p) that leaving out each of them makes."""
        for place, batch, shares in self.side.parts(self.size(most)):
            yield place, batch, self.steps_of(batch, shares, place.start)

    @abstractmethod
    def step(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the change of θ (p,) that leaving out all the ``rows`` (m,), indices, makes."""

    def chosen(self, rows: torch.Tensor) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Yield those of the ``rows`` that a batch has, with their shares, batch by batch, for each that has some."""
        wanted = torch.zeros(self.side.count, dtype=torch.bool, device="cpu")
        wanted[rows.cpu()] = True
        for place, batch, shares in self.side.parts():
            inside = wanted[place].nonzero()[:, 0].to(shares.device)
            if len(inside):
                yield map_tensors(lambda tensor, inside=inside: tensor[inside], batch), shares[inside]

    def summed(self, rows: torch.Tensor) -> torch.Tensor:
        """Return Σ wᵢgᵢ/Σw (p,) of the ``rows``."""
        total = torch.zeros(self.side.model.num_params, dtype=self.side.model.dtype, device=self.side.model.device)
        for batch, shares in self.chosen(rows):
            outputs = self.side.model.forward(map_tensors(torch.clone, batch))
            values = self.side.measurement.of(self.side.model)(outputs, batch)
            total += self.side.model.gradient_of((values * shares).sum())
        return total


class FirstOrder(Removal):
    """A⁻¹ wᵢgᵢ/Σw of each row: the curvature stays that of all rows.

    References
    ----------
    Koh & Liang (2017), "Understanding black-box predictions via influence functions", sec. 2.1.
    """

    def size(self, most: int) -> int:
        """Return how many gradients fit."""
        return min(most, rows_within(3 * self.side.model.num_params * self.side.model.dtype.itemsize))

    def steps_of(self, batch: Batch, shares: torch.Tensor, start: int) -> torch.Tensor:
        """Return A⁻¹ wᵢgᵢ/Σw."""
        return self.solve(shares[:, None] * self.side.row_gradients(batch))

    def step(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the sum of the rows' steps."""
        return self.solve(self.summed(rows)[None])[0]


class Newton(Removal):
    r"""(A − FᵀF)⁻¹ b, with b = Σ wᵢgᵢ/Σw and FᵀF = Σ (wᵢ/Σw) Jᵢᵀ(∇²_f ℓᵢ)Jᵢ of the rows that are left out.

    By Woodbury's identity it is x + A⁻¹Fᵀ (I − F A⁻¹Fᵀ)⁻¹ F x with x = A⁻¹b: one solve for each row of F, of which a
    training row has as many as the loss's curvature has columns at its outputs. Where the loss is quadratic in θ, as
    that of ridge regression, it is retraining itself.

    Parameters
    ----------
    side : RowSide
        The training rows' losses, each times its share wᵢ/Σw.
    solve : callable
        B (k, p) -> A⁻¹ B.
    objective : Objective
        Of the training rows.

    References
    ----------
    Rad & Maleki (2020), "A scalable estimate of the out-of-sample prediction error via approximate leave-one-out
    cross-validation", eq. 9; here for any outputs.
    """

    def __init__(self, side: RowSide, solve: Solve, objective: Objective) -> None:
        super().__init__(side, solve)
        try:
            self.ggn = gauss_newton(objective)
        except (TypeError, ValueError) as error:
            hint = 'Try removal="first_order".'
            must = "one whose rows have a curvature at the outputs"
            raise ValueError(must_be('The loss for removal="newton"', must, str(error), hint)) from error

    def size(self, most: int) -> int:
        """Return how many rows' factors fit."""
        return min(most, rows_within(3 * self.ggn.rank * self.ggn.size * self.ggn.dtype.itemsize))

    def steps_of(self, batch: Batch, shares: torch.Tensor, start: int) -> torch.Tensor:
        """Return (A − FᵢᵀFᵢ)⁻¹ wᵢgᵢ/Σw."""
        F = self.ggn.factor_of(batch, shares)
        x = self.solve(shares[:, None] * self.side.row_gradients(batch))
        Y = self.solve(F.flatten(0, 1)).reshape(F.shape)
        K = torch.eye(F.shape[1], dtype=F.dtype, device=F.device) - F @ Y.mT
        Fx = (F @ x[:, :, None]).contiguous()
        return x + (_solved(K, Fx, start).mT @ Y)[:, 0]

    def step(self, rows: torch.Tensor) -> torch.Tensor:
        """Return (A − FᵀF)⁻¹ b of all the rows together."""
        x = self.solve(self.summed(rows)[None])[0]
        R = len(rows) * self.ggn.rank
        way_out = 'Try fewer rows, or removal="first_order".'
        check_memory(
            4 * R * self.ggn.size * self.ggn.dtype.itemsize, f"A step without {len(rows)} rows", way_out, x.device
        )
        parts = [self.ggn.factor_of(batch, shares).flatten(0, 1) for batch, shares in self.chosen(rows)]
        F = torch.cat(parts) if parts else x.new_zeros(0, len(x))
        if len(F) > F.shape[1]:
            F = torch.linalg.qr(F, mode="r").R
        Y = self.solve(F)
        K = torch.eye(len(F), dtype=F.dtype, device=F.device) - F @ Y.mT
        return x + (_solved(K[None], (F @ x)[None, :, None], None)[0].mT @ Y)[0]


def _solved(K: torch.Tensor, b: torch.Tensor, start: int | None) -> torch.Tensor:
    """Return K⁻¹ b of each K (m, r, r), which must be positive definite; ``start`` is the first one's row."""
    symmetric = (K + K.mT) / 2
    L, fault = torch.linalg.cholesky_ex(symmetric)
    if bool(fault.any()):
        which = "the rows together" if start is None else f"row {start + int(fault.nonzero()[0, 0])}"
        hint = 'Try a larger hessian_perturbation, or removal="first_order".'
        must = f"positive definite without {which}"
        raise ValueError(must_be("H + λI", must, "one with a negative or zero eigenvalue", hint))
    return torch.cholesky_solve(b, L)
