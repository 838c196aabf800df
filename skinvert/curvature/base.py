"""What every curvature shares: the objective over all the data, and graphs that are kept while they fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .._memory import working_memory
from .._progress import progress
from .._validation import must_be
from ..data import Batches
from ..models import TorchTwiceDifferentiable
from ..operators import LinearOperator
from .checks import (
    check_layers,
    check_rows_alone,
    check_rows_without_others,
    explain_not_finite,
    forward_or_tell,
)
from .first_pass import FirstPass
from .loss_values import LossValues

__all__ = ["Curvature", "Objective"]


class Objective:
    r"""L(θ) = Σᵢ wᵢsᵢ / Σᵢ wᵢmᵢ + penalty over all the data: its denominators and its gradient, by one pass.

    sᵢ is a sample's loss before the average and mᵢ its share of the denominator, so that ℓᵢ = κ sᵢ with
    κ = Σ w / Σ w m, the ``scale``.

    Parameters
    ----------
    model : TorchTwiceDifferentiable
        At a fixed point θ (``at_point``).
    batches : Batches
        All the data.

    Attributes
    ----------
    weight_sum, mass_sum : float
        Σ wᵢ and Σ wᵢmᵢ.
    gradient : tensor of shape (p,)
        ∇L(θ), penalty included.
    unreached : list of str
        Selected parameters that no row's loss depends on.
    """

    def __init__(self, model: TorchTwiceDifferentiable, batches: Batches, verbose: int = 0) -> None:
        self.model, self.batches, self.verbose = model, batches, verbose
        self.layout, self.dtype, self.device = model.layout, model.dtype, model.device
        self.weight_sum = self.mass_sum = 0.0
        check_layers(model)
        model.settle(batches)
        self.gradient = torch.zeros(model.num_params, dtype=model.dtype, device=model.device)
        self._values, self._alone, start = LossValues(model), False, 0
        self.first_pass = FirstPass(model)
        for index, (batch, weights) in enumerate(progress(batches, "loss and gradient", verbose)):
            self._add(batch, weights, index, slice(start, start + len(weights)))
            start += len(weights)
        self.unreached = self.first_pass.unreached
        del self._values, self.first_pass
        self._check_joined()
        if not self.mass_sum > 0:
            raise ValueError(must_be("The targets", "valid for at least one weighted row", "all ignored"))
        self.gradient = self.gradient / self.mass_sum
        if self.penalty is not None:
            self.gradient = self.gradient + model.penalty_gradient()
        if not bool(torch.isfinite(self.gradient).all()):
            raise ValueError(
                must_be("The gradient of the loss", "finite", "NaN or infinity", "Look at the parameters.")
            )

    @property
    def scale(self) -> float:
        """κ, with ℓᵢ = κ sᵢ."""
        return self.weight_sum / self.mass_sum

    @property
    def penalty(self) -> torch.Tensor | None:
        """The penalty's Hessian as a diagonal (p,), or None."""
        return self.model.penalty_diagonal()

    @property
    def gradient_norm(self) -> float:
        """‖∇L(θ)‖."""
        return float(self.gradient.norm())

    def on_samples(self, rows: torch.Tensor) -> Objective:
        """Return the objective over m of the n samples, its denominators times m/n; the gradient stays that of all."""
        part = copy.copy(self)
        share = len(rows) / self.batches.n_samples
        part.batches = self.batches.take(rows)
        part.weight_sum, part.mass_sum = share * self.weight_sum, share * self.mass_sum
        return part

    def _add(self, batch: Any, weights: torch.Tensor, index: int, rows: slice) -> None:
        outputs = forward_or_tell(self.first_pass, batch)
        if not self._alone and len(weights) > 1:
            check_rows_alone(self.model, outputs, batch)
            self._alone = True
        losses = self.first_pass.losses(outputs, batch)
        if losses.shape != weights.shape:
            must = f"of shape {tuple(weights.shape)}, one per row of the batch"
            raise ValueError(must_be("The per-sample losses", must, f"shape {tuple(losses.shape)}"))
        self._values.add(outputs, batch, losses)
        gradient = self.first_pass.gradient((losses * weights).sum())
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError(explain_not_finite(self.model, batch, index, rows))
        self.gradient += gradient
        self.weight_sum += float(weights.sum())
        self.mass_sum += float((weights * self.model.mass(outputs, batch)).sum())
        # Last: the graph of the whole batch is no longer held.
        check_rows_without_others(self.model, outputs, batch, index, rows.start)

    def _check_joined(self) -> None:
        """Check batches of one row each, of which a method may make larger ones."""
        if self._alone or self.batches.n_samples < 2 or self.batches.kept is None:
            return
        batch, weights = next(iter(self.batches.take(torch.tensor([0, self.batches.n_samples - 1], device="cpu"))))
        if len(weights) > 1:
            check_rows_alone(self.model, forward_or_tell(self.model, batch), batch)


class Curvature(LinearOperator):
    """A curvature of an objective, as a symmetric operator on rows.

    Subclasses define ``graph(batch, weights)``: a function that maps rows (k, p) to a batch's share of the products.
    It is kept for every batch while all of them fit scikit-learn's ``working_memory``, and made anew otherwise; the
    products are the same.

    Parameters
    ----------
    objective : Objective
        Model, data and denominators.
    """

    _transient: tuple[str, ...] = ("_graphs",)

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective.layout.num_params, objective.dtype, objective.device)
        self.objective = objective
        self._graphs: list[Callable[[torch.Tensor], torch.Tensor]] | None = None
        self.hint = (
            f"The gradient's norm at θ is {objective.gradient_norm:.3g} (not a minimum?). "
            'Try curvature="ggn", which is positive semi-definite.'
        )

    @property
    def penalty(self) -> torch.Tensor | None:  # type: ignore[override]
        """The penalty's Hessian as a diagonal (p,), or None."""
        return self.objective.penalty

    @property
    def gradient_norm(self) -> float:
        """‖∇L(θ)‖."""
        return self.objective.gradient_norm

    def graph(self, batch: Any, weights: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function that gives a batch's share of the products, before the division by Σ w m."""
        raise NotImplementedError

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products with the rows of V (k, p), summed over all batches, plus the penalty's."""
        product = torch.zeros_like(V)
        for share in self._shares():
            product += share(V)
        product /= self.objective.mass_sum
        return product if self.penalty is None else product.addcmul_(V, self.penalty)

    @property
    def n_samples(self) -> int:
        """Number n of samples."""
        return self.objective.batches.n_samples

    def minibatch(self, rows: torch.Tensor) -> LinearOperator:
        """Return an unbiased estimate of the curvature from the samples ``rows`` (m,), a tensor of indices.

        It is (n/m) Σ over these samples, with the denominator of all of them and the whole penalty; so its mean over
        samples drawn uniformly is the curvature, sample weights included.
        """
        # Not `copy.copy`, which goes by the state of a pickle: all on the CPU.
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part.objective = self.objective.on_samples(rows)
        for name in self._transient:
            setattr(part, name, None)
        return part

    def _shares(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        if self._graphs is not None:
            yield from self._graphs
            return
        kept: list[Callable[[torch.Tensor], torch.Tensor]] = []
        keep: bool | None = None
        for batch, weights in self.objective.batches:
            if keep is None:
                share, size = _measured(lambda: self.graph(batch, weights))  # noqa: B023 (called at once)
                # What it holds beside what autograd saves.
                size += getattr(share, "nbytes", 0)
                keep = size * self.objective.batches.n_samples / len(weights) <= working_memory()
            else:
                share = self.graph(batch, weights)
            if keep:
                kept.append(share)
            yield share
        if keep:
            self._graphs = kept


def _measured(build: Callable[[], Any]) -> tuple[Any, int]:
    """Return what ``build`` returns, and the bytes that its graph saves."""
    sizes: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.coalesce().values().nbytes if tensor.layout == torch.sparse_coo else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        built = build()
    return built, sum(sizes)


def flat_products(value: torch.Tensor, variables: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that differentiates ``value`` along each row of V: (k, numel) -> (k, p).

    Row by row over one kept graph, which works for every network; on an accelerator in batches of rows, where the
    network allows it.
    """
    if not value.requires_grad:
        size = sum(t.numel() for t in variables)
        return lambda V: V.new_zeros(len(V), size)
    return _FlatProducts(value, variables)


class _FlatProducts:
    def __init__(self, value: torch.Tensor, variables: list[torch.Tensor]) -> None:
        self.value, self.variables = value, variables
        self.batched = value.device.type != "cpu"
        # Numbers of rows at which a batch was found right: a batching rule may be wrong for one of them alone.
        self.sound: set[int] = set()

    def __call__(self, V: torch.Tensor) -> torch.Tensor:
        if self.batched and len(V) > 1:
            try:
                parts = [self._grad(rows, True) for rows in V.split(64)]
                self.batched = all(self._agree(rows, part) for rows, part in zip(V.split(64), parts, strict=True))
            except RuntimeError:
                # Some layers have no batching rule.
                self.batched = False
            if self.batched:
                return torch.cat(parts)
        return torch.stack([self._grad(v, False) for v in V]) if len(V) else self._empty(V)

    def _agree(self, V: torch.Tensor, products: torch.Tensor) -> bool:
        """Return whether a random mixture of the products is that of the mixture."""
        if len(V) in self.sound:
            return True
        generator = torch.Generator("cpu").manual_seed(0)
        mixture = torch.randn(len(V), generator=generator, dtype=torch.float64, device="cpu").to(V)
        error = (mixture @ products - self._grad(mixture @ V, False)).norm()
        size = (mixture * products.norm(dim=1)).norm()
        if not bool(error <= math.sqrt(torch.finfo(V.dtype).eps) * size):
            return False
        self.sound.add(len(V))
        return True

    def _grad(self, v: torch.Tensor, batched: bool) -> torch.Tensor:
        lead = v.shape[:-1]
        parts = torch.autograd.grad(
            self.value,
            self.variables,
            v.reshape(*lead, *self.value.shape),
            retain_graph=True,
            is_grads_batched=batched,
            allow_unused=True,
        )
        flat = [
            v.new_zeros(*lead, variable.numel()) if part is None else part.reshape(*lead, -1)
            for part, variable in zip(parts, self.variables, strict=True)
        ]
        return torch.cat(flat, dim=-1).detach()

    def _empty(self, V: torch.Tensor) -> torch.Tensor:
        return V.new_zeros(0, sum(variable.numel() for variable in self.variables))
