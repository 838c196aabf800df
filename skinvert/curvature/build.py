"""A curvature by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from glob import escape
from typing import Any

import torch
from sklearn.utils import check_random_state

from .._autograd import ordinary
from .._validation import check_choice, must_be
from ..data import Batches
from ..models import TorchTwiceDifferentiable, TwiceDifferentiable
from ..operators import BlockDiagonal, LinearOperator
from .base import Objective
from .first_pass import warn_of_unreached
from .fisher import EmpiricalFisher, Fisher, SampledFisher
from .ggn import GGN
from .hessian import GenericHessian, Hessian

__all__ = ["CURVATURES", "build_blocks", "build_curvature", "curvature_name", "seeded_curvature"]

CURVATURES = {"hessian": Hessian, "ggn": GGN, "fisher": Fisher, "empirical_fisher": EmpiricalFisher}
# The Fisher by its settings, at their defaults.
SAMPLED = "sampled_fisher"


@ordinary
def build_curvature(
    curvature: str | SampledFisher, model: TwiceDifferentiable, batches: Batches, verbose: int = 0
) -> LinearOperator:
    """Return the curvature, given by name or by its settings, of a model at a fixed point over all the data.

    Parameters that no loss reaches are warned of.
    """
    built: Any = _build(curvature, model, batches, verbose)
    if isinstance(model, TorchTwiceDifferentiable):
        # Through `HessianInverter.fit`, to its caller.
        warn_of_unreached(built.objective.unreached)
    return built


def _build(
    curvature: str | SampledFisher, model: TwiceDifferentiable, batches: Batches, verbose: int
) -> LinearOperator:
    name = curvature_name(curvature)
    curvature = seeded_curvature(curvature)
    if isinstance(model, TorchTwiceDifferentiable):
        objective = Objective(model, batches, verbose)
        return curvature.build(objective) if isinstance(curvature, SampledFisher) else CURVATURES[name](objective)
    if name != "hessian":
        hint = "Its grad and mvp define no outputs. Subclass TorchTwiceDifferentiable for the other curvatures."
        raise ValueError(must_be(f"curvature for {type(model).__name__}", "'hessian'", repr(name), hint))
    return GenericHessian(model, batches)


def build_blocks(
    curvature: str | SampledFisher,
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


def curvature_name(curvature: str | SampledFisher) -> str:
    """Return the name of a curvature that is given by name or by its settings."""
    if isinstance(curvature, SampledFisher):
        return "fisher"
    name = check_choice(curvature, "curvature", [*CURVATURES, SAMPLED], "A SampledFisher is taken too.")
    return "fisher" if name == SAMPLED else name


def seeded_curvature(curvature: Any, random_state: Any = None) -> Any:
    """Return ``"sampled_fisher"`` as its settings; settings without a seed get one from ``random_state``."""
    if isinstance(curvature, str) and curvature == SAMPLED:
        curvature = SampledFisher()
    if random_state is None or not isinstance(curvature, SampledFisher) or curvature.random_state is not None:
        return curvature
    seed = check_random_state(random_state).randint(2**31 - 1)
    return SampledFisher(curvature.n_samples, random_state=random_state if isinstance(random_state, int) else seed)
