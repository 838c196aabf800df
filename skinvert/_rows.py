"""The user's right-hand sides as tensor rows, and the answer back in their kind, dtype and device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from ._check import all_finite, check_rows, must_be, to_plain_array
from ._scaling import far_exponents, lost_rows, times_powers
from ._state import DTYPES
from ._telling import warn
from ._types import Array, State
from .reasons import Reason
from .results import InverseHvpResult

__all__ = ["InFloat64", "Rows"]

# Rows with magnitudes beyond 2 ** ± this are brought near one before they are cast to the operator's dtype.
SAFE = {torch.float32: 64, torch.float64: 400}


class Space(Protocol):
    """Where rows live: an operator, or an inverse of one."""

    @property
    def size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class InFloat64:
    """A space whose rows are taken in float64: of what is computed there whatever the dtype of an operator."""

    size: int
    device: torch.device
    dtype: torch.dtype = torch.float64


@dataclass
class Rows:
    """Rows (k, p) for an operator, and what they were made from.

    Attributes
    ----------
    tensor : tensor of shape (k, p)
        In the operator's dtype and on its device, each row times 2 ** -power.
    source : array or tensor
        As they were given.
    powers : tensor of int, shape (k,)
        0 for every row that the dtype holds with room for its squares.
    """

    tensor: torch.Tensor
    source: Array
    powers: torch.Tensor

    @classmethod
    def of(cls, b: Array, operator: Space, name: str = "b", *, scale: bool = True) -> Rows:
        """Check ``b`` and return a copy in the operator's dtype and on its device, scaled in its own dtype."""
        source = _plain(b, name)
        check_rows(source, operator.size, name)
        wide = _wide(source, operator.device)
        powers = far_exponents(wide, SAFE[operator.dtype])
        if not scale:
            powers = torch.zeros_like(powers)
        rows = times_powers(wide, -powers) if bool(powers.any()) else wide
        rows = rows.to(operator.dtype).contiguous()
        return cls(
            rows.clone() if isinstance(source, torch.Tensor) and rows.data_ptr() == source.data_ptr() else rows,
            source,
            powers,
        )

    def start(self, x0: Array) -> torch.Tensor:
        """Return ``x0``, of shape (k, p), (1, p) or (p,), as new rows (k, p) on the scale of these.

        Rows that the operator's dtype cannot hold, from which nothing can start, are zero.
        """
        source, shape = _plain(x0, "x0"), tuple(self.tensor.shape)
        source = source[None] if source.ndim == 1 else source
        if tuple(source.shape) not in (shape, (1, shape[1])):
            raise ValueError(must_be("x0", f"of shape {shape}, (1, p) or (p,)", f"shape {tuple(np.shape(x0))}"))
        check_rows(source, shape[1], "x0")
        wide = _wide(source, self.tensor.device).expand(shape)
        rows = times_powers(wide, -self.powers).to(self.tensor.dtype)
        return torch.where(torch.isfinite(rows).all(1, keepdim=True), rows, 0.0)

    def through(self, inverse: Any) -> Any:
        """Return the inverse that serves the scaled rows: free of settings on the scale of b, where any is scaled."""
        return inverse.scale_free() if bool(self.powers.any()) else inverse

    def back(self, x: torch.Tensor) -> Array:
        """Return ``x`` (..., k, p) as the user gave b: integers come back in the operator's dtype.

        Raises ValueError where that dtype overflows, and warns where a row is below its range.
        """
        found, lost = self._back(x)
        self._warn(lost)
        return found

    def result(self, x: torch.Tensor, info: State) -> InverseHvpResult:
        """Return ``back(x)`` with ``back_info(info)``; a row below the range of b's dtype is not converged."""
        found, lost = self._back(x)
        self._warn(lost)
        if "converged" in info and bool(lost.any()):
            info = {**info, "converged": info["converged"] & ~lost}
            if "reason" in info:
                info["reason"] = info["reason"].masked_fill(lost, Reason.OUT_OF_RANGE)
        return InverseHvpResult(found, self.back_info(info))

    def _back(self, x: torch.Tensor) -> tuple[Array, torch.Tensor]:
        dtype = self._dtype(x)
        wide = x if dtype not in SAFE else x.to(dtype)
        scaled = times_powers(wide, self.powers)
        found = scaled.to(dtype)
        if not all_finite(found) and all_finite(x):
            hint = f"Give b in {'float32 or float64' if found.itemsize < 4 else 'float64'}, or smaller rows."
            raise ValueError(must_be("The solution", f"within the range of b's dtype {dtype}", "an overflow", hint))
        lost = lost_rows(x, found)
        if isinstance(self.source, torch.Tensor):
            return found.to(self.source.device), lost
        return found.detach().cpu().numpy().astype(self._numpy_dtype(x), copy=False), lost

    def _dtype(self, x: torch.Tensor) -> torch.dtype:
        """Return the torch dtype of the answer: b's own where it is a floating one."""
        if isinstance(self.source, torch.Tensor):
            return self.source.dtype if self.source.is_floating_point() else x.dtype
        # A long double has no counterpart.
        return DTYPES.get(self._numpy_dtype(x).name, torch.float64)

    def _numpy_dtype(self, x: torch.Tensor) -> np.dtype:
        return (
            self.source.dtype
            if self.source.dtype.kind == "f"
            else torch.empty(0, dtype=x.dtype, device="cpu").numpy().dtype
        )

    def _warn(self, lost: torch.Tensor) -> None:
        if bool(lost.any()):
            warn(
                f"{int(lost.sum())} of {lost.numel()} rows of the answer are below the range of b's dtype: they come "
                "out as zeros or with few digits. Give b in float64, or larger rows.",
                ConvergenceWarning,
            )

    def back_info(self, info: State) -> State:
        """Return ``info`` with its tensors of the kind that the user gave."""
        if isinstance(self.source, torch.Tensor):
            return {k: v.to(self.source.device) if isinstance(v, torch.Tensor) else v for k, v in info.items()}
        return {k: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in info.items()}


def _plain(given: Array, name: str) -> Array:
    """Return a dense, real tensor without its graph, or a plain array."""
    if not isinstance(given, torch.Tensor):
        return to_plain_array(given, name)
    if given.is_complex() or given.layout != torch.strided:
        raise TypeError(must_be(name, "dense and real", f"{given.layout}, {given.dtype}"))
    return given.detach()


def _wide(source: Array, device: torch.device) -> torch.Tensor:
    """Return rows in float32 or float64, those of an array as a copy."""
    if isinstance(source, torch.Tensor):
        rows = source.to(device)
    else:
        own = source.dtype if source.dtype in (np.float32, np.float64) else np.float64
        rows = torch.from_numpy(np.array(source, dtype=own, order="C", copy=True)).to(device)
    return rows if rows.dtype in SAFE else rows.to(torch.float64)
