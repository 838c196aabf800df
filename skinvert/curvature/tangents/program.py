"""A recorded computation as a linear map of tangents: from rows at its inputs to rows at one of its results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .recording import Call, Recording, aten, spread
from .rules import Push, UnservedError, rule_of

__all__ = ["Program", "UnservedError"]

# Numbers of all tangents alive at once: on a CPU a chunk of rows is to stay in the caches.
CHUNK, ACCELERATED = 2**20, 2**27


@dataclass(frozen=True)
class _Step:
    """A push of some slots' tangents to others; ``last`` are the slots that no later step reads."""

    push: Push
    sources: tuple[int | None, ...]
    targets: tuple[int | None, ...]
    last: tuple[int, ...]


class Program:
    r"""J V for a recorded result y of given inputs: V (k, Σ numel of the inputs) -> (k, numel of y).

    What y depends on is what autograd says it does: a tensor is followed where it requires a gradient and is no leaf
    of its own, so that detached tensors are constants, as in a backward pass.

    Parameters
    ----------
    record : Recording
        Of a computation with gradients on, of the gradient by ``create_graph=True``.
    inputs : sequence of tensor
        What V is tangent to, flat and one after the other.
    output : tensor
        y.

    Raises
    ------
    UnservedError
        Where an operation on the way has no rule.

    Examples
    --------
    >>> from skinvert.curvature.tangents import recorded
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> record, y = recorded(lambda: (x * x).sum())
    >>> Program(record, [x], y)(torch.eye(2))
    tensor([[2.],
            [4.]])
    """

    def __init__(self, record: Recording, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        self.shapes = [tuple(one.shape) for one in inputs]
        self.sizes = [one.numel() for one in inputs]
        self.output, self.device, self.dtype = output.numel(), output.device, output.dtype
        slots = _Slots(inputs)
        steps = [step for call in record.calls for step in slots.step(call)]
        self.result, self.slots = slots.of(output), slots.shapes
        self.steps = _needed(steps, self.result)
        # Of one row, at the widest place.
        self.numbers = max(_alive(self.steps, slots.numbers, self.sizes), 1)
        # Numbers of rows at which all at once were found to be as each alone.
        self._sound = {1}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the steps hold."""
        held: dict[int, int] = {}
        for step in self.steps:
            for tensor in step.push.held:
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
        return sum(held.values())

    def __call__(self, V: torch.Tensor) -> torch.Tensor:
        """Return J v for each row of V, in chunks of rows."""
        if self.result is None or not len(V):
            return V.new_zeros(len(V), self.output)
        chunks = torch.split(V, self.rows)
        return torch.cat([self._together(rows) for rows in chunks])

    def ones(self) -> torch.Tensor:
        """Return as many rows of ones as are pushed at once."""
        return torch.ones(self.rows, sum(self.sizes), dtype=self.dtype, device=self.device)

    @property
    def rows(self) -> int:
        """How many rows are pushed at once."""
        return max(1, (CHUNK if self.device.type == "cpu" else ACCELERATED) // self.numbers)

    def _together(self, V: torch.Tensor) -> torch.Tensor:
        """Push rows all at once, where that is right for so many: an axis may be told by its length."""
        found = self._pushed(V)
        if len(V) in self._sound:
            return found
        generator = torch.Generator("cpu").manual_seed(0)
        mixture = torch.randn(len(V), generator=generator, dtype=torch.float64, device="cpu").to(V)
        error = (mixture @ found - self._pushed((mixture @ V)[None])[0]).norm()
        size = (mixture * found.norm(dim=1)).norm()
        if not bool(error <= math.sqrt(torch.finfo(V.dtype).eps) * size):
            return torch.cat([self._pushed(v[None]) for v in V])
        self._sound.add(len(V))
        return found

    @torch.no_grad()
    def _pushed(self, V: torch.Tensor) -> torch.Tensor:
        parts = V.split(self.sizes, dim=1)
        alive = {
            j: part.reshape(len(V), *shape) for j, (part, shape) in enumerate(zip(parts, self.shapes, strict=True))
        }
        for step in self.steps:
            found = step.push(*[None if source is None else alive[source] for source in step.sources])
            for target, tangent in zip(step.targets, found, strict=True):
                if target is not None:
                    # None is zero: of a result that does not depend on what has a tangent here, or of units that are
                    # off for the whole batch. Rules are given what they were told would be there.
                    alive[target] = V.new_zeros(len(V), *self.slots[target]) if tangent is None else tangent
            for slot in step.last:
                alive.pop(slot, None)
        assert self.result is not None
        return alive[self.result].reshape(len(V), -1)


class _Slots:
    """Numbers for the tensors that depend on the inputs, as the calls are followed."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        self.number = {id(one): j for j, one in enumerate(inputs)}
        self.inputs = {id(one) for one in inputs}
        # Inputs, detached.
        self.kept: set[int] = set()
        self.numbers = {j: one.numel() for j, one in enumerate(inputs)}
        self.shapes: dict[int, tuple[int, ...]] = {}

    def of(self, tensor: object, through_detach: bool = False) -> int | None:
        """Return the number of a tensor, or None where no tangent comes to it."""
        if not isinstance(tensor, torch.Tensor) or id(tensor) not in self.number:
            return None
        if id(tensor) in self.inputs or through_detach:
            return self.number[id(tensor)]
        return self.number[id(tensor)] if tensor.requires_grad and not tensor.is_leaf else None

    def step(self, call: Call) -> list[_Step]:
        """Return the step of a call, in a list of its own; none where no tangent comes through it."""
        # Autograd keeps results by detaching them, and gives them back by detaching once more.
        kept = call.operation is aten.detach.default
        if kept and self._is_kept_input(call):
            return []
        sources = [self.of(one, kept) for one in spread(call.given)]
        if any(self.of(one) is not None for one in spread(tuple(call.kwargs.values()))):
            raise UnservedError(call.operation.name())
        if all(source is None for source in sources):
            self._forget(call)
            return []
        rule = rule_of(call._replace(given=(), made=()), [source is not None for source in sources])
        self._forget(call)
        if rule is None:
            return []
        targets = tuple(self._new(one) if live else None for one, live in zip(call.made, rule.live, strict=True))
        used = tuple(s if u else None for s, u in zip(sources, rule.used, strict=True))
        return [_Step(rule, used, targets, ())]

    def _is_kept_input(self, call: Call) -> bool:
        """Take note where autograd keeps an input or gives it back: where saved tensors have hooks, as another leaf."""
        (given,), (made,) = call.given, call.made
        if id(given) not in self.inputs | self.kept or not isinstance(made, torch.Tensor):
            return False
        self.number[id(made)] = self.number[id(given)]
        (self.inputs if made.requires_grad else self.kept).add(id(made))
        return True

    def _new(self, result: object) -> int | None:
        if not isinstance(result, torch.Tensor) or not result.is_floating_point():
            return None
        slot = len(self.numbers)
        self.number[id(result)] = slot
        self.numbers[slot], self.shapes[slot] = result.numel(), tuple(result.shape)
        return slot

    def _forget(self, call: Call) -> None:
        """Drop the numbers of what a call has written over."""
        for result in call.made:
            if id(result) not in self.inputs:
                self.number.pop(id(result), None)


def _needed(steps: Sequence[_Step], result: int | None) -> list[_Step]:
    """Return the steps that the result needs, each with the slots that it is the last to read."""
    wanted = {result} - {None}
    kept: list[_Step] = []
    for step in reversed(steps):
        if not wanted & set(step.targets):
            continue
        targets = tuple(target if target in wanted else None for target in step.targets)
        sources = {source for source in step.sources if source is not None}
        last = tuple(sources - wanted)
        wanted |= sources
        kept.append(_Step(step.push, step.sources, targets, last))
    return kept[::-1]


def _alive(steps: Sequence[_Step], numbers: dict[int, int], inputs: Sequence[int]) -> int:
    """Return the most numbers of tangents that are alive at once, of one row."""
    now = most = sum(inputs)
    for step in steps:
        now += sum(numbers[target] for target in step.targets if target is not None)
        most = max(most, now)
        now -= sum(numbers[slot] for slot in step.last)
    return most
