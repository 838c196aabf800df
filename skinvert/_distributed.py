"""Processes that share one fit, each with rows of its own: sums over all of them, and errors that all of them raise."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from ._check import must_be

__all__ = ["Ranks", "as_one", "in_distributed_run", "ranks_of"]

# What this process computes of its own rows, and what must be the same on all.
Parts: TypeAlias = Callable[[], Sequence[torch.Tensor]]
Facts: TypeAlias = Mapping[str, object]

WORLD = "world"
# Of an error that no other rank need be told of.
EVERYWHERE = "Raised on every rank of the process group."
# What an error of another rank is raised as; all else is a RuntimeError.
KINDS = (TypeError, ValueError, MemoryError)


def ranks_of(process_group: object) -> Ranks | None:
    """Return the processes that ``process_group=`` names; None for None, and for a group of this one alone.

    Raises
    ------
    TypeError
        For what is no process group.
    ValueError
        For "world" where ``torch.distributed`` is not initialised.
    """
    if process_group is None:
        return None
    if process_group != WORLD and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        must = f"None, {WORLD!r}, or a ProcessGroup that this process is a member of"
        raise TypeError(must_be("process_group", must, repr(process_group)))
    if not (dist.is_available() and dist.is_initialized()):
        hint = "Call `torch.distributed.init_process_group()` first, in a script that torchrun starts."
        raise ValueError(must_be("torch.distributed for process_group", "initialised", "no process group", hint))
    group: Any = dist.group.WORLD if process_group == WORLD else process_group
    size = dist.get_world_size(group)
    return None if size == 1 else Ranks(group, dist.get_rank(group), size, process_group == WORLD)


def _exists(group: Any) -> bool:
    """Return whether a group has not been destroyed."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError):
        return False


def in_distributed_run() -> bool:
    """Return whether this is one of several processes of ``torch.distributed``."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def as_one(ranks: Ranks | None, step: str) -> AbstractContextManager[None]:
    """Return a context in which what one rank raises, all raise; without ranks it does nothing."""
    return nullcontext() if ranks is None else ranks.together(step)


class Ranks:
    """The processes of a group. All of them make the same calls in the same order; where they do not, all raise.

    A rank that has died makes the others raise RuntimeError, at the latest after the group's timeout.

    Parameters
    ----------
    group : ProcessGroup
        Of this process and others.
    rank, size : int
        This process's number in the group, and how many there are.
    of_world : bool
        Whether it is the default group, which a pickle finds again.
    """

    def __init__(self, group: Any, rank: int, size: int, of_world: bool) -> None:
        self._group, self.rank, self.size, self.of_world = group, rank, size, of_world
        self._turn = threading.RLock()

    def __deepcopy__(self, memo: dict[int, object]) -> Ranks:
        """Return itself: a group is a connection."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the connections."""
        return {**self.__dict__, "_group": None, "_turn": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the place in the group, which is found when it is asked for."""
        self.__dict__.update(state, _turn=threading.RLock())

    @property
    def group(self) -> Any:
        """The group; after a pickle, or its end, the default one, where this process has the same place in it."""
        if self._group is None or not _exists(self._group):
            found = ranks_of(WORLD) if self.of_world else None
            if found is None or (found.rank, found.size) != (self.rank, self.size):
                must = f"one of {self.size} in which this process is rank {self.rank}"
                hint = "Fit again: its own group is at an end, or not in the pickle, and each rank has rows of its own."
                raise ValueError(must_be("The process group of a fitted inverter", must, "another", hint))
            self._group = found._group
        return self._group

    # -- together ----------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self, step: str) -> Iterator[None]:
        """Let all ranks come out of a context, or none: what one raises inside, all raise."""
        # One thread after the other: collectives are told apart by their order alone.
        with self._turn:
            try:
                yield
            except Exception as error:
                if not _known(error):
                    self.meet(step, error=error)
                raise
            self.meet(f"the end of {step}")

    def meet(self, step: str, facts: Facts | None = None, *, error: Exception | None = None, hint: str = "") -> None:
        """Wait for all ranks; raise on all of them where one brings an error, or another step or other facts.

        Raises
        ------
        ValueError, TypeError, MemoryError or RuntimeError
            The ``error`` of this rank, or what tells of another's.
        """
        told = {"doing": step, **{name: repr(value) for name, value in (facts or {}).items()}}
        code = int.from_bytes(hashlib.blake2b(repr(told).encode(), digest_size=7).digest(), "big")
        status = torch.tensor([error is not None, code, -code], device=self._home)
        self._reach(step, lambda: dist.all_reduce(status, dist.ReduceOp.MAX, self.group))
        failed, high, low = status.tolist()
        if not failed and high == -low:
            return
        raised = _error_of_all(self.gathered((told, None if error is None else _picture(error)), step), hint)
        if error is not None:
            raised = error
        raised.add_note(EVERYWHERE)
        raise raised

    # -- what each rank has ------------------------------------------------------------------------------------------

    def summed(self, step: str, compute: Parts, facts: Facts | None = None) -> list[torch.Tensor]:
        """Return the sums over the ranks of new tensors that each computes of its own rows: the same bits on each."""
        with self._turn:
            return [self._sum(part, step) for part in self.own(step, compute, facts)]

    def joined(self, step: str, compute: Parts, facts: Facts | None = None) -> list[torch.Tensor]:
        """Return tensors (m, ...) that each rank computes of its own m rows, one rank's after the other's."""
        with self._turn:
            return [self._join(part, step) for part in self.own(step, compute, facts, rows=False)]

    def own(self, step: str, compute: Parts, facts: Facts | None = None, *, rows: bool = True) -> list[torch.Tensor]:
        """Return what this rank computes of its own rows, once all have: of one shape, the ``rows`` included or not."""
        parts: list[torch.Tensor] = []
        failed = None
        try:
            parts = list(compute())
        except Exception as error:
            failed = error
        shapes = [(tuple(part.shape if rows else part.shape[1:]), part.dtype) for part in parts]
        self.meet(step, {**(facts or {}), "shapes": shapes}, error=failed)
        return parts

    def least(self, value: int, step: str) -> int:
        """Return the least of the ranks' integers."""
        self.meet(step)
        found = torch.tensor(value, device=self._home)
        self._reach(step, lambda: dist.all_reduce(found, dist.ReduceOp.MIN, self.group))
        return int(found)

    def gathered(self, value: Any, step: str) -> list[Any]:
        """Return each rank's value, pickled on the way."""
        found: list[Any] = [None] * self.size
        self._reach(step, lambda: dist.all_gather_object(found, value, self.group))
        return found

    def _sum(self, part: torch.Tensor, step: str) -> torch.Tensor:
        if not part.numel():
            return part
        moved = part.contiguous().to(self._carrier(part.device))
        self._reach(step, lambda: dist.all_reduce(moved, dist.ReduceOp.SUM, self.group))
        return moved.to(part.device)

    def _join(self, part: torch.Tensor, step: str) -> torch.Tensor:
        parts = self._parts(part.contiguous().to(self._carrier(part.device)), step)
        return torch.cat(parts).to(part.device)

    def _parts(self, own: torch.Tensor, step: str) -> list[torch.Tensor]:
        """Return each rank's tensor (m, ...), whatever its m."""
        lengths = torch.zeros(self.size, dtype=torch.int64, device=self._home)
        lengths[self.rank] = len(own)
        self._reach(step, lambda: dist.all_reduce(lengths, dist.ReduceOp.SUM, self.group))
        counts = lengths.tolist()
        padded = own.new_zeros(max(counts), *own.shape[1:])
        if not padded.numel():
            return [padded[:count] for count in counts]
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        self._reach(step, lambda: dist.all_gather(parts, padded, self.group))
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    # -- the way -----------------------------------------------------------------------------------------------------

    def _reach(self, step: str, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            message = (
                f"Rank {self.rank} of {self.size} has lost the others in {step}: one has died, or did not come within "
                f"the group's timeout. All ranks must fit, and solve, together. {error}"
            )
            lost = RuntimeError(message)
            # To nobody who would hear it.
            lost.add_note(EVERYWHERE)
            raise lost from error

    def _carrier(self, device: torch.device) -> torch.device:
        """Return where the group takes tensors of a device from: gloo from the CPU."""
        return device if self._backends.get(device.type, "gloo") != "gloo" else self._home

    @property
    def _home(self) -> torch.device:
        """The CPU, or where the group serves none the device of this process."""
        if "cpu" in self._backends:
            return torch.device("cpu")
        kind = next(iter(self._backends))
        return torch.device(kind, torch.accelerator.current_device_index())

    @property
    def _backends(self) -> dict[str, str]:
        pairs = (pair.partition(":") for pair in dist.get_backend_config(self.group).split(","))
        return {device: backend for device, _, backend in pairs}


def _known(error: BaseException | None) -> bool:
    """Return whether every rank has raised an error, or what it came of."""
    while error is not None:
        if EVERYWHERE in vars(error).get("__notes__", ()):
            return True
        error = error.__cause__
    return False


def _picture(error: Exception) -> tuple[str, str]:
    kind = next((kind for kind in KINDS if isinstance(error, kind)), RuntimeError)
    return kind.__name__, f"{error}" if isinstance(error, KINDS) else f"{type(error).__name__}: {error}"


def _error_of_all(told: list[tuple[dict[str, str], tuple[str, str] | None]], hint: str) -> Exception:
    """Return what the ranks raise together: the first one's error, or what they do not agree on."""
    kinds = {kind.__name__: kind for kind in KINDS}
    for rank, (facts, picture) in enumerate(told):
        if picture is not None:
            name, message = picture
            return kinds.get(name, RuntimeError)(f"Rank {rank} failed in {facts['doing']}: {message}")
    names = dict.fromkeys(name for facts, _ in told for name in facts)
    differing = next(name for name in names if len({facts.get(name) for facts, _ in told}) > 1)
    got = "; ".join(f"{facts.get(differing, 'nothing')} on rank {rank}" for rank, (facts, _) in enumerate(told))
    what = "What the ranks do" if differing == "doing" else f"{differing} in {told[0][0]['doing']}"
    return ValueError(must_be(what, "the same on every rank", got, hint))
