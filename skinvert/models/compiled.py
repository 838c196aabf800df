"""Modules and functions that ``torch.compile`` wraps: the originals, which have second derivatives."""

from __future__ import annotations

import sys
import types
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from .._check import must_be

__all__ = [
    "SHARING",
    "Alone",
    "Uncompiled",
    "eager",
    "is_compiled",
    "is_compiled_function",
    "refuse_sharded",
    "unwrapped",
]

# Where the wrappers live; it is imported where something is compiled, and by nothing here: that takes seconds.
_COMPILER = "torch._dynamo"
SHARING = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_SHARDING, _DISTRIBUTED_TENSORS = "torch.distributed.fsdp", "torch.distributed.tensor"


class Uncompiled(nn.Module):
    """Stands where a compiled module stood, under the same parameter names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the original does."""
        return self._orig_mod(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Look in the original as well, as a compiled module does."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_orig_mod":
                raise
            return getattr(super().__getattr__("_orig_mod"), name)


class Alone(nn.Module):
    """Stands where a module stood that shares its batches out, under the same parameter names.

    The forward pass of a ``DistributedDataParallel`` with buffers waits for all processes, in eval mode too.
    """

    module: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module inside does, in this process, on one device."""
        return self.module(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``torch.compile`` made this module of another."""
    return type(module).__module__.startswith(_COMPILER) and "_orig_mod" in dict(module.named_children())


def is_compiled_function(value: Any) -> bool:
    """Return whether ``torch.compile`` made this function of another."""
    known = isinstance(value, types.FunctionType) and "__wrapped__" in value.__dict__
    return known and str(value.__globals__.get("__name__")).startswith(_COMPILER)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside those that compile it, or share its batches out to devices."""
    while True:
        if is_compiled(module):
            module = dict(module.named_children())["_orig_mod"]
        elif isinstance(module, SHARING):
            module = module.module
        else:
            return module


def refuse_sharded(module: nn.Module) -> None:
    """Raise where the parameters are shared out among processes, as FSDP and tensor parallelism leave them."""
    names = [name for name, parameter in module.named_parameters() if _is_sharded(parameter)]
    wrapped = any(type(child).__module__.startswith(_SHARDING) for child in module.modules())
    if not (names or wrapped):
        return
    got = f"{names[0]} in parts" if names else "a FullyShardedDataParallel"
    hint = (
        "Load `torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
        "options=StateDictOptions(full_state_dict=True))` into a plain module on every rank."
    )
    raise TypeError(must_be("The model's parameters", "whole in every process", got, hint))


def _is_sharded(parameter: nn.Parameter) -> bool:
    # A DTensor, whose module is imported where one was made.
    return any(kind.__module__.startswith(_DISTRIBUTED_TENSORS) for kind in type(parameter).__mro__)


def eager() -> AbstractContextManager[Any]:
    """Compile nothing while the context lasts: what is compiled cannot be differentiated twice."""
    return torch.compiler.set_stance("force_eager") if _COMPILER in sys.modules else nullcontext()
