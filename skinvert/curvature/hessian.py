"""The Hessian ∇²L of the loss over all the data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from .._telling import warn
from .._validation import must_be
from ..data import Batches
from ..models import TwiceDifferentiable
from ..models.second_derivative import SecondDerivativeError
from ..operators import KroneckerFactors, LinearOperator
from .base import Curvature, Objective, flat_products
from .differences import DifferencedGradient
from .ggn import GGN

__all__ = ["GenericHessian", "Hessian"]


class Hessian(Curvature):
    r"""H = ∇²L(θ), by the derivative of the gradient along each row.

    Indefinite wherever θ is not a minimum. One product costs about one gradient pass over the data.

    Autograd's second derivatives are held against differences of gradients on a few rows. Where a kernel or a custom
    ``autograd.Function`` makes them wrong, a warning names the layers and the products are such differences
    themselves, in float64; where the model does not take float64, it is a ValueError.

    References
    ----------
    Pearlmutter (1994), "Fast exact multiplication by the Hessian", eq. 10.
    """

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

    def graph(self, batch: Any, weights: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the products of Σ wᵢ ∇²sᵢ over one batch."""
        if self.differenced is not None:
            return partial(self.differenced.products, batch, weights)
        model = self.objective.model
        losses = model.per_sample_loss(model.forward(batch), batch)
        gradient = model.gradient_of((losses * weights).sum(), create_graph=True)
        return flat_products(gradient, model.theta)

    def kronecker_factors(
        self, approx: str = "expand", unsupported: str = "error", verbose: int = 0
    ) -> KroneckerFactors:
        """Return the factors of each layer of the GGN: the Hessian has none of its own."""
        return GGN(self.objective).kronecker_factors(approx, unsupported, verbose)

    def psd_companion(self) -> GGN | None:
        """Return the GGN, which is the Hessian without the curvature of the outputs; None where the loss has none."""
        try:
            return GGN(self.objective)
        except (TypeError, ValueError):
            # Outputs that are no tensor, or a loss that is not convex in them.
            return None


class GenericHessian(LinearOperator):
    """The Hessian of a user's own ``TwiceDifferentiable``, from its ``grad`` and ``mvp`` alone.

    Batches count by their rows; with sample weights every row is a batch of its own.

    Parameters
    ----------
    model : TwiceDifferentiable
        ``grad`` is the gradient of the mean loss on a batch.
    batches : Batches
        Batches ``(x, y)``.
    """

    def __init__(self, model: TwiceDifferentiable, batches: Batches) -> None:
        super().__init__(model.num_params, batches.dtype, batches.device)
        self.model, self.batches = model, batches
        self._numpy = model.tensor_type() is np.ndarray
        gradient = sum(share * self._tensor(model.grad(x, y)) for x, y, share in self._parts())
        self.gradient_norm = float(torch.as_tensor(gradient, device=batches.device).norm())
        self.hint = (
            f"The gradient's norm at θ is {self.gradient_norm:.3g} (not a minimum?). Try a larger hessian_perturbation."
        )

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products with the rows of V, batch by batch."""
        product = torch.zeros_like(V)
        for x, y, share in self._parts():
            gradient = self.model.grad(x, y, create_graph=True)
            rows = V.cpu().numpy() if self._numpy else V
            product += share * self._tensor(self.model.mvp(gradient, rows, self.model.parameters))
        return product

    def _parts(self) -> Any:
        total = 0.0
        parts = []
        for batch, weights in self.batches:
            x, y = self._pair(batch)
            if self.batches.sample_weight is None:
                parts.append((x, y, float(len(weights))))
            else:
                parts += [(x[i : i + 1], y[i : i + 1], float(w)) for i, w in enumerate(weights)]
            total += float(weights.sum())
        return [(x, y, share / total) for x, y, share in parts if share]

    def _pair(self, batch: Any) -> tuple[Any, Any]:
        if not isinstance(batch, tuple) or len(batch) != 2:
            raise ValueError(must_be("A batch", "an (x, y) pair", type(batch).__name__))
        x, y = batch
        return (x.cpu().numpy(), y.cpu().numpy()) if self._numpy else (x, y)

    def _tensor(self, value: Any) -> torch.Tensor:
        value = value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        return value.to(self.device, self.dtype)
