"""Whatever the user has trained, as a ``TwiceDifferentiable``."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeGuard, runtime_checkable

from sklearn.base import BaseEstimator, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from torch import nn

from .._check import must_be
from .._types import Decay
from .base import TwiceDifferentiable
from .losses import Margin, OutputSum
from .shared import UNFITTED, SharedModel
from .sklearn import SklearnTwiceDifferentiable
from .skorch import SkorchTwiceDifferentiable
from .torch import TorchTwiceDifferentiable

__all__ = ["FittedSearch", "as_margin", "as_model", "as_outputs", "is_model", "margin_of", "register_model"]

ACCEPTED = "a torch.nn.Module, an initialised skorch net, a fitted scikit-learn model or a TwiceDifferentiable"

if TYPE_CHECKING:
    import skorch


@runtime_checkable
class FittedSearch(Protocol):
    """A search that has been fitted, of scikit-learn or another library."""

    best_estimator_: BaseEstimator


@runtime_checkable
class _Estimator(Protocol):
    """An estimator, of other libraries too, which keep scikit-learn's contract without its base class."""

    def get_params(self, deep: bool = True) -> dict[str, object]: ...


# Of models of one type, whichever that is.
Adapter: TypeAlias = Callable[..., TwiceDifferentiable]

_adapters: dict[type, Adapter] = {}


def register_model(model_type: type, adapter: Adapter) -> None:
    """Say how models of a type, and of its subclasses, become a ``TwiceDifferentiable``.

    The nearest registered base counts, before what is built in; registering a type again replaces its adapter.
    Processes of a search (``n_jobs``) know what the modules that they import register.

    Parameters
    ----------
    model_type : type
        The class of the models.
    adapter : callable
        Returns the ``TwiceDifferentiable`` of one, which brings its own loss and penalty.

    Examples
    --------
    >>> class Slope:
    ...     weight = 3.0
    >>> def adapt(slope):
    ...     net = nn.Linear(1, 1, bias=False)
    ...     nn.init.constant_(net.weight, slope.weight)
    ...     return TorchTwiceDifferentiable(net, "mse")
    >>> register_model(Slope, adapt)
    >>> as_model(Slope()).num_params
    1
    """
    if not isinstance(model_type, type):
        raise TypeError(must_be("model_type", "a type", repr(model_type)))
    if not callable(adapter):
        raise TypeError(must_be("adapter", "a function of a model", repr(adapter)))
    _adapters[model_type] = adapter


def is_model(value: object) -> bool:
    """Return whether ``value`` is something that was trained, rather than data."""
    # A class is no model either, but an attempt at one: `as_model` says so.
    adapted = isinstance(value, nn.Module | TwiceDifferentiable | type) or _is_skorch(value)
    return adapted or isinstance(value, _Estimator) or _adapter_of(value) is not None


def as_model(model: object, loss: object = None, weight_decay: Decay = 0.0) -> TwiceDifferentiable:
    """Return ``model`` adapted; ``loss`` and ``weight_decay`` are for what does not bring its own."""
    model = _unwrap(model)
    if isinstance(model, TwiceDifferentiable):
        _refuse_own(model, loss, weight_decay)
        return model
    adapter = _adapter_of(model)
    if adapter is not None:
        _refuse_own(model, loss, weight_decay)
        return _checked(adapter(model), model)
    if isinstance(model, nn.Module):
        return TorchTwiceDifferentiable(model, loss, weight_decay)
    if _is_skorch(model):
        return _adapt_skorch(model, loss, weight_decay)
    if isinstance(model, Pipeline):
        return _adapt_pipeline(model, loss, weight_decay)
    if isinstance(model, BaseEstimator):
        _refuse_search(model)
        _refuse_own(model, loss, weight_decay)
        return SklearnTwiceDifferentiable(model)
    if isinstance(model, type):
        raise TypeError(must_be("model", ACCEPTED, f"the class {model.__name__}", "Try an instance of it."))
    raise TypeError(must_be("model", ACCEPTED, f"a {type(model).__name__}", _way_to_a_model(model)))


def as_margin(model: object) -> TwiceDifferentiable:
    """Return ``model`` adapted, with the margin of its outputs as its loss; a bare module's outputs are logits."""
    model = _unwrap(model)
    if isinstance(model, nn.Module):
        return TorchTwiceDifferentiable(model, Margin())
    adapted = copy.copy(as_model(model))
    if not isinstance(adapted, TorchTwiceDifferentiable):
        raise TypeError(must_be("The model for the margin", "a classifier", type(model).__name__))
    adapted.loss = margin_of(adapted)
    return adapted


def margin_of(model: TorchTwiceDifferentiable) -> Margin:
    """Return the margin of a model's outputs; TypeError for a scikit-learn model that has no classes."""
    if isinstance(model, SklearnTwiceDifferentiable) and not is_classifier(model.estimator):
        raise TypeError(must_be("The model for the margin", "a classifier", type(model.estimator).__name__))
    return Margin() if model.loss is None else Margin(model.loss.takes)


def as_outputs(model: object) -> TwiceDifferentiable:
    """Return ``model`` adapted, its outputs in place of its loss."""
    model = _unwrap(model)
    adapted = TorchTwiceDifferentiable(model, OutputSum()) if isinstance(model, nn.Module) else as_model(model)
    return adapted.of_outputs() if isinstance(adapted, TorchTwiceDifferentiable) else adapted


def _unwrap(model: object) -> object:
    while isinstance(model, SharedModel | FrozenEstimator):
        model = model.model if isinstance(model, SharedModel) else model.estimator
    return model


def _adapter_of(model: object) -> Adapter | None:
    return next((_adapters[base] for base in type(model).__mro__ if base in _adapters), None)


def _checked(adapted: object, model: object) -> TwiceDifferentiable:
    if not isinstance(adapted, TwiceDifferentiable):
        what = f"What the adapter registered for a {type(model).__name__} returns"
        raise TypeError(must_be(what, "a TwiceDifferentiable", type(adapted).__name__))
    return adapted


def _refuse_search(model: object) -> None:
    if isinstance(model, GridSearchCV | RandomizedSearchCV | FittedSearch):
        got = f"a {type(model).__name__}, a search for one"
        raise TypeError(must_be("model", ACCEPTED, got, "Try its `.best_estimator_`, once it is fitted."))


def _way_to_a_model(value: object) -> str:
    if isinstance(value, Mapping):
        return "A `state_dict` holds tensors alone: load it into its module."
    if isinstance(value, str | bytes | Path):
        return "Load it first."
    if callable(value):
        return "Wrap a function of inputs in a module; for another loss subclass TwiceDifferentiable."
    return "Models of other types: `register_model`."


def _refuse_own(model: object, loss: object, weight_decay: Decay) -> None:
    if loss is not None or weight_decay:
        name = "loss" if loss is not None else "weight_decay"
        hint = f"A {type(model).__name__} brings its own: give it there."
        raise ValueError(must_be(name, "left at its default", repr(loss if loss is not None else weight_decay), hint))


def _is_skorch(value: object) -> TypeGuard[skorch.NeuralNet]:
    # Without importing skorch for those who do not use it.
    skorch = sys.modules.get("skorch")
    return skorch is not None and isinstance(value, skorch.NeuralNet)


def _adapt_skorch(net: skorch.NeuralNet, loss: object, weight_decay: Decay) -> TwiceDifferentiable:
    if loss is not None:
        hint = "A skorch net brings its criterion; for another loss, pass `net.module_`."
        raise ValueError(must_be("loss", "None for a skorch net", repr(loss), hint))
    if not net.initialized_:
        hint = f"Call `net.initialize()` or `net.fit(X, y)` first; {UNFITTED}"
        raise NotFittedError(must_be(f"The {type(net).__name__}", "initialised", "an uninitialised net", hint))
    return SkorchTwiceDifferentiable(net, weight_decay)


def _adapt_pipeline(pipeline: Pipeline, loss: object, weight_decay: Decay) -> TwiceDifferentiable:
    """Return the last step's model, which reads data through the steps before it."""
    adapted = as_model(pipeline.steps[-1][1], loss, weight_decay)
    if len(pipeline) == 1:
        return adapted
    if not isinstance(adapted, TorchTwiceDifferentiable):
        must = "a TorchTwiceDifferentiable once adapted"
        raise TypeError(must_be("The last step of a pipeline", must, type(adapted).__name__))
    adapted, before = copy.copy(adapted), pipeline[:-1]
    adapted.features = before if adapted.features is None else make_pipeline(before, adapted.features)
    return adapted
