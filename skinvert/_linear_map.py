"""A linear map of rows as a differentiable function, so that hypergradients pass through a solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._autograd import ordinary_state, own_tensor
from ._check import must_be
from ._types import Array, Batch
from .results import InverseHvpResult

__all__ = ["apply_linear", "solve_linear"]

Map = Callable[..., Any]


def apply_linear(b: Array, apply: Map, adjoint: Map | None = None) -> Array:
    """Return ``apply(b)``; for a tensor with its place in autograd's graph, where one is recorded.

    The gradient with respect to b is the adjoint map of the incoming one, and so are derivatives of any order. Neither
    map's own operations are recorded: λ, the model and the data are constants.

    Parameters
    ----------
    b : tensor of shape (..., k, p), or anything else
        Rows; what is no tensor is mapped as it is.
    apply : callable
        A linear map of the rows, each on its own.
    adjoint : callable, default=None
        Its adjoint; None is ``apply`` itself, of a symmetric map.

    Examples
    --------
    >>> b = torch.ones(1, 2, requires_grad=True)
    >>> x = apply_linear(b, lambda rows: 3.0 * rows)
    >>> torch.autograd.grad(x.square().sum(), b)[0]
    tensor([[18., 18.]])
    """
    if not isinstance(b, torch.Tensor):
        return apply(b)
    return _mapped(b, apply, adjoint or apply)


def solve_linear(b: Array, solve: Map, x0: Array | None = None) -> InverseHvpResult:
    """Return ``solve(b, x0)``, its x in autograd's graph as by ``apply_linear``; the inverse of H + λI is symmetric.

    The start ``x0`` is a constant and belongs to b: what derivatives solve for starts without one.
    """
    told: list[Any] = []

    def apply(rows: Batch, start: Array | None = None) -> Array:
        result = solve(rows) if start is None else solve(rows, start)
        if not isinstance(result, InverseHvpResult | tuple) or len(result) != 2:
            raise TypeError(must_be("What a method returns", "an InverseHvpResult", f"a {type(result).__name__}"))
        x, info = result
        # The solves of a backward pass tell nothing.
        if not told:
            told.append(info)
        return x

    def first(rows: Batch) -> Array:
        return apply(rows, x0)

    x = _mapped(b, apply, apply, first) if isinstance(b, torch.Tensor) else first(b)
    return InverseHvpResult(x, told[0])


def _mapped(b: torch.Tensor, apply: Map, adjoint: Map, first: Map | None = None) -> Array:
    """Return ``first(b)``, which has the values of ``apply(b)``; derivatives go by the other two alone."""
    return _LinearMap.apply(b, apply, adjoint, first or apply)  # type: ignore[no-untyped-call]  # torch's own.


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(b: torch.Tensor, _: Map, __: Map, first: Map) -> Array:
        # A matrix-free solve differentiates the loss, and x is to be an ordinary tensor.
        with ordinary_state():
            x = first(own_tensor(b.detach()))
            return x.detach() if isinstance(x, torch.Tensor) else x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004 (torch's names)
        ctx.maps = inputs[1:3]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Array:
        apply, adjoint = ctx.maps
        return _mapped(gradients[0], adjoint, apply), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Array:
        return _mapped(tangents[0], *ctx.maps)

    @staticmethod
    def vmap(_: Any, in_dims: tuple[Any, ...], b: torch.Tensor, *maps: Map) -> Array:
        # More rows of one call.
        rows = b.movedim(in_dims[0], -3)
        x = _mapped(rows.flatten(-3, -2), *maps)
        return x.unflatten(-2, rows.shape[-3:-1]).movedim(-3, 0), 0
