"""skinvert solves (H + λI) x = b for a trained model's curvature H, as a scikit-learn estimator."""

from .curvature import Curvature, Factored, SampledFisher, SampledGGN, register_curvature
from .files import load
from .gradients import PerSampleGradient
from .influence import InfluenceFunction
from .inverter import HessianInverter
from .models import (
    Loss,
    SharedModel,
    SklearnTwiceDifferentiable,
    TorchTwiceDifferentiable,
    TwiceDifferentiable,
    register_loss,
    register_model,
)
from .reasons import Reason
from .registry import InversionRegistry, solve_hvp
from .results import InverseHvpResult, InversionMethod
from .selection import HessianInverterCV, make_quadratic_scorer

__version__ = "0.1.0.dev0"

__all__ = [
    "Curvature",
    "Factored",
    "HessianInverter",
    "HessianInverterCV",
    "InfluenceFunction",
    "InverseHvpResult",
    "InversionMethod",
    "InversionRegistry",
    "Loss",
    "PerSampleGradient",
    "Reason",
    "SampledFisher",
    "SampledGGN",
    "SharedModel",
    "SklearnTwiceDifferentiable",
    "TorchTwiceDifferentiable",
    "TwiceDifferentiable",
    "load",
    "make_quadratic_scorer",
    "register_curvature",
    "register_loss",
    "register_model",
    "solve_hvp",
]
