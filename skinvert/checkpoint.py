"""A job's checkpoint as a file: what its stages have done, and of which job; never mixed with another one's."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ._check import must_be
from ._checkpoint import Checkpoint
from ._progress import say
from ._schema import check_fields
from ._telling import warn
from ._types import State
from .identity import Job, first_pass, identity, joined, product
from .methods.base import Method
from .persistence import load_state, save_state
from .registry import InversionRegistry
from .system import Function, System, is_method

__all__ = [
    "CheckpointFile",
    "check_checkpoint",
    "check_path",
    "open_checkpoint",
    "open_file",
    "resumes",
]

KIND = "checkpoint"
FIELDS = {"job": "plain", "numbers": "state", "stages": "state"}
# Seconds between two writes: no fewer, and so many that writing takes no more than this share of the time.
EVERY, SHARE = 1.0, 0.05
# And until the next attempt after one that failed.
RETRY = 60.0


def check_path(path: object) -> None:
    """Raise where a checkpoint that is asked for has no path, or one that no file can have."""
    if path is None:
        return
    if not isinstance(path, str | os.PathLike):
        raise TypeError(must_be("checkpoint", "None or a path", type(path).__name__))
    name = os.fspath(path)
    # The empty one would be the working directory.
    if not name or "\0" in name:
        raise ValueError(must_be("checkpoint", "None or a path that a file can have", repr(name)))
    try:
        os.lstat(name)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            got = f"one of {len(name):,} characters"
            raise OSError(error.errno, must_be("checkpoint", "a path that a file can have", got)) from error


def resumes(method: str | Method | Function) -> bool:
    """Return whether a method, or that of a name, goes on from a checkpoint."""
    if isinstance(method, Method):
        return method.resumes
    kinds = [kind for (_, name), kind in InversionRegistry.registry.items() if name == method]
    return bool(kinds) and all(is_method(kind) and kind.resumes for kind in kinds)


def check_checkpoint(path: object, method: Method | Function, together: bool = False) -> None:
    """Raise, before any work, where there can be no checkpoint at ``path``, or ``method`` cannot go on from one.

    ``together`` with other processes none can: each would go on from another step.
    """
    if path is None:
        return
    if together:
        raise ValueError(must_be("checkpoint", "None for a fit with process_group", repr(path)))
    check_path(path)
    if not isinstance(method, Method) or not method.resumes:
        names = sorted({kind.name for kind in InversionRegistry.registry.values() if is_method(kind) and kind.resumes})
        got = method.name if isinstance(method, Method) else "a function"
        raise ValueError(must_be("The method of a fit with a checkpoint", f"one of {names}", repr(got)))


def open_checkpoint(
    path: str | os.PathLike[str], method: Method, system: System, settings: Mapping[str, object], verbose: int = 0
) -> CheckpointFile:
    """Return the checkpoint of a fit: as an interrupted run of it left the file, or an empty one, written at once.

    Parameters
    ----------
    path : str or Path
        The file; or a folder that exists, in which the file has a name of the fit's own.
    method : Method
        With its settings.
    system : System
        What it is to invert.
    settings : mapping
        Further settings that decide the result, by the words to name them by.
    verbose : int, default=0
        1 says what is gone on with.

    Raises
    ------
    ValueError
        Where the file is that of another fit, damaged, or none of ours; it is left as it is.
    OSError
        Where it cannot be written.
    """
    numbers = {"code of the model or its loss": joined([product(system), *first_pass(system)])}
    return open_file(path, Job("fit", identity(method, system, settings), numbers), system.curvature.device, verbose)


def open_file(path: str | os.PathLike[str], job: Job, device: torch.device, verbose: int = 0) -> CheckpointFile:
    """Return the checkpoint of a job, its tensors on ``device``; as for a fit, and raising alike."""
    # Through a link to what it points at, as `save_state` writes.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        target /= hashlib.sha256(repr(sorted(job.settled.items())).encode()).hexdigest()[:32] + ".safetensors"
    opened = CheckpointFile(target, job)
    if target.exists():
        opened.stages = _read(target, job, device)
        say(f"checkpoint: goes on with {str(target)!r}, {', '.join(opened.stages) or 'nothing done'}", verbose)
    else:
        opened.write()
    return opened


class CheckpointFile(Checkpoint):
    """The states of a job's stages in a file, which is written now and then, whole or not at all.

    Parameters
    ----------
    path : Path
        Of the file.
    job : Job
        What tells it from others.
    """

    keeps = True

    def __init__(self, path: Path, job: Job) -> None:
        self.path, self.job = path, job
        # A state of a stage at work is asked for when it is written.
        self.stages: dict[str, State | Callable[[], State]] = {}
        self._due = time.monotonic() + EVERY

    def resumed(self, stage: str, fields: Mapping[str, str]) -> State | None:
        """Return what an earlier run left of a stage."""
        known = self.stages.get(stage)
        if not isinstance(known, dict):
            return None
        try:
            check_fields(stage, fields, known, frozenset())
        except ValueError as error:
            raise ValueError(_refusal(self.path, self.job, f"one that no {self.job.what} left ({error})")) from error
        return known

    def keep(self, stage: str, state: Callable[[], State]) -> None:
        """Take the state after a step, and write it where it is time."""
        self.stages[stage] = state
        self._write_when_due()

    def finish(self, stage: str, result: State, replaces: str = "") -> None:
        """Take the result of a stage, and write it where it is time."""
        self.stages.pop(replaces, None)
        known = isinstance(self.stages.get(stage), dict)
        self.stages[stage] = result
        # A result that the file has already is no reason to write it again.
        if not known:
            self._write_when_due()

    def within(self, part: str) -> Checkpoint:
        """Return the checkpoint of one part, in the same file."""
        return _Part(self, part)

    def write(self) -> None:
        """Write the states as they are."""
        start = time.monotonic()
        stages = {name: state if isinstance(state, dict) else state() for name, state in self.stages.items()}
        told = {"job": dict(self.job.settled), "numbers": self.job.sums, "stages": stages}
        save_state(self.path, KIND, told, FIELDS)
        now = time.monotonic()
        self._due = now + max(EVERY, (now - start) * (1 - SHARE) / SHARE)

    def remove(self) -> None:
        """Remove the file: the job is done."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            # The result is there.
            warn(f"The checkpoint was not removed: {error}", RuntimeWarning)

    def _write_when_due(self) -> None:
        if time.monotonic() < self._due:
            return
        try:
            self.write()
        except (OSError, MemoryError) as error:
            # What was done so far is worth more than its checkpoint.
            self._due = time.monotonic() + RETRY
            warn(f"The checkpoint was not written, and the {self.job.what} goes on without: {error}", RuntimeWarning)


class _Part(Checkpoint):
    """One part's stages in the checkpoint of the whole."""

    keeps = True

    def __init__(self, whole: Checkpoint, part: str) -> None:
        self.whole, self.part = whole, part

    def resumed(self, stage: str, fields: Mapping[str, str]) -> State | None:
        return self.whole.resumed(f"{self.part}, {stage}", fields)

    def keep(self, stage: str, state: Callable[[], State]) -> None:
        self.whole.keep(f"{self.part}, {stage}", state)

    def finish(self, stage: str, result: State, replaces: str = "") -> None:
        self.whole.finish(f"{self.part}, {stage}", result, f"{self.part}, {replaces}")

    def within(self, part: str) -> Checkpoint:
        return _Part(self, part)


def _read(path: Path, job: Job, device: torch.device) -> dict[str, State | Callable[[], State]]:
    """Return the states in a file of this job; ValueError for any other file."""
    try:
        _, found = load_state(path, {KIND: (FIELDS, frozenset())}, device)
    except ValueError as error:
        raise ValueError(_refusal(path, job, "another file, or a damaged one")) from error
    if other := job.differences(found["job"], found["numbers"]):
        raise ValueError(_refusal(path, job, f"that of one with another {', another '.join(other)}"))
    stages = found["stages"]
    if not all(isinstance(state, dict) and all(isinstance(name, str) for name in state) for state in stages.values()):
        raise ValueError(_refusal(path, job, "one whose stages have no states"))
    return stages


def _refusal(path: Path, job: Job, got: str) -> str:
    what = job.what
    hint = f"Delete the file to begin anew, or give another path; in a folder that exists each {what} has its own file."
    return must_be(f"The checkpoint {str(path)!r}", f"a file of this {what}", got, hint)
