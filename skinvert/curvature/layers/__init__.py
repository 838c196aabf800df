"""The layers of a model, recorded: what each sees and the derivatives at its results, and what is made of both."""

from .assembly import dense_from_layers
from .kronecker import kronecker_factors
from .recording import Signals

__all__ = ["Signals", "dense_from_layers", "kronecker_factors"]
