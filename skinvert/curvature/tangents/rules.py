"""How tangents pass through an operation: a rule for each kind, and torch's own forward mode for the rest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeGuard

import torch
from torch.autograd import forward_ad

from .recording import Call, Operation, aten, spread

__all__ = ["Push", "Tangent", "UnservedError", "linear_in_first", "rule", "rule_of"]

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
    found = _rules.get(call.operation)
    if found is not None:
        return found(call, live)
    if call.operation.is_view or call.kwargs.get("out") is not None or call.operation.name().endswith("_"):
        raise UnservedError(call.operation.name())
    return _pointwise(call, live) if _by_entries(call) else _forward_mode(call, live)


# -- what holds for many ---------------------------------------------------------------------------------------------


def linear_in_first(call: Call, live: list[bool]) -> Push | None:
    """Return the push of an operation that is linear in its first argument, and whose slope no other changes."""
    if not live[0]:
        return None
    rest = call.args[1:]

    def one(tangent: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        found = call.operation(tangent, *rest, **call.kwargs)
        return tuple(found) if isinstance(found, list) else found

    held = [tensor for tensor in spread(rest) if isinstance(tensor, torch.Tensor)]
    used = [True, *[False] * (len(live) - 1)]
    return Push(lambda t, *_: torch.vmap(one)(t), used, [True] * len(call.results), held)


def _by_entries(call: Call) -> bool:
    """Whether an entry of the result depends on those of the arguments at its own place alone."""
    if torch.Tag.pointwise in call.operation.tags:
        return True
    # Losses without a reduction.
    outputs, result = call.args[LOSSES.get(call.operation, 0)], call.results[0]
    if call.operation not in LOSSES or not isinstance(outputs, torch.Tensor) or not isinstance(result, torch.Tensor):
        return False
    return outputs.shape == result.shape


LOSSES: dict[Operation, int] = {
    aten.mse_loss.default: 0,
    aten.mse_loss_backward.default: 1,
    aten.smooth_l1_loss.default: 0,
    aten.smooth_l1_loss_backward.default: 1,
    aten.huber_loss.default: 0,
    aten.huber_loss_backward.default: 1,
    aten.binary_cross_entropy_with_logits.default: 0,
    aten.binary_cross_entropy.default: 0,
    aten.binary_cross_entropy_backward.default: 1,
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


def _forward_mode(call: Call, live: list[bool]) -> Push | None:
    """Return torch's own forward mode, batched over the rows."""
    floating = [_is_real(one) for one in call.results]
    if not any(floating):
        return None
    shapes = [one if isinstance(one, torch.Tensor) else torch.empty(0, device="cpu") for one in call.results]
    of, places = _as_function(call, live)
    primals = _tensors(call, places)

    def along(*tangents: Tangent) -> tuple[Tangent, ...]:
        known = [tangents[j] for j in places]
        r = next(len(t) for t in known if t is not None)
        rows = [x.new_zeros(r, *x.shape) if t is None else t for t, x in zip(known, primals, strict=True)]
        with warnings.catch_warnings(), forward_ad.dual_level():
            # Its first use loads scripts of torch's own.
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            found: tuple[torch.Tensor, ...] = torch.vmap(lambda *ts: _filled(_within(of, primals, ts), shapes))(*rows)
        return found

    return Push(along, live, floating, [x for x in spread(call.args) if isinstance(x, torch.Tensor)])


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


def _within(
    of: Callable[..., object], primals: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor]
) -> list[Tangent]:
    duals = [forward_ad.make_dual(x.detach(), t) for x, t in zip(primals, tangents, strict=True)]
    found = of(*duals)
    results = found if isinstance(found, tuple | list) else (found,)
    return [forward_ad.unpack_dual(one).tangent if _is_real(one) else None for one in results]


def _filled(tangents: Sequence[Tangent], results: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return zeros for no tangent, so that each is one."""
    return tuple(torch.zeros_like(one) if t is None else t for t, one in zip(tangents, results, strict=True))


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
    return isinstance(one, torch.Tensor) and (one.is_floating_point() or one.is_complex())
