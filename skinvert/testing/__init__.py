"""The kit that holds anyone's method, curvature, loss, operator or inverter to what skinvert promises."""

from .curvatures import CURVATURE_CHECKS, check_curvature
from .inverters import INVERTER_CHECKS, check_inverter
from .losses import LOSS_CHECKS, check_loss
from .methods import METHOD_CHECKS, check_method, parametrize_with_methods, registered_methods
from .operators import OPERATOR_CHECKS, check_operator

__all__ = [
    "CURVATURE_CHECKS",
    "INVERTER_CHECKS",
    "LOSS_CHECKS",
    "METHOD_CHECKS",
    "OPERATOR_CHECKS",
    "check_curvature",
    "check_inverter",
    "check_loss",
    "check_method",
    "check_operator",
    "parametrize_with_methods",
    "registered_methods",
]
