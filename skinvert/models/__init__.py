"""Models that can be inverted: PyTorch modules, skorch nets, scikit-learn models, any ``TwiceDifferentiable``."""

from .adapt import FittedSearch, as_margin, as_model, as_outputs, is_model, margin_of, register_model
from .autocast import resolve_autocast
from .base import TwiceDifferentiable
from .batches import doubled, labels_key, leading_length, map_tensors, rebuilt, row_axes, with_row_axis
from .losses import (
    LOSSES,
    DiagonalHessian,
    FactoredHessian,
    IndependentLabels,
    Loss,
    Margin,
    ModuleLoss,
    OutputHessian,
    Predictive,
    as_loss,
    names_with_predictive,
    register_loss,
)
from .shared import SharedModel
from .sklearn import Affine, SklearnTwiceDifferentiable
from .sparse_rows import SparseRows
from .torch import TorchTwiceDifferentiable

__all__ = [
    "LOSSES",
    "Affine",
    "DiagonalHessian",
    "FactoredHessian",
    "IndependentLabels",
    "FittedSearch",
    "Loss",
    "Margin",
    "ModuleLoss",
    "OutputHessian",
    "Predictive",
    "SharedModel",
    "SklearnTwiceDifferentiable",
    "SparseRows",
    "TorchTwiceDifferentiable",
    "TwiceDifferentiable",
    "as_loss",
    "as_margin",
    "as_model",
    "as_outputs",
    "is_model",
    "doubled",
    "labels_key",
    "leading_length",
    "map_tensors",
    "margin_of",
    "names_with_predictive",
    "register_loss",
    "rebuilt",
    "register_model",
    "resolve_autocast",
    "row_axes",
    "with_row_axis",
]
