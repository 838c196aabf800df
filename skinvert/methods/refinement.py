"""The residual that refines the solutions of a float32 matrix."""

from __future__ import annotations

import torch

from ..operators import LinearOperator

__all__ = ["double_residual"]


def double_residual(
    A: LinearOperator | None, hessian_perturbation: float, B: torch.Tensor, X: torch.Tensor
) -> torch.Tensor | None:
    """Return b − (A + λI) x summed in float64 and rounded to float32; None where that is not needed, or not at hand."""
    if A is None or B.dtype != torch.float32 or "apply_double" not in A.faces:
        return None
    X = X.double()
    return (B.double() - hessian_perturbation * X - A.apply_double(X)).to(B.dtype)
