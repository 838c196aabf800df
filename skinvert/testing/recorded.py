"""A checkpoint in memory: every state that long work tells it, as it would come back from a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from .._types import State
from ..checkpoint import CheckpointFile
from ..encoding import Writer, decode_state
from ..identity import Job

__all__ = ["Recorded"]


class Recorded(CheckpointFile):
    """Writes every state at once, and to no file.

    Parameters
    ----------
    device : torch.device
        Of the tensors that come back.
    stages : mapping of str to state, default={}
        What an earlier run left.

    Attributes
    ----------
    written : list of callable
        One for each state, as it was told: returns the stages, anew each time.
    resumed_stages : set of str
        Those of which an earlier run's state was taken.
    """

    def __init__(self, device: torch.device, stages: Mapping[str, State] | None = None) -> None:
        super().__init__(Path("memory"), Job())
        self.stages = dict(stages or {})
        self.device = device
        self.written: list[Callable[[], dict[str, State]]] = []
        self.resumed_stages: set[str] = set()

    def resumed(self, stage: str, fields: Mapping[str, str]) -> State | None:
        """Return what an earlier run left, and note that it was asked for."""
        found = super().resumed(stage, fields)
        if found is not None:
            self.resumed_stages.add(stage)
        return found

    def remove(self) -> None:
        """Leave nothing behind: there is no file."""

    def _write_when_due(self) -> None:
        """Encode what a file would hold now."""
        stages = {name: state if isinstance(state, dict) else state() for name, state in self.stages.items()}
        writer = Writer()
        root = writer.encode({"stages": stages}, "a state")
        text = json.dumps({"root": root, "objects": writer.objects})
        # Copies: the work goes on in the memory of its states.
        arrays = {name: np.array(array) for name, array in writer.arrays.items()}
        self.written.append(lambda: decode_state(json.loads(text), arrays, self.device)["stages"])
