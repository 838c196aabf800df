"""How tangents pass through an operation: a rule for each kind, and autograd for the rest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeAlias, TypeGuard

import torch

from .recording import Call, Operation, aten, spread

__all__ = ["Push", "Tangent", "UnservedError", "by_graph", "lifted", "linear_in_first", "rule", "rule_of"]

Tangent: TypeAlias = torch.Tensor | None


class UnservedError(Exception):
    """An operation that no rule serves."""


@dataclass(frozen=True)
class Push:
    """Tangents (r, *shape) of the arguments, None for zero, to those of the results.

    Parameters
    ----------
    along : callable
        The map, of the arguments with the lists among them spread out; it returns one tangent, or a tuple of them.
    used : sequence of bool
        Which of the arguments' tangents it needs.
    live : sequence of bool
        Which of the results have a tangent.
    held : sequence of tensor
        What it keeps.
    """

    along: Callable[..., Tangent | tuple[Tangent, ...]]
    used: Sequence[bool]
    live: Sequence[bool]
    held: Sequence[torch.Tensor] = field(default=(), repr=False)

    def __call__(self, *tangents: Tangent) -> tuple[Tangent, ...]:
        """Return the results' tangents."""
        found = self.along(*tangents)
        return found if isinstance(found, tuple) else (found,)


# A call, and which of its arguments have tangents, to what pushes them; None where they end there.
Rule: TypeAlias = Callable[[Call, list[bool]], Push | None]

_rules: dict[Operation, Rule] = {}


def rule(*operations: Operation) -> Callable[[Rule], Rule]:
    """Decorate the rule of some operations."""

    def register(function: Rule) -> Rule:
        _rules.update(dict.fromkeys(operations, function))
        return function

    return register


def rule_of(call: Call, live: list[bool]) -> Push | None:
    """Return what pushes tangents through a call; None where they end there; UnservedError where none is known."""
    if any(isinstance(one, torch.Tensor) and one.is_complex() for one in (*spread(call.args), *call.results)):
        # Their derivatives are conjugate: none of the rules is for them.
        raise UnservedError(call.operation.name())
    found = _rules.get(call.operation)
    if found is not None:
        return found(call, live)
    if call.operation.is_view or call.operation._schema.is_mutable:
        raise UnservedError(call.operation.name())
    return _pointwise(call, live) if _by_entries(call) else by_graph(call, live)


# -- what holds for many ---------------------------------------------------------------------------------------------


def linear_in_first(call: Call, live: list[bool]) -> Push | None:
    """Return the push of an operation that is linear in its first argument, and whose slope no other changes."""
    if not live[0]:
        return None
    operation, rest, named = call.operation, call.args[1:], call.kwargs

    def one(tangent: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        found = operation(tangent, *rest, **named)
        return tuple(found) if isinstance(found, list) else found

    def along(t: torch.Tensor, *_: Tangent) -> Tangent | tuple[Tangent, ...]:
        with _quiet():
            found: torch.Tensor | tuple[torch.Tensor, ...] = torch.vmap(one)(t)
        return found

    held = [tensor for tensor in spread(rest) if isinstance(tensor, torch.Tensor)]
    used = [True, *[False] * (len(live) - 1)]
    return Push(along, used, [True] * len(call.results), held)


@rule(
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
def _constant(call: Call, live: list[bool]) -> None:
    """Only the shape counts."""


def _by_entries(call: Call) -> bool:
    """Whether an entry of the result depends on those of the arguments at its own place alone."""
    if torch.Tag.pointwise in call.operation.tags:
        return True
    # Backward passes of activations, and losses without a reduction.
    outputs, result = call.args[ENTRYWISE.get(call.operation, 0)], call.results[0]
    if call.operation not in ENTRYWISE or not isinstance(outputs, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    return outputs.shape == result.shape


# By the place of an argument that is of the result's shape where they are entrywise.
ENTRYWISE: dict[Operation, int] = {
    aten.mse_loss.default: 0,
    aten.mse_loss_backward.default: 1,
    aten.smooth_l1_loss.default: 0,
    aten.smooth_l1_loss_backward.default: 1,
    aten.huber_loss.default: 0,
    aten.huber_loss_backward.default: 1,
    aten.binary_cross_entropy_with_logits.default: 0,
    aten.binary_cross_entropy.default: 0,
    aten.binary_cross_entropy_backward.default: 1,
    aten.soft_margin_loss.default: 0,
    aten.soft_margin_loss_backward.default: 1,
    aten.softplus_backward.default: 0,
    aten.leaky_relu_backward.default: 0,
    aten.elu_backward.default: 0,
    aten.hardtanh_backward.default: 0,
    aten.hardswish.default: 0,
    aten.hardswish_backward.default: 0,
    aten.log_sigmoid_backward.default: 0,
    aten.masked_fill.Scalar: 0,
}


def _pointwise(call: Call, live: list[bool]) -> Push | None:
    """Return Σⱼ tⱼ ∂f/∂xⱼ, the partial derivatives computed once."""
    result = call.results[0]
    if not _is_real(result):
        return None
    slopes: dict[int, torch.Tensor | float] = {}
    for j, slope in _slopes(call, live, result).items():
        plain = _uniform(slope)
        if plain is None:
            slopes[j] = slope
        elif plain:
            slopes[j] = plain
    if not slopes:
        return None
    shape = result.shape

    def along(*tangents: Tangent) -> Tangent:
        total: Tangent = None
        for j, slope in slopes.items():
            tangent = tangents[j]
            if tangent is None:
                continue
            tangent = lifted(tangent, len(shape))
            if isinstance(slope, torch.Tensor):
                total = tangent * slope if total is None else torch.addcmul(total, tangent, slope)
            else:
                term = tangent if slope == 1 else tangent * slope
                total = term if total is None else total + term
        return None if total is None else total.expand(len(total), *shape)

    held = [slope for slope in slopes.values() if isinstance(slope, torch.Tensor)]
    return Push(along, [j in slopes for j in range(len(live))], [True, *[False] * (len(call.results) - 1)], held)


def by_graph(call: Call, live: list[bool]) -> Push | None:
    """Return J t as the derivative of Jᵀu by u along t: by a kept graph of the one operation, for any there is."""
    of, places = _as_function(call, live)
    held: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.detach())
        return held[-1]

    # Forward mode has a level that threads share.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        leaves = [x.detach().requires_grad_(True) for x in _tensors(call, places)]
        found = of(*leaves)
        results = list(found) if isinstance(found, tuple | list) else [found]
        live_results = [_is_real(one) and one.requires_grad for one in results]
        reached = [one for one in results if _is_real(one) and one.requires_grad]
        if not reached:
            return None
        u = [torch.ones_like(one, requires_grad=True) for one in reached]
        pulled = torch.autograd.grad(reached, leaves, u, create_graph=True, allow_unused=True)
    graph = _Graph(u, {j: one for j, one in zip(places, pulled, strict=True) if one is not None})
    held += [one.detach() for one in (*graph.u, *graph.pulled.values())]
    used = [j in graph.pulled for j in range(len(live))]
    return Push(partial(_along, graph, live_results), used, live_results, held)


class _Graph(NamedTuple):
    """Jᵀu, by the places of the arguments, and u."""

    u: list[torch.Tensor]
    pulled: dict[int, torch.Tensor]


def _along(graph: _Graph, live: list[bool], *tangents: Tangent) -> tuple[Tangent, ...]:
    given = {j: t for j, one in graph.pulled.items() if (t := tangents[j]) is not None and one.requires_grad}
    if not given:
        return tuple(None for _ in live)
    with _quiet():
        found = torch.autograd.grad(
            [graph.pulled[j] for j in given],
            graph.u,
            list(given.values()),
            retain_graph=True,
            is_grads_batched=True,
            allow_unused=True,
        )
    parts = iter(found)
    return tuple(next(parts) if one else None for one in live)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let torch go row by row where it has no batching rule, which it warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
        yield


def _slopes(call: Call, live: list[bool], result: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return ∂f/∂xⱼ, of the result's shape, of each argument that has a tangent; those that are zero are left out."""
    of, places = _as_function(call, live)
    given = [x.detach().to(result.dtype) for x in _tensors(call, places)]
    leaves = [x.expand(result.shape).requires_grad_(True) for x in given]
    with torch.enable_grad():
        value = of(*leaves)
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return {}
    # Entry by entry, so that the slope is the gradient of the sum: by a backward pass, which every operation here has.
    found = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return {j: slope for j, slope in zip(places, found, strict=True) if slope is not None}


def _as_function(call: Call, live: list[bool]) -> tuple[Callable[..., object], list[int]]:
    """Return a call as a function of the arguments that have tangents, and their places with lists spread out."""
    places = [j for j, has in enumerate(live) if has]

    def of(*given: torch.Tensor) -> object:
        values = dict(zip(places, given, strict=True))
        args: list[object] = []
        start = 0
        for one in call.args:
            if isinstance(one, list | tuple):
                args.append([values.get(start + i, x) for i, x in enumerate(one)])
                start += len(one)
            else:
                args.append(values.get(start, one))
                start += 1
        return call.operation(*args, **call.kwargs)

    return of, places


def _tensors(call: Call, places: Sequence[int]) -> list[torch.Tensor]:
    args = spread(call.args)
    return [x for x in (args[j] for j in places) if isinstance(x, torch.Tensor)]


def lifted(tangent: torch.Tensor, ndim: int) -> torch.Tensor:
    """Return a tangent (r, *shape) as one that broadcasts against tensors of ``ndim`` axes."""
    missing = ndim - (tangent.ndim - 1)
    return tangent.reshape(len(tangent), *[1] * missing, *tangent.shape[1:]) if missing > 0 else tangent


def _uniform(slope: torch.Tensor) -> float | None:
    """Return the value of all entries, None where they differ."""
    if not slope.numel():
        return 0.0
    first = slope.reshape(-1)[0]
    return float(first) if bool((slope == first).all()) else None


def _is_real(one: object) -> TypeGuard[torch.Tensor]:
    return isinstance(one, torch.Tensor) and one.is_floating_point()
