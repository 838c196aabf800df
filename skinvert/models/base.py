"""The least that a model must offer to have its Hessian inverted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from .._check import must_be
from .._types import Array, Batch, Device, Globs
from ..parameters import ParameterLayout

__all__ = ["TwiceDifferentiable"]


class _FromTheta:
    """What θ says of a model, read anew at each look; a subclass or an object may set its own in its place."""

    def __init__(self, look: Callable[[TwiceDifferentiable], object]) -> None:
        self.look = look

    def __get__(self, model: TwiceDifferentiable | None, owner: type) -> object:
        return self if model is None else self.look(model)


def _layout(model: TwiceDifferentiable) -> ParameterLayout:
    shapes = tuple(tuple(parameter.shape) for parameter in model.parameters)
    return ParameterLayout(tuple(f"parameter{i}" for i in range(len(shapes))), shapes)


def _dtype(model: TwiceDifferentiable) -> torch.dtype:
    first = model.parameters[0]
    # Of arrays by way of an empty one: NumPy and torch have no table of each other's dtypes.
    return (first if isinstance(first, torch.Tensor) else torch.from_numpy(np.empty(0, np.asarray(first).dtype))).dtype


def _device(model: TwiceDifferentiable) -> torch.device:
    first = model.parameters[0]
    return first.device if isinstance(first, torch.Tensor) else torch.device("cpu")


def _from_theta(look: Callable[[TwiceDifferentiable], object]) -> Any:
    """Return the descriptor as anything: each attribute below declares the type that it gives."""
    return _FromTheta(look)


class TwiceDifferentiable(ABC):
    """A model whose loss over a batch is twice differentiable in its parameters.

    A subclass of only these members gets the Hessian, and with it the dense and the matrix-free methods. Its loss on
    a batch is the *mean* over the batch's rows; the mean over all data is then taken with the batch sizes as weights.
    For PyTorch modules ``TorchTwiceDifferentiable`` is the subclass to use, or to extend.

    Attributes
    ----------
    layout : ParameterLayout
        Names and shapes of θ: ``parameter0``, ``parameter1`` and so on, unless a subclass says otherwise.
    dtype : torch.dtype
        That data are given in; θ's own.
    device : torch.device
        That data are given on; θ's own.
    """

    layout: ParameterLayout = _from_theta(_layout)
    dtype: torch.dtype = _from_theta(_dtype)
    device: torch.device = _from_theta(_device)

    @property
    @abstractmethod
    def num_params(self) -> int:
        """Number p of parameters."""

    @property
    @abstractmethod
    def parameters(self) -> list[Array]:
        """The parameters θ, as a list of tensors."""

    @abstractmethod
    def grad(self, x: Batch, y: Batch, create_graph: bool = False) -> Array:
        """Return the gradient (p,) of the mean loss on a batch; differentiable once more with ``create_graph``."""

    @abstractmethod
    def hessian(self, x: Batch, y: Batch) -> Array:
        """Return the Hessian (p, p) of the mean loss on a batch."""

    @staticmethod
    @abstractmethod
    def mvp(grad_xy: Array, v: Array, backprop_on: Array | Iterable[Array], *, progress: bool = False) -> Array:
        """Return rows (d, m): the derivative of ``grad_xy`` (p,) along each row of ``v`` (d, p).

        ``backprop_on`` is the tensor (or list of tensors) of m entries that is differentiated for: the parameters
        give Hessian-vector products.
        """

    @classmethod
    @abstractmethod
    def tensor_type(cls) -> type:
        """Return the array type that the model computes with."""

    # -- what a subclass may leave as it is ------------------------------------------------------------------------

    def at_point(self, params: Globs = None, dtype: object = None, device: Device = None) -> TwiceDifferentiable:
        """Return the model at today's θ, of chosen parameters, in a dtype and on a device: here it is as it is.

        Raises ValueError for a choice: a subclass of only the abstract members has none to offer.
        """
        for name, value in (("params", params), ("dtype", dtype), ("device", device)):
            if value is not None and value != "auto":
                hint = "Its own θ says where and what it is. Subclass TorchTwiceDifferentiable for the choice."
                raise ValueError(must_be(name, f"None for a {type(self).__name__}", repr(value), hint))
        return self

    @property
    def reads_pairs_alone(self) -> bool:
        """Whether its data are ``(X, y)`` and never batches, so that a list is rows."""
        return False

    def read(self, data: object) -> object:
        """Return the user's data as this model reads it."""
        return data

    def learn_labels(self, batches: Callable[[], Iterable[Batch]]) -> None:  # noqa: B027 (a default)
        """Learn from the training data, once, how labels are read: nothing here."""

    def pair(self, batch: Batch) -> Batch:
        """Return a raw batch as the pair (inputs, targets) that it stands for: here it is one."""
        return batch

    def check_unchanged(self) -> None:  # noqa: B027 (a default)
        """Raise where what is shared with the user's model has changed since: nothing is, here."""
