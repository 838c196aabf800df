"""Jackknife+ intervals: predictions without each training row, and the residuals of these rows there."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from .._memory import check_memory
from ..data import batches_of, with_any_targets
from ..models import map_tensors
from .families import predicted
from .fitted import Fitted
from .left_out import own_outputs
from .measurements import RowMeasurement
from .sides import RowSide

__all__ = ["jackknife_plus"]

OUTPUT = RowMeasurement("output", lambda _, outputs, __: outputs.reshape(len(outputs)))


def jackknife_plus(fitted: Fitted, X: object, alpha: float) -> torch.Tensor:
    """Return the intervals (n_test, 2)."""
    first, _ = next(iter(fitted.objective.batches))
    # A loss without one real output is told of before the work.
    with torch.no_grad():
        mean = predicted(fitted.model, fitted.model.forward(map_tensors(torch.clone, first)).detach(), first)
    test, n = _side(fitted, X), fitted.training.count
    now, way_out = test.values(), "Try fewer test rows at a time."
    check_memory(3 * n * test.count * now.itemsize, f"{n:,} × {test.count:,} predictions", way_out, now.device)
    outputs = now.new_empty(test.count, n)
    residuals, weighs = outputs.new_empty(n), torch.empty(n, dtype=torch.bool, device=outputs.device)
    for place, batch, steps in fitted.remove().parts(fitted.most):
        residuals[place] = (batch[1] - mean(own_outputs(fitted, batch, steps))).abs().reshape(-1)
        for rows, along in test.along(steps):
            outputs[rows, place] = now[rows, None] + along.mT
    for place, _, shares in fitted.training.parts():
        weighs[place] = shares > 0
    return _interval(mean(outputs)[:, weighs], residuals[weighs], alpha)


def _interval(predictions: torch.Tensor, residuals: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the ⌊α(n + 1)⌋-th smallest of μ₍ᵢ₎ − Rᵢ and the ⌈(1 − α)(n + 1)⌉-th of μ₍ᵢ₎ + Rᵢ, (n_test, 2)."""
    n = len(residuals)
    # By the decimal number that is meant: 0.29 · 100 is less than 29 in floating point.
    k = math.floor(Fraction(str(float(alpha))) * (n + 1))
    if k < 1:
        return predictions.new_tensor([-math.inf, math.inf]).repeat(len(predictions), 1)
    lower = (predictions - residuals).kthvalue(k, dim=1).values
    # n + 1 − ⌊α(n + 1)⌋ is ⌈(1 − α)(n + 1)⌉.
    upper = (predictions + residuals).kthvalue(n + 1 - k, dim=1).values
    return torch.stack([lower, upper], dim=1)


def _side(fitted: Fitted, X: object) -> RowSide:
    """Return test rows' outputs, which no target changes."""
    model = fitted.model.of_outputs()
    rows = batches_of(model, with_any_targets(X, model), batch_size=fitted.batch_size, needs_row_order=True)
    return RowSide(model, rows, OUTPUT, verbose=fitted.verbose)
