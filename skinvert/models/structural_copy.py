"""A copy of a module that shares its tensors: own mode, own containers, nothing of the user's to disturb."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .._validation import must_be

__all__ = ["structural_copy"]


def structural_copy(module: nn.Module) -> nn.Module:
    """Return ``module`` in eval mode as a tree of new module objects over the same tensors.

    ``copy.deepcopy`` would copy the weights, and call a user's ``__deepcopy__``; a plain reference would let ``eval()``
    and parameter swaps reach the user's model.
    """
    if isinstance(module, torch.jit.ScriptModule):
        # A compiled module has no Python structure to copy.
        return copy.deepcopy(module).eval()
    duplicate = _copy_module(module, {})
    for child in duplicate.modules():
        _make_evaluable(child)
    return duplicate


def _copy_module(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    duplicate = memo[id(module)] = type(module).__new__(type(module))
    duplicate.__dict__.update({name: _copy_container(value, memo) for name, value in module.__dict__.items()})
    return duplicate


def _copy_container(value: Any, memo: dict[int, nn.Module]) -> Any:
    """Copy lists and dicts (an LSTM keeps its weights in one), and the modules in them."""
    if isinstance(value, nn.Module):
        return _copy_module(value, memo)
    if type(value) in (list, tuple):
        return type(value)(_copy_container(item, memo) for item in value)
    if isinstance(value, dict):
        duplicate = copy.copy(value)
        duplicate.update({key: _copy_container(item, memo) for key, item in value.items()})
        return duplicate
    return value


def _make_evaluable(module: nn.Module) -> None:
    module.training = False
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.running_mean is None:
        hint = "Without them a sample's loss depends on the other rows of its batch: there is no loss per sample."
        raise ValueError(must_be("BatchNorm", "with running statistics", "track_running_stats=False", hint))
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if module.max_norm is not None:
            hint = "It rewrites the weights in the forward pass. Renormalise once, then set `max_norm = None`."
            raise ValueError(must_be("Embedding", "without max_norm", f"max_norm={module.max_norm}", hint))
        # Sparse gradients have no second derivative; the copy's may be dense.
        module.sparse = False
