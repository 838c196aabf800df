"""skinvert solves (H + λI) x = b for a trained model's curvature H, as a scikit-learn estimator."""

from .gradients import PerSampleGradient
from .inverter import HessianInverter
from .models import TorchTwiceDifferentiable, TwiceDifferentiable
from .registry import InversionRegistry, solve_hvp
from .results import InverseHvpResult, InversionMethod
from .selection import HessianInverterCV, make_quadratic_scorer

__version__ = "0.1.0.dev0"

__all__ = [
    "HessianInverter",
    "HessianInverterCV",
    "InverseHvpResult",
    "InversionMethod",
    "InversionRegistry",
    "PerSampleGradient",
    "TorchTwiceDifferentiable",
    "TwiceDifferentiable",
    "make_quadratic_scorer",
    "solve_hvp",
]
