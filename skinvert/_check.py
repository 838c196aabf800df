"""Argument checks, and the one wording of every error: what, must be, got, try."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy.sparse
import torch

from ._namespaces import to_numpy

__all__ = [
    "all_finite",
    "check_choice",
    "check_shift",
    "check_hessian_perturbation",
    "check_number",
    "check_rows",
    "check_sample_weight",
    "check_shift",
    "finite_rows",
    "must_be",
    "resolve_device",
    "resolve_dtype",
    "to_plain_array",
]


def must_be(what: str, must: str, got: object, hint: str = "") -> str:
    """Return the wording of every error: what it is about, what it must be, what came, what to try."""
    text = f"{what} must be {must}. Got {got} instead."
    return f"{text} {hint}" if hint else text


def check_number(
    value: Any,
    name: str,
    *,
    owner: str = "",
    low: float = -math.inf,
    high: float = math.inf,
    integer: bool = False,
) -> Any:
    """Return ``value`` if it is a number in [low, high], else raise TypeError or ValueError."""
    kind: Any = numbers.Integral if integer else numbers.Real
    what = f"The {name!r} parameter of {owner}" if owner else name
    bounds = f"[{low}, {high}{']' if math.isfinite(high) else ')'}"
    must = f"{'an int' if integer else 'a float'} in the range {bounds}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, kind):
        raise TypeError(must_be(what, must, repr(value)))
    # NaN compares false with both bounds.
    if not (low <= float(value) <= high) or math.isinf(float(value)):
        raise ValueError(must_be(what, must, repr(value)))
    return int(value) if integer else float(value)


def check_hessian_perturbation(value: Any, owner: str = "") -> float:
    """Return λ as a float: a finite number of at least 0."""
    return check_number(value, "hessian_perturbation", owner=owner, low=0.0)


def check_shift(shift: float, dtype: torch.dtype) -> float:
    """Return λ, which ``dtype`` must hold: 0, or a normal number."""
    numbers_of = torch.finfo(dtype)
    if shift and not numbers_of.tiny <= shift <= numbers_of.max:
        must = f"0 or in the range [{numbers_of.tiny:.3g}, {numbers_of.max:.3g}] of {dtype}"
        hint = "Try dtype=torch.float64." if dtype != torch.float64 else ""
        raise ValueError(must_be("hessian_perturbation", must, f"{shift:.3g}", hint))
    return shift


def check_choice(value: Any, name: str, choices: Iterable[Any], hint: str = "") -> Any:
    """Return ``value`` if it is one of ``choices``, else raise a ValueError that lists them."""
    choices = list(choices)
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(must_be(name, f"one of {listed}", repr(value), hint))
    return value


def check_sample_weight(sample_weight: Any, n_samples: int | None, *, vanishing: bool = False) -> np.ndarray | None:
    """Return the weights as a float64 array (n,): finite, none negative; not all zero, save where they may vanish."""
    if sample_weight is None:
        return None
    sample_weight = to_numpy(sample_weight)
    if isinstance(sample_weight, numbers.Number):
        raise ValueError(must_be("sample_weight", "an array of one weight per row", repr(sample_weight)))
    weights = np.array(to_plain_array(sample_weight, "sample_weight"), dtype=np.float64)
    if weights.ndim != 1:
        raise ValueError(must_be("sample_weight", "a 1D array", f"an array of shape {weights.shape}"))
    if n_samples is not None and len(weights) != n_samples:
        raise ValueError(must_be("sample_weight", f"of length {n_samples}, one weight per row", len(weights)))
    if not np.isfinite(weights).all():
        raise ValueError(must_be("sample_weight", "finite", "NaN or infinity"))
    if (weights < 0).any():
        raise ValueError(must_be("sample_weight", "non-negative", f"{weights.min():.3g}"))
    if not (vanishing or weights.sum() > 0):
        raise ValueError(must_be("The sum of sample_weight", "positive", "all weights zero"))
    return weights


def to_plain_array(value: Any, name: str) -> np.ndarray:
    """Return a dense, real, non-object array of ``value``; refuse the rest by name."""
    if scipy.sparse.issparse(value):
        raise TypeError(must_be(name, "dense", "a sparse matrix", "Try `.toarray()`."))
    if isinstance(value, np.ma.MaskedArray) and (masked := int(np.ma.getmaskarray(value).sum())):
        hint = "Try `.filled(...)`, or leave their rows out."
        raise ValueError(must_be(name, "without masked entries", f"{masked} of them", hint))
    array = np.asarray(value)
    if np.iscomplexobj(array):
        message = f"Complex data not supported: {must_be(name, 'real', f'dtype {array.dtype}')}"
        raise ValueError(message)
    if array.dtype == object or array.dtype.kind in "USVMm":
        hint = "Try `.astype(float)`, or encode the labels as integers."
        raise ValueError(must_be(name, "numeric", f"dtype {array.dtype}", hint))
    if array.dtype.kind == "f" and array.itemsize > 8:
        array = array.astype(np.float64)
    # Torch takes no other byte order, as files of FITS or NetCDF have it.
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def all_finite(V: torch.Tensor) -> bool:
    """Return whether no entry is NaN or infinite."""
    # The sum is finite only if they are, and costs a tenth; of large entries it may overflow.
    return bool(torch.isfinite(V.sum())) or bool(torch.isfinite(V).all())


def finite_rows(V: torch.Tensor) -> torch.Tensor:
    """Return which rows (k,) of V (k, p) have no entry that is NaN or infinite."""
    found = torch.isfinite(V.sum(1))
    # As above: what the sums leave open is asked of those rows alone.
    found[~found] = torch.isfinite(V[~found]).all(1)
    return found


def check_rows(b: Any, size: int, name: str = "b") -> None:
    """Raise unless the tensor or array ``b`` is (k, p) and finite."""
    if b.ndim != 2:
        hint = f"One right-hand side is one row: try `{name}.reshape(1, -1)`."
        raise ValueError(must_be(name, f"of shape (k, {size})", f"shape {tuple(b.shape)}", hint))
    if b.shape[1] != size:
        hint = "One column per selected parameter, in the order of `get_feature_names_out()`."
        raise ValueError(must_be(name, f"of shape (k, {size})", f"shape {tuple(b.shape)}", hint))
    if not (all_finite(b) if isinstance(b, torch.Tensor) else bool(np.isfinite(b).all())):
        raise ValueError(must_be(name, "finite", "NaN or infinity"))


def resolve_device(device: str | torch.device | None, default: torch.device) -> torch.device:
    """Return the torch device that ``device`` names: None is ``default``, "auto" a GPU when there is one."""
    if device is None:
        return default
    if isinstance(device, str) and device == "auto":
        # Not `check_available=`, which torch has only from 2.8 on.
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(must_be("device", 'None, "auto" or a torch device', repr(device))) from error
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = must_be("device", "one that this machine has", repr(str(found)), 'Try device="auto".')
        raise ValueError(message) from error
    if found.type == "meta":
        raise ValueError(must_be("device", "one that holds numbers", "'meta'"))
    return found


def resolve_dtype(dtype: Any, default: torch.dtype) -> torch.dtype:
    """Return float32 or float64 as a torch dtype: None is ``default``; numpy's names are understood."""
    found: Any = default if dtype is None else dtype
    if not isinstance(found, torch.dtype):
        try:
            found = {"float32": torch.float32, "float64": torch.float64}.get(np.dtype(dtype).name)
        except TypeError as error:
            raise ValueError(must_be("dtype", "float32 or float64", repr(dtype))) from error
    if found not in (torch.float32, torch.float64):
        hint = "Try dtype=torch.float32: half precision cannot carry a solve."
        raise ValueError(must_be("dtype", "float32 or float64", str(found), hint))
    return found
