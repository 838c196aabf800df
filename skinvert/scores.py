"""The held-out quadratic: how well a fitted inverse serves rows that it has not seen."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning

from ._validation import must_be
from .methods.base import InverseOperator

__all__ = ["quadratic_score", "rows_score"]


def rows_score(inverse: InverseOperator, X: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    """Return the held-out quadratic of plain rows, which are their own right-hand sides: gᵢ = xᵢ, hᵢ = xᵢxᵢᵀ."""
    Z = _solve(inverse, X)
    if Z is None:
        return -float("inf")
    w = torch.ones(len(X), dtype=X.dtype, device=X.device) if weights is None else weights
    # m·zᵢᵀH̄zᵢ = Σⱼ wⱼ (xⱼᵀzᵢ)²
    total = ((Z @ X.mT).square() * w).sum(1)
    return combine((X * Z).sum(1), total, (X * Z).sum(1).square(), w)


def quadratic_score(
    inverse: InverseOperator, curvature: Any, gradients: torch.Tensor, weights: torch.Tensor, batches: Any
) -> float:
    r"""Return mean_i[ gᵢᵀzᵢ − ½ (W zᵢᵀH̄zᵢ − wᵢ zᵢᵀhᵢzᵢ) / (W − wᵢ) − ½ zᵢᵀRzᵢ ].

    Parameters
    ----------
    inverse : InverseOperator
        Fitted on other rows; zᵢ is its solution for gᵢ.
    curvature : GGN or EmpiricalFisher
        Of the held-out rows: H̄ + R, and ``sample_terms`` gives zᵢᵀhᵢzᵢ.
    gradients : tensor of shape (m, p)
        gᵢ, without the penalty.
    weights : tensor of shape (m,)
        wᵢ.
    batches : Batches
        The held-out rows.
    """
    Z = _solve(inverse, gradients)
    if Z is None:
        return -float("inf")
    penalty = curvature.penalty
    ridge = (Z.square() * penalty).sum(1) if penalty is not None else torch.zeros_like(weights)
    total = weights.sum() * ((curvature.apply(Z) * Z).sum(1) - ridge)
    own, start = [], 0
    for batch, part in batches:
        own.append(curvature.sample_terms(batch, Z[start : start + len(part)]))
        start += len(part)
    return combine((gradients * Z).sum(1), total, torch.cat(own), weights, ridge)


def combine(
    linear: torch.Tensor,
    total: torch.Tensor,
    own: torch.Tensor,
    weights: torch.Tensor,
    ridge: torch.Tensor | float = 0.0,
) -> float:
    """Return the U-statistic: a row's own curvature is left out of the mean that judges it."""
    kept = weights > 0
    if int(kept.sum()) < 2:
        raise ValueError(must_be("score's data", "at least two weighted rows", f"{int(kept.sum())} sample"))
    rest = weights.sum() - weights
    quadratic = (total - weights * own) / rest
    value = linear - 0.5 * quadratic - 0.5 * ridge
    return float((weights * value)[kept].sum() / weights[kept].sum())


def _solve(inverse: InverseOperator, rows: torch.Tensor) -> torch.Tensor | None:
    """Return the solutions, or None, with a warning, where A is not positive definite."""
    if inverse.positive_definite is not False:
        X, info = inverse.solve(rows)
        if not bool(torch.as_tensor(info.get("negative_curvature", False)).any()):
            return X
    message = "A = H + λI is not positive definite: the score is -inf. Try a larger hessian_perturbation."
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return None
