"""The contract of a method: settings, ``invert`` (the factorisation), and the inverse that solves."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning

from .._autograd import ordinary_methods
from .._memory import rows_within
from .._validation import must_be
from ..operators import LinearOperator, Shifted, TensorState
from ..results import InverseHvpResult

__all__ = ["InverseOperator", "Method"]


class Method(TensorState, BaseEstimator, ABC):
    """A way to invert A + λI: a bag of settings with ``invert``.

    A method sees an operator, never a model or data. What it needs of one beyond ``apply`` it declares in
    ``requires``; the error for a curvature that lacks it is made from that.

    Attributes
    ----------
    name : str
        The name in the registry.
    requires : tuple of str
        Operator methods that must exist, such as ``("factor",)``.
    default_curvature : str
        What ``curvature="auto"`` means with this method.
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

    def choose(self, A: LinearOperator, hessian_perturbation: float) -> Method:
        """Return the method that inverts A: this one, save for ``Auto``."""
        return self

    @abstractmethod
    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Do all the work that does not depend on the right-hand sides, and return the inverse."""


class InverseOperator(TensorState, ABC):
    """(A + λI)⁻¹ on rows.

    Attributes
    ----------
    operator : LinearOperator
        A + λI as the method inverts it: residuals are taken against it.
    positive_definite : bool or None
        Whether A + λI was found positive definite; None where the method cannot know before a solve.
    """

    operator: LinearOperator
    positive_definite: bool | None = None
    # Whether a solve needs the curvature itself, and with it the model and the data.
    keeps_operator: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let solves be right under ``no_grad``, ``inference_mode`` and ``autocast``."""
        super().__init_subclass__(**kwargs)
        ordinary_methods(cls, ("solve", "path", "solve_path", "at", "apply", "precondition"))

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

    @abstractmethod
    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions (k, p) of rows B (k, p), and what is known of them."""

    def path(self, B: torch.Tensor, hessian_perturbations: Iterable[float]) -> torch.Tensor:
        """Return the solutions (n_λ, k, p) of rows B at every λ, from one factorisation."""
        at = getattr(self, "at", None)
        if at is None:
            hint = 'Try method="direct", "arnoldi", "nystroem" or "cg".'
            raise TypeError(must_be("The method of a λ-path", "one that serves every λ", type(self).__name__, hint))
        X = [at(shift).solve(B).x for shift in hessian_perturbations]
        return torch.stack(X) if X else B.new_empty(0, *B.shape)

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the solutions alone, so that an inverse is itself an operator on rows."""
        return self.solve(V).x

    def precondition(self, R: torch.Tensor) -> torch.Tensor:
        """Return M⁻¹ r for each row: ``apply``, or a form that serves conjugate gradients better."""
        return self.apply(R)


def shifted(A: LinearOperator, hessian_perturbation: float) -> Shifted:
    """Return A + λI."""
    return Shifted(A, hessian_perturbation)


def relative_residual(operator: LinearOperator, B: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """Return ‖Ax − b‖ / ‖b‖ (k,) in float64 sums; 0 where b = 0 and x = 0."""
    residual = torch.empty(len(B), dtype=torch.float64, device=B.device)
    step = rows_within(4 * operator.size * B.element_size())
    for start in range(0, len(B), step):
        rows = slice(start, start + step)
        gap = (operator.apply(X[rows]) - B[rows]).to(torch.float64).norm(dim=1)
        size = B[rows].to(torch.float64).norm(dim=1)
        residual[rows] = torch.where(size > 0, gap / size, gap)
    return residual


def warn_not_converged(name: str, residual: torch.Tensor, converged: torch.Tensor, rtol: float, hint: str) -> None:
    """Warn of rows that did not converge, with the residual reached and what to try."""
    failed = int((~converged).sum())
    if failed:
        worst = float(residual[~converged].max())
        warnings.warn(
            f"{name} did not converge on {failed} of {len(converged)} right-hand sides: relative residual "
            f"{worst:.3g}, asked for {rtol:.3g}. {hint}",
            ConvergenceWarning,
            stacklevel=2,
        )
