"""Arrays of further libraries, by the array API standard, where scikit-learn's ``array_api_dispatch`` is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from sklearn import get_config
from torch.utils.dlpack import from_dlpack

from ._types import Array

__all__ = [
    "Standard",
    "as_tensor",
    "dispatches",
    "in_kind_of",
    "is_foreign",
    "like_rows",
    "namespace_of",
    "of_kind",
    "to_numpy",
]


@runtime_checkable
class Standard(Protocol):
    """What arrays of the standard have, and is used here: their namespace, and DLPack to and from it."""

    device: Any

    def __array_namespace__(self) -> Any: ...

    def __dlpack__(self) -> Any: ...

    def to_device(self, device: Any) -> Any: ...


def dispatches() -> bool:
    """Return whether scikit-learn's estimators take arrays by their own library."""
    return bool(get_config()["array_api_dispatch"])


def is_foreign(value: object) -> TypeGuard[Standard]:
    """Return whether ``value`` is to be taken as an array of another library than NumPy and torch."""
    own = isinstance(value, np.ndarray | np.generic | torch.Tensor)
    return not own and isinstance(value, Standard) and dispatches()


def namespace_of(value: object) -> str:
    """Return the name of an array's library; "numpy" for what becomes an array of NumPy's."""
    if isinstance(value, torch.Tensor):
        return "torch"
    return str(value.__array_namespace__().__name__) if is_foreign(value) else "numpy"


def as_tensor(value: Standard) -> torch.Tensor:
    """Return a foreign array as a tensor, over its memory where that is on its library's first device."""
    info = value.__array_namespace__().__array_namespace_info__()
    return from_dlpack(value.to_device(info.default_device()))


def of_kind(value: Standard, found: torch.Tensor) -> Array:
    """Return a tensor as an array of the library of ``value``, on its device."""
    xp = value.__array_namespace__()
    return xp.asarray(xp.from_dlpack(found.detach()), device=value.device)


def in_kind_of(b: Array, function: Callable[[Array], Array]) -> Array:
    """Return ``function`` of b; of a foreign b as a tensor, and back."""
    return of_kind(b, function(as_tensor(b))) if is_foreign(b) else function(b)


def like_rows(rows: object, found: np.ndarray) -> Array:
    """Return an attribute of a fit as an array of the rows' library, where scikit-learn's dispatch is on."""
    if is_foreign(rows):
        return of_kind(rows, torch.from_numpy(found))
    return torch.from_numpy(found).to(rows.device) if isinstance(rows, torch.Tensor) and dispatches() else found


def to_numpy(value: object) -> object:
    """Return a tensor, or a foreign array, as one of NumPy's; all else as it is."""
    if is_foreign(value):
        value = as_tensor(value)
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
