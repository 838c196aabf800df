"""``weight_decay``: one μ for all parameters, or one for each group of them, by glob."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from .._check import check_number, must_be
from .._types import Decay

__all__ = ["decay_by_name"]


def decay_by_name(weight_decay: Decay, named: Sequence[tuple[str, torch.Tensor]]) -> dict[str, float]:
    """Return μ of each parameter by name: 0 for those that no glob of a mapping matches.

    Parameters
    ----------
    weight_decay : float or mapping of str to float
        μ ≥ 0, or globs on parameter names and their μ.
    named : sequence of (str, tensor)
        ``named_parameters(remove_duplicate=False)``: a tied parameter goes by each of its names.

    Raises
    ------
    ValueError
        For a glob that matches nothing, and for a parameter that globs of different μ match.

    Examples
    --------
    >>> linear = torch.nn.Linear(2, 1)
    >>> decay_by_name({"weight": 0.1}, list(linear.named_parameters()))
    {'weight': 0.1, 'bias': 0.0}
    """
    names = [name for name, _ in named]
    if not isinstance(weight_decay, Mapping):
        return dict.fromkeys(names, check_number(weight_decay, "weight_decay", low=0.0))
    found: dict[int, float] = {}
    for glob, value in weight_decay.items():
        mu = check_number(value, f"weight_decay[{glob!r}]", low=0.0)
        matched = [(name, tensor) for name, tensor in named if isinstance(glob, str) and fnmatchcase(name, glob)]
        if not matched:
            raise ValueError(must_be("weight_decay", f"a mapping of globs that match some of {names}", repr(glob)))
        for name, tensor in matched:
            if found.setdefault(id(tensor), mu) != mu:
                got = f"{found[id(tensor)]:.3g} and {mu:.3g} for {name!r}"
                raise ValueError(must_be("weight_decay", "one μ for each parameter", got, "Try narrower globs."))
    return {name: found.get(id(tensor), 0.0) for name, tensor in named}
