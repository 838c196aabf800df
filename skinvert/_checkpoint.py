"""Where long work puts what it has done, so that it can go on after an interruption: here nowhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ._types import State

__all__ = ["NOWHERE", "Checkpoint", "like"]


class Checkpoint:
    """What the stages of long work have done, by their names; this one keeps nothing.

    A stage asks for what an earlier run left of it, tells its state after every step, and its result at the end. The
    state must be all that its next step needs: plain values and tensors.
    """

    # Whether anything outlives the run: what a stage holds beside its state is then not to be relied on.
    keeps = False

    def resumed(self, stage: str, fields: Mapping[str, str]) -> State | None:
        """Return what an earlier run left of a stage, checked by ``check_fields``; None where it begins anew."""
        return None

    def keep(self, stage: str, state: Callable[[], State]) -> None:
        """Take the state after a step; ``state`` is called where it is time to write it."""

    def finish(self, stage: str, result: State, replaces: str = "") -> None:
        """Take the result of a stage, in place of the states of the stage ``replaces``."""

    def remove(self) -> None:
        """Leave nothing behind: the work is done."""

    def within(self, part: str) -> Checkpoint:
        """Return the checkpoint of one part of the work, whose stages have names of their own."""
        return self


NOWHERE = Checkpoint()


def like(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the fields of a state with tensors of just these shapes."""
    return {name: f"tensor[{','.join(map(str, tensor.shape))}]" for name, tensor in tensors.items()}
