"""A curvature by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from glob import escape

import torch

from .._autograd import ordinary
from .._validation import check_choice, must_be
from ..block_operators import BlockDiagonal
from ..data import Batches
from ..models import TorchTwiceDifferentiable, TwiceDifferentiable
from ..operators import LinearOperator
from .base import Objective
from .fisher import EmpiricalFisher, Fisher, SampledFisher
from .ggn import GGN
from .hessian import GenericHessian, Hessian

__all__ = ["CURVATURES", "build_blocks", "build_curvature", "curvature_name"]

CURVATURES = {"hessian": Hessian, "ggn": GGN, "fisher": Fisher, "empirical_fisher": EmpiricalFisher}


@ordinary
def build_curvature(
    curvature: str | SampledFisher, model: TwiceDifferentiable, batches: Batches, verbose: int = 0
) -> LinearOperator:
    """Return the curvature, given by name or by its settings, of a model at a fixed point over all the data."""
    name = curvature_name(curvature)
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
        operators.append(build_curvature(curvature, part, batches, verbose))
        indices.append(torch.cat([torch.arange(places[name].start, places[name].stop, device="cpu") for name in names]))
    return BlockDiagonal(operators, indices)


def curvature_name(curvature: str | SampledFisher) -> str:
    """Return the name of a curvature that is given by name or by its settings."""
    if isinstance(curvature, SampledFisher):
        return "fisher"
    return check_choice(curvature, "curvature", CURVATURES, "A SampledFisher is taken too.")
