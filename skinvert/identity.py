"""What tells one job from others: what decides its result, as short texts, and what it computes first, as numbers."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import sklearn
import torch

from ._checksum import checksum
from .curvature import Curvature, Objective
from .methods.base import Method
from .models import TorchTwiceDifferentiable
from .operators import LinearOperator
from .system import Function, System

__all__ = [
    "Job",
    "Numbers",
    "evenly",
    "first_pass",
    "identity",
    "joined",
    "numbers_of",
    "parts_of",
    "product",
    "random_row",
    "signs",
]

# Sums of a part's entries; and by how many roundings of all of them a part may differ that rounding alone makes up.
SUMS, ROUNDINGS = 8, 10


@dataclass(frozen=True)
class Numbers:
    """Numbers of which each part must be the same to the half of its digits.

    Parameters
    ----------
    sums : tensor of shape (k, 8)
        Sums of the entries of each part, times random numbers that are always the same.
    allowed : tensor of shape (k,)
        By how much those of each part may differ.
    """

    sums: torch.Tensor
    allowed: torch.Tensor

    def are(self, found: object) -> bool:
        """Return whether sums are the same but for what another machine rounds."""
        if not isinstance(found, torch.Tensor) or found.shape != self.sums.shape or found.dtype != self.sums.dtype:
            return False
        return torch.equal(found, self.sums) or bool(((found - self.sums).norm(dim=1) <= self.allowed).all())


@dataclass(frozen=True)
class Job:
    """What tells one job from others.

    Parameters
    ----------
    what : str
        The word for it.
    settled : mapping of str to str
        What decides its result, by the words to name it by, each as a short text.
    numbers : mapping of str to Numbers
        What it computes first: code that has changed shows in it.
    """

    what: str = "job"
    settled: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, Numbers] = field(default_factory=dict)

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """What is kept of the numbers."""
        return {name: own.sums for name, own in self.numbers.items()}

    def differences(self, settled: object, sums: Mapping[str, object]) -> list[str]:
        """Return the words for what another job, of which these are known, has otherwise."""
        known = settled if isinstance(settled, dict) else {}
        other = [name for name in {**self.settled, **known} if known.get(name) != self.settled.get(name)]
        return other or [name for name, own in self.numbers.items() if not own.are(sums.get(name))]


def identity(
    method: Method | Function, system: System, settings: Mapping[str, object], to_the_bit: bool = True
) -> dict[str, str]:
    """Return what decides the result of a fit, by the words to name it by, each as a short text.

    ``to_the_bit`` with what decides its last bits alone: batches, memory.
    """
    A, model, batches = system.curvature, system.model, system.batches
    own: list[object] = [A.penalty]
    if isinstance(model, TorchTwiceDifferentiable):
        module = model.module
        own += [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    elif model is not None:
        own += model.parameters
    data: list[object]
    if batches is None:
        data = [*A.gradient_rows()]
    else:
        data = [batches.checksums if to_the_bit else batches.row_checksums(), batches.sample_weight]
    given = method.get_params() if isinstance(method, Method) else {"function": method}
    placing = method.placing if isinstance(method, Method) else ()
    own_settings = {name: value for name, value in given.items() if name not in placing}
    parts = {
        "method": [type(method), sorted(own_settings.items(), key=lambda item: item[0])],
        "curvature": [system.curvature_name, A.dtype, A.device.type],
        "model": [type(model), model.module if isinstance(model, TorchTwiceDifferentiable) else None],
        "parameters": [system.layout, own],
        "data": [system.n_samples, data],
        **({"working_memory": [sklearn.get_config()["working_memory"]]} if to_the_bit else {}),
        **{name: [value] for name, value in settings.items()},
    }
    versions = {
        "skinvert": vars(sys.modules[__name__.partition(".")[0]])["__version__"],
        "torch": str(torch.__version__),
    }
    told = {name: hashlib.sha256(_text(part).encode()).hexdigest()[:16] for name, part in parts.items()}
    return {**{f"version of {name}": version for name, version in versions.items()}, **told}


def _text(value: object) -> str:
    """Return a text that is the same in every run: numbers by their checksums, functions without their addresses."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(np.array(value))
    if isinstance(value, torch.Tensor):
        return str(checksum(value))
    if isinstance(value, torch.nn.Module) and type(value).__module__ == torch.nn.modules.loss.__name__:
        # Their repr has no settings.
        shown = [item for item in vars(value).items() if not item[0].startswith("_")]
        return f"{value} {_text([sorted(shown, key=lambda item: item[0]), *value.buffers()])}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


# -- numbers -----------------------------------------------------------------------------------------------------------


def numbers_of(x: torch.Tensor, parts: Sequence[slice] = (slice(None),), rounded: float = 0.0) -> Numbers:
    """Return the numbers that tell x from others, by its parts.

    A part that is small beside the others counts by itself, down to what rounding makes of them: the derivatives by
    some parameters are zero but for it. ``rounded`` is the norm of what x is a small rest of.
    """
    generator = torch.Generator("cpu").manual_seed(1)
    sums, norms, eps = torch.zeros(len(parts), SUMS, dtype=torch.float64, device="cpu"), [], torch.finfo(x.dtype).eps
    for row, part in zip(sums, parts, strict=True):
        own = x.detach().reshape(-1)[part].cpu().double()
        norms.append(float(own.norm()))
        u = 2 * torch.rand(len(own), dtype=torch.float64, generator=generator, device="cpu") - 1
        # None near zero, and no two alike: what cancels in a plain sum does not here.
        for k, piece in enumerate(torch.tensor_split((u + u.sign()) * own, SUMS)):
            row[k] = piece.sum()
    size = torch.tensor(norms, dtype=torch.float64, device="cpu")
    return Numbers(sums, 10 * eps**0.5 * size + ROUNDINGS * eps * size.norm().clamp(min=rounded))


def joined(numbers: Sequence[Numbers]) -> Numbers:
    """Return the parts of all."""
    return Numbers(torch.cat([own.sums for own in numbers]), torch.cat([own.allowed for own in numbers]))


def random_row(A: LinearOperator) -> torch.Tensor:
    """Return a row (1, p) of random numbers, always the same."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(1, A.size, dtype=torch.float64, generator=generator, device="cpu").to(A.device, A.dtype)


def signs(count: int, like: torch.Tensor) -> torch.Tensor:
    """Return random signs (count,), always the same: a sum does not cancel then, as that of gradients at a minimum."""
    generator = torch.Generator("cpu").manual_seed(2)
    return (2 * torch.randint(2, (count,), generator=generator, device="cpu") - 1).to(like)


def product(system: System) -> Numbers:
    """Return the product of a random row with the curvature of the first batch."""
    A = system.curvature
    v = random_row(A)
    if isinstance(A, Curvature):
        batch, weights = next(iter(A.objective.batches))
        return numbers_of(A.graph(batch, weights)(v), parts_of(system))
    return numbers_of(A.apply(v), parts_of(system))


def first_pass(system: System) -> list[Numbers]:
    """Return what the first pass over all the data has found: the gradient, and each batch's losses."""
    objective = system.curvature.of_data if isinstance(system.curvature, Curvature) else None
    if objective is None:
        return []
    if not isinstance(objective, Objective):
        return [numbers_of(objective.gradient, parts_of(system))]
    (batch, weights), sums = next(iter(objective.batches)), objective.loss_sums
    losses = objective.losses(batch)
    some = objective.model.gradient_of((losses * signs(len(losses), losses)).sum())
    # Of -log(1 - t) the digits are those of 1.
    ones = len(weights) * len(sums) ** 0.5
    # At a minimum the gradient is a small rest of the rows'.
    gradient = numbers_of(objective.gradient, parts_of(system), float(some.norm()) / len(losses) ** 0.5)
    return [gradient, numbers_of(sums, evenly(len(sums)), ones)]


def parts_of(system: System) -> list[slice]:
    """Return where each parameter tensor lies in a row."""
    return [slice(None)] if system.layout is None else list(system.layout.slices.values())


def evenly(count: int, most: int = 64) -> list[slice]:
    """Return parts of so many numbers, all of about one length."""
    stops = [count * k // most for k in range(most + 1)]
    return [slice(start, stop) for start, stop in pairwise(stops) if stop > start]
