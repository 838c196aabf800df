"""The least that a model must offer to have its Hessian inverted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

__all__ = ["TwiceDifferentiable"]


class TwiceDifferentiable(ABC):
    """A model whose loss over a batch is twice differentiable in its parameters.

    A subclass of only these members gets the Hessian, and with it the dense and the matrix-free methods. Its loss on
    a batch is the *mean* over the batch's rows; the mean over all data is then taken with the batch sizes as weights.
    For PyTorch modules ``TorchTwiceDifferentiable`` is the subclass to use, or to extend.
    """

    @property
    @abstractmethod
    def num_params(self) -> int:
        """Number p of parameters."""

    @property
    @abstractmethod
    def parameters(self) -> list[Any]:
        """The parameters θ, as a list of tensors."""

    @abstractmethod
    def grad(self, x: Any, y: Any, create_graph: bool = False) -> Any:
        """Return the gradient (p,) of the mean loss on a batch; differentiable once more with ``create_graph``."""

    @abstractmethod
    def hessian(self, x: Any, y: Any) -> Any:
        """Return the Hessian (p, p) of the mean loss on a batch."""

    @staticmethod
    @abstractmethod
    def mvp(grad_xy: Any, v: Any, backprop_on: Any, *, progress: bool = False) -> Any:
        """Return rows (d, m): the derivative of ``grad_xy`` (p,) along each row of ``v`` (d, p).

        ``backprop_on`` is the tensor (or list of tensors) of m entries that is differentiated for: the parameters
        give Hessian-vector products.
        """

    @classmethod
    @abstractmethod
    def tensor_type(cls) -> type:
        """Return the array type that the model computes with."""
