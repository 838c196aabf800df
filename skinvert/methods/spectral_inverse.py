"""The inverse of eigenvalues along a basis: what every method that knows a spectrum solves by."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import ClassVar, NamedTuple, Self

import scipy.linalg
import torch

from .._check import check_hessian_perturbation, finite_rows, must_be
from .._memory import rows_within
from .._storage import HERE, Storage
from .._telling import warn
from ..operators import Basis, Dense, LinearOperator, Shifted, Spectral
from ..reasons import Reason, reasons
from ..results import InverseHvpResult
from .base import InverseOperator, default_tolerance, relative_residual, warn_not_converged
from .condition import rank_in_own_units
from .definite import proven_bound
from .null_space import InvertedSpectrum, invert_spectrum

__all__ = ["SpectralInverse"]


class _Parts(NamedTuple):
    """Rows b (k, p) taken apart by a basis.

    Attributes
    ----------
    along : tensor of shape (k, r)
        Their coordinates.
    more : tensor of shape (k, r)
        What of these is still in ``across``: rounding of the first projection.
    across : tensor of shape (k, p) or None
        Their part across the basis, by one projection; None where the basis is of the whole space.
    """

    along: torch.Tensor
    more: torch.Tensor
    across: torch.Tensor | None


class SpectralInverse(InverseOperator):
    """x = Q f(θ + λ) Qᵀ b + (I − QQᵀ) b / (τ + λ), for eigenvalues θ along a basis Q; λ enters last.

    f is 1 / t. What of θ + λ counts as zero, the basis says; it is left out (the pseudo-inverse), and a right-hand side
    with a part along it is warned of. Negative ones are inverted as they are, with a warning.

    Parameters
    ----------
    basis : Basis
        Q (p, r).
    spectrum : tensor of shape (r,)
        θ.
    hessian_perturbation : float
        λ.
    name : str
        The method's.
    complement : float or None, default=None
        τ, what stands for the other p − r eigenvalues where r < p; None leaves their span out.
    source : LinearOperator or None, default=None
        A as the method inverts it, where its products do not go by the basis: they judge the solutions, and refine
        those of a float32 matrix. None is Q diag(θ) Qᵀ itself.
    hint : str, default=""
        What to try where A + λI is indefinite.
    rtol : float, default=None
        The relative residual up to which a row counts as solved, and the part of b along what is left out that is not
        warned of; None is 1e-3 in float32, else 1e-6.
    filter : {"pseudo_inverse", "damped"}, default="pseudo_inverse"
        f: of ``FILTERS``.
    storage : Storage
        Where the basis and the spectrum lie, and what is made of them for another λ is to lie.

    Examples
    --------
    >>> from skinvert.operators import Eigenvectors
    >>> basis = Eigenvectors(torch.tensor([[1.0, 0.0]]))
    >>> SpectralInverse(basis, torch.tensor([3.0]), 1.0, name="one", complement=0.0).apply(torch.tensor([[4.0, 4.0]]))
    tensor([[1., 4.]])
    """

    _fields: ClassVar[dict[str, str]] = {
        "basis": "Basis",
        "spectrum": "tensor[r]",
        "hessian_perturbation": "float",
        "name": "str",
        "complement": "float|None",
        "source": "LinearOperator|None",
        "hint": "str",
        "rtol": "float",
        "filter": "str",
        "approximate": "bool",
        "positive_definite": "bool",
        "judges": "bool|missing",
    }
    _transient = ("exact", "_inverted", "_untold", "_storage")
    # Of a pickle, or a file, all is on one device.
    _storage: Storage | None = None
    # θ + λ inverted: made anew after a load, so that no file can contradict it.
    _inverted: InvertedSpectrum | None = None
    # Whether rows that are not solved are left to the caller to tell.
    _untold: bool | None = None

    def __init__(
        self,
        basis: Basis,
        spectrum: torch.Tensor,
        hessian_perturbation: float,
        *,
        name: str,
        complement: float | None = None,
        source: LinearOperator | None = None,
        hint: str = "",
        rtol: float | None = None,
        filter: str = "pseudo_inverse",
        storage: Storage = HERE,
    ) -> None:
        if not bool(torch.isfinite(spectrum).all()):
            raise ValueError(must_be("The curvature", "finite", "NaN or infinity", "Look at the parameters."))
        self.basis, self.spectrum, self.complement, self.source = basis, spectrum, complement, source
        self.name, self.hint, self.filter, self._storage = name, hint, filter, storage
        self.rtol = default_tolerance(spectrum.dtype) if rtol is None else rtol
        self._set(hessian_perturbation)

    @property
    def operator(self) -> LinearOperator:
        """A + λI as the method inverts it; without the complement where that is left out."""
        if self.source is not None:
            return Shifted(self.source, self.hessian_perturbation)
        return Spectral(self.basis, self.inverted.values, self._rest, (self._storage or HERE).device)

    @property
    def size(self) -> int:
        """Number p of parameters."""
        return self.basis.size

    @property
    def inverted(self) -> InvertedSpectrum:
        """θ + λ, what of it counts as zero, and f of it."""
        if self._inverted is None:
            settings = self.hessian_perturbation, self.filter, self._storage or HERE
            self._inverted = invert_spectrum(self.basis, self.spectrum, *settings)
        return self._inverted

    @property
    def place(self) -> str:
        """Where ``offload`` has put its numbers."""
        return (self._storage or HERE).place

    @property
    def eigenvalues(self) -> torch.Tensor | None:
        """Those of A, ascending, where the basis is of its eigenvectors."""
        return self.spectrum if self.basis.of_curvature else None

    @property
    def all_eigenvalues(self) -> torch.Tensor | None:
        """All eigenvalues of the exact A, where these are all."""
        return self.eigenvalues if self._spans else None

    @property
    def tolerance(self) -> float:
        """``rtol``."""
        return self.rtol

    @property
    def lower_bound(self) -> float:
        """λ + min(penalty) of a semi-definite A where that is positive; of a dense matrix what Cholesky proves."""
        known, truth = super().lower_bound, self.truth
        if known > 0 or truth is None or self.approximate or not isinstance(self.source, Dense):
            return known
        return proven_bound(self.source, truth, self.hessian_perturbation)

    @property
    def preconditions(self) -> bool:
        """Whether none is negative: what is left out ``precondition`` puts back."""
        return bool(self.positive_definite) or (self._spans and not self.inverted.n_negative)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions, or pseudo-solutions where A + λI is singular.

        ``info`` holds ``residual`` (k,), against the exact A where it is at hand, ``converged`` (k,) by it, and
        ``approximate``; ``residual_of_approximation`` (k,), against Q diag(θ) Qᵀ + λI, where A itself is not kept.
        """
        X, inside = torch.empty_like(B), B
        outside = torch.zeros(len(B), dtype=torch.bool, device=B.device)
        if not self._spans and self._drops:
            inside = torch.empty_like(B)
        # Coordinates, their quotients and both parts of b: not of all rows at once.
        most = self.basis.rows_at_once if B.device.type == "cpu" else None
        step = rows_within(5 * B.shape[1] * B.element_size(), most)
        for start in range(0, len(B), step):
            rows = slice(start, start + step)
            X[rows], outside[rows] = self._solution(B[rows], self._split(B[rows]), inside[rows])
        return self._told(B, X, outside, inside)

    def solve_path(self, B: torch.Tensor, hessian_perturbations: Iterable[float]) -> list[InverseHvpResult]:
        """Return the results at every λ: B is projected once."""
        parts = self._split(B)
        return [self.at(shift)._solved(B, parts) for shift in hessian_perturbations]

    def at(self, hessian_perturbation: float) -> Self:
        """Return the inverse at another λ, from the same basis and spectrum."""
        other = copy.copy(self)
        other._set(hessian_perturbation)
        return other

    @property
    def takes_products(self) -> bool:
        """Whether a solve takes products with the exact curvature: not where the matrix is at hand."""
        return super().takes_products and (self.approximate or self.source is None)

    def untold(self) -> Self:
        """Return this inverse without warnings of rows that it does not solve, for callers that solve them anew."""
        other = copy.copy(self)
        other._untold = True
        return other

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the solutions alone; an exact inverse of a matrix still says what it did not solve."""
        if self.source is not None and not self.approximate:
            return super().apply(V)
        parts = self._split(V)
        self._warn_of_outside(self._outside(V, parts.along))
        return self._refined(V, self._combined(parts))

    def precondition(self, R: torch.Tensor) -> torch.Tensor:
        """Return M⁻¹ r, with r itself along what is left out, so that no direction is lost.

        Where r < p it is P⁻¹ = (θ_r + λ) Q (θ + λ)⁻¹ Qᵀ + (I − QQᵀ), θ_r the smallest of the eigenvalues kept, the form
        of Frangella, Tropp & Udell (2023), eq. 1.3 and 5.3: those that are not computed count as the smallest one that
        is, and not as zero.
        """
        found = self.inverted
        if self._spans:
            return self._mapped(self._split(R), found.inverse + found.lost, None)
        return self._mapped(self._split(R), found.values.min() / found.values, 1.0)

    @property
    def gaussian(self) -> bool:
        """Whether it has ``log_det`` and ``root``: it has."""
        return True

    def log_det(self) -> float:
        """Return Σ log(θ + λ) + (p − r) log(τ + λ)."""
        self._check_definite()
        found = float(self.inverted.values.double().log().sum())
        return found if self._spans else found + (self.size - self.basis.rank) * math.log(self._rest)

    def root(self, Z: torch.Tensor) -> torch.Tensor:
        """Return Q (θ + λ)^-½ Qᵀ z + (I − QQᵀ) z / (τ + λ)^½: the symmetric root."""
        self._check_definite()
        return self._mapped(
            self._split(Z), self.inverted.values.rsqrt(), None if self._spans else 1 / math.sqrt(self._rest)
        )

    @property
    def own_eigenvalues(self) -> torch.Tensor | None:
        """θ, and τ as often as it stands for one; None where the rest is left out."""
        if not self._spans and self.complement is None:
            return None
        rest = self.spectrum.new_full((self.size - self.basis.rank,), self.complement or 0.0)
        return torch.cat([self.spectrum, rest]).to(self.device).sort().values

    def check(self) -> None:
        """Raise ValueError where the parts contradict each other, or the spectrum what it is said to be of."""
        if len(self.spectrum) != self.basis.rank:
            raise ValueError(must_be("SpectralInverse.spectrum", f"of length {self.basis.rank}", len(self.spectrum)))
        super().check()
        if self.source is None:
            return
        b = torch.ones(1, self.size, dtype=self.dtype, device=self.device)
        gap = self.source.apply(b) - Spectral(self.basis, self.spectrum, self.complement or 0.0).apply(b)
        size = float(self.spectrum.double().abs().max()) * self.size**0.5
        # Not (gap > ...): NaN compares false.
        if not bool(gap.double().norm() <= 1e-3 * size):
            raise ValueError(must_be("The eigendecomposition", "that of the matrix", "another"))

    def _check_definite(self) -> None:
        """Raise ValueError, with what is in the way, unless A + λI as it is inverted is positive definite."""
        found = self.inverted
        if not self._spans and self._drops:
            got, hint = "one whose complement is left out", 'Try complement="shift".'
        elif found.n_lost:
            got, hint = f"{found.n_lost} eigenvalues that count as zero", "Try a larger hessian_perturbation."
        elif not self.positive_definite:
            least = found.least if self._spans else min(found.least, self._rest)
            got, hint = f"a smallest eigenvalue of {least:.3g}", f"Try a larger hessian_perturbation. {self.hint}"
        else:
            return
        raise ValueError(must_be("A + λI for log_det and samples", "positive definite", got, hint.strip()))

    @property
    def _spans(self) -> bool:
        """Whether the basis is of the whole space."""
        return self.basis.rank == self.basis.size

    @property
    def _drops(self) -> bool:
        """Whether nothing is inverted on the complement: none is wanted, or there is none."""
        return self.complement is None or self._spans

    @property
    def _rest(self) -> float:
        """τ + λ, on the complement; 0 where nothing is inverted there."""
        return 0.0 if self._drops or self.complement is None else self.complement + self.hessian_perturbation

    def _set(self, hessian_perturbation: float) -> None:
        self.hessian_perturbation = check_hessian_perturbation(hessian_perturbation)
        if not self._drops and self._rest == 0:
            raise ValueError(self._no_complement())
        self._inverted = None
        self.approximate = not (self.basis.of_curvature and (self._spans or self.source is not None))
        self.positive_definite = self.inverted.positive_definite and (self._drops or self._rest > 0)
        self._warn_of_negative()
        self._warn_of_units()

    def _split(self, B: torch.Tensor) -> _Parts:
        """Return rows B (k, p) taken apart."""
        along = self.basis.coordinates(B)
        if self._spans:
            return _Parts(along, along, None)
        across = B - self.basis.combination(along)
        # Twice: 1/λ would magnify what rounding leaves along the basis.
        more = self.basis.coordinates(across)
        return _Parts(along + more, more, across)

    def _mapped(self, parts: _Parts, inner: torch.Tensor, outer: float | None) -> torch.Tensor:
        """Return Q diag(inner) Qᵀ b + outer (I − QQᵀ) b; nothing of the second where ``outer`` is None.

        What is along the basis in both is joined before it is combined: a GEMM less.
        """
        # The spectrum may lie elsewhere than the rows.
        inner = inner.to(parts.along.device)
        if parts.across is None or outer is None:
            return self.basis.combination(parts.along * inner)
        return self.basis.combination(parts.along * inner - parts.more * outer) + parts.across * outer

    def _combined(self, parts: _Parts) -> torch.Tensor:
        return self._mapped(parts, self.inverted.inverse, None if self._drops else 1 / self._rest)

    def _refined(self, B: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """Take one step of refinement where the source offers it."""
        R = None if self.source is None else self.source.refining_residual(B, X, self.hessian_perturbation)
        return X if R is None else X + self._combined(self._split(R))

    def _solved(self, B: torch.Tensor, parts: _Parts) -> InverseHvpResult:
        """Solve, with B taken apart."""
        inside = B if self._spans or not self._drops else torch.empty_like(B)
        return self._told(B, *self._solution(B, parts, inside), inside)

    def _solution(self, B: torch.Tensor, parts: _Parts, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the solutions, and which rows have a part along what is left out; b's part that is solved, inside."""
        if parts.across is not None and self._drops:
            torch.sub(B, parts.across, out=inside)
        return self._refined(B, self._combined(parts)), self._outside(B, parts.along)

    def _told(self, B: torch.Tensor, X: torch.Tensor, outside: torch.Tensor, inside: torch.Tensor) -> InverseHvpResult:
        """Return the result, and warn of what is not solved."""
        self._warn_of_outside(outside)
        judged = own = self._own_residual(B, X)
        if inside is not B:
            # A complement that was dropped as asked is no failure to solve.
            judged = relative_residual(self.operator, inside, X)
        if self.approximate:
            info = self.verdict(B, X, own, outside)
        else:
            residual = own if self.source is not None else self.true_residual(B, X)
            judged, unknown = torch.where(residual.isnan(), judged, residual), residual.isnan()
            converged = residual <= self.rtol
            unheld = (Reason.OUT_OF_RANGE, ~finite_rows(X))
            reason = reasons(
                converged, Reason.STAGNATED, (Reason.NOT_JUDGED, unknown), unheld, (Reason.SINGULAR, outside)
            )
            info = {"residual": residual, "converged": converged, "reason": reason, "approximate": False}
            if self.source is None:
                info["residual_of_approximation"] = own
        if not self._untold:
            told = judged[~(outside | judged.isnan())]
            warn_not_converged(self.name, told, told <= self.rtol, self.rtol, self.not_solved)
        return InverseHvpResult(X, info)

    def _own_residual(self, B: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """Return the residuals against the operator that is inverted; NaN for an approximate one that is not judged."""
        if self.approximate and not self.judges:
            return torch.full((len(B),), torch.nan, dtype=torch.float64, device=B.device)
        return relative_residual(self.operator, B, X)

    def _no_complement(self) -> str:
        what = f"hessian_perturbation + {self.complement:.3g}" if self.complement else "hessian_perturbation"
        left = self.size - self.basis.rank
        hint = f"The {left} eigenvalues that are not computed count as {self.complement:.3g}. "
        return must_be(f"{what} for {self.name} with rank < p", "> 0", self._rest, hint + "Try 1e-3, or rank=p.")

    @property
    def _what(self) -> str:
        return f"A = H + λI as {self.name} approximates it" if self.approximate else "A = H + λI"

    def _warn_of_negative(self) -> None:
        """Warn of negative eigenvalues, which are inverted as they are."""
        found = self.inverted
        left_out = 0 if self._drops or self._rest >= -float(found.cuts.max()) else self.size - self.basis.rank
        if n := found.n_negative + left_out:
            least = min(found.least, self._rest) if left_out else found.least
            warn(
                f"{self._what} is indefinite: its smallest eigenvalue is {least:.3g}, at hessian_perturbation="
                f"{self.hessian_perturbation:.3g}, and {n} of {self.size} are negative. They are inverted as they are: "
                f"the solution is no minimiser. {self.hint}",
                scipy.linalg.LinAlgWarning,
            )

    def _warn_of_units(self) -> None:
        """Warn of directions that count as zero beside those of parameters in other units, and not by themselves."""
        found, A = self.inverted, self.source
        if not found.n_lost or not isinstance(A, Dense) or not A.is_psd:
            return
        diagonal, cut = A.matrix.diagonal() + self.hessian_perturbation, float(found.cuts.max())
        # Else a direction is lost by what is in it.
        if not bool(((diagonal > 0) & (diagonal <= 1e4 * cut)).any()):
            return
        n = rank_in_own_units(A.matrix, self.hessian_perturbation) - (self.basis.rank - found.n_lost)
        if n > 0:
            double = " or dtype=torch.float64" if self.dtype == torch.float32 else ""
            warn(
                f"{n} of {self.size} directions of {self._what} count as zero beside those of parameters in other "
                f"units: entries of its diagonal are from {float(diagonal.min()):.3g} to {float(diagonal.max()):.3g}, "
                f"and eigenvalues within {cut:.2g} of zero are left out. Scale the inputs (StandardScaler), or try a "
                f"larger hessian_perturbation{double}.",
                scipy.linalg.LinAlgWarning,
            )

    def _outside(self, B: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
        """Return which rows have a part along what is left out."""
        found = self.inverted
        if not found.n_lost:
            return torch.zeros(len(B), dtype=torch.bool, device=B.device)
        return (along * found.lost.to(along.device)).norm(dim=1) > self.rtol * B.norm(dim=1)

    def _warn_of_outside(self, outside: torch.Tensor) -> None:
        if not bool(outside.any()):
            return
        found = self.inverted
        double = " or dtype=torch.float64" if self.dtype == torch.float32 else ""
        larger = "a larger hessian_perturbation" if self.hessian_perturbation > 0 else "hessian_perturbation > 0"
        cut = float(found.cuts[found.lost].max())
        counted = f": eigenvalues within {cut:.2g} of zero count as zero." if cut else "."
        warn(
            f"{self._what} is singular (rank {self.basis.rank - found.n_lost} of {self.basis.rank}) and "
            f"{int(outside.sum())} of {len(outside)} right-hand sides have a part outside its range: the "
            f"pseudo-inverse leaves it out. Try {larger}{double}{counted}",
            scipy.linalg.LinAlgWarning,
        )
