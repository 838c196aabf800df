"""What a fitted inverter has at hand: its inverse, its rows as these are to be, and what pickles leave out.

Mixed into ``HessianInverter``, which says what is fitted.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from sklearn.utils.validation import check_is_fitted

from ._check import check_choice, must_be
from ._checksum import checksum
from ._distributed import Ranks, as_one
from ._memory import working_memory
from ._namespaces import dispatches, namespace_of
from ._rows import Rows
from ._types import TrainedModel
from .columns import NamedColumns
from .methods.base import InverseOperator
from .operators import LinearOperator, Shifted
from .parameters import ParameterLayout

__all__ = ["AtHand"]


class AtHand(NamedColumns):
    """The parts of a fitted inverter, each or an error that says why it is not there."""

    model: TrainedModel
    check_residual: bool
    n_features_in_: int
    hessian_perturbation_: float
    method_: object
    curvature_: LinearOperator
    inverse_: InverseOperator | None
    _layout: ParameterLayout | None
    # The processes that were fitted together; None where this one was alone.
    _ranks: Ranks | None = None

    def _judged(self, what: str, hint: str = "Call `solve`.") -> InverseOperator:
        """Return the inverse, its solutions judged against the exact curvature where that is at hand and asked for."""
        inverse = self._factorised(what, hint)
        judges = check_choice(self.check_residual, "check_residual", [True, False])
        return inverse.judged_by(vars(self).get("curvature_")) if judges else inverse.unjudged()

    @property
    def _used(self) -> str:
        """The method in words, with the setting that makes its factorisation a part of the inverse alone."""
        autocast = vars(self).get("autocast")
        return repr(self.method_) + ("" if autocast is None else f" with autocast={autocast!r}")

    def _factorised(self, what: str, hint: str = "Call `solve`.") -> InverseOperator:
        check_is_fitted(self, "n_features_in_")
        if self.inverse_ is None:
            raise TypeError(must_be("method", f"a Method for {what}", "a function", hint))
        return self.inverse_

    def _together(self, step: str, *, of_all: bool | None = None) -> AbstractContextManager[None]:
        """Return a context in which all ranks fail together, where the step takes products with the rows of all.

        Whether it does, the inverse says where ``of_all`` does not.
        """
        if self._ranks is not None and of_all is None:
            of_all = vars(self).get("inverse_") is not None and self._judged(step).takes_products
        return as_one(self._ranks if of_all else None, step)

    def _check_alike(self, step: str, rows: Rows, shifts: object = None) -> None:
        if self._ranks is not None:
            # It decides how many rows are taken at once.
            memory = {"scikit-learn's working_memory": working_memory()}
            hint = "It solves with the rows of all ranks: call it on each of them, with the same right-hand sides."
            self._ranks.meet(step, {"b": checksum(rows.tensor), "λ": shifts, **memory}, hint=hint)

    def _check_namespace(self, X: object, method: str, asked: str = "HessianInverter") -> None:
        """Raise, where scikit-learn's dispatch is on, for rows of another library than those that were fitted."""
        fitted, given = vars(self).get("_namespace"), namespace_of(X)
        if dispatches() and fitted not in (None, given):
            what = f"Inputs passed to {asked}.{method}()"
            message = f"{what} must use the same namespace as those passed to fit(), {fitted}. Got {given} instead."
            raise ValueError(message)

    def _exact(self) -> LinearOperator:
        return Shifted(self._at_hand("curvature_", "residual"), self.hessian_perturbation_)

    def _at_hand(self, name: str, what: str) -> Any:
        """Return a fitted attribute that pickles and files leave out; raise where it was."""
        found = vars(self).get(name)
        if found is None:
            hint = "A saved or pickled factorisation leaves out model and data: call `fit` again."
            raise ValueError(must_be(f"{what}'s model and data", "at hand", "a loaded inverter", hint))
        return found
