"""Curvatures: each maps a model and data to a symmetric operator on rows."""

from .base import Objective
from .build import CURVATURES, build_curvature
from .fisher import EmpiricalFisher
from .ggn import GGN, split_batch
from .gram import Gram
from .held_out import held_out_curvature
from .hessian import GenericHessian, Hessian
from .rows import gradient_rows

__all__ = [
    "CURVATURES",
    "GGN",
    "EmpiricalFisher",
    "GenericHessian",
    "Gram",
    "Hessian",
    "Objective",
    "build_curvature",
    "gradient_rows",
    "held_out_curvature",
    "split_batch",
]
