"""Two processes of one group that live as long as the sweep, and make the same calls."""

import atexit
import multiprocessing
import os
import tempfile
import traceback
import warnings
from datetime import timedelta

# Seconds for a call; that of the group is less, so that a rank which waits for another says so.
PATIENCE = 60
POOL = []


def answers(function, *arguments):
    """Return what ``function(rank, *arguments)`` returns on each of the two ranks: a value, or the text of an error."""
    if not POOL:
        POOL.append(Pool())
    try:
        return POOL[0].answers(function, arguments)
    except (EOFError, OSError, TimeoutError) as error:
        close()
        return [(None, f"{type(error).__name__}: a rank is lost or does not answer {error}")] * 2


def close():
    """End the processes, if there are any."""
    while POOL:
        POOL.pop().close()


class Pool:
    """The two processes."""

    def __init__(self):
        # One process reads all the modules, and the two are copies of it.
        context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
        if os.name == "posix":
            context.set_forkserver_preload(["fuzz.together"])
        self.folder = tempfile.TemporaryDirectory()
        ends = [context.Pipe() for _ in range(2)]
        self.connections = [ours for ours, _ in ends]
        self.processes = [
            context.Process(target=_work, args=(rank, theirs, self.folder.name), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process, (_, theirs) in zip(self.processes, ends, strict=True):
            process.start()
            # A process that has died is then the end of its pipe.
            theirs.close()
        atexit.register(close)

    def answers(self, function, arguments):
        for connection in self.connections:
            connection.send((function, arguments))
        found = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(PATIENCE):
                raise TimeoutError(f"rank {rank}, for {PATIENCE} s")
            found.append(connection.recv())
        return found

    def close(self):
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _work(rank, connection, folder):
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    method, timeout = f"file://{folder}/meeting", timedelta(seconds=PATIENCE // 2)
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=2, timeout=timeout)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        connection.send(_outcome(function, rank, arguments))


def _outcome(function, rank, arguments):
    try:
        return function(rank, *arguments), ""
    except Exception as error:
        return None, "".join(traceback.format_exception(error))
