"""What the Krylov methods share: settings, products, starting points, and the judgement of the true residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .._validation import check_number, must_be, to_plain_array
from ..operators import LinearOperator

__all__ = ["check_settings", "default_rtol", "products_with", "starting_point", "within"]


def default_rtol(dtype: torch.dtype) -> float:
    """Return the relative tolerance of the iterative methods: 1e-5 in float32, 1e-8 in float64."""
    return 1e-5 if dtype == torch.float32 else 1e-8


def check_settings(method: Any, A: LinearOperator) -> tuple[float, float, int]:
    """Return ``rtol``, ``atol`` and ``maxiter`` (10·p, at most 1,000) of a method's settings, checked."""
    owner = type(method).__name__
    rtol = default_rtol(A.dtype) if method.rtol is None else method.rtol
    maxiter = min(10 * A.size, 1000) if method.maxiter is None else method.maxiter
    return (
        check_number(rtol, "rtol", owner=owner, low=0.0),
        check_number(method.atol, "atol", owner=owner, low=0.0),
        check_number(maxiter, "maxiter", owner=owner, low=1, integer=True),
    )


def products_with(operator: LinearOperator) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return V ↦ A v on rows: over SciPy's LinearOperator on the CPU, in torch on an accelerator."""
    if operator.device.type != "cpu":
        return operator.apply
    columns = operator.aslinearoperator()
    return lambda V: torch.from_numpy(np.ascontiguousarray(columns.matmat(V.numpy().T).T))


def starting_point(x0: Any, B: torch.Tensor, name: str = "x0") -> torch.Tensor | None:
    """Return a copy of ``x0`` for each row of B (k, p), from (k, p), (1, p) or (p,); None stays None."""
    if x0 is None:
        return None
    given = x0 if isinstance(x0, torch.Tensor) else torch.from_numpy(np.array(to_plain_array(x0, name)))
    start = given.detach().to(B)
    start = start[None] if start.ndim == 1 else start
    if start.shape not in (B.shape, (1, B.shape[1])):
        raise ValueError(must_be(name, f"of shape {tuple(B.shape)} or (1, p)", f"shape {tuple(start.shape)}"))
    if not bool(torch.isfinite(start).all()):
        raise ValueError(must_be(name, "finite", "NaN or infinity"))
    return start.expand(B.shape).clone()


def within(residual: torch.Tensor, B: torch.Tensor, rtol: float, atol: float = 0.0) -> torch.Tensor:
    """Return which relative residuals (k,) mean ‖Ax − b‖ ≤ max(rtol ‖b‖, atol)."""
    size = B.norm(dim=1).to(residual)
    # A row of zeros has its absolute residual in `residual`.
    goal = torch.where(size > 0, torch.clamp(atol / size.clamp(min=1e-300), min=rtol), atol)
    return residual <= goal
