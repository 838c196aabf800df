"""Conjugate gradients row by row: one batched recurrence, in which every row stops on its own residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .._scaling import norms
from .krylov import check_finite

__all__ = ["REFRESH", "CGState", "RowRun"]

# Iterations between two recomputations of r: the recurrence drifts in float32.
REFRESH = 50

Products = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class CGState:
    """What a run of conjugate gradients, row-wise or by blocks, knows of its right-hand sides.

    Attributes
    ----------
    rows : tensor of int
        Which are still under way.
    x0, R0 : tensor of shape (k, p) or None
        Where to start, which becomes X, and B − A x there.
    tolerance : tensor of shape (k,), float64
        Of ‖b − Ax‖.
    true : tensor of shape (k,), float64
        ‖b − Ax‖ of each row that has left, recomputed at its last iterate; NaN for the others.
    floor : tensor of shape (k,), float64
        Below it the recurrence has no digit of r left: it is rounding of the residual that it began with.
    n_products : int
        Products of one row with A so far.
    """

    products: Products
    B: torch.Tensor
    x0: torch.Tensor | None
    tolerance: torch.Tensor
    precondition: Products | None = None
    R0: torch.Tensor | None = None
    least_curvature: float = 0.0
    most_curvature: float = 0.0
    steps: int = 0
    n_products: int = 0
    n_iter: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        k = len(self.B)
        self.X = torch.zeros_like(self.B) if self.x0 is None else self.x0
        self.R = self._first_residual()
        self.n_iter = torch.zeros(k, dtype=torch.int64, device=self.B.device)
        self.negative = torch.zeros(k, dtype=torch.bool, device=self.B.device)
        self.stagnated, self.null = self.negative.clone(), self.negative.clone()
        # The true residual at a row's last check: a check that finds no better one has met the dtype's floor.
        self.best = torch.full_like(self.tolerance, torch.inf)
        self.true = torch.full_like(self.tolerance, torch.nan)
        self.rows = torch.arange(k, device=self.B.device)
        size = norms(self.R)
        self.floor = torch.finfo(self.B.dtype).eps * size
        self.leave(size <= self.tolerance, size)

    def _first_residual(self) -> torch.Tensor:
        if self.x0 is None:
            return self.B.clone()
        if self.R0 is None:
            return self.B - self.apply(self.X)
        self.n_products += len(self.B)
        return self.R0.clone()

    def claims(self) -> torch.Tensor:
        """Return which of the rows under way the recurrence believes to be done, or can tell no more of."""
        return norms(self.R[self.rows]) <= torch.maximum(self.tolerance, self.floor)[self.rows]

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products with the rows of V, and count them."""
        self.n_products += len(V)
        return self.products(V)

    def preconditioned(self, R: torch.Tensor) -> torch.Tensor:
        """Return M⁻¹ r for each row of R."""
        return R if self.precondition is None else self.precondition(R)

    def check(self, candidate: torch.Tensor) -> torch.Tensor:
        """Recompute r where a row claims to be done, and for all now and then; done is who truly is.

        Returns which of the rows under way take up the true residual, and must restart from it.
        """
        restart = torch.zeros_like(candidate)
        refresh = self.steps % REFRESH == 0
        which = torch.ones_like(candidate) if refresh else candidate
        rows = self.rows[which]
        if not len(rows):
            return restart
        R = self.B[rows] - self.apply(self.X[rows])
        size = norms(R)
        # A drifted recurrence is near the floor too; a new r with the old directions would diverge.
        claims = candidate[which] | (size > 2 * norms(self.R[rows]))
        self.R[rows[claims]] = R[claims]
        done = size <= self.tolerance[rows]
        stuck = claims & ~done & (size > 0.5 * self.best[rows])
        self.best[rows[claims]] = size[claims]
        self.floor[rows[claims]] = torch.finfo(R.dtype).eps * size[claims]
        self.stagnated[rows[stuck]] = True
        restart[which] = claims
        leaving, sizes = torch.zeros_like(candidate), torch.zeros_like(self.tolerance[self.rows])
        leaving[which], sizes[which] = done | stuck, size
        self.leave(leaving, sizes)
        return restart[~leaving]

    def leave(self, leaving: torch.Tensor, true: torch.Tensor | None = None) -> None:
        """Take rows out, with the norms of their true residuals where these are known."""
        if true is not None:
            self.true[self.rows[leaving]] = true[leaving]
        self.rows = self.rows[~leaving]


class RowRun(CGState):
    """Each row with its own directions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Z, self.rz, _ = self._descent(self.R)
        self.P = Z.clone()

    def step(self) -> None:
        """Advance all rows under way by one iteration."""
        P = self.P[self.rows]
        AP = self.apply(P)
        curvature = (P * AP).sum(1)
        check_finite("cg", curvature, self.steps)
        size = P.square().sum(1)
        good = self._judge(curvature / size, AP.square().sum(1) / size)
        if not bool(good.all()):
            P, AP, curvature = P[good], AP[good], curvature[good]
            self.leave(~good)
        if len(self.rows):
            self._advance(P, AP, curvature)

    def _descent(self, R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return Z = M⁻¹R, rᵀz, and where z = r instead, as rounding has made M indefinite."""
        Z = self.preconditioned(R)
        rz = (R * Z).sum(1)
        # Not (a ≤ b): NaN compares false.
        plain = ~(rz > 0)
        if self.precondition is not None and bool(plain.any()):
            Z = torch.where(plain[:, None], R, Z)
            rz = torch.where(plain, R.square().sum(1), rz)
        return Z, rz, plain

    def _judge(self, quotient: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Tell rows that can go on from those that met a null or a negative direction."""
        self.most_curvature = max(self.most_curvature, float(quotient.abs().max()))
        eps = torch.finfo(quotient.dtype).eps * self.most_curvature
        small = quotient <= 10 * eps
        # (Ap)² ≤ |A| pᵀAp where A is positive semi-definite: a vanishing pᵀAp without a vanishing Ap proves it is not.
        null = small & (quotient >= -100 * eps) & (image <= 1e4 * eps * self.most_curvature)
        negative = small & ~null
        if bool(negative.any()):
            self.least_curvature = min(self.least_curvature, float(quotient.min()))
            self.negative[self.rows[negative]] = True
        self.stagnated[self.rows[null]] = self.null[self.rows[null]] = True
        return ~(negative | null)

    def _advance(self, P: torch.Tensor, AP: torch.Tensor, curvature: torch.Tensor) -> None:
        rows, rz = self.rows, self.rz[self.rows]
        alpha = (rz / curvature)[:, None]
        self.X[rows] += alpha * P
        self.R[rows] -= alpha * AP
        self.steps += 1
        self.n_iter[rows] += 1
        before = self.rows
        restart = self.check(self.claims())
        if len(self.rows) < len(before):
            stays = torch.isin(before, self.rows)
            P, rz = P[stays], rz[stays]
        R = self.R[self.rows]
        Z, new, plain = self._descent(R)
        beta = torch.where(restart | plain, 0.0, new / rz)
        self.P[self.rows], self.rz[self.rows] = Z + beta[:, None] * P, new
