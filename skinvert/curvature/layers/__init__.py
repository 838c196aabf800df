"""The layers of a model, recorded: what each sees and the derivatives at its results, and what is made of both."""

from .assembly import agrees, agrees_at_some, dense_from_layers
from .kronecker import kronecker_factors
from .recording import Signals
from .second_order import hessian_diagonal_from_layers, hessian_from_layers
from .squares import diagonal_from_layers

__all__ = [
    "Signals",
    "agrees",
    "agrees_at_some",
    "dense_from_layers",
    "diagonal_from_layers",
    "hessian_diagonal_from_layers",
    "hessian_from_layers",
    "kronecker_factors",
]
