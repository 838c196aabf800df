"""The contract of a method: settings, ``invert`` (the factorisation), and the inverse that solves."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning

from .._autograd import ordinary_methods
from .._check import finite_rows, must_be
from .._checkpoint import Checkpoint
from .._progress import progress
from .._state import TensorState
from .._telling import warn
from ..operators import LinearOperator, Shifted
from ..reasons import Reason, reasons
from ..results import InverseHvpResult
from ..solvers.residuals import relative_residual
from .quadratic import Certificate, QuadraticForms

__all__ = ["InverseOperator", "Method", "default_tolerance", "relative_residual", "warn_not_converged"]


class Method(TensorState, BaseEstimator, ABC):
    """A way to invert A + λI: a bag of settings with ``invert``.

    A method sees an operator, never a model or data. What it needs of one beyond ``apply`` it declares in
    ``requires``; the error for a curvature that lacks it is made from that.

    Attributes
    ----------
    name : str
        The name in the registry.
    requires : tuple of str
        The faces that an operator must have, of ``skinvert.operators.FACES``.
    gaussian : bool
        Whether its inverse has ``log_det`` and ``sample``: it knows a root of A + λI.
    needs_psd : bool
        Whether it refuses a curvature with a negative eigenvalue, whatever λ is.
    keeps_operator : bool
        Whether a solve needs the operator itself, and with it the model and the data.
    resumes : bool
        Whether ``resume`` goes on where an interrupted run left off.
    placing : tuple of str
        Settings that say where numbers lie, and change none of them.
    accuracy : float
        The relative residual that ``tight`` settings reach in float64 where the method is exact.
    default_curvature : str
        What ``curvature="auto"`` means with this method; for ``"ggn"`` the Fisher where outputs are probabilities.
    cost, memory, exactness, choose_it_for : str
        Its row in the table of methods: work in products with A, numbers held (p parameters, k right-hand sides, n
        samples, c outputs, rank or rows r), what the solution is, and when to choose it.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    default_curvature: ClassVar[str] = "hessian"
    cost: ClassVar[str] = ""
    memory: ClassVar[str] = ""
    exactness: ClassVar[str] = ""
    choose_it_for: ClassVar[str] = ""
    gaussian: ClassVar[bool] = False
    needs_psd: ClassVar[bool] = False
    keeps_operator: ClassVar[bool] = False
    resumes: ClassVar[bool] = False
    placing: ClassVar[tuple[str, ...]] = ()
    accuracy: ClassVar[float] = 1e-8

    def check(self) -> None:
        """Raise for settings that cannot be served here, before any work; here for none."""

    @classmethod
    def tight(cls) -> Self:
        """Return the method with the settings at which it is as exact as it can be: what tests hold it to."""
        return cls()

    def choose(self, A: LinearOperator, hessian_perturbation: float) -> Method:
        """Return the method that inverts A: this one, save for ``Auto``."""
        return self

    def explain(self, A: LinearOperator, hessian_perturbation: float) -> tuple[Method, str]:
        """Return what ``choose`` returns, and why, in a few words."""
        return self.choose(A, hessian_perturbation), "as asked"

    @abstractmethod
    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Do all the work that does not depend on the right-hand sides, and return the inverse."""

    def resume(
        self, A: LinearOperator, hessian_perturbation: float, checkpoint: Checkpoint, verbose: int = 0
    ) -> InverseOperator:
        """Return what ``invert`` does, by stages that tell ``checkpoint`` their state and start from it.

        To the last bit the same, wherever an earlier run was interrupted.
        """
        return self.invert(A, hessian_perturbation, verbose)


class InverseOperator(TensorState, ABC):
    """(A + λI)⁻¹ on rows.

    Attributes
    ----------
    curvature : LinearOperator
        A as the method inverts it, without λ; a class that keeps its parts alone overrides ``operator``.
    hessian_perturbation : float
        λ.
    exact : LinearOperator or None
        The exact curvature A, against which solutions are judged; None where it is not at hand. Never pickled, so that
        no model and no data go into a file.
    approximate : bool
        Whether ``operator`` is another than the exact A + λI.
    judges : bool
        Whether an approximate inverse spends one product with the exact curvature per solve on its true residual.
    positive_definite : bool or None
        Whether A + λI was found positive definite; None where the method cannot know before a solve.
    name : str
        The method's, for warnings.
    """

    curvature: LinearOperator
    hessian_perturbation: float
    exact: LinearOperator | None = None
    approximate: bool = False
    judges: bool = True
    positive_definite: bool | None = None
    name: str = ""
    # Whether a solve needs the curvature itself, and with it the model and the data.
    keeps_operator: bool = False
    # 1 shows a bar where solves take long.
    verbose: int = 0

    _transient: tuple[str, ...] = ("exact",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let solves be right under ``no_grad``, ``inference_mode`` and ``autocast``."""
        super().__init_subclass__(**kwargs)
        ordinary_methods(
            cls,
            ("solve", "path", "solve_path", "at", "apply", "precondition", "quadratic", "refined", "log_det", "root"),
        )

    @property
    def operator(self) -> LinearOperator:
        """A + λI as the method inverts it."""
        return Shifted(self.curvature, self.hessian_perturbation)

    @property
    def size(self) -> int:
        """Number p of parameters."""
        return self.operator.size

    @property
    def shape(self) -> tuple[int, int]:
        """(p, p)."""
        return self.operator.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of rows and solutions."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """Of rows and solutions."""
        return self.operator.device

    @property
    def place(self) -> str:
        """Where its numbers lie, in words; nothing where that is the device that computes."""
        return ""

    @property
    def preconditions(self) -> bool:
        """Whether ``precondition`` is positive definite, as far as is known."""
        return self.positive_definite is not False

    @property
    def moves(self) -> bool:
        """Whether ``at`` serves another λ from what is kept, without factorising anew."""
        return True

    @property
    def takes_products(self) -> bool:
        """Whether a solve takes products with the exact curvature: to iterate, or to judge its solutions."""
        return self.keeps_operator or (self.exact is not None and (self.judges or not self.approximate))

    @property
    def eigenvalues(self) -> torch.Tensor | None:
        """Those of A that the method computed, ascending."""
        return None

    @property
    def all_eigenvalues(self) -> torch.Tensor | None:
        """All p eigenvalues of the exact A, where they are known."""
        return None

    @abstractmethod
    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions (k, p) of rows B (k, p), and what is known of them."""

    @abstractmethod
    def at(self, hessian_perturbation: float) -> InverseOperator:
        """Return the inverse at another λ, judged as this one is: from what is kept, or by a fresh inversion.

        ``other.judged_as(self)`` hands the judgement on.
        """

    def solve_path(self, B: torch.Tensor, hessian_perturbations: Iterable[float]) -> list[InverseHvpResult]:
        """Return what ``solve`` returns, residuals and warnings included, at every λ, from one factorisation."""
        shifts = progress(list(hessian_perturbations), "path", self.verbose)
        return [self.at(shift).judged_as(self).solve(B) for shift in shifts]

    def path(self, B: torch.Tensor, hessian_perturbations: Iterable[float]) -> torch.Tensor:
        """Return the solutions (n_λ, k, p) of rows B at every λ, from one factorisation."""
        X = [x for x, _ in self.solve_path(B, hessian_perturbations)]
        return torch.stack(X) if X else B.new_empty(0, *B.shape)

    @property
    def tolerance(self) -> float:
        """The relative residual up to which a row counts as solved."""
        return default_tolerance(self.dtype)

    def started_at(self, x0: torch.Tensor) -> InverseOperator:
        """Return this inverse with its iterations started at ``x0`` (k, p), one row for each of B, whatever it was."""
        must, hint = "None for a method that factorises", 'Leave it out, or try method="cg" or "minres".'
        raise ValueError(must_be("x0", must, f"a start for {self.name or type(self).__name__}", hint))

    def scale_free(self) -> Self:
        """Return this inverse without settings on the scale of b: an absolute tolerance, a start."""
        return self

    def roughly(self, rtol: float, maxiter: int) -> Self:
        """Return this inverse with iterations that stop early, for solutions that are mended; itself without any."""
        return self

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the solutions alone, so that an inverse is itself an operator on rows."""
        return self.unjudged().solve(V).x

    def precondition(self, R: torch.Tensor) -> torch.Tensor:
        """Return M⁻¹ r for each row: ``apply``, or a form that serves conjugate gradients better."""
        return self.apply(R)

    # -- what is certain -------------------------------------------------------------------------------------------

    @property
    def truth(self) -> LinearOperator | None:
        """The exact A + λI with its products in float64; None where it is not at hand."""
        if self.exact is not None:
            return shifted(self.exact, self.hessian_perturbation).in_float64()
        # What was factorised in float32 is A to the rounding of float32 alone.
        own = not self.approximate and (self.keeps_operator or self.dtype == torch.float64)
        return self.operator.in_float64() if own else None

    @property
    def lower_bound(self) -> float:
        """A number that no eigenvalue of the exact A + λI is below: λ + min(penalty) of a semi-definite A.

        NaN where none is proven; never an estimate.
        """
        truth = self.truth
        return torch.nan if truth is None else truth.lower_bound

    def quadratic(self, G: torch.Tensor, B: torch.Tensor | None = None, *, one_sided: bool = False) -> QuadraticForms:
        r"""Return gᵀ(A + λI)⁻¹b of the exact A for all pairs of rows, with bounds that hold.

        .. math:: x_g^T b + r_g^T x_b,  |error| ≤ ‖r_g‖ ‖r_b‖ / μ

        for solutions x, their true residuals r and ``lower_bound`` μ; the rounding of float64 is added. The correction
        brings the value nearer by about the product of the two relative residuals. Costs a solve and an exact product
        for each row of both sides.

        Parameters
        ----------
        G : tensor of shape (q, p)
            Rows g.
        B : tensor of shape (k, p), default=None
            Rows b; None gives gᵀ(A + λI)⁻¹g of each row alone, which its value never exceeds but by rounding.
        one_sided : bool, default=False
            Solve for G alone, x_b = 0 and r_b = b: the bound is ‖r_g‖‖b‖/μ, for many rows b.

        Returns
        -------
        QuadraticForms
            ``values`` and ``bounds`` (q, k), or (q,), in float64; ``bounds`` are NaN where ``lower_bound`` is not
            positive, or the exact A not at hand, values then those of the solutions alone.
        """
        certificate = Certificate(self)
        return certificate.own(G) if B is None else certificate.pairs(G, B, one_sided)

    def refined(
        self, B: torch.Tensor, X: torch.Tensor | None = None, *, target: torch.Tensor | float, maxiter: int = 100
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return solutions (k, p), float64, improved until ‖b − (A + λI)x‖ ≤ ``target`` or falls no more; and ‖r‖ (k,).

        Each round x + (A + λI)⁻¹r costs one exact product, and one solve, of the rows that are still open.

        Parameters
        ----------
        B : tensor of shape (k, p)
            Rows b.
        X : tensor of shape (k, p), default=None
            Where to start; None solves.
        target : float or tensor of shape (k,)
            Absolute.
        maxiter : int, default=100
            Most rounds.
        """
        certificate = Certificate(self)
        solved = certificate.refined(certificate.solved(B, X), target, maxiter)
        return solved.X, solved.residual

    # -- the Gaussian with A + λI as precision -----------------------------------------------------------------------

    @property
    def gaussian(self) -> bool:
        """Whether it has ``log_det`` and ``root``."""
        return False

    def log_det(self) -> float:
        """Return log det(A + λI) of the operator that is inverted, by its factorisation.

        Raises
        ------
        TypeError
            Where the method has no root of it: ``gaussian`` says so.
        ValueError
            Where A + λI is not positive definite.
        """
        raise TypeError(self._no_root())

    @property
    def noise_size(self) -> int:
        """Length of the rows that ``root`` takes."""
        return self.size

    def root(self, Z: torch.Tensor) -> torch.Tensor:
        """Return Z Sᵀ (k, p) of rows Z (k, ``noise_size``), with S Sᵀ = (A + λI)⁻¹; raises as ``log_det`` does."""
        raise TypeError(self._no_root())

    @property
    def own_eigenvalues(self) -> torch.Tensor | None:
        """All p eigenvalues of A as the method inverts it, ascending, where they are known; without λ."""
        return None

    def _no_root(self) -> str:
        return must_be("The inverse for log_det and samples", "one with a root", self.name or type(self).__name__)

    # -- a state from a file ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ValueError where attributes contradict each other, as no fit leaves them; it factorises nothing.

        Here: where what λ decides is not what it decides anew, from the same factorisation.
        """
        if self.moves:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.compare(self.at(self.hessian_perturbation))

    def compare(self, anew: InverseOperator, but: tuple[str, ...] = ()) -> None:
        """Raise ValueError where an attribute differs from that of ``anew``, beyond rounding; ``but`` are not asked."""
        for name in sorted(set(anew.__dict__) - {*self._transient, "judges", *but}):
            if not _agree(self.__dict__.get(name), anew.__dict__[name], self):
                must = "what the others make it"
                raise ValueError(must_be(f"{type(self).__name__}.{name}", must, repr(self.__dict__.get(name))[:80]))

    # -- the truth of a solution -----------------------------------------------------------------------------------

    def judged_by(self, exact: LinearOperator | None) -> Self:
        """Return this inverse with its solutions judged against ``exact``; None: it is not at hand."""
        other = copy.copy(self)
        other.exact = exact
        return other

    def judged_as(self, other: InverseOperator) -> Self:
        """Return this inverse with its solutions judged as those of another are."""
        judged = self if other.exact is None else self.judged_by(other.exact)
        return judged if other.judges else judged.unjudged()

    def unjudged(self) -> Self:
        """Return this inverse without the product that an approximate one spends on its true residual."""
        other = copy.copy(self)
        other.judges = False
        return other

    def true_residual(self, B: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """Return ‖(A + λI)x − b‖ / ‖b‖ (k,) against the exact A; NaN where that is not at hand or not asked for."""
        if self.exact is None or (self.approximate and not self.judges):
            return torch.full((len(B),), torch.nan, dtype=torch.float64, device=B.device)
        return relative_residual(shifted(self.exact, self.hessian_perturbation), B, X)

    def judged(self, B: torch.Tensor, X: torch.Tensor, residual: torch.Tensor | None = None) -> InverseHvpResult:
        """Return the solutions of an inverse that keeps A itself, with their residuals; warn of what is not solved."""
        residual = relative_residual(self.operator, B, X) if residual is None else residual
        converged = residual <= self.tolerance
        warn_not_converged(self.name, residual, converged, self.tolerance, self.not_solved)
        reason = reasons(converged, Reason.STAGNATED, (Reason.OUT_OF_RANGE, ~finite_rows(X)))
        info = {"residual": residual, "converged": converged, "reason": reason, "approximate": False}
        return InverseHvpResult(X, info)

    @property
    def not_solved(self) -> str:
        """What to say of a row that a factorisation does not solve."""
        double = "dtype=torch.float64 or " if self.dtype == torch.float32 else ""
        return f"Rounding does not allow less. Try {double}a larger hessian_perturbation."

    def verdict(
        self,
        B: torch.Tensor,
        X: torch.Tensor,
        own: torch.Tensor,
        outside: torch.Tensor | None = None,
        causes: Iterable[tuple[Reason, torch.Tensor]] = (),
    ) -> dict[str, Any]:
        """Return the ``info`` of an inverse of another operator than A + λI, and warn where x = 0 would be better.

        ``residual`` (k,) against the exact A, ``converged`` (k,) by it (unknown is False), ``approximate``, and
        ``residual_of_approximation`` (k,), which is ``own``; ``reason`` (k,), of rows ``outside`` its range SINGULAR,
        and else the last of the ``causes`` that holds.
        """
        residual = self.true_residual(B, X)
        warn_worse_than_zero(self.name or type(self).__name__, residual, self.hessian_perturbation)
        converged = residual <= self.tolerance
        found = [(Reason.NOT_JUDGED, residual.isnan()), (Reason.OUT_OF_RANGE, ~finite_rows(X))]
        if outside is not None:
            found.append((Reason.SINGULAR, outside))
        return {
            "residual": residual,
            "converged": converged,
            "reason": reasons(converged, Reason.APPROXIMATE, *found, *causes),
            "residual_of_approximation": own,
            "approximate": self.approximate,
        }


def _agree(one: Any, other: Any, inverse: InverseOperator) -> bool:
    """Return whether two attributes are the same, to what another machine's rounding allows."""
    if one is other:
        return True
    if isinstance(one, LinearOperator) and isinstance(other, LinearOperator):
        b = torch.ones(1, inverse.size, dtype=inverse.dtype, device=inverse.device)
        one, other = one.apply(b), other.apply(b)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        gap, size = (one.double() - other.double()).norm(), other.double().norm()
        return torch.equal(one, other) or bool(gap <= default_tolerance(inverse.dtype) * size)
    if type(one) is float and type(other) is float:
        return abs(one - other) <= default_tolerance(inverse.dtype) * abs(other)
    return bool(one == other)


def default_tolerance(dtype: torch.dtype) -> float:
    """Return the relative residual up to which a factorisation counts as a solution: 1e-3 in float32, else 1e-6."""
    return 1e-3 if dtype == torch.float32 else 1e-6


def shifted(A: LinearOperator, hessian_perturbation: float) -> Shifted:
    """Return A + λI."""
    return Shifted(A, hessian_perturbation)


def warn_not_converged(name: str, residual: torch.Tensor, converged: torch.Tensor, rtol: float, hint: str) -> None:
    """Warn of rows that did not converge, with the residual reached and what to try."""
    failed = int((~converged).sum())
    if failed:
        worst = float(residual[~converged].max())
        warn(
            f"{name} did not converge on {failed} of {len(converged)} right-hand sides: relative residual "
            f"{worst:.3g}, asked for {rtol:.3g}. {hint}",
            ConvergenceWarning,
        )


def warn_worse_than_zero(name: str, residual: torch.Tensor, hessian_perturbation: float) -> None:
    """Warn of solutions whose true residual is above 1, that of x = 0."""
    # A hair above, for rounding.
    worse = residual > 1 + 1e-6
    if bool(worse.any()):
        warn(
            f"{name} is worse than x = 0 on {int(worse.sum())} of {len(residual)} right-hand sides: their relative "
            f"residual against the exact H + λI is up to {float(residual[worse].max()):.3g}, at "
            f"hessian_perturbation={hessian_perturbation:.3g}. Try a larger one, a larger rank where it has one, a few "
            'products from there (`CG(start=..., maxiter=5)`), or method="cg" or "direct".',
            ConvergenceWarning,
        )


def warn_of_overflow(name: str, X: torch.Tensor) -> torch.Tensor:
    """Return X, and warn of rows that its dtype cannot hold."""
    rows = ~finite_rows(X)
    if bool(rows.any()):
        warn(
            f"{name}: the solutions of {int(rows.sum())} of {len(X)} right-hand sides overflow {X.dtype}. "
            "Try a larger hessian_perturbation or dtype=torch.float64.",
            ConvergenceWarning,
        )
    return X
