"""The choice of λ on held-out rows."""

from .scorer import make_quadratic_scorer
from .search import HessianInverterCV

__all__ = ["HessianInverterCV", "make_quadratic_scorer"]
