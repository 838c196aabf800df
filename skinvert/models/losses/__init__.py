"""One class a loss: its name, numerators, denominators, checks, second derivatives and predicted labels."""

from .base import Loss, Outputs
from .bce import BCEWithLogits
from .callable_loss import CallableLoss
from .cross_entropy import CrossEntropy
from .margin import Margin
from .module import ModuleLoss, TorchLoss
from .nll import NLL, Probabilities
from .output_hessians import DiagonalHessian, FactoredHessian, OutputHessian, SoftmaxHessian, explains
from .outputs import OutputSum
from .poisson import PoissonNLL
from .predictive import IndependentLabels, Predictive
from .registry import LOSSES, as_loss, is_torch_loss, names_with_predictive, register_loss, torch_loss

__all__ = [
    "LOSSES",
    "NLL",
    "BCEWithLogits",
    "CallableLoss",
    "CrossEntropy",
    "DiagonalHessian",
    "FactoredHessian",
    "IndependentLabels",
    "Loss",
    "Margin",
    "ModuleLoss",
    "OutputHessian",
    "OutputSum",
    "Outputs",
    "PoissonNLL",
    "Predictive",
    "Probabilities",
    "SoftmaxHessian",
    "TorchLoss",
    "as_loss",
    "explains",
    "is_torch_loss",
    "names_with_predictive",
    "register_loss",
    "torch_loss",
]
