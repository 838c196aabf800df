"""Curvatures by their names, and those that users register."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from glob import escape
from typing import TypeAlias

import numpy as np
import torch
from sklearn.utils import check_random_state

from .._autograd import ordinary
from .._check import check_choice, must_be
from .._naming import may_take
from ..data import Batches
from ..models import TorchTwiceDifferentiable, TwiceDifferentiable
from ..operators import BlockDiagonal
from .base import Curvature
from .draws import Sampled
from .empirical_fisher import EmpiricalFisher
from .first_pass import warn_of_unreached
from .fisher import Fisher, SampledFisher
from .ggn import GGN
from .hessian import GenericHessian, Hessian
from .objective import GenericObjective, MeanLoss, Objective
from .sampled_ggn import SampledGGN
from .sharded import Sharded

__all__ = [
    "CURVATURES",
    "build_blocks",
    "build_curvature",
    "curvature_name",
    "faces_of",
    "register_curvature",
    "registered",
    "seeded_curvature",
]

Builder: TypeAlias = Callable[[Objective], Curvature]

CURVATURES: dict[str, type[Curvature] | Builder] = {kind.name: kind for kind in (Hessian, GGN, Fisher, EmpiricalFisher)}
# Those by settings, at their defaults.
SAMPLED: dict[str, type[Sampled]] = {"sampled_ggn": SampledGGN, "sampled_fisher": SampledFisher}
# What `curvature=` means otherwise.
RESERVED = ("auto", "gram", *SAMPLED)


def register_curvature(name: str, curvature: type[Curvature] | Builder, *, overwrite: bool = False) -> None:
    r"""Give a curvature a name, by which ``HessianInverter(curvature=name)`` and everything beside it takes it.

    Parameters
    ----------
    name : str
        The name.
    curvature : subclass of Curvature, or callable
        Called with the ``Objective``, it returns the ``Curvature`` over all the data. ``functools.partial`` gives a
        class settings of its own.
    overwrite : bool, default=False
        Replace what the name already has; without it the first is kept, with a warning.

    Raises
    ------
    TypeError
        For a name that is no string, and for what is neither a complete subclass of ``Curvature`` nor a function.
    ValueError
        For an empty name, and for "auto", "gram", "sampled_ggn" and "sampled_fisher", which mean something else.

    See Also
    --------
    skinvert.Curvature : By its products.
    skinvert.Factored : By the factors of the rows.

    Examples
    --------
    The Fisher by ten labels a row:

    >>> from functools import partial
    >>> register_curvature("fisher_of_ten", partial(Fisher, n_labels=10))
    >>> curvature_name("fisher_of_ten")
    'fisher_of_ten'
    >>> del CURVATURES["fisher_of_ten"]
    """
    if not isinstance(name, str):
        raise TypeError(must_be("A curvature's name", "a string", repr(name)))
    if not name or name in RESERVED:
        raise ValueError(must_be("A curvature's name", f"another than '' and {', '.join(RESERVED)}", repr(name)))
    _check_kind(curvature)
    if may_take(name, CURVATURES, overwrite, f"The curvature {name!r}"):
        CURVATURES[name] = curvature


def registered(name: str) -> type[Curvature] | Builder:
    """Return what a name is registered for; ValueError, with the names that there are, where it is for nothing."""
    return CURVATURES[check_choice(name, "curvature", CURVATURES)]


def faces_of(name: str) -> frozenset[str]:
    """Return the faces of the curvatures of a name, as far as they are known before one is built: those of a class."""
    kind = registered(name)
    return kind.faces if isinstance(kind, type) and issubclass(kind, Curvature) else frozenset()


@ordinary
def build_curvature(
    curvature: str | Sampled, model: TwiceDifferentiable, batches: Batches, verbose: int = 0
) -> Curvature | Sharded:
    """Return the curvature, given by name or by its settings, of a model at a fixed point over all the data.

    Parameters that no loss reaches are warned of. Of batches that are one process's share it is that of all shares.
    """
    built = _build(curvature, model, batches, verbose)
    # Through `HessianInverter.fit`, to its caller.
    warn_of_unreached(built.unreached)
    return built


def _build(curvature: str | Sampled, model: TwiceDifferentiable, batches: Batches, verbose: int) -> Curvature | Sharded:
    name = curvature_name(curvature)
    curvature = seeded_curvature(curvature)
    if not isinstance(model, TorchTwiceDifferentiable):
        if CURVATURES[name] is not Hessian:
            hint = "Its grad and mvp define no outputs. Subclass TorchTwiceDifferentiable for the other curvatures."
            raise ValueError(must_be(f"curvature for {type(model).__name__}", "'hessian'", repr(name), hint))
        generic = GenericObjective(model, batches)
        return _of_all(GenericHessian(generic.share()), generic) if batches.shard else GenericHessian(generic)
    objective = Objective(model, batches, verbose)
    own = objective if batches.shard is None else objective.share()
    built = curvature.build(own) if isinstance(curvature, Sampled) else CURVATURES[name](own)
    if not isinstance(built, Curvature):
        raise TypeError(must_be(f"What is registered as {name!r}", "what builds a Curvature", type(built).__name__))
    return built if own is objective else _of_all(built, objective)


def _of_all(own: Curvature, objective: MeanLoss) -> Sharded:
    """Return the curvature of all processes' rows, given that of this process's."""
    shard = objective.batches.shard
    assert shard is not None
    return Sharded(own, shard, objective.penalty, objective)


def build_blocks(
    curvature: str | Sampled,
    model: TwiceDifferentiable,
    batches: Batches,
    members: Mapping[str, Sequence[str]],
    verbose: int = 0,
) -> BlockDiagonal:
    """Return the block-diagonal part of a curvature: each block is the curvature of its own parameters alone."""
    if not isinstance(model, TorchTwiceDifferentiable):
        must = "None for a model without named parameters"
        raise ValueError(must_be("blocks", must, f"{len(members)} blocks of a {type(model).__name__}"))
    places, operators, indices = model.layout.slices, [], []
    for names in members.values():
        part = model.at_point([escape(name) for name in names], model.dtype, model.device)
        operators.append(_build(curvature, part, batches, verbose))
        indices.append(torch.cat([torch.arange(places[name].start, places[name].stop, device="cpu") for name in names]))
    return BlockDiagonal(operators, indices)


def curvature_name(curvature: str | Sampled) -> str:
    """Return the name of a curvature that is given by name or by its settings."""
    if isinstance(curvature, Sampled):
        return curvature.curvature
    also = f"{' and '.join(kind.__name__ for kind in SAMPLED.values())} are taken too."
    name = check_choice(curvature, "curvature", [*CURVATURES, *SAMPLED], also)
    return SAMPLED[name].curvature if name in SAMPLED else name


def seeded_curvature(
    curvature: str | Sampled, random_state: int | np.random.RandomState | None = None
) -> str | Sampled:
    """Return the name of settings as these; settings without a seed get one from ``random_state``."""
    if isinstance(curvature, str) and curvature in SAMPLED:
        curvature = SAMPLED[curvature]()
    if random_state is None or not isinstance(curvature, Sampled) or curvature.random_state is not None:
        return curvature
    seed = check_random_state(random_state).randint(2**31 - 1)
    own = random_state if isinstance(random_state, int) else seed
    return type(curvature)(curvature.n_samples, random_state=own)


def _check_kind(curvature: type[Curvature] | Builder) -> None:
    must, hint = "a subclass of Curvature, or a function from an Objective to one", ""
    if isinstance(curvature, type):
        missing = sorted(curvature.__abstractmethods__) if issubclass(curvature, Curvature) else []
        if issubclass(curvature, Curvature) and not missing:
            return
        hint = f"It does not define {', '.join(missing)}." if missing else ""
    elif callable(curvature):
        return
    raise TypeError(must_be("A registered curvature", must, repr(curvature), hint))
