"""How far a matrix of scores has come: what is known of it, and the solutions at work; a checkpoint keeps both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from .._check import must_be
from .._checkpoint import NOWHERE, Checkpoint
from .._types import State
from ..models import TorchTwiceDifferentiable
from .sides import Streamed

__all__ = ["Course", "Done", "Kept", "Lines"]

# Of rows and columns, whether they are known already.
Done: TypeAlias = Callable[[slice, slice], bool]


class Kept(ABC):
    """What a course makes of the blocks that it has met."""

    @property
    @abstractmethod
    def fields(self) -> Mapping[str, str]:
        """The types of its state, in the words of ``check_fields``."""

    @abstractmethod
    def state(self, stop: int) -> State:
        """Return what is known after ``stop`` solved rows have met something."""

    @abstractmethod
    def restore(self, state: State, stop: int) -> None:
        """Take such a state; ValueError where no run left it."""


class Lines(Kept):
    """Tensors of a line for each solved row, and such as are known all at once.

    Parameters
    ----------
    lines : mapping of str to tensor
        Written to, line by line.
    whole : mapping of str to tensor, default={}
        Written to.
    """

    def __init__(self, lines: Mapping[str, torch.Tensor], whole: Mapping[str, torch.Tensor] | None = None) -> None:
        self.lines, self.whole = dict(lines), dict(whole or {})

    @property
    def fields(self) -> Mapping[str, str]:
        """One length for all that has lines."""
        found = {name: ",".join(["lines", *map(str, tensor.shape[1:])]) for name, tensor in self.lines.items()}
        found |= {name: ",".join(map(str, tensor.shape)) for name, tensor in self.whole.items()}
        return {name: f"tensor[{shape}]" for name, shape in found.items()}

    def state(self, stop: int) -> State:
        """Return the first lines, and what is whole."""
        return {**{name: tensor[:stop] for name, tensor in self.lines.items()}, **self.whole}

    def restore(self, state: State, stop: int) -> None:
        """Write what was known where it belongs."""
        for name, tensor in {**self.lines, **self.whole}.items():
            own = tensor[:stop] if name in self.lines else tensor
            if state[name].shape != own.shape or state[name].dtype != own.dtype:
                got = f"{state[name].dtype} of shape {tuple(state[name].shape)}"
                raise ValueError(must_be(f"{name} of a checkpoint", f"{own.dtype} of shape {tuple(own.shape)}", got))
            own.copy_(state[name])


class Course:
    """The solved rows that have met all of the other side, and the solutions at work with what they have met.

    It begins where ``checkpoint`` has it.

    Parameters
    ----------
    model : TorchTwiceDifferentiable
        Whose parameters' number is the width of a solution.
    solved, streamed : int
        Numbers of rows of the sides.
    kept : sequence of Kept
        What is made of the blocks.
    transposed : bool, default=False
        Whether the solved rows are the columns of the matrix.
    checkpoint : Checkpoint
        Where it is kept.
    stage : str, default="scores"
        What the checkpoint calls it.
    has : callable, default=None
        Whether rows and columns of the matrix are known by other means.
    """

    def __init__(
        self,
        model: TorchTwiceDifferentiable,
        solved: int,
        streamed: int,
        kept: Sequence[Kept],
        *,
        transposed: bool = False,
        checkpoint: Checkpoint = NOWHERE,
        stage: str = "scores",
        has: Done | None = None,
    ) -> None:
        self.model, self.counts, self.kept, self.transposed = model, (solved, streamed), kept, transposed
        self.checkpoint, self.stage, self.has = checkpoint, stage, has
        self.done, self.met = 0, Streamed()
        self.X: torch.Tensor | None = None
        X = f"tensor[k,{model.num_params}]|None"
        fields = {"done": "int", "met": "int", "forward": "bool", "X": X}
        for part in kept:
            fields.update(part.fields)
        known = checkpoint.resumed(stage, fields)
        if known is not None:
            self._restore(known)

    @property
    def entries(self) -> int:
        """How many entries of the matrix are known."""
        return self.done * self.counts[1] + (0 if self.X is None else len(self.X) * self.met.rows)

    def knows(self, part: slice) -> bool:
        """Return whether a part of the solved rows has met all of the other side."""
        everything = slice(0, self.counts[1])
        places = (everything, part) if self.transposed else (part, everything)
        return part.stop <= self.done or (self.has is not None and self.has(*places))

    def begin(self, part: slice, solve: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the solutions of a part: those at work when an earlier run was interrupted, or fresh ones."""
        if self.X is None:
            X = solve()
            # As it would come from a file, to the last bit of a product with it.
            own = X.is_contiguous() and not X.storage_offset()
            self.X = X if own else X.clone(memory_format=torch.contiguous_format)
            self.done, self.met = part.start, Streamed()
            self._tell()
        elif (part.start, part.stop) != (self.done, self.done + len(self.X)):
            raise ValueError(self._refusal(f"of rows {self.done} to {self.done + len(self.X) - 1}"))
        return self.X

    def meet(self, stop: int) -> None:
        """Note that the solutions at work have met so many rows of the other side, and what came of it is kept."""
        self.met.rows = stop
        self._tell()

    def end(self, part: slice) -> None:
        """Note that the next rows, all at work or the first of them, have met all of the other side."""
        left = None if self.X is None else self.X[part.stop - self.done :]
        self.X = left if left is not None and len(left) else None
        self.done, self.met = part.stop, Streamed()
        self._tell()

    def rest(self, part: slice) -> slice:
        """Return what is left of a part: all of it where an earlier run left none of its solutions."""
        return part if self.X is None else slice(self.done, part.stop)

    def _tell(self) -> None:
        self.checkpoint.keep(self.stage, self._state)

    @property
    def _stop(self) -> int:
        return self.done + (0 if self.X is None else len(self.X))

    def _state(self) -> State:
        state: State = {"done": self.done, "met": self.met.rows, "forward": self.met.forward, "X": self.X}
        for part in self.kept:
            state.update(part.state(self._stop))
        return state

    def _restore(self, state: State) -> None:
        self.done, self.X = state["done"], state["X"]
        self.met = Streamed(state["met"], state["forward"])
        if self._stop > self.counts[0] or self.met.rows > (self.counts[1] if self.X is not None else 0):
            raise ValueError(self._refusal(f"{self._stop:,} by {self.met.rows:,}"))
        if self.X is not None and (not len(self.X) or self.X.dtype != self.model.dtype):
            raise ValueError(self._refusal(f"of {len(self.X)} rows of {self.X.dtype}"))
        for part in self.kept:
            part.restore(state, self._stop)

    def _refusal(self, got: str) -> str:
        most = f"at most {self.counts[0]:,} by {self.counts[1]:,}, of {self.model.dtype}, in this job's parts"
        hint = "Delete the file to begin anew."
        return must_be("The solved and the streamed rows of a checkpoint", most, got, hint)
