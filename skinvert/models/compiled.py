"""Modules and functions that ``torch.compile`` wraps: the originals, which have second derivatives."""

from __future__ import annotations

import sys
import types
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

__all__ = ["Uncompiled", "eager", "is_compiled", "is_compiled_function", "unwrapped"]

# Where the wrappers live; it is imported where something is compiled, and by nothing here: that takes seconds.
_COMPILER = "torch._dynamo"


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
        elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        else:
            return module


def eager() -> AbstractContextManager[Any]:
    """Compile nothing while the context lasts: what is compiled cannot be differentiated twice."""
    return torch.compiler.set_stance("force_eager") if _COMPILER in sys.modules else nullcontext()
