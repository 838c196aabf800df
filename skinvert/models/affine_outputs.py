"""Whether a model's outputs are affine in the selected parameters, by its construction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["has_affine_outputs"]

# By exact type, as that of nn.Linear: a subclass may do anything.
PLAIN = (nn.Identity, nn.Flatten)


def has_affine_outputs(module: nn.Module, theta: Sequence[torch.Tensor]) -> bool:
    """Return whether θ are weights of one last linear layer and of nothing else; False where that cannot be told.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> has_affine_outputs(net, list(net.parameters())), has_affine_outputs(net, [net[2].weight])
    (False, True)
    """
    layers = list(module.children()) if type(module) is nn.Sequential else [module]
    while layers and type(layers[-1]) in PLAIN:
        layers.pop()
    if not layers or type(layers[-1]) is not nn.Linear or any(_has_hooks(child) for child in module.modules()):
        return False
    *before, last = layers
    selected, own = {id(tensor) for tensor in theta}, {id(tensor) for tensor in last.parameters()}
    elsewhere = {id(tensor) for layer in before for tensor in layer.parameters()}
    return selected <= own and not selected & elsewhere


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
