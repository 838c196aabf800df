"""Whatever the user has trained, as a ``TwiceDifferentiable``."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import NotFittedError
from torch import nn

from .._validation import must_be
from .base import TwiceDifferentiable
from .skorch import SkorchTwiceDifferentiable
from .torch import TorchTwiceDifferentiable

__all__ = ["as_model", "describe", "is_model"]

ACCEPTED = "a torch.nn.Module, an initialised skorch net or a TwiceDifferentiable"


def is_model(value: Any) -> bool:
    """Return whether ``value`` is something that was trained, rather than data."""
    # A class is no model either, but an attempt at one: `as_model` says so.
    adapted = isinstance(value, nn.Module | TwiceDifferentiable | type) or _is_skorch(value)
    return adapted or hasattr(value, "get_params")


def as_model(model: Any, loss: Any = None, weight_decay: float = 0.0) -> TwiceDifferentiable:
    """Return ``model`` adapted; ``loss`` and ``weight_decay`` are for what does not bring its own."""
    if isinstance(model, TwiceDifferentiable):
        _refuse_own(model, loss, weight_decay)
        return model
    if isinstance(model, nn.Module):
        return TorchTwiceDifferentiable(model, loss, weight_decay)
    if _is_skorch(model):
        return _adapt_skorch(model, loss, weight_decay)
    if isinstance(model, type):
        raise TypeError(must_be("model", ACCEPTED, f"the class {model.__name__}", "Try an instance of it."))
    raise TypeError(must_be("model", ACCEPTED, type(model).__name__))


def describe(model: TwiceDifferentiable) -> dict[str, Any]:
    """Return the dtype and device that a model computes with."""
    if isinstance(model, TorchTwiceDifferentiable):
        return {"dtype": model.dtype, "device": model.device}
    first = model.parameters[0]
    if isinstance(first, torch.Tensor):
        return {"dtype": first.dtype, "device": first.device}
    return {"dtype": getattr(torch, np.asarray(first).dtype.name), "device": torch.device("cpu")}


def _refuse_own(model: Any, loss: Any, weight_decay: float) -> None:
    if loss is not None or weight_decay:
        name = "loss" if loss is not None else "weight_decay"
        hint = f"A {type(model).__name__} brings its own: give it there."
        raise ValueError(must_be(name, "left at its default", repr(loss if loss is not None else weight_decay), hint))


def _is_skorch(value: Any) -> bool:
    # Without importing skorch for those who do not use it.
    skorch = sys.modules.get("skorch")
    return skorch is not None and isinstance(value, skorch.NeuralNet)


def _adapt_skorch(net: Any, loss: Any, weight_decay: float) -> TwiceDifferentiable:
    if loss is not None:
        hint = "A skorch net brings its criterion; for another loss, pass `net.module_`."
        raise ValueError(must_be("loss", "None for a skorch net", repr(loss), hint))
    if not getattr(net, "initialized_", False):
        hint = "Call `net.initialize()` or `net.fit(X, y)` first; `clone` returns an unfitted net."
        raise NotFittedError(must_be(f"The {type(net).__name__}", "initialised", "an uninitialised net", hint))
    return SkorchTwiceDifferentiable(net, weight_decay)
