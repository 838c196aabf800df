"""The covariance of trained parameters and of outputs, and the evidence, from a fitted inverse of H + λI."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from ._check import check_choice, check_number, must_be
from ._memory import check_memory, rows_within
from ._types import Array
from .curvature import Curvature, Objective, Sharded, jacobian_rows, split_batch
from .data import Batches
from .methods.base import InverseOperator
from .models import TorchTwiceDifferentiable
from .operators import LinearOperator

__all__ = ["KINDS", "OUTPUTS", "checked_dispersion", "evidence", "output_variances", "parameter_covariance"]

KINDS = ("hessian", "sandwich")
OUTPUTS = ("each", "joint")
# Matrices of p × p: the inverse, the middle, their product and its transpose.
COPIES = 4


def parameter_covariance(inverse: InverseOperator, A: LinearOperator, kind: str, share: float) -> np.ndarray:
    """Return (p, p): ``share`` times the inverse for ``"hessian"``, else A⁻¹ (Σ wᵢ²gᵢgᵢᵀ / (Σw)²) A⁻¹."""
    check_choice(kind, "kind", KINDS)
    p = inverse.size
    way_out = "Try `predictive_variance`, `sample`, or fewer parameters with `params`."
    what = f"A covariance of p = {p:,} parameters"
    check_memory(COPIES * p**2 * inverse.dtype.itemsize, what, way_out, inverse.device)
    bread = inverse.solve(torch.eye(p, dtype=inverse.dtype, device=inverse.device)).x
    found = share * bread if kind == "hessian" else bread.mT @ _meat(A) @ bread
    return ((found + found.mT) / 2).cpu().numpy()


def checked_dispersion(dispersion: float | str, A: LinearOperator | None) -> float:
    """Return φ: a number, or by ``"residual"`` the estimate 2 Σ wᵢℓᵢ / (c Σ wᵢ − p) for squared errors.

    Without A, a number alone.
    """
    if not isinstance(dispersion, str):
        return check_number(dispersion, "dispersion", low=float(np.finfo(np.float64).tiny))
    check_choice(dispersion, "dispersion", ["residual"], "A number is taken too.")
    if A is None:
        hint = "One for all λ that are compared: an estimate would be another at each."
        raise ValueError(must_be("dispersion", "a number for log_evidence", repr(dispersion), hint))
    objective = objective_of(A, 'dispersion="residual"')
    loss = objective.model.loss
    if loss is None or not loss.squares_residuals:
        hint = "Give a number: 1 for a negative log-likelihood."
        raise ValueError(must_be("dispersion", "a number for this loss", repr(dispersion), hint))
    batch, _ = next(iter(objective.batches))
    outputs = objective.model.forward(curvature_of(A).data_of(batch))
    left = objective.weight_sum * outputs[0].numel() - objective.size
    if not left > 0:
        must = f"more than the {objective.size} parameters"
        raise ValueError(must_be('The residuals for dispersion="residual"', must, left + objective.size))
    return 2 * _total_loss(A) / left


def evidence(inverse: InverseOperator, A: LinearOperator, dispersion: float) -> float:
    """Return Laplace's log evidence: −N Σ wᵢℓᵢ/Σw − ½ Σ δθ² + ½ Σ log δ − ½ log det(N (H + λI))."""
    objective = objective_of(A, "log_evidence")
    factor = objective.n_observed / dispersion
    prior = torch.full((objective.size,), inverse.hessian_perturbation, dtype=torch.float64, device=objective.device)
    if objective.penalty is not None:
        prior += objective.penalty
    if not bool((prior > 0).all()):
        n, hint = int((prior <= 0).sum()), "Their prior is flat. Try hessian_perturbation > 0, or leave them out."
        raise ValueError(must_be("λ + penalty for log_evidence", "> 0 for every parameter", f"0 for {n}", hint))
    prior *= factor
    theta = torch.cat([tensor.detach().reshape(-1) for tensor in objective.model.theta]).double()
    log_det = inverse.log_det() + objective.size * math.log(factor)
    fit = -factor * _total_loss(A) / objective.weight_sum
    return fit - 0.5 * float((prior * theta.square()).sum()) + 0.5 * float(prior.log().sum()) - 0.5 * log_det


def output_variances(
    inverse: InverseOperator, model: TorchTwiceDifferentiable, batches: Batches, share: float, outputs: str
) -> torch.Tensor:
    """Return diag(J A⁻¹ Jᵀ) (n, c) of every row's Jacobian J (c, p), or the whole of it (n, c, c), times ``share``."""
    form = {"each": "mcp,mcp->mc", "joint": "mcp,mdp->mcd"}[check_choice(outputs, "outputs", OUTPUTS)]
    inverse, parts = inverse.unjudged(), []
    for batch, weights in batches:
        first, _ = next(split_batch(batch, weights, 1))
        numbers = 5 * model.forward(first)[0].numel() * inverse.size
        for rows, _ in split_batch(batch, weights, rows_within(numbers * inverse.dtype.itemsize, len(weights))):
            J = jacobian_rows(model, rows)
            Z = inverse.solve(J.flatten(0, 1)).x.view_as(J)
            parts.append(share * torch.einsum(form, J, Z))
    return torch.cat(parts)


def curvature_of(A: LinearOperator | None) -> Curvature:
    """Return a curvature of a model, of this process's rows; TypeError for another operator."""
    A = A.local if isinstance(A, Sharded) else A
    if not isinstance(A, Curvature):
        hint = "Fit with a model: `fit(model, (X, y))`."
        raise TypeError(must_be("The curvature", "that of a model", type(A).__name__, hint))
    return A


def objective_of(A: LinearOperator | None, what: str) -> Objective:
    """Return the objective of a curvature, which has losses and gradients by row; TypeError where there is none."""
    objective = A.objective if isinstance(A, Sharded) else curvature_of(A).objective
    if not isinstance(objective, Objective):
        must, hint = "one with per-sample losses", "Subclass TorchTwiceDifferentiable."
        raise TypeError(must_be(f"The model for {what}", must, type(objective).__name__, hint))
    return objective


def _meat(A: LinearOperator) -> torch.Tensor:
    """Return Σ wᵢ² gᵢgᵢᵀ / (Σw)² (p, p)."""
    curvature = curvature_of(A)
    objective = objective_of(curvature, 'kind="sandwich"')

    def own() -> torch.Tensor:
        total = torch.zeros(A.shape, dtype=A.dtype, device=A.device)
        for batch, weights in _in_chunks(objective):
            rows = objective.gradients(curvature.data_of(batch)) * (weights / objective.weight_sum)[:, None]
            total.addmm_(rows.mT, rows)
        return total

    return _of_all(A, own, "the squares of the gradients")


def _total_loss(A: LinearOperator | None) -> float:
    """Return Σ wᵢℓᵢ, without the penalty."""
    curvature = curvature_of(A)
    objective = objective_of(curvature, "its loss")

    def own() -> torch.Tensor:
        losses = (
            float((objective.losses(curvature.data_of(batch)).detach().double() * weights).sum())
            for batch, weights in objective.batches
        )
        return torch.tensor(math.fsum(losses), dtype=torch.float64, device="cpu")

    return float(_of_all(A, own, "the loss"))


def _of_all(A: LinearOperator | None, own: Callable[[], torch.Tensor], step: str) -> torch.Tensor:
    """Return what this process's rows add up to, or where several share a curvature those of all."""
    return A.ranks.summed(step, lambda: [own()])[0] if isinstance(A, Sharded) else own()


def _in_chunks(objective: Objective) -> Iterator[tuple[Array, torch.Tensor]]:
    """Yield the data in chunks of rows whose gradients fit the working memory."""
    size = rows_within(3 * objective.size * objective.dtype.itemsize)
    for batch, weights in objective.batches:
        yield from split_batch(batch, weights, size)
