"""The user's right-hand sides as tensor rows, and the answer back in their kind, dtype and device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ._validation import check_rows, must_be, to_plain_array

__all__ = ["Rows"]


@dataclass
class Rows:
    """Rows (k, p) for an operator, and what they were made from."""

    tensor: torch.Tensor
    source: Any

    @classmethod
    def of(cls, b: Any, operator: Any, name: str = "b") -> Rows:
        """Check ``b`` and return a copy in the operator's dtype and on its device."""
        if isinstance(b, torch.Tensor):
            if b.is_complex() or b.layout != torch.strided:
                raise TypeError(must_be(name, "dense and real", f"{b.layout}, {b.dtype}"))
            source: Any = b.detach()
        else:
            source = to_plain_array(b, name)
        check_rows(source, operator.size, name)
        if isinstance(source, torch.Tensor):
            return cls(source.to(operator.device, operator.dtype, copy=True).contiguous(), source)
        dtype = torch.empty(0, dtype=operator.dtype, device="cpu").numpy().dtype
        rows = torch.from_numpy(np.array(source, dtype=dtype, order="C", copy=True))
        return cls(rows.to(operator.device), source)

    def back(self, x: torch.Tensor) -> Any:
        """Return ``x`` as the user gave b: integers come back in the operator's dtype."""
        if isinstance(self.source, torch.Tensor):
            dtype = self.source.dtype if self.source.is_floating_point() else x.dtype
            return x.to(self.source.device, dtype)
        array = x.detach().cpu().numpy()
        return array.astype(self.source.dtype, copy=False) if self.source.dtype.kind == "f" else array

    def back_info(self, info: dict[str, Any]) -> dict[str, Any]:
        """Return ``info`` with its tensors of the kind that the user gave."""
        if isinstance(self.source, torch.Tensor):
            return {k: v.to(self.source.device) if isinstance(v, torch.Tensor) else v for k, v in info.items()}
        return {k: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in info.items()}
