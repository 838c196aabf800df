"""What users put around a model, and the ways in which arrays may lie in memory: all the same to what is fitted."""

import tempfile
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations

# -- around a model ----------------------------------------------------------------------------------------------------


class Answer(nn.Module):
    """A model whose outputs are wrapped, as those of other libraries are."""

    def __init__(self, inner, wrap):
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


class Alias(nn.Module):
    """A model that is known by two names."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.second = inner, inner

    def forward(self, x):
        return self.second(x)


class Rescaled(nn.Module):
    """Outputs times a buffer in float64, whatever the model's dtype; ``cast`` brings it to that."""

    def __init__(self, inner, cast):
        super().__init__()
        self.inner, self.cast = inner, cast
        self.register_buffer("scale", torch.tensor([1.25], dtype=torch.float64))

    def forward(self, x):
        f = self.inner(x)
        return f * (self.scale.to(f.dtype) if self.cast else self.scale)


class Hooked(nn.Module):
    """A model whose layers have hooks, one of which changes what it sees."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        inner.register_forward_hook(lambda module, given, f: 0.5 * f)

    def forward(self, x):
        return self.inner(x)


def in_data_parallel(module):
    shared = nn.DataParallel(module)
    # On no device, though there be some.
    shared.device_ids = []
    return shared


def frozen_first(module):
    """Freeze the first layer that has parameters of its own, where another one is left."""
    layers = [layer for layer in module.modules() if [*layer.parameters(recurse=False)]]
    for layer in layers[: len(layers) > 1]:
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(False)
    return module


def weight_norm_last(module):
    """Put the norm of the last Linear's rows into a parameter of its own."""
    heads = [layer for layer in module.modules() if type(layer) is nn.Linear]
    if heads:
        parametrizations.weight_norm(heads[-1])
    return module


# The same model, whose outputs are a tensor; and then what the user has.
INSIDE = {
    "none": lambda module: module,
    "frozen_first": frozen_first,
    "weight_norm_last": weight_norm_last,
    "alias": Alias,
    "buffer64": lambda module: Rescaled(module, cast=True),
    "promoting": lambda module: Rescaled(module, cast=False),
    "hooked": Hooked,
}
OUTSIDE = {
    "data_parallel": in_data_parallel,
    "mapping": lambda module: Answer(module, lambda f: {"logits": f, "hidden": f.detach()}),
    "attributes": lambda module: Answer(module, lambda f: SimpleNamespace(logits=f, loss=None)),
    "pair": lambda module: Answer(module, lambda f: (f, f.detach())),
}
WRAPPERS = (*INSIDE, *OUTSIDE)


def wrapped(case, module):
    """Return the model of a case with a tensor for its outputs, and as the user has it."""
    plain = INSIDE.get(case.wrapper, INSIDE["none"])(module)
    return plain, OUTSIDE.get(case.wrapper, INSIDE["none"])(plain)


# -- in memory ---------------------------------------------------------------------------------------------------------


def strided(values):
    """Every other number of twice as many."""
    return torch.stack([values, torch.full_like(values, 7)], dim=-1)[..., 0]


def columns_first(values):
    """Columns that lie one after the other."""
    return values.mT.contiguous().mT if values.ndim > 1 else values


def backwards(values):
    """Negative strides, along the rows and along what follows."""
    flipped = values.numpy()[tuple(slice(None, None, -1) for _ in values.shape)].copy()
    return flipped[tuple(slice(None, None, -1) for _ in values.shape)]


def read_only(values):
    """An array that may not be written."""
    values = values.numpy().copy()
    values.flags.writeable = False
    return values


def on_disk(values):
    """A memory map that may not be written."""
    with tempfile.TemporaryFile() as file:
        file.write(values.contiguous().numpy().tobytes())
        file.flush()
        return np.memmap(file, values.numpy().dtype, "r", shape=tuple(values.shape))


IN_TORCH = {"plain": lambda values: values, "strided": strided, "columns_first": columns_first}
IN_NUMPY = {"backwards": backwards, "read_only": read_only, "on_disk": on_disk}
LAYOUTS = (*IN_TORCH, *IN_NUMPY)


def laid_out(case, values):
    """Return the same values as they lie in memory in a case."""
    return {**IN_TORCH, **IN_NUMPY}[case.layout](values)
