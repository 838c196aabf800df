"""What tells one job from others: what decides its result, as short texts, and what it computes first, as numbers."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import sklearn
import torch

from ._checksum import checksum
from .curvature import Curvature
from .methods.base import Method
from .models import TorchTwiceDifferentiable
from .operators import LinearOperator
from .system import Function, System

__all__ = ["Job", "Numbers", "identity", "numbers_of", "product", "random_row"]

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


def identity(method: Method | Function, system: System, settings: Mapping[str, object]) -> dict[str, str]:
    """Return what decides the result of a fit, by the words to name it by, each as a short text."""
    A, model, batches = system.curvature, system.model, system.batches
    own: list[object] = [A.penalty]
    if isinstance(model, TorchTwiceDifferentiable):
        module = model.module
        own += [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    elif model is not None:
        own += model.parameters
    data: list[object] = [*A.gradient_rows()] if batches is None else [batches.checksums, batches.sample_weight]
    given = method.get_params() if isinstance(method, Method) else {"function": method}
    placing = method.placing if isinstance(method, Method) else ()
    own_settings = {name: value for name, value in given.items() if name not in placing}
    parts = {
        "method": [type(method), sorted(own_settings.items(), key=lambda item: item[0])],
        "curvature": [system.curvature_name, A.dtype, A.device.type],
        "model": [type(model), model.module if isinstance(model, TorchTwiceDifferentiable) else None],
        "parameters": [system.layout, own],
        "data": [system.n_samples, data],
        "working_memory": [sklearn.get_config()["working_memory"]],
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
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


# -- numbers -----------------------------------------------------------------------------------------------------------


def numbers_of(x: torch.Tensor, parts: Sequence[slice] = (slice(None),)) -> Numbers:
    """Return the numbers that tell x from others, by its parts.

    A part that is small beside the others counts by itself, down to what rounding makes of them: the derivatives by
    some parameters are zero but for it.
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
    return Numbers(sums, 10 * eps**0.5 * size + ROUNDINGS * eps * size.norm())


def random_row(A: LinearOperator) -> torch.Tensor:
    """Return a row (1, p) of random numbers, always the same."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(1, A.size, dtype=torch.float64, generator=generator, device="cpu").to(A.device, A.dtype)


def product(system: System) -> Numbers:
    """Return the product of a random row: code of the model, or of its loss, that has changed shows in it."""
    A = system.curvature
    v = random_row(A)
    if not isinstance(A, Curvature):
        return numbers_of(A.apply(v), _parts(system))
    batch, weights = next(iter(A.objective.batches))
    return numbers_of(A.graph(batch, weights)(v), _parts(system))


def _parts(system: System) -> list[slice]:
    return [slice(None)] if system.layout is None else list(system.layout.slices.values())
