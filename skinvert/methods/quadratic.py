"""Certified gᵀ(A + λI)⁻¹b: solutions corrected by their true residuals, with a bound of what is left.

With A ⪰ μI on top of λ, solutions x of rows g and b, and their true residuals r = g − (A + λI)x,

.. math:: |g^T(A+λI)^{-1}b - (x_g^T b + r_g^T x_b)| = |r_g^T (A+λI)^{-1} r_b| ≤ ‖r_g‖‖r_b‖ / μ.

A is that of exact arithmetic: residuals are computed in float64 from the same parameters and data, whatever the dtype
of the solutions. What float64 rounds is added to the bound: dot products of p terms by p·u of their sum of magnitudes,
whatever the order of summation (Higham 2002, eq. 3.5), with u = 2⁻⁵³; a product A x, which no formula bounds for all
models, by ``rounding`` · ‖x‖: see ``rounding_of``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .._memory import rows_within
from .._progress import progress_by
from .._scaling import far_exponents, norms, times_powers
from ..operators import LinearOperator, Shifted
from ..operators.bases import rounding

if TYPE_CHECKING:
    from .base import InverseOperator

__all__ = ["Certificate", "QuadraticForms", "SolvedRows", "rounding_of"]

# Rows with magnitudes beyond 2 ** ± this are solved on another scale.
NEAR = {torch.float32: 64, torch.float64: 400}
# A product with A is taken to be this many times further from exact than what makes a null eigenvalue non-zero.
SAFETY = 8
EPS = torch.finfo(torch.float64).eps
# Numbers (k, p) of float64 that a chunk of rows holds: rows, solutions, residuals, products and their scaled copies.
HELD = 10


@dataclass(frozen=True)
class QuadraticForms:
    """gᵀ(A + λI)⁻¹b, each within bounds that hold for the exact A.

    Parameters
    ----------
    values : tensor or array of shape (q, k) or (k,), float64
        The corrected values.
    bounds : tensor or array of the same shape
        How far above ``values`` the exact ones may lie; NaN where no eigenvalue bound of A + λI is known.
    below : tensor or array of the same shape
        How far below: ``bounds`` for pairs; for bᵀ(A + λI)⁻¹b, which its value never exceeds, rounding alone.

    Examples
    --------
    >>> forms = QuadraticForms(torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([0.0]))
    >>> forms.lower, forms.upper
    (tensor([2.]), tensor([2.5000]))
    """

    values: Any
    bounds: Any
    below: Any

    @property
    def lower(self) -> Any:
        """``values - below``: the exact ones are not smaller."""
        return self.values - self.below

    @property
    def upper(self) -> Any:
        """``values + bounds``: the exact ones are not larger."""
        return self.values + self.bounds

    def times(self, powers: torch.Tensor) -> QuadraticForms:
        """Return all times 2 ** powers."""
        return QuadraticForms(*(torch.ldexp(part, powers) for part in (self.values, self.bounds, self.below)))


@dataclass(frozen=True)
class SolvedRows:
    """Rows, their solutions, and what is left of them: all that a bound needs.

    Parameters
    ----------
    B, X, R : tensor of shape (k, p), float64
        Rows, solutions, and the residuals b − (A + λI)x as computed.
    error : tensor of shape (k,)
        Bound of what rounding made of R.
    """

    B: torch.Tensor
    X: torch.Tensor
    R: torch.Tensor
    error: torch.Tensor

    @classmethod
    def unsolved(cls, B: torch.Tensor) -> SolvedRows:
        """Return rows with x = 0, whose residuals are they themselves."""
        return cls(B, B.new_zeros(1, 1).expand(B.shape), B, B.new_zeros(len(B)))

    @property
    def residual(self) -> torch.Tensor:
        """Upper bound (k,) of the true ‖r‖."""
        return norms(self.R) * (1 + self.dots) + self.error

    @property
    def dots(self) -> float:
        """(p + 4)·u/(1 − …): the rounding of a dot product, relative to its sum of magnitudes."""
        p = self.B.shape[1] + 4
        u = torch.finfo(torch.float64).eps / 2
        return p * u / (1 - p * u)

    def rows(self, chosen: torch.Tensor | slice) -> SolvedRows:
        """Return those of some rows."""
        return SolvedRows(self.B[chosen], self.X[chosen], self.R[chosen], self.error[chosen])

    def with_rows(self, chosen: torch.Tensor, anew: SolvedRows) -> SolvedRows:
        """Return these with some rows replaced."""
        parts = [(self.B, anew.B), (self.X, anew.X), (self.R, anew.R), (self.error, anew.error)]
        return SolvedRows(*(whole.index_copy(0, chosen, part) for whole, part in parts))


class Certificate:
    """What certifies quadratic forms of an inverse: the exact A + λI in float64, its rounding, and μ.

    Made once for many calls: it costs four products, and in float32 a pass over the data for A in float64.

    Parameters
    ----------
    inverse : InverseOperator
        Solves; its ``truth`` judges.

    Attributes
    ----------
    operator : LinearOperator or None
        The exact A + λI, in float64; None where it is not at hand: values are then uncorrected, and bounds NaN.
    floor : float
        μ > 0, or NaN.
    rounding : float
        ‖computed (A + λI)x − exact‖ ≤ ``rounding`` · ‖x‖.

    Examples
    --------
    The diagonal of A = [[2, 1], [1, 2]] solves it roughly; the exact bᵀA⁻¹b of b = (1, 0) is 2/3.

    >>> from skinvert.methods import Diagonal
    >>> from skinvert.operators import LowRank
    >>> A = LowRank(torch.ones(1, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    >>> forms = Certificate(Diagonal().invert(A, 0.0)).own(torch.tensor([[1.0, 0.0]]))
    >>> forms.lower, forms.upper
    (tensor([0.4800], dtype=torch.float64), tensor([0.6800], dtype=torch.float64))
    """

    def __init__(self, inverse: InverseOperator) -> None:
        # Its own judgement costs a product, and is of less.
        self.inverse = inverse.unjudged() if inverse.approximate else inverse
        self.operator = inverse.truth
        floor = inverse.lower_bound
        self.floor = floor if floor > 0 else math.nan
        self.rounding = math.nan if self.operator is None else rounding_of(self.operator)

    def solved(self, B: torch.Tensor, X: torch.Tensor | None = None) -> SolvedRows:
        """Return rows B (k, p) with solutions and residuals: those given, else the inverse's, each times a number.

        The number is that which makes ‖r‖ least, about 1 where the method solves and less where it overstates: no
        bound is above that of x = 0.
        """
        rows = SolvedRows.unsolved(B.double())
        if X is None:
            return self.improved(rows)
        if self.operator is None:
            return self._unjudged(rows, X.double())
        Y = self.operator.apply(X.double())
        return replace(rows, X=X.double(), R=rows.B - Y, error=self.rounding * norms(X) + EPS * norms(rows.B))

    def improved(self, solved: SolvedRows) -> SolvedRows:
        """Return rows with a solve of their residuals s added, x + αs: α is where ‖r‖ is least. One exact product."""
        S = self._solutions(solved.R)
        if self.operator is None:
            return self._unjudged(solved, S)
        Y = self.operator.apply(S)
        length = (solved.R * Y).sum(1) / Y.square().sum(1)
        # Of what overflows, or is zero, nothing: the bound holds for every x.
        length = torch.where(torch.isfinite(length), length, 0.0)[:, None]
        S, Y = (torch.where(length == 0, 0.0, length * part) for part in (S, Y))
        X = solved.X + S
        error = solved.error + self.rounding * (norms(S) + norms(X)) + 2 * EPS * (norms(solved.R) + norms(Y))
        return SolvedRows(solved.B, X, solved.R - Y, error)

    def refined(self, solved: SolvedRows, target: torch.Tensor | float, maxiter: int = 100) -> SolvedRows:
        """Return solutions ``improved`` until ‖r‖ ≤ target, or falls by less than a hundredth.

        A round costs one exact product and one solve of the rows that are still open. Solutions and residuals are in
        float64, and so may come nearer than the dtype of the solves.

        Parameters
        ----------
        solved : SolvedRows
            Where to start.
        target : float or tensor of shape (k,)
            Absolute, for each row.
        maxiter : int, default=100
            Most rounds.
        """
        target = torch.as_tensor(target, dtype=torch.float64, device=solved.B.device).expand(len(solved.B))
        left = torch.nonzero(solved.residual > target)[:, 0]
        for _ in range(maxiter):
            if not len(left):
                break
            old = solved.rows(left)
            new = self.improved(old)
            better, goes_on = new.residual < old.residual, new.residual < 0.99 * old.residual
            solved = solved.with_rows(left[better], new.rows(better))
            left = left[goes_on & (new.residual > target[left])]
        return solved

    def own(self, B: torch.Tensor) -> QuadraticForms:
        """Return bᵀ(A + λI)⁻¹b (k,) of rows b, in chunks."""
        chunks = progress_by(self._chunks(B), len, "quadratic forms", self.inverse.verbose, len(B))
        parts = [self.own_of(self.solved(rows)) for rows in chunks]
        return QuadraticForms(*(torch.cat([vars(part)[name] for part in parts]) for name in FIELDS))

    def own_of(self, solved: SolvedRows) -> QuadraticForms:
        """Return bᵀ(A + λI)⁻¹b (k,) of solved rows: bᵀx + xᵀr, and at most ‖r‖²/μ more."""
        values = (solved.B * solved.X).sum(1) + (solved.X * solved.R).sum(1)
        x, slack = norms(solved.X), 1 + 4 * solved.dots
        below = slack * (solved.error * x + solved.dots * x * (norms(solved.B) + norms(solved.R)))
        # What is inverted is positive definite where μ is known; else a form may lie on either side.
        bounds = slack * solved.residual.square() / self.floor + below
        return QuadraticForms(values, bounds, torch.where(bounds.isnan(), torch.nan, below))

    def pairs(self, G: torch.Tensor, B: torch.Tensor, one_sided: bool = False) -> QuadraticForms:
        """Return gᵀ(A + λI)⁻¹b (q, k) of all pairs of rows, the longer side in chunks."""
        if len(G) > len(B) and not one_sided:
            return _transposed(self.pairs(B, G))
        held = self.solved(G)
        found = [torch.empty(len(G), len(B), dtype=torch.float64, device=G.device) for _ in range(2)]
        start = 0
        for rows in progress_by(self._chunks(B, len(G)), len, "quadratic forms", self.inverse.verbose, len(B)):
            other = SolvedRows.unsolved(rows.double()) if one_sided else self.solved(rows)
            part = self.pairs_of(held, other)
            columns = slice(start, start := start + len(rows))
            found[0][:, columns], found[1][:, columns] = part.values, part.bounds
        return QuadraticForms(found[0], found[1], found[1])

    def pairs_of(self, g: SolvedRows, b: SolvedRows) -> QuadraticForms:
        """Return x_gᵀb + r_gᵀx_b (q, k) of solved rows, and ‖r_g‖‖r_b‖/μ with what rounds."""
        values = g.X @ b.B.mT + g.R @ b.X.mT
        x, slack = norms(b.X), 1 + 4 * g.dots
        bounds = torch.outer(g.residual, b.residual) / self.floor
        bounds += torch.outer(g.error + g.dots * norms(g.R), x) + g.dots * torch.outer(norms(g.X), norms(b.B))
        bounds *= slack
        return QuadraticForms(values, bounds, bounds)

    def _unjudged(self, rows: SolvedRows, X: torch.Tensor) -> SolvedRows:
        return SolvedRows(rows.B, X, torch.zeros_like(X), torch.full_like(rows.error, torch.nan))

    def _solutions(self, B: torch.Tensor) -> torch.Tensor:
        """Return the solutions, float64, of rows in float64, solved in the inverse's dtype on a scale that it holds."""
        powers = far_exponents(B, NEAR[self.inverse.dtype])
        inverse = self.inverse.scale_free() if bool(powers.any()) else self.inverse
        X = inverse.solve(times_powers(B, -powers).to(self.inverse.dtype)).x
        return times_powers(X.double(), powers)

    def _chunks(self, B: torch.Tensor, pairs: int = 0) -> Iterator[torch.Tensor]:
        """Yield rows, at least one chunk, by so many as fit the working memory with what is made of them."""
        yield from B.split(rows_within(8 * (HELD * B.shape[1] + 3 * pairs), max(1, len(B))))


FIELDS = ("values", "bounds", "below")


def rounding_of(operator: LinearOperator) -> float:
    """Return ε with ‖computed A x − exact‖ ≤ ε‖x‖: 8 (10 + √(p + n))·eps·‖A‖_F, from four random rows.

    A sum of m terms rounds to at most m·eps/2 of their magnitudes, and as a rule to √m·eps/2 of them: here p of a row
    and n of the data, of which (10 + √m)·eps is taken 8 times. No formula holds for every network: of all models and
    curvatures of the tests, products differ from those of another program by less than a hundredth of this, and of
    100,000 rows from those in 80-bit arithmetic. ‖A‖_F ≈ √p ‖Az‖/‖z‖ of random rows z; the largest of four counts.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    Z = torch.randn(4, operator.size, dtype=torch.float64, generator=generator, device="cpu").to(operator.device)
    size = float((norms(operator.apply(Z)) / norms(Z)).max()) * operator.size**0.5
    return SAFETY * rounding(operator.size + _summed(operator), torch.float64) * size


def _summed(operator: LinearOperator) -> int:
    """Return over how many rows of data an operator sums, as far as it says."""
    if isinstance(operator, Shifted):
        return _summed(operator.operator)
    if "minibatch" in operator.faces:
        return operator.n_samples
    return 0 if operator.factor_shape is None else operator.factor_shape[0]


def _transposed(forms: QuadraticForms) -> QuadraticForms:
    bounds = forms.bounds.mT
    return replace(forms, values=forms.values.mT, bounds=bounds, below=bounds)
