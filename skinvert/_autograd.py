"""The autograd state that skinvert computes in, whatever the caller's: gradients on, no inference mode, no autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from inspect import isgeneratorfunction
from types import FunctionType
from typing import Any, TypeVar, cast

import torch

from ._progress import closing_bars

__all__ = ["flat", "ordinary", "ordinary_methods", "ordinary_state", "own_tensor"]

_DEVICE_TYPES = tuple(kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(kind))


# A decorator that keeps a signature has no other spelling before Python 3.12.
Function = TypeVar("Function", bound=Callable[..., Any])


def ordinary(function: Function) -> Function:
    """Decorate a function to run in the ordinary state, and to leave no bar open where it fails or is interrupted."""
    if isgeneratorfunction(function):
        return cast("Function", _ordinary_generator(function))

    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        # Where the caller's state is that already, nothing is entered.
        with closing_bars(), nullcontext() if _is_ordinary() else ordinary_state():
            return function(*args, **kwargs)

    return cast("Function", inside)


def ordinary_methods(cls: type, names: Iterable[str]) -> None:
    """Let those of the named methods that ``cls`` itself defines run in the ordinary state."""
    for name in names:
        method = cls.__dict__.get(name)
        if isinstance(method, FunctionType) and not vars(method).get("__isabstractmethod__", False):
            setattr(cls, name, ordinary(method))


def flat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors as one vector (p,), through which derivatives pass as through the tensors.

    Each is multiplied by 1, so that what comes back to it is a tensor of its own: a slice of the whole's may start at
    an odd place of memory, of which ``view_as_complex`` makes no view.
    """
    return torch.cat([part.reshape(-1) * 1 for part in parts])


@contextmanager
def ordinary_state() -> Iterator[None]:
    """Compute as outside of ``no_grad``, ``inference_mode`` and ``autocast``.

    Within them a Hessian is zero, or made of bfloat16 products. What is computed here are ordinary tensors, which
    may be used anywhere.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in _autocast_kinds():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def own_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``, or a copy where it was made in inference mode: no gradient passes through such a one."""
    return tensor.clone() if tensor.is_inference() else tensor


def _ordinary_generator(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Take each step in the ordinary state: between the steps the caller has its own."""
    step = ordinary(next)

    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Iterator[Any]:
        steps, done = function(*args, **kwargs), object()
        while (value := step(steps, done)) is not done:
            yield value

    return inside


def _is_ordinary() -> bool:
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not _autocast_kinds()


def _autocast_kinds() -> list[str]:
    return [kind for kind in _DEVICE_TYPES if torch.is_autocast_enabled(kind)]
