"""The curvature of linear least squares on plain rows: H = Σ wᵢ xᵢxᵢᵀ / Σ wᵢ."""

from __future__ import annotations

import math

import torch

from .._check import must_be
from .._scaling import norms
from ..operators import LowRank

__all__ = ["Gram"]


class Gram(LowRank):
    r"""H = Σᵢ wᵢ xᵢxᵢᵀ / Σᵢ wᵢ of rows X (n, p), the Hessian of ½ mean (xᵢᵀθ − yᵢ)².

    On rows of per-sample gradients it *is* the empirical Fisher.

    Parameters
    ----------
    X : tensor of shape (n, p)
        Rows; never written to.
    weights : tensor of shape (n,) or None
        Sample weights.
    total : float, default=None
        Σ wᵢ, where these are some of the rows; None is theirs.

    Examples
    --------
    >>> Gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).to_dense()
    tensor([[ 5.,  7.],
            [ 7., 10.]])
    """

    def __init__(self, X: torch.Tensor, weights: torch.Tensor | None = None, total: float | None = None) -> None:
        if weights is None:
            weights, total = torch.ones(len(X), dtype=X.dtype, device=X.device), total or len(X)
        shares = weights / (weights.sum() if total is None else total)
        super().__init__(X * shares.sqrt()[:, None])
        self.shares = shares
        _check_range(self.rows)

    @property
    def n_samples(self) -> int:
        """Number n of rows."""
        return len(self.rows)

    def minibatch(self, rows: torch.Tensor) -> LowRank:
        """Return an unbiased estimate of H from the rows of these indices (m,): their sum times n/m."""
        return LowRank(math.sqrt(self.n_samples / len(rows)) * self.rows[rows.to(self.device)])

    def gradient_rows(self, verbose: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return X (n, p), zero where the weight is, and wᵢ/Σw (n,)."""
        scale = torch.where(self.shares > 0, self.shares.rsqrt(), 0.0)
        return self.rows * scale[:, None], self.shares


def _check_range(rows: torch.Tensor) -> None:
    """Raise where squares of the rows leave the range of their dtype, or its normal numbers."""
    if not rows.numel():
        return
    limits, largest, size = torch.finfo(rows.dtype), float(rows.flatten().norm(torch.inf)), float(norms(norms(rows)))
    least, most = (limits.tiny / limits.eps) ** 0.5, limits.max**0.5
    if 0 < largest < least or size > most:
        must = f"such that squares are within the range of {rows.dtype}: its largest entry in [{least:.1g}, {most:.1g}]"
        more = "dtype=torch.float64, or " if rows.dtype == torch.float32 else ""
        hint = f"Try {more}other units: where X is multiplied by c, λ is by c²."
        raise ValueError(must_be("X / √n", must, f"{largest:.3g}", hint))
