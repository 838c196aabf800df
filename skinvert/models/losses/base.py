"""What a loss is here: of each sample a numerator, and a share of the denominator."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import nn

from ..._check import must_be
from ..batches import doubled, first_rows, map_tensors
from .output_hessians import OutputHessian, explains, explains_differences
from .predictive import Predictive

__all__ = ["Loss", "Outputs", "check_same_length", "check_same_shape", "check_unit_interval"]


Outputs = Literal["logits", "log_probabilities", "probabilities"]


class Loss(ABC):
    r"""L = Σᵢ wᵢ sᵢ / Σᵢ wᵢ mᵢ over all the data: of each sample its numerator sᵢ and its share mᵢ of the denominator.

    Subclass it for a loss of your own, and give an instance as ``loss=``, or a name by ``register_loss``. It needs
    ``per_sample`` alone, in torch and differentiable in the outputs: each curvature and each method follow. The rest
    has defaults, to override where they are not right:

    ==================  ============================================================================================
    ``mass``            mᵢ = 1: L is the mean of the sᵢ
    ``mass_weighs``     True: mᵢ is what row i weighs in a likelihood; False: how many outputs of a row L averages
    ``check``           y is a tensor of as many rows as the outputs; floats have the shape of the outputs
    ``output_hessian``  None: the GGN differentiates ``per_sample`` twice, output by output
    ``predictive``      None: no likelihood; ``curvature="fisher"`` says which losses are one
    ``to``              tensors and modules among the attributes are moved, in a copy
    ==================  ============================================================================================

    What cannot be right is told in ``fit``: a row's value that depends on the other rows, or that no gradient comes
    from; an ``output_hessian`` that is another than that of ``per_sample``.

    Examples
    --------
    The second derivative of log-cosh in an output is 1 − tanh²(f − y).

    >>> class LogCosh(Loss):
    ...     def per_sample(self, output, target):
    ...         return (output - target).cosh().log().sum(1)
    ...
    ...     def output_hessian(self, output, target):
    ...         return DiagonalHessian(1 - (output - target).tanh() ** 2)

    So the Hessian of a line through two points that it meets is XᵀX / n.

    >>> from skinvert import HessianInverter
    >>> from skinvert.models import DiagonalHessian
    >>> net, X = nn.Linear(2, 1, bias=False), torch.eye(2)
    >>> inverter = HessianInverter("direct", 1.0, loss=LogCosh(), curvature="ggn").fit(net, (X, net(X).detach()))
    >>> inverter.curvature_.to_dense().tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """

    # Whether sᵢ is a multiple of the sum of squares of residuals f − y.
    squares_residuals: ClassVar[bool] = False
    # Whether mᵢ is what sample i weighs in a likelihood, as labels do; else how many of its outputs L is a mean over.
    mass_weighs: bool = True

    @abstractmethod
    def per_sample(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return sᵢ (m,) of outputs (m, ...) and targets (m, ...), each of its own row alone."""

    def mass(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return mᵢ (m,) ≥ 0, which no parameter may change."""
        return torch.ones(len(output), dtype=output.dtype, device=output.device)

    def check(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise unless the targets fit the outputs; called on every batch, before the loss."""
        check_same_length(output, target)
        # Integers may be class indices, save against one column: there torch would broadcast.
        if target.is_floating_point() or output.shape == (*target.shape, 1):
            check_same_shape(output, target)

    def output_hessian(self, output: torch.Tensor, target: torch.Tensor) -> OutputHessian | None:
        """Return ∇²_f sᵢ, positive semi-definite, in closed form, or None where there is none."""
        return None

    def predictive(self, output: torch.Tensor, target: torch.Tensor) -> Predictive | None:
        """Return the labels that the outputs predict, where sᵢ is their negative log-likelihood; else None.

        The targets say only what their rows weigh: which are ignored, and the class weights.
        """
        return None

    @property
    def takes(self) -> Outputs:
        """What the outputs are, where they are of classes: the margin asks."""
        return "logits"

    def to(self, dtype: torch.dtype, device: torch.device) -> Loss:
        """Return the loss with its tensors and modules in ``dtype`` on ``device``; the user's keeps its own."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                vars(moved)[name] = value.to(device, dtype if value.is_floating_point() else None)
            elif isinstance(value, nn.Module):
                vars(moved)[name] = copy.deepcopy(value).to(device, dtype)
        return moved

    def verify(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise unless sᵢ has a gradient and the second derivative that ``output_hessian`` says; called once."""
        f, y = first_rows((output.detach(), target))
        with torch.enable_grad():
            losses = self.per_sample(f.requires_grad_(True), y)
        self._check_values(losses, len(f))
        if not losses.requires_grad:
            hint = "Its gradient is not recorded (`.detach()`, `torch.no_grad()`, numpy?)."
            raise ValueError(must_be(f"{self._name}.per_sample", "differentiable in the outputs", "a constant", hint))
        self._verify_closed_form(f.detach(), y)

    def verify_values(self, output: torch.Tensor, target: torch.Tensor, losses: torch.Tensor) -> None:
        """Raise unless these sᵢ are those of each row alone; called on every batch of the training data."""
        self._check_values(losses, len(output))
        # Together once more: these may be of rows of several batches.
        with torch.no_grad():
            together = self.per_sample(output, target)
        for i in {0, len(output) - 1}:
            row = map_tensors(lambda tensor, i=i: tensor[i : i + 1] if tensor.ndim else tensor, (output, target))
            with torch.no_grad():
                alone = self.per_sample(*row)[0]
            for value in (losses[i], together[i]):
                if not torch.isclose(alone, value, rtol=1e-3, atol=1e-6, equal_nan=True):
                    got = f"{value:.6g} for row {i} among {len(losses)}, {alone:.6g} for it alone"
                    raise ValueError(must_be(f"{self._name}.per_sample", "of each row alone", got))

    @classmethod
    def has_predictive(cls) -> bool:
        """Return whether losses of this class are negative log-likelihoods."""
        return cls.predictive is not Loss.predictive

    def __str__(self) -> str:
        return f"a {self._name}"

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _verify_closed_form(self, f: torch.Tensor, y: torch.Tensor) -> None:
        closed = self.output_hessian(f, y)
        if closed is None:
            return
        if (closed.rows, closed.outputs) != (len(f), f[0].numel()):
            must, got = f"of {len(f)} rows and {f[0].numel()} outputs", f"{closed.rows} and {closed.outputs}"
            raise ValueError(must_be(f"{self._name}.output_hessian", must, got))
        if not self._has_second_derivative(closed, f, y):
            must = "the second derivative of `per_sample`, and that convex in the outputs"
            hint = "Without it autograd finds the second derivative."
            raise ValueError(must_be(f"{self._name}.output_hessian", must, "another", hint))

    def _has_second_derivative(self, closed: OutputHessian, f: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether a closed form is autograd's or, where that has first derivatives alone, that of differences."""
        try:
            if explains(closed, self.per_sample, f, y):
                return True
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError):
            pass
        f, y = doubled((f, y))
        double = self.to(torch.float64, f.device)
        closed_in_double = double.output_hessian(f, y)
        return closed_in_double is not None and explains_differences(closed_in_double, double.per_sample, f, y)

    def _check_values(self, losses: torch.Tensor, m: int) -> None:
        if not isinstance(losses, torch.Tensor):
            raise TypeError(must_be(f"What {self._name}.per_sample returns", "a tensor", type(losses).__name__))
        if losses.shape != (m,):
            must, got = "one value per row", f"shape {tuple(losses.shape)} of {m} rows"
            raise ValueError(must_be(f"What {self._name}.per_sample returns", must, got, "Try `.flatten(1).sum(1)`."))


def check_same_length(output: torch.Tensor, target: object) -> None:
    """Raise unless the target is a tensor with one entry a row."""
    if not isinstance(target, torch.Tensor):
        hint = "A callable loss (output, target) takes mappings and tuples of tensors too."
        raise TypeError(must_be("y", "a tensor or an array", type(target).__name__, hint))
    if target.ndim == 0 or len(output) != len(target):
        got = f"outputs of shape {tuple(output.shape)} and y of shape {tuple(target.shape)}"
        raise ValueError(must_be("The outputs and y", "of the same length", got))


def check_same_shape(output: torch.Tensor, target: torch.Tensor) -> None:
    """Raise unless the target has the shape of the outputs."""
    if output.shape != target.shape:
        hint = "Try `y.reshape(-1, 1)`." if target.ndim < output.ndim else "Try `y.ravel()`, or reshape the outputs."
        got = f"y of shape {tuple(target.shape)} against outputs of shape {tuple(output.shape)}"
        raise ValueError(must_be("y", "of the shape of the outputs, never broadcast", got, hint))


def check_unit_interval(output: torch.Tensor, target: torch.Tensor) -> None:
    """Raise unless the targets, as numbers, are probabilities."""
    y = target.to(output.dtype)
    if y.numel() and (y.min() < 0 or y.max() > 1):
        raise ValueError(must_be("y", "in the range [0, 1]", f"values from {y.min():.3g} to {y.max():.3g}"))
