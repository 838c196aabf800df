"""Names that users give: whoever has one keeps it, unless it is replaced on purpose."""

from __future__ import annotations

from collections.abc import Container

from ._telling import warn

__all__ = ["may_take"]


def may_take(key: object, taken: Container[object], overwrite: bool, what: str, where: str = "") -> bool:
    """Return whether a key is free, or to be overwritten; else warn that the first is kept."""
    if key not in taken or overwrite:
        return True
    warn(f"{what} is already registered{where}: the first is kept. Try overwrite=True.", UserWarning)
    return False
