"""Block conjugate gradients: all rows share their directions, so that many right-hand sides need few iterations."""

from __future__ import annotations

import torch

from .._scaling import norms
from ..operators.bases import rounding
from .row_cg import CGState

__all__ = ["LEAST_ROWS", "BlockRun", "orthonormal_rows"]

# From how many rows on the products that are saved outweigh the arithmetic of a block.
LEAST_ROWS = 8


class BlockRun(CGState):
    r"""Breakdown-free block conjugate gradients.

    With directions P (r, p), r ≤ k orthonormal rows, Q = PA and S = PQᵀ:
    X ← X + (R Pᵀ S⁻¹) P, R ← R − (R Pᵀ S⁻¹) Q, P ← orth(Z − (Z Qᵀ S⁻¹) P), with Z = M⁻¹R of the rows that are still
    under way. The rank-revealing orth drops dependent directions, so S never loses rank; converged rows drop out.

    Where S is not positive definite the run gives up (``odd``), and the row-wise form goes on from its iterates: that
    one can tell the rows apart.

    References
    ----------
    Ji & Li (2017), "A breakdown-free block conjugate gradient method", Alg. 2.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.odd = False
        self.P = orthonormal_rows(self.preconditioned(self.R[self.rows]))

    def step(self) -> None:
        """Advance all rows under way by one iteration."""
        # A preconditioner that maps them to zero leaves no direction.
        self.odd = not len(self.P)
        if self.odd:
            return
        Q = self.apply(self.P)
        S = self.P @ Q.mT
        # Which row it was, and whether it is the curvature itself, rows of their own tell.
        self.odd = not bool(torch.isfinite(norms(Q)).all() & torch.isfinite(S).all())
        if self.odd:
            return
        values, vectors = torch.linalg.eigh((S + S.mT) / 2)
        self.most_curvature = max(self.most_curvature, float(values.abs().max()))
        if float(values.min()) <= 10 * torch.finfo(S.dtype).eps * self.most_curvature:
            self.odd = True
            return
        inverse = (vectors / values) @ vectors.mT
        rows = self.under_way
        alpha = (self.R[rows] @ self.P.mT) @ inverse
        self.X[rows] += alpha @ self.P
        self.R[rows] -= alpha @ Q
        self.odd = not bool(torch.isfinite(norms(self.R[rows])).all())
        if self.odd:
            return
        self.steps += 1
        self.n_iter[rows] += 1
        restart = self.check(self.claims())
        if len(self.rows):
            self._turn(Q, inverse, bool(restart.any()))

    def _turn(self, Q: torch.Tensor, inverse: torch.Tensor, restart: bool) -> None:
        Z = self.preconditioned(self.R[self.under_way])
        if not restart:
            Z = Z - ((Z @ Q.mT) @ inverse) @ self.P
        self.P = orthonormal_rows(Z)


def orthonormal_rows(Z: torch.Tensor) -> torch.Tensor:
    """Return orthonormal rows (r, p) that span the rows of Z (k, p); r is their numerical rank."""
    size = norms(Z)[:, None].to(Z)
    # Each row counts alike, however far it has converged.
    Z = (Z / size)[size[:, 0] > 0]
    if not len(Z):
        return Z
    Q, T = torch.linalg.qr(Z.mT)
    U, values, _ = torch.linalg.svd(T, full_matrices=False)
    # Not p·eps, which at p = 500,000 is 0.06 in float32: what is dropped in need costs iterations.
    kept = values > rounding(max(Z.shape), Z.dtype) * values[0]
    return (Q @ U[:, kept]).mT.contiguous()
