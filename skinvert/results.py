"""What a solve returns, and the names of the built-in methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

__all__ = ["InverseHvpResult", "InversionMethod"]


class InversionMethod(str, Enum):  # noqa: UP042 (the contract: `str, Enum`)
    """The names that the functional face fixes; a registry takes a user's own names beside them.

    Examples
    --------
    >>> InversionMethod("cg") is InversionMethod.Cg, InversionMethod.Direct == "direct"
    (True, True)
    """

    Direct = "direct"
    Cg = "cg"
    Lissa = "lissa"
    Arnoldi = "arnoldi"
    Auto = "auto"


@dataclass(frozen=True)
class InverseHvpResult:
    """Solutions of (H + λI) x = b, one per row, and what is known of them.

    Unpacks as ``x, info``.

    Parameters
    ----------
    x : tensor or array of shape (k, p)
        The solutions, of the kind, dtype and device of b.
    info : dict
        ``residual`` (k,), the true ‖Ax − b‖ / ‖b‖ of each row (0 where b = 0), recomputed after the solve with the
        operator that the method inverts; ``converged`` (k,); further entries as each method documents.

    Examples
    --------
    >>> x, info = InverseHvpResult([[1.0]], {"converged": [True]})
    >>> x, info["converged"]
    ([[1.0]], [True])
    """

    x: Any
    info: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        """Yield x, then info."""
        return iter((self.x, self.info))
