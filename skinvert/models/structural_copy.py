"""A copy of a module that shares its tensors: own mode, own containers, nothing of the user's to disturb."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .._check import must_be
from .compiled import SHARING, Alone, Uncompiled, is_compiled, is_compiled_function, unwrapped
from .holders import (
    BUILTIN_OWNERS,
    NAMESPACES,
    OWN_STATE,
    copy_function,
    copy_object,
    copy_own_state,
    copy_partial,
    holds_tensors,
    is_plain_object,
)
from .weight_norm import plain_hook, plain_parametrization

__all__ = ["structural_copy"]

Convert = Callable[[torch.Tensor], torch.Tensor]

_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))
# By their own `copy`: `copy.copy` takes ten times as long, and a module has a dozen of them.
_COPIED = frozenset((dict, OrderedDict, list, deque))
# An attribute of Module: `module.compile()` keeps the compiled call in it, bound to that module.
_COMPILED_CALL = "_compiled_call_impl"
# They change gradients and are no part of a loss: no derivative of the copy passes through them.
_GRADIENT_HOOKS = frozenset(("_backward_hooks", "_backward_pre_hooks"))


def structural_copy(
    module: nn.Module, convert: Convert | None = None, found: dict[int, tuple[str, torch.Tensor]] | None = None
) -> nn.Module:
    """Return ``module`` in eval mode as a tree of new module objects over the same tensors.

    ``copy.deepcopy`` would copy the weights, and call a user's ``__deepcopy__``; a plain reference would let ``eval()``
    and parameter swaps reach the user's model. What is bound to the old objects (methods, partials, closures, hooks) is
    bound to the new ones; hooks on gradients are left out.

    Parameters
    ----------
    module : Module
        Compiled modules are unwrapped, as are those that share out a batch.
    convert : callable, default=None
        Returns what stands in for a tensor, the same for the same; None shares all.
    found : dict, default=None
        Filled with the name and the tensor of everything that was met, by its identity.
    """
    module = unwrapped(module)
    copier = _Copier(module, convert or (lambda tensor: tensor), {} if found is None else found)
    duplicate = copier.copy(module, "")
    # Those in containers that `modules()` does not see keep their mode, as under the user's own `eval()`.
    for child in duplicate.modules():
        child.training = False
        _check_batch_norm(child)
    for child in copier.modules():
        _make_dense(child)
    return duplicate


class _Copier:
    """One walk over all that a module holds, each object copied once."""

    def __init__(self, module: nn.Module, convert: Convert, found: dict[int, tuple[str, torch.Tensor]]) -> None:
        self.convert, self.found = convert, found
        self.tree = {id(child) for child in module.modules()}
        # The originals are kept too: an identity counts only while its object lives.
        self.memo: dict[int, tuple[Any, Any]] = {}
        self.cells: dict[int, types.CellType] = {}

    def modules(self) -> list[nn.Module]:
        """Return the modules that were made."""
        return [new for _, new in self.memo.values() if isinstance(new, nn.Module)]

    def copy(self, value: Any, path: str) -> Any:
        """Return what stands in for ``value``: itself, where it holds nothing of the model."""
        if type(value) in _ATOMS:
            return value
        if id(value) in self.memo:
            return self.memo[id(value)][1]
        if type(value) in weakref.ProxyTypes:
            return self._proxy(value, path)
        if isinstance(value, nn.Module):
            return self._module(value, path)
        if isinstance(value, torch.Tensor):
            return self._keep(value, self._tensor(value, path))
        if isinstance(value, list | dict | deque):
            return self._container(value, path)
        if isinstance(value, tuple | set | frozenset):
            return self._fixed(value, path)
        if isinstance(value, OWN_STATE):
            return self._keep(value, copy_own_state(value))
        return self._bound(value, path)

    def _keep(self, value: Any, duplicate: Any) -> Any:
        self.memo[id(value)] = (value, duplicate)
        return duplicate

    def _module(self, module: nn.Module, path: str) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return self._keep(module, self._script(module, path))
        plain = plain_parametrization(module)
        if plain is not None:
            return self._keep(module, plain)
        if is_compiled(module):
            duplicate: nn.Module = self._keep(module, Uncompiled())
            duplicate.add_module(
                "_orig_mod", self.copy(dict(module.named_children())["_orig_mod"], f"{path}_orig_mod.")
            )
            return duplicate
        if isinstance(module, SHARING):
            alone: nn.Module = self._keep(module, Alone())
            alone.add_module("module", self.copy(module.module, f"{path}module."))
            return alone
        # Not its own `__new__`, which for a traced module makes a class without a forward pass.
        duplicate = self._keep(module, object.__new__(type(module)))
        for name, value in module.__dict__.items():
            if name in _GRADIENT_HOOKS:
                duplicate.__dict__[name] = OrderedDict()
            elif name != _COMPILED_CALL:
                # Parameters and modules lie in dicts, which have no part in a name.
                inner = path if name in ("_parameters", "_buffers", "_modules") else f"{path}{name}."
                duplicate.__dict__[name] = self.copy(value, inner)
        return duplicate

    def _script(self, module: nn.Module, path: str) -> nn.Module:
        # It has no Python structure to copy: its tensors are put in afterwards.
        duplicate = copy.deepcopy(module)
        children = dict(duplicate.named_modules())
        for prefix, child in module.named_modules():
            for name, tensor in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
                setattr(children[prefix], name, self.copy(tensor, f"{path}{prefix}.{name}".replace("..", ".")))
        return duplicate

    def _tensor(self, tensor: torch.Tensor, path: str) -> torch.Tensor:
        name = path.removesuffix(".")
        self.found.setdefault(id(tensor), (name, tensor))
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            hint = "A lazy layer takes its shape from data: call `model(X[:1])` once before."
            raise ValueError(must_be(f"The tensor {name!r} of the model", "initialised", "a lazy one", hint))
        if tensor.grad_fn is not None:
            # Made from parameters in another pass: kept as it is, so that its use can be seen.
            return tensor
        duplicate = self.convert(tensor)
        if duplicate is not tensor and tensor.__dict__:
            # Before its attributes, which may lead back to it.
            self._keep(tensor, duplicate)
            for key, value in tensor.__dict__.items():
                # A class that wraps a tensor has made its own.
                duplicate.__dict__.setdefault(key, self.copy(value, f"{path}{key}."))
        return duplicate

    def _container(self, value: Any, path: str) -> Any:
        """Copy lists and dicts (an LSTM keeps its weights in one), and what they hold."""
        try:
            duplicate = self._keep(value, value.copy() if type(value) in _COPIED else copy.copy(value))
        except TypeError:
            # A class of its own that cannot be copied.
            return self._keep(value, value)
        if not value:
            return duplicate
        if not isinstance(value, dict):
            items = [self.copy(item, f"{path}{i}.") for i, item in enumerate(value)]
            duplicate.clear()
            duplicate.extend(items)
            return duplicate
        pairs = [(self.copy(key, path), self.copy(item, f"{path}{key}."), key) for key, item in value.items()]
        if any(new is not key for new, _, key in pairs):
            duplicate.clear()
        for new, item, _ in pairs:
            # Not the item assignment of a subclass, which may refuse.
            dict.__setitem__(duplicate, new, item)
        return duplicate

    def _fixed(self, value: Any, path: str) -> Any:
        items = [self.copy(item, f"{path}{i}.") for i, item in enumerate(value)]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return self._keep(value, copy_own_state(value)) if isinstance(value, set) else value
        if isinstance(value, tuple):
            return self._keep(value, tuple.__new__(type(value), items))
        return self._keep(value, type(value)(items))

    def _bound(self, value: Any, path: str) -> Any:
        """Methods, partials, closures, references, and objects that hold modules or tensors."""
        if is_compiled_function(value):
            return self.copy(value.__wrapped__, path)
        if isinstance(value, types.MethodType):
            owner, function = self.copy(value.__self__, path), self.copy(value.__func__, path)
            same = owner is value.__self__ and function is value.__func__
            return value if same else types.MethodType(function, owner)
        if isinstance(value, types.BuiltinMethodType):
            bound: Any = value.__self__
            return getattr(self.copy(bound, path), value.__name__) if isinstance(bound, BUILTIN_OWNERS) else value
        if isinstance(value, weakref.ReferenceType):
            return self._reference(value, path)
        hook = plain_hook(value)
        if hook is not None:
            return self._keep(value, hook)
        return self._held(value, path)

    def _reference(self, value: Any, path: str) -> Any:
        # Only to what has its place in the model: nothing else would keep a copy alive.
        referent = value()
        if id(referent) in self.tree:
            return weakref.ref(self.copy(referent, path))
        return weakref.ref(self.memo[id(referent)][1]) if id(referent) in self.memo else value

    def _proxy(self, value: Any, path: str) -> Any:
        # It passes for its referent, whose methods are bound to the referent itself.
        method: Any = value.modules if isinstance(value, nn.Module) else None
        referent = method.__self__ if isinstance(method, types.MethodType) else None
        return weakref.proxy(self.copy(referent, path)) if id(referent) in self.tree else value

    def _held(self, value: Any, path: str) -> Any:
        def copy_part(part: Any, name: str) -> Any:
            return self.copy(part, f"{path}{name}.")

        def keep(duplicate: Any) -> None:
            self._keep(value, duplicate)

        is_function, is_partial = isinstance(value, types.FunctionType), isinstance(value, functools.partial)
        is_namespace = type(value) in NAMESPACES
        if not (is_function or is_partial or is_plain_object(value)) or not (is_namespace or holds_tensors(value)):
            return value
        if is_partial:
            keep(copy_partial(value, copy_part))
        elif is_function:
            copy_function(value, copy_part, keep, self.cells)
        else:
            copy_object(value, copy_part, keep)
        return self.memo[id(value)][1]


def _check_batch_norm(module: nn.Module) -> None:
    norms = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
    if isinstance(module, norms) and module.running_mean is None:
        hint = "Without them a sample's loss depends on the other rows of its batch: there is no loss per sample."
        raise ValueError(must_be("BatchNorm", "with running statistics", "track_running_stats=False", hint))


def _make_dense(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if module.max_norm is not None:
            hint = "It rewrites the weights in the forward pass. Renormalise once, then set `max_norm = None`."
            raise ValueError(must_be("Embedding", "without max_norm", f"max_norm={module.max_norm}", hint))
        # Sparse gradients have no second derivative; the copy's may be dense.
        module.sparse = False
