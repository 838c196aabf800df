"""L(θ) over all the data, as every curvature needs it: its denominators, its gradient, and what is found on the way."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Self

import numpy as np
import torch

from .._check import all_finite, must_be
from .._progress import progress
from .._types import Array, Batch
from ..data import Batches
from ..models import TorchTwiceDifferentiable, TwiceDifferentiable
from ..parameters import ParameterLayout
from .checks import (
    check_layers,
    check_rows_alone,
    check_rows_without_others,
    explain_not_finite,
    forward_or_tell,
)
from .first_pass import FirstPass
from .loss_values import LossValues
from .per_sample import gradient_rows, split_batch
from .same_model import check_same_model, values_of
from .saved import counted

__all__ = ["GenericObjective", "MeanLoss", "Objective"]

# Up to how many rows, and bytes that a forward pass keeps of them, small batches are joined.
MERGED_ROWS, MERGED_BYTES = 512, 2**26


class MeanLoss:
    r"""L(θ) = Σᵢ wᵢℓᵢ / Σᵢ wᵢ + penalty over all the data.

    Parameters
    ----------
    size : int
        p.
    batches : Batches
        All the data.
    dtype : torch.dtype
        Of θ.
    device : torch.device
        Of θ.

    Attributes
    ----------
    weight_sum : float
        Σ wᵢ.
    gradient : tensor of shape (p,)
        ∇L(θ), penalty included.
    penalty : tensor of shape (p,) or None
        The penalty's Hessian, a diagonal.
    unreached : tuple of str
        Selected parameters that no row's loss depends on.
    penalised : bool
        Whether the penalty is part of it: not of a process's ``share``.
    """

    def __init__(self, size: int, batches: Batches, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.batches, self.dtype, self.device = size, batches, dtype, device
        self.weight_sum = 0.0
        self.gradient = torch.zeros(size, dtype=dtype, device=device)
        self.penalty: torch.Tensor | None = None
        self.penalised = True
        self.unreached: tuple[str, ...] = ()

    @property
    def gradient_norm(self) -> float:
        """‖∇L(θ)‖."""
        return float(self.gradient.norm())

    def share(self) -> Self:
        """Return this process's share of L, over the denominators of all: a penalty is no process's own."""
        part = copy.copy(self)
        part.penalty, part.penalised = None, False
        return part

    def on_samples(self, rows: torch.Tensor) -> Self:
        """Return the objective over m of the n samples, its denominators times m/n; the gradient stays that of all."""
        part = copy.copy(self)
        part.batches = self.batches.take(rows)
        part._scale_denominators(len(rows) / self.batches.n_samples)
        return part

    def in_float64(self) -> MeanLoss | None:
        """Return the same L in float64; None where there is none."""
        return None

    def in_autocast(self, dtype: torch.dtype) -> Self:
        """Return the same L, its denominators and its gradient, with forward passes under ``torch.autocast``."""
        hint = "Its grad and mvp are its own. Subclass TorchTwiceDifferentiable, or leave autocast out."
        raise ValueError(must_be("The model for autocast", "a PyTorch module", "another TwiceDifferentiable", hint))

    @property
    def n_observed(self) -> float:
        """N at φ = 1: what L is multiplied by to be a negative log-likelihood, Σ wᵢ here."""
        return self.weight_sum

    @property
    def eps(self) -> float:
        """The relative rounding of what is computed of θ."""
        return torch.finfo(self.dtype).eps

    def _scale_denominators(self, share: float) -> None:
        self.weight_sum *= share

    def _over_ranks(self, numbers: list[float]) -> list[float]:
        """Sum the gradient, and return the sums of these ``numbers``, over the processes that share the data."""
        if self.batches.shard is None:
            return numbers
        own = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        ranks = self.batches.shard.ranks
        self.gradient, sums = ranks.summed("the loss and gradient", lambda: [self.gradient, own])
        return sums.tolist()


class Objective(MeanLoss):
    r"""L(θ) = Σᵢ wᵢsᵢ / Σᵢ wᵢmᵢ + penalty of a torch model: its denominators and its gradient, by one pass.

    sᵢ is a sample's loss before the average and mᵢ its share of the denominator, so that ℓᵢ = κ sᵢ with
    κ = Σ w / Σ w m, the ``scale``.

    Parameters
    ----------
    model : TorchTwiceDifferentiable
        At a fixed point θ (``at_point``).
    batches : Batches
        All the data.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    weight_sum, mass_sum : float
        Σ wᵢ and Σ wᵢmᵢ.
    loss_sums : tensor of shape (n_batches,)
        Of each batch as it was given, its losses' sum without weights.
    """

    def __init__(self, model: TorchTwiceDifferentiable, batches: Batches, verbose: int = 0) -> None:
        super().__init__(model.num_params, batches, model.dtype, model.device)
        self.model, self.layout, self.verbose = model, model.layout, verbose
        self.mass_sum = 0.0
        check_layers(model)
        own = type(model).settle is not TorchTwiceDifferentiable.settle
        model.settle(batches if batches.shard is None or not own else batches.shard.labelled(batches))
        self._values, self._alone, start = LossValues(model), False, 0
        # Not tensors: a small one after each batch's large ones would keep the memory of these in pieces.
        sums: list[float] = []
        self.first_pass = FirstPass(model)
        for index, (batch, weights) in enumerate(progress(batches, "loss and gradient", verbose)):
            sums.append(self._add(batch, weights, index, slice(start, start + len(weights))))
            start += len(weights)
        self.loss_sums = torch.tensor(sums, dtype=model.dtype, device="cpu")
        if batches.shard is not None:
            self._values.over(batches.shard.ranks)
        self._merge()
        reached = [float(seen) for seen in self.first_pass.reached]
        self.weight_sum, self.mass_sum, *reached = self._over_ranks([self.weight_sum, self.mass_sum, *reached])
        self.unreached = tuple(name for name, seen in zip(model.layout.names, reached, strict=True) if not seen)
        del self._values, self.first_pass
        self._check_joined()
        if not self.mass_sum > 0:
            raise ValueError(must_be("The targets", "valid for at least one weighted row", "all ignored"))
        self.gradient = self.gradient / self.mass_sum
        self.penalty = model.penalty_diagonal()
        if self.penalty is not None:
            self.gradient = self.gradient + model.penalty_gradient()
        if batches.shard is not None:
            check_same_model(batches, values_of(model), self.penalty)
        if not bool(torch.isfinite(self.gradient).all()):
            raise ValueError(
                must_be("The gradient of the loss", "finite", "NaN or infinity", "Look at the parameters.")
            )

    @property
    def scale(self) -> float:
        """κ, with ℓᵢ = κ sᵢ."""
        return self.weight_sum / self.mass_sum

    @property
    def n_observed(self) -> float:
        """N at φ = 1: Σ wᵢmᵢ where labels weigh mᵢ; a mean over the outputs of a row has their number in its φ."""
        loss = self.model.loss
        return self.mass_sum if loss is None or loss.mass_weighs else self.weight_sum

    def losses(self, batch: Batch) -> torch.Tensor:
        """Return ℓᵢ (m,) of a batch's rows, with gradients on."""
        return self.scale * self.model.per_sample_loss(self.model.forward(batch), batch)

    def gradients(self, batch: Batch) -> torch.Tensor:
        """Return gᵢ = ∇ℓᵢ (m, p) of a batch's rows, the penalty left out."""
        rows: torch.Tensor = gradient_rows(self.model, batch)
        return rows if self.scale == 1 else rows.mul_(self.scale)

    def in_float64(self) -> Objective | None:
        """Return L in float64, of the same θ and of the data as they were read here; None where the model takes none.

        Made anew by one pass over the data.
        """
        batch, _ = next(iter(self.batches))
        model = self.model.doubled(batch)
        if model is None:
            return None
        double = Objective(model, self.batches.in_float64())
        return double if self.penalised else double.share()

    def in_autocast(self, dtype: torch.dtype) -> Self:
        """Return the same L, its denominators and its gradient, with forward passes under ``torch.autocast``."""
        part = copy.copy(self)
        part.model = self.model.in_autocast(dtype)
        batch, weights = next(iter(self.batches))
        few, _ = next(split_batch(batch, weights, 8))
        try:
            part.model.gradient_of(part.losses(few).sum())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Of a kernel, or a layer, that has none in this dtype.
            must = f"one that runs in {dtype} on {self.device.type}"
            raise ValueError(must_be("The model for autocast", must, f"{error}", "Leave autocast out.")) from error
        return part

    @property
    def eps(self) -> float:
        """The relative rounding of what is computed of θ."""
        return self.model.eps

    def places(self, names: Collection[str]) -> torch.Tensor:
        """Return where the entries of the named parameters lie in a flat row, in its order."""
        slices = [place for name, place in self.layout.slices.items() if name in names]
        parts = [torch.arange(place.start, place.stop, device="cpu") for place in slices]
        return (torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device="cpu")).to(self.device)

    def restricted(self, names: Collection[str]) -> Objective:
        """Return the objective as a function of some parameters alone, without the penalty."""
        part, model = copy.copy(self), copy.copy(self.model)
        chosen = [k for k, name in enumerate(self.layout.names) if name in names]
        model.theta = [self.model.theta[k] for k in chosen]
        model.layout = ParameterLayout(
            tuple(self.layout.names[k] for k in chosen), tuple(self.layout.shapes[k] for k in chosen)
        )
        part.model, part.layout, part.size, part.penalty = model, model.layout, model.num_params, None
        part.gradient = self.gradient[self.places(names)]
        return part

    def _scale_denominators(self, share: float) -> None:
        super()._scale_denominators(share)
        self.mass_sum *= share

    def _add(self, batch: Batch, weights: torch.Tensor, index: int, rows: slice) -> float:
        """Add a batch to the gradient and the denominators, and return the sum of its losses."""
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
        # Of a loss by `where` the gradient may be finite where the loss is not.
        if not (all_finite(gradient) and all_finite(losses.detach())):
            raise ValueError(explain_not_finite(self.model, batch, index, rows))
        self.gradient += gradient
        self.weight_sum += float(weights.sum())
        self.mass_sum += float((weights * self.model.mass(outputs, batch)).sum())
        # Last: the graph of the whole batch is no longer held.
        check_rows_without_others(self.model, outputs, batch, index, rows.start)
        return float(losses.detach().sum())

    def _merge(self) -> None:
        """Join batches that are too small for fast products: each row was found to be alone."""
        if self.batches.fixed or self.batches.kept is None or len(self.batches.kept) < 2:
            return
        batch, weights = next(iter(self.batches))
        if 2 * len(weights) <= MERGED_ROWS:
            # Not `losses`: their scale is of all processes' rows, and here there may be no weighted one.
            _, nbytes = counted(lambda: self.model.per_sample_loss(self.model.forward(batch), batch))
            self.batches = self.batches.merged(min(MERGED_ROWS, MERGED_BYTES * len(weights) // max(1, nbytes)))

    def _check_joined(self) -> None:
        """Check batches of one row each, of which a method may make larger ones."""
        if self._alone or self.batches.n_samples < 2 or self.batches.kept is None:
            return
        batch, weights = next(iter(self.batches.take(torch.tensor([0, self.batches.n_samples - 1], device="cpu"))))
        if len(weights) > 1:
            check_rows_alone(self.model, forward_or_tell(self.model, batch), batch)


class GenericObjective(MeanLoss):
    """L(θ) of a user's own ``TwiceDifferentiable``, from its ``grad`` alone, the mean over a batch's rows.

    Parameters
    ----------
    model : TwiceDifferentiable
        ``grad`` is the gradient of the mean loss on a batch.
    batches : Batches
        Batches ``(x, y)``.
    """

    def __init__(self, model: TwiceDifferentiable, batches: Batches) -> None:
        super().__init__(model.num_params, batches, batches.dtype, batches.device)
        self.model = model
        self.reads_arrays = model.tensor_type() is np.ndarray
        for batch, weights in batches:
            self.weight_sum += float(weights.sum())
            for x, y, weight in self.parts(batch, weights):
                self.gradient += weight * self.tensor(model.grad(x, y))
        (self.weight_sum,) = self._over_ranks([self.weight_sum])
        self.gradient /= self.weight_sum
        if batches.shard is not None:
            check_same_model(batches, self._values)

    def parts(self, batch: Batch, weights: torch.Tensor) -> Iterator[tuple[Array, Array, float]]:
        """Yield (x, y, Σ wᵢ) in the model's own type of array, what weighs nothing left out.

        A batch of equal weights is yielded as it is, another one row by row.
        """
        if not isinstance(batch, tuple) or len(batch) != 2:
            raise ValueError(must_be("A batch", "an (x, y) pair", type(batch).__name__))
        x, y = (self.own(part) for part in batch)
        if bool((weights == weights[0]).all()):
            rows = [(x, y, float(weights.sum()))]
        else:
            rows = [(x[i : i + 1], y[i : i + 1], float(weight)) for i, weight in enumerate(weights)]
        yield from (row for row in rows if row[2])

    def _values(self, batch: Batch) -> dict[str, torch.Tensor]:
        x, y = (self.own(part) for part in batch)
        return {"gradient": self.tensor(self.model.grad(x, y)).norm()}

    def own(self, tensor: torch.Tensor) -> Array:
        """Return a tensor in the model's own type of array."""
        return tensor.cpu().numpy() if self.reads_arrays else tensor

    def tensor(self, value: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Return what the model computed as a tensor of the objective's dtype and device."""
        value = value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        return value.to(self.device, self.dtype)
