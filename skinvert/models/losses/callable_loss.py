"""A user's function of (output, target), as losses of single rows that are held against its own value."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import torch
from torch import nn

from ..._check import must_be
from ..batches import map_tensors
from .base import Loss

__all__ = ["CallableLoss"]

_PARTS = "a mean or a sum of per-sample losses"
_HINT = "Try a torch loss module (its class weights and ignored targets count), or one value per sample."


class CallableLoss(Loss):
    """A callable (output, target), classified once as a mean, a sum or one value per sample.

    The target is whatever the batches hold: a tensor, or a mapping or tuple of tensors with one entry a row. The
    callable alone decides which shapes go together.

    Parameters
    ----------
    function : callable
        Maps outputs and targets of rows to a scalar, or to one value (or row of values) per row.
    """

    mass_weighs = False

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.function = function
        self.kind: str | None = None
        self._takes_vmap = False
        # A row alone is given twice where the callable fails on one: `output.squeeze()` takes its axis away.
        self._copies = 1

    def to(self, dtype: torch.dtype, device: torch.device) -> CallableLoss:
        """Return an unclassified copy; a module's tensors are moved in the copy alone."""
        function = self.function
        if isinstance(function, nn.Module):
            function = copy.deepcopy(function).to(device, dtype)
        return CallableLoss(function)

    def check(self, output: torch.Tensor, target: object) -> None:
        """Raise unless every tensor of the targets has one entry a row; scalars are shared by all rows."""
        tensors = _tensors(target)
        if not tensors:
            raise TypeError(must_be("y", "a tensor, or a mapping or tuple of tensors", type(target).__name__))
        lengths = {len(tensor) for tensor in tensors if tensor.ndim}
        if lengths != {len(output)}:
            got = f"outputs of shape {tuple(output.shape)} and y of shape {_shapes(target)}"
            raise ValueError(must_be("The outputs and y", "of the same length", got))

    def per_sample(self, output: torch.Tensor, target: object) -> torch.Tensor:
        """Return the callable's value on each sample alone."""
        if self.kind == "none":
            return self._each(output, target).reshape(len(output), -1).sum(1)
        if self._takes_vmap:
            return torch.vmap(self._alone)(output, target)
        return torch.stack([self._scalar(output[i : i + 1], _row(target, i)) for i in range(len(output))])

    def mass(self, output: torch.Tensor, target: object) -> torch.Tensor:
        """Return 1 for each sample; the number of elements where the callable returns them all."""
        mass = torch.ones(len(output), dtype=output.dtype, device=output.device)
        if self.kind == "none":
            with torch.no_grad():
                mass *= self._each(output[:1], _row(target, 0)).numel()
        return mass

    def verify(self, output: torch.Tensor, target: object) -> None:
        """Classify the callable by a batch and the same batch doubled; raise where it is neither mean nor sum."""
        self._check_differentiable(output, target)
        with torch.no_grad():
            self._copies = self._copies_of_a_row(output, target)
            once, twice = self._call(output, target), self._repeated(output, target, 2)
            m = len(output)
            if once.ndim and twice.ndim and len(once) == m and len(twice) == 2 * m:
                self.kind = "none"
                self._verify_rows(output, target)
                return
            if once.numel() != 1:
                must = "a scalar, or one value per row"
                raise ValueError(must_be("The loss callable's result", must, f"shape {tuple(once.shape)} of {m} rows"))
            once, twice = once.reshape(()), twice.reshape(())
            alone = self.per_sample(output, target)
            self._takes_vmap = self._try_vmap(output, target, alone)
        for kind, times, rows in (("mean", 1, 1), ("sum", 2, m)):
            each = alone / self._copies if kind == "sum" else alone
            if _close(twice / rows, times * once / rows, each) and _close(once / rows, each.mean(), each):
                self.kind = kind
                if self._has_gradients_of_rows(output, target):
                    return
        self._refuse(output, target, once, twice, alone)

    def __str__(self) -> str:
        return "a callable"

    def verify_values(self, output: torch.Tensor, target: object, losses: torch.Tensor) -> None:
        """Raise unless the callable's own value on the batch is the mean or sum of these."""
        with torch.no_grad():
            if self.kind == "none":
                self._verify_rows(output, target)
                return
            own = self._scalar(output, target)
            own = own / len(output) if self.kind == "sum" else own
        if not _close(own, losses.mean(), losses):
            got = f"a {self.kind} of {own:.6g} a row on {len(output)} rows, {losses.mean():.6g} over single rows"
            raise ValueError(must_be("The loss callable", f"{_PARTS}, on every batch", got, _HINT))

    def _verify_rows(self, output: torch.Tensor, target: object) -> None:
        """Hold the first and the last row of the values against those of the row alone."""
        values = self._each(output, target)
        for i in {0, len(output) - 1}:
            alone = self._each(output[i : i + 1], _row(target, i))
            if alone.shape[1:] != values.shape[1:] or not _all_close(alone[0], values[i]):
                must = "one value per sample, each of its own row"
                got = f"shape {tuple(values.shape)} on {len(output)} rows, another value of row {i} alone"
                hint = f"y of shape {_shapes(target)} against outputs {tuple(output.shape)} may have been broadcast."
                raise ValueError(must_be("The loss callable", must, got, hint))

    def _has_gradients_of_rows(self, output: torch.Tensor, target: object) -> bool:
        """Return whether the gradient is that of the rows' values: weighted ones may have a mean that is the same."""
        f = output.detach().requires_grad_(True)
        with torch.enable_grad():
            whole = self._scalar(f, target)
            rows = self.per_sample(f, target)
            (own,) = torch.autograd.grad(whole, f)
            (expected,) = torch.autograd.grad(rows.sum() if self.kind == "sum" else rows.mean(), f)
        # Not (a > b): of what is not finite more is said elsewhere.
        return not bool((own - expected).norm() > math.sqrt(_tolerance(output)) * expected.norm())

    def _check_differentiable(self, output: torch.Tensor, target: object) -> None:
        kept = [tensor.clone() for tensor in _tensors(target)]
        with torch.enable_grad():
            value = self._call(output.detach().requires_grad_(True), target)
        # NaN equals nothing, itself included.
        pairs = zip(_tensors(target), kept, strict=True)
        if not all(bool(((now == before) | (before != before)).all()) for now, before in pairs):
            # Said first: whatever the values are compared with next would be of other targets.
            raise ValueError(must_be("The loss", "one that leaves its targets as they are", "changed targets"))
        if not value.requires_grad:
            hint = "Its gradient is not recorded (`.detach()`, `torch.no_grad()`, counts, integers?)."
            raise ValueError(must_be("The loss callable", "differentiable in the outputs", "a constant", hint))

    def _refuse(
        self, output: torch.Tensor, target: object, once: torch.Tensor, twice: torch.Tensor, alone: torch.Tensor
    ) -> None:
        with torch.no_grad():
            thrice = self._repeated(output, target, 3).reshape(())
        constant, m = 2 * once - twice, len(output)
        linear = _close(thrice / m, (2 * twice - once) / m, alone) and _close(
            alone.mean(), (once - constant) / m + constant, alone
        )
        got = f"{once:.6g} on a batch, {twice:.6g} on it doubled, {alone.mean():.6g} as the mean of single rows"
        hint = _HINT
        if linear:
            got = f"a sum plus {constant:.6g}, whatever the rows"
            hint = "A penalty in the loss belongs in `weight_decay=`."
        elif _shapes(target) != str(tuple(output.shape)) and (
            # Class labels are of another shape, save against one column: there torch broadcasts.
            output.shape[1:] == (1,) or any(t.is_floating_point() for t in _tensors(target))
        ):
            hint = f"{_HINT} y of shape {_shapes(target)} against outputs {tuple(output.shape)}: is one broadcast?"
        raise ValueError(must_be("The loss callable", _PARTS, got, hint))

    def _call(self, output: torch.Tensor, target: object) -> torch.Tensor:
        try:
            value = self.function(output, target)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, TypeError, ValueError, AssertionError) as error:
            got = f"outputs of shape {tuple(output.shape)} and y of shape {_shapes(target)}"
            raise ValueError(must_be("The loss callable", "a function of (output, target)", got, str(error))) from error
        if not isinstance(value, torch.Tensor):
            raise TypeError(must_be("The loss callable's result", "a tensor", type(value).__name__))
        return value

    def _value(self, output: torch.Tensor, target: object) -> torch.Tensor:
        """Return the callable's value; that of one row by two copies of it where it needs them."""
        if len(output) > 1 or self._copies == 1:
            return self._call(output, target)
        value = self._repeated(output, target, self._copies)
        if self.kind == "none":
            return value[:1]
        return value / self._copies if self.kind == "sum" else value

    def _copies_of_a_row(self, output: torch.Tensor, target: object) -> int:
        if len(output) == 1:
            return 1
        row = output[:1].detach().requires_grad_(True)
        with warnings.catch_warnings(record=True) as told, torch.enable_grad():
            warnings.simplefilter("always")
            try:
                # Of a row without its axis the backward pass may fail where the forward pass does not.
                torch.autograd.grad(self.function(row, _row(target, 0)).sum(), row, allow_unused=True)
            except Exception:
                return 2
        return 2 if told else 1

    def _each(self, output: torch.Tensor, target: object) -> torch.Tensor:
        values = self._value(output, target)
        if not values.ndim or len(values) != len(output):
            must = "one value per row on every batch, as on the first"
            got = f"shape {tuple(values.shape)} of {len(output)} rows"
            raise ValueError(must_be("The loss callable's result", must, got))
        return values

    def _scalar(self, output: torch.Tensor, target: object) -> torch.Tensor:
        value = self._value(output, target)
        if value.numel() != 1:
            must = "a scalar on every batch, as on the first"
            got = f"shape {tuple(value.shape)} of {len(output)} rows"
            raise ValueError(must_be("The loss callable's result", must, got))
        return value.reshape(())

    def _alone(self, output: torch.Tensor, target: object) -> torch.Tensor:
        return self._scalar(output[None], map_tensors(lambda tensor: tensor[None], target))

    def _repeated(self, output: torch.Tensor, target: object, times: int) -> torch.Tensor:
        again = map_tensors(lambda tensor: torch.cat([tensor] * times) if tensor.ndim else tensor, target)
        return self._call(torch.cat([output] * times), again)

    def _try_vmap(self, output: torch.Tensor, target: object, alone: torch.Tensor) -> bool:
        # A callable may branch on values or call `.item()`: then row by row, which always works. So does what torch
        # has no batched rule for, and it warns of each call that it takes apart.
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                same = _all_close(torch.vmap(self._alone)(output, target), alone)
            except Exception:
                return False
        return same and not any("batching rule" in str(warning.message) for warning in told)


def _tolerance(value: torch.Tensor) -> float:
    return 1e-6 if value.dtype == torch.float64 else 1e-4


def _close(a: torch.Tensor, b: torch.Tensor, losses: torch.Tensor) -> bool:
    """Whether two averages of the losses agree, to the rounding of their terms: those of both signs may cancel."""
    scale = float(losses.detach().abs().mean().nan_to_num(0.0, 0.0, 0.0))
    rtol, atol = _tolerances(losses)
    return bool(torch.isclose(a.double(), b.double(), rtol=rtol, atol=atol + rtol * scale, equal_nan=True))


def _all_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    rtol, atol = _tolerances(a)
    return bool(torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True))


def _tolerances(value: torch.Tensor) -> tuple[float, float]:
    return (1e-6, 1e-12) if value.dtype == torch.float64 else (1e-4, 1e-6)


def _tensors(target: object) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(found.append, target)
    return found


def _row(target: object, i: int) -> object:
    return map_tensors(lambda tensor: tensor[i : i + 1] if tensor.ndim else tensor, target)


def _shapes(target: object) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(target))
