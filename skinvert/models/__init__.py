"""Models that can be inverted: PyTorch modules, skorch nets, scikit-learn models, any ``TwiceDifferentiable``."""

from .adapt import FittedSearch, as_margin, as_model, is_model, register_model
from .affine import Affine
from .base import TwiceDifferentiable
from .batches import labels_key, leading_length, map_tensors, rebuilt, row_axes, with_row_axis
from .losses import LOSSES, Loss, ModuleLoss, as_loss
from .output_hessians import DiagonalHessian, FactoredHessian, OutputHessian
from .shared import SharedModel
from .sklearn import SklearnTwiceDifferentiable
from .sparse_rows import SparseRows
from .torch import TorchTwiceDifferentiable

__all__ = [
    "LOSSES",
    "Affine",
    "DiagonalHessian",
    "FactoredHessian",
    "FittedSearch",
    "Loss",
    "ModuleLoss",
    "as_loss",
    "OutputHessian",
    "SharedModel",
    "SklearnTwiceDifferentiable",
    "SparseRows",
    "TorchTwiceDifferentiable",
    "TwiceDifferentiable",
    "as_margin",
    "as_model",
    "is_model",
    "labels_key",
    "leading_length",
    "map_tensors",
    "rebuilt",
    "register_model",
    "row_axes",
    "with_row_axis",
]
