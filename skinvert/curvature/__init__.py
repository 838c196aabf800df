"""Curvatures: each maps a model and data to a symmetric operator on rows."""

from .base import Curvature
from .build import (
    CURVATURES,
    build_blocks,
    build_curvature,
    curvature_name,
    faces_of,
    register_curvature,
    seeded_curvature,
)
from .directional import derivatives_along, most_directions
from .draws import Sampled
from .empirical_fisher import EmpiricalFisher
from .factored import Factored
from .first_pass import warn_of_unreached
from .fisher import Fisher, SampledFisher, gauss_newton, of_probabilities
from .ggn import GGN
from .gram import Gram
from .held_out import held_out_curvature
from .hessian import GenericHessian, Hessian
from .layered import Layered
from .objective import Objective
from .per_sample import RowValues, gradient_rows, jacobian_rows, split_batch
from .products import Share
from .sampled_ggn import SampledGGN
from .sharded import Sharded

__all__ = [
    "CURVATURES",
    "GGN",
    "Curvature",
    "EmpiricalFisher",
    "Factored",
    "Fisher",
    "GenericHessian",
    "Gram",
    "Hessian",
    "Layered",
    "Objective",
    "RowValues",
    "Sampled",
    "SampledFisher",
    "SampledGGN",
    "Share",
    "Sharded",
    "build_blocks",
    "build_curvature",
    "curvature_name",
    "derivatives_along",
    "faces_of",
    "gauss_newton",
    "gradient_rows",
    "held_out_curvature",
    "jacobian_rows",
    "most_directions",
    "of_probabilities",
    "register_curvature",
    "seeded_curvature",
    "split_batch",
    "warn_of_unreached",
]
