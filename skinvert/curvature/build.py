"""A curvature by its name."""

from __future__ import annotations

from .._validation import check_choice, must_be
from ..data import Batches
from ..models import TorchTwiceDifferentiable, TwiceDifferentiable
from ..operators import LinearOperator
from .base import Objective
from .fisher import EmpiricalFisher, Fisher, SampledFisher
from .ggn import GGN
from .hessian import GenericHessian, Hessian

__all__ = ["CURVATURES", "build_curvature", "curvature_name"]

CURVATURES = {"hessian": Hessian, "ggn": GGN, "fisher": Fisher, "empirical_fisher": EmpiricalFisher}


def build_curvature(
    curvature: str | SampledFisher, model: TwiceDifferentiable, batches: Batches, verbose: int = 0
) -> LinearOperator:
    """Return the curvature, given by name or by its settings, of a model at a fixed point over all the data."""
    name = curvature_name(curvature)
    if isinstance(model, TorchTwiceDifferentiable):
        objective = Objective(model, batches, verbose)
        return curvature.build(objective) if isinstance(curvature, SampledFisher) else CURVATURES[name](objective)
    if name != "hessian":
        hint = "Its grad and mvp define no outputs. Subclass TorchTwiceDifferentiable for the other curvatures."
        raise ValueError(must_be(f"curvature for {type(model).__name__}", "'hessian'", repr(name), hint))
    return GenericHessian(model, batches)


def curvature_name(curvature: str | SampledFisher) -> str:
    """Return the name of a curvature that is given by name or by its settings."""
    if isinstance(curvature, SampledFisher):
        return "fisher"
    return check_choice(curvature, "curvature", CURVATURES, "A SampledFisher is taken too.")
