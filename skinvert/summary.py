"""What a fitted inverter is, in a few words.

Mixed into ``HessianInverter``, whose attributes these are.
"""

from __future__ import annotations

from collections.abc import Mapping

from ._shown import Shown
from .methods.base import InverseOperator, Method
from .methods.blocks import BlockInverse
from .system import Function

__all__ = ["Summary"]


class Summary(Shown):
    """The facts of a fitted inverter: sizes, curvature, λ, method, and the residual up to which a row is solved."""

    method: str | Method
    hessian_perturbation: float | str
    n_features_in_: int
    n_samples_: int
    curvature_name_: str
    hessian_perturbation_: float
    method_: Method | Function
    inverse_: InverseOperator | None
    gradient_norm_: float

    def _facts(self) -> Mapping[str, object]:
        """Return the facts; none before a fit."""
        if "n_features_in_" not in vars(self):
            return {}
        facts: dict[str, object] = {
            "parameters p": f"{self.n_features_in_:,}",
            "rows n": f"{self.n_samples_:,}",
            "curvature H": self.curvature_name_,
            "λ": self._shift(),
            "method": self._method_name(),
        }
        if self.inverse_ is not None:
            facts |= _of_inverse(self.inverse_)
        if "gradient_norm_" in vars(self):
            facts["‖∇L(θ)‖"] = f"{self.gradient_norm_:.3g}"
        return facts

    def _shift(self) -> str:
        shift = f"{self.hessian_perturbation_:.4g}"
        setting = self.hessian_perturbation
        return f"{shift}, of {setting!r}" if isinstance(setting, str) else shift

    def _method_name(self) -> str:
        if not isinstance(self.method_, Method):
            return str(self.method)
        chosen = self.method == "auto"
        if isinstance(self.inverse_, BlockInverse):
            blocks = f"each of {len(self.inverse_.inverses):,} blocks"
            return f"chosen by auto in {blocks}" if chosen else f"{self.method_!r} in {blocks}"
        return f"{self.method_!r}, chosen by auto" if chosen else repr(self.method_)


def _of_inverse(inverse: InverseOperator) -> dict[str, object]:
    return {
        "inverts": "an approximation of H + λI" if inverse.approximate else "H + λI itself",
        "solved up to a relative residual of": f"{inverse.tolerance:.3g}",
        "numbers": f"{str(inverse.dtype).removeprefix('torch.')} on {inverse.device}",
    }
