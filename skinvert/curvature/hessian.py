"""The Hessian ∇²L of the loss over all the data."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch

from .._check import must_be
from .._checkpoint import NOWHERE, Checkpoint
from .._storage import HERE, Storage
from .._telling import warn
from .._types import Batch
from ..models.second_derivative import SecondDerivativeError
from ..operators import KroneckerFactors, add_to_diagonal
from .base import Curvature
from .differences import DifferencedGradient
from .fisher import gauss_newton
from .ggn import GGN
from .layers import agrees, agrees_at_some, hessian_diagonal_from_layers, hessian_from_layers
from .objective import GenericObjective, Objective
from .products import Products, Share, flat_products, is_faster, recorded_products
from .tangents import recorded

__all__ = ["GenericHessian", "Hessian"]


class Hessian(Curvature):
    r"""H = ∇²L(θ), by the derivative of the gradient along each row.

    Indefinite wherever θ is not a minimum. One product costs about one gradient pass over the data, and about half of
    one each for many rows at once. Where each layer sees one row a sample the matrix costs n p², and the diagonal a
    third of a product at most for each entry of the layers' results; else both cost p products.

    Autograd's second derivatives are held against differences of gradients on a few rows. Where a kernel or a custom
    ``autograd.Function`` makes them wrong, a warning names the layers and the products are such differences
    themselves, in float64; where the model does not take float64, it is a ValueError.

    References
    ----------
    Pearlmutter (1994), "Fast exact multiplication by the Hessian", eq. 10.
    """

    name: ClassVar[str] = "hessian"
    objective: Objective

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self.differenced: DifferencedGradient | None = None
        batch, _ = next(iter(objective.batches))
        try:
            objective.model.verify_second_derivative(batch)
        except SecondDerivativeError as error:
            double = objective.model.in_float64(batch)
            if double is None:
                raise
            self.differenced = DifferencedGradient(double)
            warn(
                f"{error} Products with the Hessian are differences of gradients in float64 instead, two gradient "
                "passes a row.",
                UserWarning,
            )

    def graph(self, batch: Batch, weights: torch.Tensor) -> Products:
        """Return the products of Σ wᵢ ∇²ℓᵢ over one batch."""
        if self.differenced is not None:
            return partial(self.differenced.products, batch, self.objective.scale * weights)
        model, losses = self.objective.model, self.objective.losses(batch)
        gradient = model.gradient_of((losses * weights).sum(), create_graph=True)
        return flat_products(gradient, model.theta, model.eps)

    def share(self, batch: Batch, weights: torch.Tensor, many: bool) -> Products:
        """Return the products by the operations of the gradient, where they have rules; else ``graph``."""
        if not many or not self._has_rules or self.differenced is not None:
            return self.graph(batch, weights)
        model = self.objective.model
        record, gradient = recorded(
            lambda: model.gradient_of((self.objective.losses(batch) * weights).sum(), create_graph=True)
        )
        products = flat_products(gradient, model.theta)
        name, proven = self._known(batch)
        program = recorded_products(record, model.theta, gradient, products, model.theta, proven)
        if program is not None and not proven and not is_faster(program, products):
            program = None
        self._has_rules = program is not None
        if program is None:
            # Not the graph that was recorded: there some operations take ways that fail, as a determinant its SVD.
            return self.graph(batch, weights)
        self._proven.add(name)
        return Share(program, program.nbytes, alone=True)

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (p, p): from the layers where each sees one row a sample, else by p products."""
        model = self.objective.model
        layered = self.differenced is None and model.autocast is None
        matrix = hessian_from_layers(self.objective, verbose) if layered else None
        if matrix is None or not agrees(self, matrix, model.eps):
            return super().to_dense(verbose)
        return add_to_diagonal(matrix, self.penalty)

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal (p,): from the layers where each sees one row a sample, else by p products."""
        layered = self.differenced is None and self.objective.model.autocast is None
        found = hessian_diagonal_from_layers(self.objective) if layered else None
        sizes = [t.numel() for t in self.objective.model.theta]
        if found is None or not agrees_at_some(self, found, sizes):
            return super().diagonal()
        return found if self.penalty is None else found + self.penalty

    @property
    def has_own_diagonal(self) -> bool:
        """Whether there is one without p products for certain: what layers see is known only once it is made."""
        return False

    @property
    def lower_bound(self) -> float:
        """The least penalty where outputs are affine in θ and the loss convex in them; NaN where that is not known."""
        model, (batch, _) = self.objective.model, next(iter(self.objective.batches))
        # A closed form is positive semi-definite by its contract.
        if not model.affine or model.output_hessian(model.forward(batch).detach(), batch) is None:
            return math.nan
        return 0.0 if self.penalty is None else float(self.penalty.min()) * (1 - torch.finfo(self.dtype).eps)

    def in_float64(self) -> Curvature | None:
        """Return the Hessian in float64; None where its products are differences, right to some nine digits."""
        return None if self.differenced is not None else super().in_float64()

    def in_autocast(self, dtype: torch.dtype) -> Curvature:
        """Return the Hessian of passes under ``torch.autocast``; ValueError where autograd's is not right."""
        if self.differenced is not None:
            hint = "Its products are differences of gradients in float64. Leave autocast out."
            raise ValueError(must_be("The model for autocast", "one with second derivatives by autograd", "none", hint))
        return super().in_autocast(dtype)

    def kronecker_factors(
        self,
        approx: str = "expand",
        unsupported: str = "error",
        verbose: int = 0,
        checkpoint: Checkpoint = NOWHERE,
        storage: Storage = HERE,
    ) -> KroneckerFactors:
        """Return the factors of each layer of the GGN: the Hessian has none of its own."""
        return gauss_newton(self.objective).kronecker_factors(approx, unsupported, verbose, checkpoint, storage)

    def psd_companion(self) -> GGN | None:
        """Return the GGN, which is the Hessian without the curvature of the outputs; None where the loss has none."""
        try:
            return gauss_newton(self.objective)
        except (TypeError, ValueError):
            # Outputs that are no tensor, or a loss that is not convex in them.
            return None


class GenericHessian(Curvature):
    """The Hessian of a user's own ``TwiceDifferentiable``, from its ``grad`` and ``mvp`` alone.

    Batches count by their rows; with sample weights every row is a batch of its own.

    Parameters
    ----------
    objective : GenericObjective
        Model and data.
    """

    name: ClassVar[str] = "hessian"
    advice: ClassVar[str] = "Try a larger hessian_perturbation."
    objective: GenericObjective

    def __init__(self, objective: GenericObjective) -> None:
        super().__init__(objective)

    def graph(self, batch: Batch, weights: torch.Tensor) -> Products:
        """Return the products over one batch; the gradient's graph is the user's, and made anew for each."""
        objective, model = self.objective, self.objective.model

        def products(V: torch.Tensor) -> torch.Tensor:
            total, rows = torch.zeros_like(V), objective.own(V)
            for x, y, weight in objective.parts(batch, weights):
                gradient = model.grad(x, y, create_graph=True)
                total += weight * objective.tensor(model.mvp(gradient, rows, model.parameters))
            return total

        return products
