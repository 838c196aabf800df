"""Methods: each maps an operator A and λ to an operator of (A + λI)⁻¹."""

from .auto import Auto
from .cg import CG
from .direct import Direct

__all__ = ["CG", "Auto", "Direct"]
