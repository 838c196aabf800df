"""Derivatives of what a batch computes, along many directions at once: recorded, then pushed through rule by rule."""

from . import convolutions, norms, products, shapes
from .program import Program, UnservedError
from .recording import Recording, recorded

__all__ = [
    "Program",
    "Recording",
    "UnservedError",
    "convolutions",
    "norms",
    "products",
    "recorded",
    "shapes",
]
