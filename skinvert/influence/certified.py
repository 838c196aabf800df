"""Scores with bounds of their errors, solved until these are as small as asked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.exceptions import ConvergenceWarning

from .._telling import warn
from ..methods import CG
from ..methods.quadratic import Certificate, SolvedRows
from .course import Course, Kept, Lines
from .scoring import Block, gathered
from .sides import Side

__all__ = ["Bounded", "certified_blocks"]

# Rounds of tightening: what is asked is relative to scores that the solutions themselves decide.
ROUNDS = 4
# What float64 allows a residual, of a well-conditioned A.
LEAST = 1e-13


@dataclass(frozen=True)
class Bounded:
    """|score − exact| ≤ ``solved``[i] · ``streamed``[j] of the pairs of a solved and a streamed row.

    Parameters
    ----------
    left, right : Side
        Whose rows are solved, the fewer ones, and whose are streamed.
    transposed : bool
        Whether those solved are the training rows.
    solved, streamed : tensor, float64
        Of each row of a side; NaN where it is not known.
    """

    left: Side
    right: Side
    transposed: bool
    solved: torch.Tensor
    streamed: torch.Tensor

    @classmethod
    def unknown(cls, test: Side, training: Side) -> Bounded:
        """Return bounds of which none is known yet."""
        transposed = test.count > training.count
        left, right = (training, test) if transposed else (test, training)
        parts = [
            torch.full((side.count,), torch.nan, dtype=torch.float64, device=side.model.device)
            for side in (left, right)
        ]
        return cls(left, right, transposed, *parts)

    def matrix(self) -> torch.Tensor:
        """Return the bounds (n_test, n_train)."""
        found = torch.outer(self.solved, self.streamed)
        return found.mT if self.transposed else found

    @property
    def kept(self) -> Kept:
        """What a checkpoint keeps of them."""
        return Lines({"solved": self.solved}, {"streamed": self.streamed})


def certified_blocks(
    certificate: Certificate, most: int, rtol: float, course: Course, bounds: Bounded
) -> Iterator[Block]:
    """Yield places and blocks of gᵢᵀA⁻¹bⱼ in float64, and write what bounds their errors into ``bounds``.

    Each solved row is refined until its largest bound is below ``rtol`` times the root mean square of its scores, or
    falls no more, which is warned of.
    """
    everything = slice(0, bounds.right.count)
    # A chunk's scores are held, beside its rows in float64.
    most = max(1, min(most // 2, most * bounds.left.model.num_params // max(1, bounds.right.count)))
    for rows, gradients in gathered(bounds.left, most, course.done):
        if course.knows(rows):
            continue
        places = (everything, rows) if bounds.transposed else (rows, everything)
        solved = certificate.solved(gradients)
        block = _scores(solved, bounds)
        for _ in range(ROUNDS):
            allowed = _allowed(block, bounds.streamed, rtol)
            left_over = _error(solved, certificate)
            if not bool((left_over > allowed).any()) or math.isnan(certificate.floor):
                break
            tighter = _tighter(certificate, solved, 0.9 * certificate.floor * allowed)
            if not bool((tighter.residual < solved.residual).any()):
                break
            solved = tighter
            block = _scores(solved, bounds)
        bounds.solved[rows] = _error(solved, certificate)
        _warn_of_more(bounds.solved[rows] / _allowed(block, bounds.streamed, rtol), rtol, certificate)
        yield (*places, block.mT if bounds.transposed else block)
        course.end(rows)


def _tighter(certificate: Certificate, solved: SolvedRows, target: torch.Tensor) -> SolvedRows:
    """Return solutions with ‖r‖ ≤ target (k,), or as near as they come.

    By solves of the residuals where the method inverts A itself. An approximation's own would take long, or not end:
    conjugate gradients go on from its solutions, and from whatever is left over.
    """
    if not certificate.inverse.approximate:
        solved = certificate.refined(solved, target)
    left = torch.nonzero(solved.residual > target)[:, 0]
    if not len(left) or certificate.operator is None:
        return solved
    old = solved.rows(left)
    rtol = float((target[left] / old.B.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)).min())
    inverse = CG(rtol=max(rtol, LEAST)).invert(certificate.operator, 0.0).started_at(old.X)
    with warnings.catch_warnings():
        # What is reached is told of below.
        warnings.simplefilter("ignore", ConvergenceWarning)
        new = certificate.solved(old.B, inverse.solve(old.B).x)
    better = new.residual < old.residual
    return solved.with_rows(left[better], new.rows(better))


def _scores(solved: SolvedRows, bounds: Bounded) -> torch.Tensor:
    """Return the scores (k, n) by the other side's gradients, whose norms are noted."""
    parts = []
    for place, gradients in bounds.right.gradients(bounds.right.count):
        double = gradients.double()
        bounds.streamed[place] = double.norm(dim=1) * (1 + solved.dots)
        parts.append(solved.X @ double.mT)
    return torch.cat(parts, dim=1)


def _error(solved: SolvedRows, certificate: Certificate) -> torch.Tensor:
    """Return e (k,) with |xᵀb − gᵀA⁻¹b| ≤ e ‖b‖: the residual's share over μ, and what the product rounds."""
    return (1 + 4 * solved.dots) * (solved.residual / certificate.floor + solved.dots * solved.X.norm(dim=1))


def _allowed(block: torch.Tensor, sizes: torch.Tensor, rtol: float) -> torch.Tensor:
    """Return what e (k,) may be at most."""
    largest = sizes.max()
    allowed = rtol * block.square().mean(1).sqrt() / largest
    # Where all gradients are zero, so are the scores.
    return torch.where(largest > 0, allowed, math.inf)


def _warn_of_more(excess: torch.Tensor, rtol: float, certificate: Certificate) -> None:
    if math.isnan(certificate.floor):
        if math.isfinite(rtol):
            warn(
                "The scores have no error bound: no positive lower bound of the eigenvalues of H + λI is known. Try "
                'curvature="ggn" with a hessian_perturbation > 0, or method="direct".',
                ConvergenceWarning,
            )
    elif bool((excess > 1).any()):
        count, reached = f"{int((excess > 1).sum())} of {len(excess)}", rtol * float(excess.max())
        warn(
            f"The scores of {count} rows are within {reached:.3g} of their root mean square, asked for {rtol:.3g}. "
            "Rounding, or the method, does not allow less. Try dtype=torch.float64, a larger hessian_perturbation or "
            "a more exact method.",
            ConvergenceWarning,
        )
