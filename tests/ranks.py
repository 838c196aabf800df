"""Processes of a group that make the same calls; what each of them returns or raises, call by call."""

import fcntl
import multiprocessing
import os
import pickle
import socket
import time
import traceback
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist


@dataclass
class Outcome:
    """What a call came to on one rank: its value, or the error's type, message and notes; and what it warned of."""

    value: Any = None
    error: str = ""
    message: str = ""
    notes: list = field(default_factory=list)
    warned: list = field(default_factory=list)
    seconds: float = 0.0


def outcomes(size, calls, folder, before=None, backend="gloo"):
    """Return {name: [outcome of rank 0, ...]} of calls {name: function(rank, size)}, made in turn by one group.

    The functions are those of a module; a rank that dies in one leaves no outcome of it, nor of what follows. Those of
    ``before`` are made first, without a group, in the environment that torchrun makes.
    """
    before = before or {}
    context, port = multiprocessing.get_context("spawn"), _free_port()
    processes = [
        context.Process(target=_work, args=(rank, size, before, calls, folder, port, backend)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        # A rank that hangs must not outlive the test.
        process.kill()
    found = {name: [] for name in {**before, **calls}}
    for rank in range(size):
        for path in sorted(folder.glob(f"{rank}-*.pickle")):
            name, outcome = pickle.loads(path.read_bytes())
            found[name].append(outcome)
    return found


def values(found):
    """Return what the two ranks returned."""
    assert [outcome.error for outcome in found] == ["", ""], found
    return [outcome.value for outcome in found]


def check(found, expected):
    """Hold what the two ranks returned to what one process does."""
    for received in values(found):
        compare(received, expected)


def compare(received, expected):
    if isinstance(expected, dict):
        assert received.keys() == expected.keys()
        pairs = [(received[name], expected[name]) for name in expected]
    elif isinstance(expected, list | tuple):
        pairs = list(zip(received, expected, strict=True))
    else:
        assert received == pytest.approx(expected) if isinstance(expected, str | int) else close(received, expected)
        return
    for pair in pairs:
        compare(*pair)


def close(received, expected):
    received, expected = np.asarray(received), np.asarray(expected)
    return np.linalg.norm(received - expected) <= 1e-6 * np.linalg.norm(expected)


def check_fits(found, size, expected):
    """Hold the fits of all ranks to that of one process: to the rounding of sums that are taken in another order."""
    assert [outcome.error for outcome in found] == [""] * size, found
    for outcome in found:
        received = outcome.value
        gap = np.linalg.norm(received["x"] - expected["x"]) / np.linalg.norm(expected["x"])
        assert gap <= 1e-6
        np.testing.assert_allclose(received["residual"], expected["residual"], rtol=1e-6, atol=1e-9)
        assert received["gradient"] == pytest.approx(expected["gradient"], rel=1e-12)
        assert received["shift"] == pytest.approx(expected["shift"], rel=1e-9)
        assert (received["n"], received["method"]) == (expected["n"], expected["method"])
        # To the last bit: what a method does next depends on it.
        np.testing.assert_array_equal(received["x"], found[0].value["x"])


def once(folder, name, compute):
    """Return what ``compute(folder)`` returns, computed once however many workers ask."""
    own = folder / name
    own.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / f"{name}.pickle"
        if not done.exists():
            done.write_bytes(pickle.dumps(compute(own)))
        return pickle.loads(done.read_bytes())


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _work(rank, size, before, calls, folder, port, backend):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    _make(before, rank, size, folder, 0)
    # What a call raises without need is told in its outcome.
    method, timeout = f"file://{folder}/meeting", timedelta(seconds=60)
    dist.init_process_group(backend, init_method=method, rank=rank, world_size=size, timeout=timeout)
    _make(calls, rank, size, folder, len(before))
    dist.destroy_process_group()


def _make(calls, rank, size, folder, first):
    for number, (name, call) in enumerate(calls.items(), start=first):
        outcome = _outcome(call, rank, size)
        (folder / f"{rank}-{number:04}.pickle").write_bytes(pickle.dumps((name, outcome)))


def _outcome(call, rank, size):
    torch.manual_seed(0)
    start = time.process_time()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            outcome = Outcome(value=call(rank, size))
        except Exception as error:
            notes = [*getattr(error, "__notes__", ()), traceback.format_exc()]
            outcome = Outcome(error=type(error).__name__, message=str(error), notes=notes)
    outcome.seconds = time.process_time() - start
    outcome.warned = [str(warning.message) for warning in warned]
    return outcome
