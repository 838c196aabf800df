"""The curvature of linear least squares on plain rows: H = Σ wᵢ xᵢxᵢᵀ / Σ wᵢ."""

from __future__ import annotations

import math

import torch

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

    Examples
    --------
    >>> Gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).to_dense()
    tensor([[ 5.,  7.],
            [ 7., 10.]])
    """

    def __init__(self, X: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        ones = torch.ones(len(X), dtype=X.dtype, device=X.device)
        shares = ones / len(X) if weights is None else weights / weights.sum()
        super().__init__(X * shares.sqrt()[:, None])
        self.shares = shares

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
