"""Names for what users hand over, and get back, where no class says what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

__all__ = [
    "Array",
    "Autocast",
    "Batch",
    "DType",
    "Data",
    "Decay",
    "Device",
    "Globs",
    "Indices",
    "LossLike",
    "Partition",
    "ProcessGroup",
    "RandomState",
    "State",
    "TrainedModel",
]

# An array, tensor or frame; what is returned is of the kind that was given.
Array: TypeAlias = Any
# Tensors, or what becomes them, in tuples, lists and mappings as deep as the user's own.
Batch: TypeAlias = Any
# An object's attributes by name, as pickles and files have them: each is checked where it is read.
State: TypeAlias = dict[str, Any]

# What each of them may be no class says, so to mypy they are objects: `models` and `data` read and refuse them. A torch
# module, a skorch net, a fitted scikit-learn model or pipeline, a TwiceDifferentiable:
TrainedModel: TypeAlias = object
# (X, y), arrays, frames, mappings, a data set, a loader, batches:
Data: TypeAlias = object
# A name, a torch loss module, a Loss, a callable (output, target):
LossLike: TypeAlias = object

# What forward passes compute in, by `torch.autocast`.
Autocast: TypeAlias = torch.dtype | str | None
DType: TypeAlias = torch.dtype | np.dtype[Any] | type | str | None
Decay: TypeAlias = float | Mapping[str, float]
Device: TypeAlias = str | torch.device | None
# Places of rows, one or several.
Indices: TypeAlias = int | Sequence[int] | np.ndarray | torch.Tensor
Globs: TypeAlias = str | Sequence[str] | None
Partition: TypeAlias = str | Mapping[str, str | Sequence[str]] | None
# "world", or a ProcessGroup of torch.distributed, which not every build of torch has.
ProcessGroup: TypeAlias = object
RandomState: TypeAlias = int | np.random.RandomState | None
