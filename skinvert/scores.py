"""The held-out quadratic: how well a fitted inverse serves rows that it has not seen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import scipy.linalg
import torch
from sklearn.exceptions import ConvergenceWarning

from ._check import check_sample_weight, must_be
from ._memory import rows_within
from ._telling import warn
from ._types import State
from .curvature import held_out_curvature
from .data import batches_of
from .methods.base import InverseOperator
from .models import TwiceDifferentiable
from .reasons import Reason
from .solvers.extremes import extreme_eigenvalues

__all__ = ["HeldOut", "held_out", "held_out_rows", "quadratic_path", "quadratic_score"]


@dataclass
class HeldOut:
    """What the held-out quadratic needs of m rows.

    Parameters
    ----------
    gradients : tensor of shape (m, p)
        gᵢ, without the penalty; plain rows are their own.
    weights : tensor of shape (m,)
        wᵢ.
    penalty : tensor of shape (p,) or None
        The diagonal of R.
    sample_factors : callable or None
        Returns chunks (r, c, p) of the rows' own Fᵢ, hᵢ = FᵢᵀFᵢ; None is hᵢ = gᵢgᵢᵀ.
    """

    gradients: torch.Tensor
    weights: torch.Tensor
    penalty: torch.Tensor | None = None
    sample_factors: Callable[[], Iterable[torch.Tensor]] | None = None

    def factors(self) -> Iterable[torch.Tensor]:
        """Yield the rows' own factors in chunks (r, c, p)."""
        return [self.gradients[:, None]] if self.sample_factors is None else self.sample_factors()


def held_out(
    model: TwiceDifferentiable, curvature_name: str, data: object, batch_size: int | None, sample_weight: object
) -> HeldOut:
    """Return what a score needs of data that were not fitted, of a model and the name of the inverter's curvature."""
    batches = batches_of(model, data, batch_size=batch_size, sample_weight=sample_weight)
    curvature, gradients, weights = held_out_curvature(curvature_name, model, batches)
    return HeldOut(gradients, weights, curvature.penalty, curvature.sample_factors)


def held_out_rows(rows: torch.Tensor, sample_weight: object) -> HeldOut:
    """Return what a score needs of plain rows (m, p) that were not fitted."""
    weights = check_sample_weight(sample_weight, len(rows))
    return HeldOut(rows, rows.new_ones(len(rows)) if weights is None else torch.from_numpy(weights).to(rows))


def quadratic_score(inverse: InverseOperator, held: HeldOut, rhs: torch.Tensor | None = None) -> float:
    r"""Return the held-out quadratic of a fitted inverse; −inf, with a warning, where A is not positive definite.

    Without ``rhs`` the rows' gradients are the right-hand sides, and a row's own curvature is left out of the mean
    that judges it: mean_i[ gᵢᵀzᵢ − ½ (W zᵢᵀH̄zᵢ − wᵢ zᵢᵀhᵢzᵢ) / (W − wᵢ) − ½ zᵢᵀRzᵢ ].
    With ``rhs`` B, which is none of the rows', there is nothing to leave out: mean_b[ bᵀz − ½ zᵀ(H̄ + R)z ].

    Parameters
    ----------
    inverse : InverseOperator
        Fitted on other rows; z is its solution.
    held : HeldOut
        Gradients, weights, penalty and curvature of the held-out rows.
    rhs : tensor of shape (k, p), default=None
        Right-hand sides.
    """
    B = held.gradients if rhs is None else rhs
    definite = _positive_definite(inverse, [inverse])
    if definite == [True]:
        X, info = inverse.unjudged().solve(B)
        if not _met_negative_curvature(info):
            return _values(X[None], held, rhs)[0]
    _warn("")
    return -float("inf")


def quadratic_path(
    inverse: InverseOperator, shifts: Sequence[float], held: HeldOut, rhs: torch.Tensor | None = None
) -> list[float]:
    """Return ``quadratic_score`` at each λ of ``shifts``, by one factorisation and one pass over the held-out rows."""
    B = held.gradients if rhs is None else rhs
    with warnings.catch_warnings():
        # An indefinite λ is told of below, once.
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)
        inverses = [inverse.at(shift) for shift in shifts]
    definite = _positive_definite(inverse, inverses)
    kept = [index for index, claim in enumerate(definite) if claim]
    scores = [-float("inf")] * len(shifts)
    step = rows_within(2 * B.numel() * B.element_size())
    for start in range(0, len(kept), step):
        group = kept[start : start + step]
        X, negative = _solutions(inverse, [shifts[i] for i in group], B)
        for i, value, bad in zip(group, _values(X, held, rhs), negative, strict=True):
            scores[i] = -float("inf") if bad else value
    failed = [f"{shift:.3g}" for shift, score in zip(shifts, scores, strict=True) if score == -float("inf")]
    if failed:
        _warn(f" at hessian_perturbation={', '.join(failed)}")
    return scores


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


def _values(Z: torch.Tensor, held: HeldOut, rhs: torch.Tensor | None) -> list[float]:
    """Return the quadratic of each set of solutions, Z (n_λ, k, p)."""
    total, own = _curvature_terms(Z, held, rhs is None)
    values = []
    for i, z in enumerate(Z):
        ridge = (z.square() * held.penalty).sum(1) if held.penalty is not None else torch.zeros_like(total[i])
        if rhs is None:
            values.append(combine((held.gradients * z).sum(1), total[i], own[i], held.weights, ridge))
        else:
            values.append(float(((rhs * z).sum(1) - 0.5 * total[i] / held.weights.sum() - 0.5 * ridge).mean()))
    return values


def _curvature_terms(Z: torch.Tensor, held: HeldOut, leave_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Σᵢ wᵢ zᵀhᵢz (n_λ, k), and zᵢᵀhᵢzᵢ (n_λ, m) where row i is z's own, in one pass over the rows."""
    total, own, start = Z.new_zeros(Z.shape[:2]), Z.new_zeros(len(Z), len(held.weights)), 0
    n_rows, p = Z.shape[0] * Z.shape[1], Z.shape[2]
    matrix: torch.Tensor | None = None
    for F in held.factors():
        rows = slice(start, start + len(F))
        start = rows.stop
        if leave_out:
            for i, z in enumerate(Z):
                own[i, rows] = torch.einsum("mcp,mp->mc", F, z[rows]).square().sum(1)
        flat = (F * held.weights[rows].sqrt()[:, None, None]).flatten(0, 1)
        # The matrix of the chunk, where it costs less than products of its rows with every z.
        if p <= rows_within(2 * p * Z.element_size()) and p * len(flat) + p * n_rows < n_rows * len(flat):
            matrix = Z.new_zeros(p, p) if matrix is None else matrix
            matrix.addmm_(flat.mT, flat)
        else:
            total += torch.stack([(z @ flat.mT).square().sum(1) for z in Z])
    if matrix is not None:
        total += torch.stack([((z @ matrix) * z).sum(1) for z in Z])
    return total, own


def _solutions(inverse: InverseOperator, shifts: list[float], B: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """Return the solutions (n_λ, k, p), and at which λ negative curvature was met."""
    # The held-out rows judge an approximation; a product with the exact curvature for each λ would add nothing.
    found = inverse.unjudged().solve_path(B, shifts)
    return torch.stack([x for x, _ in found]), [_met_negative_curvature(info) for _, info in found]


def _met_negative_curvature(info: State) -> bool:
    # A method of one's own may give no reasons.
    return "reason" in info and bool((info["reason"] == Reason.NEGATIVE_CURVATURE).any())


def _positive_definite(inverse: InverseOperator, inverses: list[InverseOperator]) -> list[bool]:
    """Return whether A + λI is positive definite, of inverses of one A at several λ.

    Where the method cannot know, the smallest eigenvalue of A says so: right-hand sides may miss its direction.
    """
    known = [each.positive_definite for each in inverses]
    operator = inverse.operator
    if None not in known or operator.is_psd:
        return [claim is not False for claim in known]
    (lowest, _), _ = extreme_eigenvalues(operator)
    lowest -= inverse.hessian_perturbation
    pairs = zip(known, inverses, strict=True)
    return [claim is not False and lowest + each.hessian_perturbation > 0 for claim, each in pairs]


def _warn(where: str) -> None:
    message = f"A = H + λI is not positive definite{where}: the score is -inf. Try a larger hessian_perturbation."
    warn(message, ConvergenceWarning)
