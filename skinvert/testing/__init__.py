"""The kit that holds anyone's method, curvature, loss or operator to what skinvert promises."""

from .methods import METHOD_CHECKS, check_method, parametrize_with_methods, registered_methods

__all__ = ["METHOD_CHECKS", "check_method", "parametrize_with_methods", "registered_methods"]
