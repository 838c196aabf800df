"""Work that is stopped at once after a write of its checkpoint, as by SIGKILL; and checkpoints that were changed."""

import errno
import json

import safetensors
import safetensors.numpy

from skinvert import checkpoint
from skinvert.checkpoint import CheckpointFile
from skinvert.persistence import _checksum


class StoppedError(BaseException):
    """As SIGKILL would, at once after a write."""


def always_due(monkeypatch):
    """Let every state be written."""
    monkeypatch.setattr(checkpoint, "EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1.0)


# What writing a file may end with.
FAILURES = [OSError(errno.ENOSPC, "No space left on device"), PermissionError(13, "no"), MemoryError("no")]


def failing(monkeypatch, error, after=2):
    """Let writes fail after the first ones; return the list that has an entry for each try."""
    save, tries = checkpoint.save_state, []

    def saved(*args):
        tries.append(1)
        if len(tries) > after:
            raise error
        save(*args)

    monkeypatch.setattr(checkpoint, "save_state", saved)
    return tries


def stopping(monkeypatch):
    """Return what sets after which write the work stops, and returns the list of what was written by then."""
    written, original = [], CheckpointFile.write

    def write(self):
        original(self)
        written.append(dict(self.stages))
        if len(written) == write.last:
            raise StoppedError

    def after(count):
        written.clear()
        write.last = count
        return written

    write.last = None
    monkeypatch.setattr(CheckpointFile, "write", write)
    return after


def rewritten(path, change):
    """Change the stages of a checkpoint, and sign it as ``save`` would."""
    with safetensors.safe_open(path, framework="numpy") as file:
        header = file.metadata()
    arrays = safetensors.numpy.load_file(path)
    state = json.loads(header["state"])
    stages = next(pair for pair in state["root"][1] if pair[0] == "stages")[1][1]
    change(stages, arrays)
    header["state"] = json.dumps(state)
    header["sha256"] = _checksum(header, arrays)
    safetensors.numpy.save_file(arrays, path, header)


def entries(stages, stage):
    return next(pair for pair in stages if pair[0] == stage)[1][1]


def set_entry(stages, stage, name, value):
    next(pair for pair in entries(stages, stage) if pair[0] == name)[1] = value
