"""Models that can be inverted: PyTorch modules, skorch nets, scikit-learn models, any ``TwiceDifferentiable``."""

from .adapt import as_margin, as_model, describe, fixed_at, is_model, register_model
from .affine import Affine
from .base import TwiceDifferentiable
from .losses import LOSSES, ModuleLoss
from .shared import SharedModel
from .sklearn import SklearnTwiceDifferentiable
from .torch import TorchTwiceDifferentiable, leading_length, map_tensors

__all__ = [
    "LOSSES",
    "Affine",
    "ModuleLoss",
    "SharedModel",
    "SklearnTwiceDifferentiable",
    "TorchTwiceDifferentiable",
    "TwiceDifferentiable",
    "as_margin",
    "as_model",
    "describe",
    "fixed_at",
    "is_model",
    "leading_length",
    "map_tensors",
    "register_model",
]
