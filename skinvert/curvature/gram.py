"""The curvature of linear least squares on plain rows: H = Σ wᵢ xᵢxᵢᵀ / Σ wᵢ."""

from __future__ import annotations

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
        scale = torch.full((len(X), 1), 1 / len(X), dtype=X.dtype, device=X.device)
        if weights is not None:
            scale = (weights / weights.sum())[:, None]
        super().__init__(X * scale.sqrt())
