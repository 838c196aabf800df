"""A PyTorch module and a loss as a ``TwiceDifferentiable``; the seam for models that are not ``loss(model(x), y)``."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._autograd import ordinary, own_tensor
from .._progress import progress as progress_bar
from .._validation import check_number, must_be, resolve_device, resolve_dtype
from ..parameters import ParameterLayout, select_parameters
from .base import TwiceDifferentiable
from .losses import Loss, as_loss
from .plain_functions import PlainFunctions
from .second_derivative import check_loss_derivative, check_second_derivative
from .structural_copy import structural_copy

__all__ = ["TorchTwiceDifferentiable", "leading_length", "map_tensors"]


class TorchTwiceDifferentiable(TwiceDifferentiable):
    r"""L(θ) = Σᵢ wᵢℓᵢ / Σᵢ wᵢ + ½ μ‖θ‖² of a PyTorch module.

    The model is used in eval mode through a structural copy that shares its tensors: nothing of the user's changes.

    To serve a model that is not ``loss(model(x), y)``, override ``outputs`` and ``per_sample_loss``; every curvature
    and every method follow.

    Parameters
    ----------
    model : torch.nn.Module
        A trained model.
    loss : str, torch loss module, callable or None
        ``"cross_entropy"``, ``"mse"``, ``"bce_with_logits"``, ``"nll"``, ``"huber"``, ``"poisson_nll"``; a torch loss
        module with its own ``reduction``; a callable (output, target) that is a mean or a sum over rows. None only in
        a subclass that overrides ``per_sample_loss``.
    weight_decay : float, default=0.0
        μ ≥ 0 of ½ μ‖θ‖².

    Examples
    --------
    The Hessian of least squares is 2 XᵀX / n, which torch's ``mse`` does not halve.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> model = TorchTwiceDifferentiable(net, "mse", weight_decay=0.5)
    >>> model.hessian(torch.eye(2), torch.zeros(2, 1)).tolist()
    [[1.5, 0.0], [0.0, 1.5]]
    """

    @ordinary
    def __init__(self, model: nn.Module, loss: Any, weight_decay: float = 0.0) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(must_be("model", "a torch.nn.Module", type(model).__name__))
        self.model, self.weight_decay = model, check_number(weight_decay, "weight_decay", low=0.0)
        self.loss: Loss | None = None if loss is None and self._own_loss() else as_loss(loss)
        self.module = structural_copy(model)
        self._verified = False
        # Which shapes of batches `curvature.rows` may differentiate all at once: what it found.
        self.batched_rows: dict[Any, bool] = {}
        # `at_point` raises where none is trainable and none is chosen by name.
        trainable = [name for name, tensor in self.module.named_parameters() if tensor.requires_grad]
        if any(tensor.is_inference() for tensor in [*self.module.parameters(), *self.module.buffers()]):
            _convert(self.module, set(trainable), None, None)
        self._select(trainable)

    # -- the seam --------------------------------------------------------------------------------------------------

    def outputs(self, module: nn.Module, batch: Any) -> Any:
        """Return the outputs of ``module`` (eval mode) on a batch: by default ``module(x)`` of ``(x, y)``."""
        x = batch[0]
        return module(**x) if isinstance(x, Mapping) else module(x)

    def per_sample_loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """Return the losses (m,) of a batch's rows, before any average."""
        return self._loss().per_sample(outputs, batch[1])

    # -- TwiceDifferentiable ---------------------------------------------------------------------------------------

    @property
    def num_params(self) -> int:
        """Number p of selected parameters."""
        return self.layout.num_params

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The selected parameters θ."""
        return self.theta

    @ordinary
    def grad(self, x: Any, y: Any, create_graph: bool = False) -> torch.Tensor:
        """Return the gradient (p,) of L on one batch."""
        batch = map_tensors(own_tensor, (x, y))
        outputs = self.forward(batch)
        mean = self.per_sample_loss(outputs, batch).sum() / self.mass(outputs, batch).sum()
        gradient = self.gradient_of(mean, create_graph)
        penalty = self.penalty_diagonal()
        if penalty is None:
            return gradient
        theta = torch.cat([t.reshape(-1) for t in self.theta])
        return gradient + penalty * (theta if create_graph else theta.detach())

    @ordinary
    def hessian(self, x: Any, y: Any) -> torch.Tensor:
        """Return the Hessian (p, p) of L on one batch."""
        if type(self).grad is TorchTwiceDifferentiable.grad:
            self.verify_second_derivative(map_tensors(own_tensor, (x, y)))
        gradient = self.grad(x, y, create_graph=True)
        identity = torch.eye(self.num_params, dtype=self.dtype, device=self.device)
        matrix = self.mvp(gradient, identity, self.theta)
        return (matrix + matrix.mT) / 2

    @staticmethod
    @ordinary
    def mvp(
        grad_xy: torch.Tensor,
        v: torch.Tensor,
        backprop_on: torch.Tensor | Iterable[torch.Tensor],
        *,
        progress: bool = False,
    ) -> torch.Tensor:
        """Return rows (d, m): the derivative of ``grad_xy`` (p,) along each row of ``v`` (d, p)."""
        variables = [backprop_on] if isinstance(backprop_on, torch.Tensor) else list(backprop_on)
        rows = [
            _flat_grad(grad_xy, variables, direction, retain_graph=True)
            for direction in progress_bar(v, "Hessian-vector products", int(progress), len(v))
        ]
        return torch.stack(rows).detach() if rows else v.new_zeros(0, sum(t.numel() for t in variables))

    @classmethod
    def tensor_type(cls) -> type:
        """Return ``torch.Tensor``."""
        return torch.Tensor

    # -- what the curvatures use -----------------------------------------------------------------------------------

    @ordinary
    def at_point(
        self, params: str | Iterable[str] | None = None, dtype: Any = None, device: Any = None
    ) -> TorchTwiceDifferentiable:
        """Return a copy fixed at today's θ: chosen parameters, dtype and device; later training does not reach it.

        The selected parameters and the buffers are snapshots (p numbers, less than one right-hand side of a solve);
        frozen parameters are shared where no conversion is needed.
        """
        duplicate = copy.copy(self)
        duplicate.module = structural_copy(self.model)
        chosen = select_parameters(list(duplicate.module.named_parameters()), params)
        first = dict(duplicate.module.named_parameters())[chosen[0]]
        to_dtype, to_device = (
            resolve_dtype(dtype, first.dtype),
            resolve_device(device, _one_device(duplicate.module)),
        )
        _convert(duplicate.module, set(chosen), to_dtype, to_device)
        duplicate._select(chosen)
        if duplicate.loss is not None:
            duplicate.loss = duplicate.loss.to(to_dtype, to_device)
        duplicate._verified, duplicate.batched_rows = False, {}
        return duplicate

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of θ."""
        return self.theta[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of θ."""
        return self.theta[0].device

    # The fitted steps of a pipeline before the model; None where it sees the data as they are.
    features: Any = None
    # What `settle` took from the training data; None where L depends on nothing of them.
    totals: Any = None

    def read(self, data: Any) -> Any:
        """Return the user's data as this model reads it; a skorch net uses its own loader."""
        if self.features is None:
            return data
        if not isinstance(data, tuple) or len(data) != 2:
            raise TypeError(must_be("data", "an (X, y) tuple for a Pipeline", f"a {type(data).__name__}"))
        return (self.features.transform(data[0]), data[1])

    def settle(self, batches: Iterable[Any]) -> None:
        """Take from the training data, once, what L depends on beside them: nothing here."""

    def adopt(self, totals: Any) -> None:
        """Take what another object of this model settled."""

    @ordinary
    def forward(self, batch: Any) -> Any:
        """Return the outputs, with gradients on, checked against the targets."""
        own = self._own_loss() or type(self).outputs is not TorchTwiceDifferentiable.outputs
        if not own and not (isinstance(batch, tuple) and len(batch) == 2):
            got = f"a tuple of {len(batch)}" if isinstance(batch, tuple) else type(batch).__name__
            hint = "For other batches subclass TorchTwiceDifferentiable: `outputs` and `per_sample_loss`."
            raise ValueError(must_be("A batch", "a pair (inputs, targets)", got, hint))
        # The fused attention kernels have no second derivative.
        kernels = _without_fused_rnn(self.module, self.device)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), kernels, PlainFunctions():
            outputs = self.outputs(self.module, batch)
        if not self._own_loss():
            self._check(outputs, batch)
        return outputs

    def mass(self, outputs: Any, batch: Any) -> torch.Tensor:
        """Return each row's share (m,) of the denominator of L; 1 where a subclass defines the loss."""
        if self._own_loss():
            return torch.ones_like(self.per_sample_loss(outputs, batch).detach())
        return self._loss().mass(outputs.detach(), batch[1])

    def verify_loss(self, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Raise unless the loss of some (outputs, targets) of different batches together is that of single rows."""
        if not self._own_loss():
            self._loss().verify(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    @ordinary
    def verify_second_derivative(self, batch: Any) -> None:
        """Raise where autograd's second derivatives, on a few rows of a batch, are not those of the gradient."""
        few = map_tensors(lambda tensor: tensor[:8] if tensor.ndim else tensor, batch)
        check_second_derivative(self, few, _doubled(few))

    @ordinary
    def verify_loss_derivative(self, outputs: torch.Tensor, batch: Any) -> None:
        """Raise where autograd's second derivatives of the loss in the outputs are not those of its gradient."""
        check_loss_derivative(self, outputs.detach(), batch, _doubled(batch))

    @ordinary
    def gradient_of(self, value: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
        """Return the flat gradient (p,) of a scalar that was computed from ``forward``."""
        return _flat_grad(value, self.theta, create_graph=create_graph)

    def penalty_diagonal(self) -> torch.Tensor | None:
        """Return the penalty's Hessian as a diagonal (p,), or None where there is no penalty."""
        if not self.weight_decay:
            return None
        return torch.full((self.num_params,), self.weight_decay, dtype=self.dtype, device=self.device)

    def penalty_gradient(self) -> torch.Tensor:
        """Return the penalty's gradient (p,) at θ."""
        return self.weight_decay * torch.cat([t.detach().reshape(-1) for t in self.theta])

    def output_factor(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor | None:
        """Return Sᵢ (m, c, c) with ∇²_f sᵢ = SᵢSᵢᵀ in closed form, or None."""
        return None if self._own_loss() else self._loss().output_factor(outputs, batch[1])

    # -- helpers ---------------------------------------------------------------------------------------------------

    @property
    def own_loss(self) -> bool:
        """Whether a subclass defines the loss."""
        return self._own_loss()

    def _own_loss(self) -> bool:
        return type(self).per_sample_loss is not TorchTwiceDifferentiable.per_sample_loss

    def _loss(self) -> Loss:
        if self.loss is None:
            raise ValueError(must_be("loss", "given, or per_sample_loss overridden", "None"))
        return self.loss

    def _select(self, names: list[str]) -> None:
        tensors = dict(self.module.named_parameters())
        self.theta: list[torch.Tensor] = [tensors[name] for name in names]
        self.layout = ParameterLayout(tuple(names), tuple(tuple(t.shape) for t in self.theta))

    def _check(self, outputs: Any, batch: Any) -> None:
        if not isinstance(outputs, torch.Tensor):
            hint = "Subclass TorchTwiceDifferentiable and override `outputs` and `per_sample_loss`."
            raise TypeError(must_be("The model's output", "a tensor", type(outputs).__name__, hint))
        self._loss().check(outputs.detach(), batch[1])
        if not self._verified:
            self._loss().verify(outputs.detach(), batch[1])
            self._verified = True


def _flat_grad(
    value: torch.Tensor,
    variables: list[torch.Tensor],
    direction: torch.Tensor | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> torch.Tensor:
    """Return the flat gradient of ``value``; zeros for what it does not reach."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(t).reshape(-1) for t in variables])
    parts = torch.autograd.grad(
        value,
        variables,
        direction,
        create_graph=create_graph,
        retain_graph=retain_graph,
        materialize_grads=True,
    )
    return torch.cat([part.reshape(-1) for part in parts])


def _without_fused_rnn(module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """CuDNN's recurrent layers have no second derivative, and none at all in eval mode."""
    if device.type == "cuda" and any(isinstance(child, nn.RNNBase) for child in module.modules()):
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


def _doubled(batch: Any) -> Any:
    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, batch)


def _one_device(module: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in module.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise ValueError(must_be("The model", "on one device that holds numbers", ", ".join(sorted(map(str, devices)))))
    return devices.pop()


def _convert(module: nn.Module, chosen: set[str], dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Put converted tensors into a structural copy; selected ones become leaves that require a gradient."""
    converted: dict[int, torch.Tensor] = {}
    selected = {id(tensor) for name, tensor in module.named_parameters() if name in chosen}
    for child in list(module.modules()):
        buffers = list(child.named_buffers(recurse=False, remove_duplicate=False))
        weights = list(child.named_parameters(recurse=False, remove_duplicate=False))
        for name, tensor in weights + buffers:
            if id(tensor) not in converted:
                snapshot = id(tensor) in selected or not isinstance(tensor, nn.Parameter)
                converted[id(tensor)] = _converted(tensor, dtype, device, snapshot)
                converted[id(tensor)].requires_grad_(id(tensor) in selected)
            setattr(child, name, converted[id(tensor)])


def _converted(tensor: torch.Tensor, dtype: Any, device: Any, snapshot: bool) -> torch.Tensor:
    own = own_tensor(tensor.detach())
    data = own.to(device, dtype if tensor.is_floating_point() else None, copy=snapshot)
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data


def map_tensors(function: Any, batch: Any) -> Any:
    """Return ``batch`` (tensors in tuples, lists and mappings) with ``function`` applied to every tensor."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def leading_length(batch: Any) -> int:
    """Return the number of rows of a batch: the length of its last tensor, which is the target of ``(x, y)``."""
    lengths: list[int] = []
    map_tensors(lambda tensor: lengths.append(len(tensor) if tensor.ndim else 1), batch)
    if not lengths:
        raise ValueError(must_be("A batch", "one with a tensor in it", type(batch).__name__))
    return lengths[-1]
