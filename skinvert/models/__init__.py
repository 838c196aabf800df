"""Models that can be inverted: PyTorch modules, skorch nets, and anything that is ``TwiceDifferentiable``."""

from .adapt import as_model, describe, is_model
from .base import TwiceDifferentiable
from .losses import LOSSES, ModuleLoss
from .torch import TorchTwiceDifferentiable, leading_length, map_tensors

__all__ = [
    "LOSSES",
    "ModuleLoss",
    "TorchTwiceDifferentiable",
    "TwiceDifferentiable",
    "as_model",
    "describe",
    "is_model",
    "leading_length",
    "map_tensors",
]
