"""Curvatures: each maps a model and data to a symmetric operator on rows."""

from .base import Objective
from .build import CURVATURES, build_blocks, build_curvature, curvature_name, seeded_curvature
from .first_pass import warn_of_unreached
from .fisher import EmpiricalFisher, Fisher, SampledFisher
from .ggn import GGN, split_batch
from .gram import Gram
from .held_out import held_out_curvature
from .hessian import GenericHessian, Hessian
from .rows import gradient_rows

__all__ = [
    "CURVATURES",
    "GGN",
    "EmpiricalFisher",
    "Fisher",
    "GenericHessian",
    "Gram",
    "Hessian",
    "Objective",
    "SampledFisher",
    "build_blocks",
    "build_curvature",
    "curvature_name",
    "gradient_rows",
    "held_out_curvature",
    "seeded_curvature",
    "split_batch",
    "warn_of_unreached",
]
