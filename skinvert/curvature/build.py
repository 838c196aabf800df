"""A curvature by its name."""

from __future__ import annotations

from .._validation import check_choice, must_be
from ..data import Batches
from ..models import TorchTwiceDifferentiable, TwiceDifferentiable
from ..operators import LinearOperator
from .base import Objective
from .fisher import EmpiricalFisher
from .ggn import GGN
from .hessian import GenericHessian, Hessian

__all__ = ["CURVATURES", "build_curvature"]

CURVATURES = {"hessian": Hessian, "ggn": GGN, "empirical_fisher": EmpiricalFisher}


def build_curvature(name: str, model: TwiceDifferentiable, batches: Batches, verbose: int = 0) -> LinearOperator:
    """Return the curvature ``name`` of a model at a fixed point over all the data."""
    check_choice(name, "curvature", CURVATURES)
    if isinstance(model, TorchTwiceDifferentiable):
        return CURVATURES[name](Objective(model, batches, verbose))
    if name != "hessian":
        hint = "Its grad and mvp define no outputs. Subclass TorchTwiceDifferentiable for the other curvatures."
        raise ValueError(must_be(f"curvature for {type(model).__name__}", "'hessian'", repr(name), hint))
    return GenericHessian(model, batches)
