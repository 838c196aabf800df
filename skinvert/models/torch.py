"""A PyTorch module and a loss as a ``TwiceDifferentiable``; the seam for models that are not ``loss(model(x), y)``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._autograd import ordinary, own_tensor
from .._check import must_be, resolve_device, resolve_dtype
from .._checksum import checksum
from .._progress import progress as progress_bar
from .._types import Batch, Decay, Device
from ..parameters import ParameterLayout, select_parameters
from .affine_outputs import has_affine_outputs
from .autocast import computed_in
from .base import TwiceDifferentiable
from .batches import call, check_pair, doubled, first_rows, map_tensors, split_labels
from .compiled import eager, refuse_sharded, unwrapped
from .conversion import Conversion, parameter_like
from .flat_gradient import flat_gradient
from .global_names import globals_of
from .labelled import Reading, gives_its_loss, logits_of, reading_of
from .leaks import Watch
from .losses import Loss, OutputHessian, OutputSum, Predictive, as_loss
from .own_eval import OwnEval
from .plain_functions import PlainFunctions
from .second_derivative import check_loss_derivative, check_second_derivative, in_float64
from .structural_copy import structural_copy
from .weight_decay import decay_by_name

__all__ = ["TorchTwiceDifferentiable"]


class TorchTwiceDifferentiable(TwiceDifferentiable):
    r"""L(θ) = Σᵢ wᵢℓᵢ / Σᵢ wᵢ + ½ μ‖θ‖² of a PyTorch module.

    The model is used in eval mode through a structural copy that shares its tensors: nothing of the user's changes.
    A compiled or data-parallel module counts as the module inside it, with that one's parameter names.

    To serve a model that is not ``loss(model(x), y)``, override ``outputs`` and ``per_sample_loss``; every curvature
    and every method follow.

    Parameters
    ----------
    model : torch.nn.Module
        A trained model.
    loss : str, torch loss module, Loss, callable or None
        ``"cross_entropy"``, ``"mse"``, ``"bce_with_logits"``, ``"nll"``, ``"huber"``, ``"poisson_nll"``, ``"bce"``,
        ``"smooth_l1"``, or a name of ``register_loss``; a torch loss module with its own ``reduction``; a ``Loss``; a
        callable (output, target): a mean or a sum over rows, or one value per row. None in a subclass that overrides
        ``per_sample_loss``, and for a model that takes ``labels`` and returns its own ``loss`` beside ``logits``: the
        cross-entropy (ignoring labels of -100, shifted by a position or not), squared error or binary cross-entropy
        that it is on every batch is found; ValueError where it is none of them.
    weight_decay : float or mapping of str to float, default=0.0
        μ ≥ 0 of ½ μ‖θ‖²; or, as an optimiser's parameter groups have it, globs on parameter names and the μ of each:
        ``{"*.weight": 1e-2}`` leaves all other parameters without.

    Examples
    --------
    The Hessian of least squares is 2 XᵀX / n, which torch's ``mse`` does not halve.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> model = TorchTwiceDifferentiable(net, "mse", weight_decay=0.5)
    >>> model.hessian(torch.eye(2), torch.zeros(2, 1)).tolist()
    [[1.5, 0.0], [0.0, 1.5]]

    Batches may be mappings with ``labels``, and labels of -100 are ignored: here two of three tokens are.

    >>> from skinvert import HessianInverter
    >>> net = nn.Embedding(2, 2)  # the logits of two classes for each token
    >>> _ = nn.init.zeros_(net.weight)
    >>> batches = [{"input": torch.tensor([[0, 1, 1]]), "labels": torch.tensor([[1, -100, -100]])}]
    >>> inverter = HessianInverter("direct", 1.0, loss="cross_entropy").fit(net, batches)
    >>> inverter.curvature_.to_dense()[:2].tolist()
    [[0.25, -0.25, 0.0, 0.0], [-0.25, 0.25, 0.0, 0.0]]
    """

    @ordinary
    def __init__(self, model: nn.Module, loss: Any, weight_decay: Decay = 0.0) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(must_be("model", "a torch.nn.Module", type(model).__name__))
        refuse_sharded(model)
        self.model, self.weight_decay = model, weight_decay
        # A model of labels may give its own loss: `learn_labels` says which it is.
        pending = loss is None and (self._own_loss() or gives_its_loss(model))
        self.loss: Loss | None = None if pending else as_loss(loss)
        self.module = structural_copy(model)
        self._decay = decay_by_name(weight_decay, list(self.module.named_parameters(remove_duplicate=False)))
        self._verified = False
        # Which shapes of batches `curvature.rows` may differentiate all at once: what it found.
        self.batched_rows: dict[Any, bool] = {}
        # `at_point` raises where none is trainable and none is chosen by name.
        trainable = [name for name, tensor in self.module.named_parameters() if tensor.requires_grad]
        if any(tensor.is_inference() for tensor in [*self.module.parameters(), *self.module.buffers()]):
            self.module = structural_copy(model, _ordinary)
        self._select(trainable)

    # -- the seam --------------------------------------------------------------------------------------------------

    def outputs(self, module: nn.Module, batch: Batch) -> Any:
        """Return the outputs of ``module`` (eval mode) on a batch, by default of the x of ``(x, y)``.

        A mapping is given by name and a tuple as several arguments, where ``forward`` takes them so, else as one. Of
        an output with ``logits`` these are returned, the classes of tokens on axis 1.
        """
        if isinstance(batch, Mapping):
            hint = "Override `outputs` too."
            raise ValueError(must_be("A batch", "a pair (inputs, targets)", f"a mapping of {sorted(batch)}", hint))
        logits = logits_of(call(module, batch[0]))
        return self.reading.outputs(logits) if isinstance(logits, torch.Tensor) else logits

    def per_sample_loss(self, outputs: Batch, batch: Batch) -> torch.Tensor:
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
    def grad(self, x: Batch, y: Batch, create_graph: bool = False) -> torch.Tensor:
        """Return the gradient (p,) of L on one batch."""
        batch = map_tensors(own_tensor, (x, y))
        # A forward pass may write into its inputs.
        outputs = self.forward(map_tensors(torch.clone, batch))
        mean = self.per_sample_loss(outputs, batch).sum() / self.mass(outputs, batch).sum()
        gradient = self.gradient_of(mean, create_graph)
        penalty = self.penalty_diagonal()
        if penalty is None:
            return gradient
        theta = torch.cat([t.reshape(-1) for t in self.theta])
        return gradient + penalty * (theta if create_graph else theta.detach())

    @ordinary
    def hessian(self, x: Batch, y: Batch) -> torch.Tensor:
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
        v = torch.as_tensor(v, dtype=grad_xy.dtype, device=grad_xy.device)
        if v.ndim != 2 or v.shape[1:] != grad_xy.shape:
            hint = "One direction is one row: try `v.reshape(1, -1)`." if v.ndim == 1 else ""
            raise ValueError(must_be("v", f"of shape (d, {grad_xy.numel()})", f"shape {tuple(v.shape)}", hint))
        rows = [
            flat_gradient(grad_xy, variables, direction, retain_graph=True)
            for direction in progress_bar(v, "Hessian-vector products", int(progress), len(v))
        ]
        return torch.stack(rows).detach() if rows else v.new_zeros(0, sum(t.numel() for t in variables))

    @classmethod
    def tensor_type(cls) -> type:
        """Return ``torch.Tensor``."""
        return torch.Tensor

    # -- what the curvatures use -----------------------------------------------------------------------------------

    # What forward passes compute in, by `torch.autocast`; None is the dtype of θ.
    autocast: torch.dtype | None = None

    def in_autocast(self, dtype: torch.dtype) -> TorchTwiceDifferentiable:
        """Return a copy at this very θ whose forward passes run under ``torch.autocast``, and theirs backward."""
        other = copy.copy(self)
        # What was found of passes in another dtype does not hold.
        other.autocast, other.watch, other.batched_rows = dtype, None, {}
        return other

    @property
    def eps(self) -> float:
        """The relative rounding of its passes."""
        return torch.finfo(self.autocast or self.dtype).eps

    def computed(self, module: nn.Module, batch: Batch) -> Any:
        """Return ``outputs`` under the autocast that is set, in the dtype of θ."""
        if self.autocast is None:
            return self.outputs(module, batch)
        return computed_in(self.autocast, self.device, self.dtype, lambda: self.outputs(module, batch))

    @ordinary
    def at_point(
        self, params: str | Iterable[str] | None = None, dtype: Any = None, device: Device = None
    ) -> TorchTwiceDifferentiable:
        """Return a copy fixed at today's θ: chosen parameters, dtype and device; later training does not reach it.

        Parameters and buffers are snapshots; frozen parameters that together exceed scikit-learn's ``working_memory``
        are shared where no conversion is needed, and `check_unchanged` says whether they are still the same.
        """
        duplicate, shared = copy.copy(self), structural_copy(self.model)
        named = dict(shared.named_parameters())
        chosen = select_parameters(list(named.items()), params)
        # Of others than floats `Conversion` tells by name.
        own = next((named[name].dtype for name in chosen if named[name].is_floating_point()), torch.float32)
        to_dtype, to_device = resolve_dtype(dtype, own), resolve_device(device, _one_device(shared))
        selected = {id(named[name]) for name in chosen}
        found = {id(t): (name, t) for name, t in [*named.items(), *shared.named_buffers()]}
        conversion = Conversion(shared, selected, own, to_dtype, to_device)
        duplicate.module = structural_copy(self.model, conversion, found)
        duplicate._select(chosen)
        trained = {id(tensor) for tensor in named.values() if tensor.requires_grad}
        duplicate.watch = Watch(found, selected | trained, to_dtype)
        if not self._is_fixed:
            duplicate.watch.own_eval = OwnEval.of(self.model)
            duplicate.watch.globals = globals_of(unwrapped(self.model))
        duplicate._is_fixed = True
        if duplicate.loss is not None:
            duplicate.watch.check_modules(duplicate.loss)
            duplicate.loss = duplicate.loss.to(to_dtype, to_device)
        duplicate._verified, duplicate.batched_rows = False, {}
        theirs = {tensor.data_ptr() for tensor in named.values()}
        kept = {name: t for name, t in duplicate.module.named_parameters() if t.data_ptr() in theirs and t.numel()}
        duplicate._shared = {name: (tensor, checksum(tensor)) for name, tensor in kept.items()}
        return duplicate

    @ordinary
    def doubled(self, batch: Batch) -> TorchTwiceDifferentiable | None:
        """Return a copy at this very θ that computes in float64; None where the model does not take the batch so.

        Nor where it casts to less on its way. Twice the memory of the module.
        """
        duplicate, found = copy.copy(self), dict[int, tuple[str, torch.Tensor]]()
        duplicate.autocast = None
        selected = {id(tensor) for tensor in self.theta}
        conversion = Conversion(self.module, selected, self.dtype, torch.float64, self.device)
        duplicate.module = structural_copy(self.module, conversion, found)
        duplicate._select(list(self.layout.names))
        duplicate.loss = None if self.loss is None else self.loss.to(torch.float64, self.device)
        duplicate.watch = watch = Watch(found, selected, torch.float64)
        watch.quiet, duplicate.batched_rows = True, {}
        few = first_rows(doubled(batch))
        try:
            duplicate.per_sample_loss(duplicate.forward(few), few)
        except (RuntimeError, TypeError, ValueError):
            # A model may hold to its own dtype.
            return None
        return None if watch.lower else duplicate

    # Parameters shared with the user's model, with their checksums.
    _shared: Mapping[str, tuple[torch.Tensor, Any]] = {}

    def check_unchanged(self) -> None:
        """Raise where a parameter that this copy shares with the user's model has changed since."""
        changed = [name for name, (tensor, known) in self._shared.items() if checksum(tensor) != known]
        if changed:
            hint = "They were too large to copy. Call `fit` again."
            raise ValueError(must_be("The frozen parameters", "those of fit", f"others in {changed}", hint))

    # The fitted steps of a pipeline before the model; None where it sees the data as they are.
    features: Any = None
    # Whether `at_point` made it.
    _is_fixed = False
    # Over a copy until its first forward pass: a look-out for what it still shares with the user's model.
    watch: Watch | None = None
    # Whether the model changes its inputs in place: then it is given copies.
    writes_inputs = False
    # What `settle` took from the training data; None where L depends on nothing of them.
    totals: Any = None

    @property
    def reads_pairs_alone(self) -> bool:
        """Whether the data go through the steps of a pipeline first."""
        return self.features is not None

    def read(self, data: Batch) -> Any:
        """Return the user's data as this model reads it; a skorch net uses its own loader."""
        if self.features is None:
            return data
        if not isinstance(data, tuple) or len(data) != 2:
            raise TypeError(must_be("data", "an (X, y) tuple for a Pipeline", f"a {type(data).__name__}"))
        return (self.features.transform(data[0]), data[1])

    # Whether targets count: not where the outputs alone are asked.
    reads_targets = True

    def of_outputs(self) -> TorchTwiceDifferentiable:
        """Return a copy whose loss is the sum of its outputs, whatever the targets; a subclass's own loss stays."""
        other = copy.copy(self)
        if not self._own_loss():
            other.loss, other.reads_targets, other._learned = OutputSum(), False, True
        return other

    # How the logits and labels of batches that are mappings meet the loss.
    reading: Reading = Reading()
    _learned = False

    def learn_labels(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Find, where no loss is given, which loss of the logits the model's own is, and how labels are read.

        Without a loss this costs one forward pass over ``batches()``, and without labels in mappings nothing.
        """
        if not self._reads_pairs():
            return
        first = split_labels(next(iter(batches())))
        named = isinstance(first, Mapping) or (isinstance(first, tuple) and isinstance(first[0], Mapping))
        if self.loss is not None and not (named and not self._learned):
            return
        loss, decided = (None, self.reading) if self._learned else (self.loss, None)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                self.reading = reading_of(self.module, batches(), loss, decided)
        except (RuntimeError, LookupError, NotImplementedError) as error:
            message = must_be(
                "The data", "what the model takes", f"a batch it fails on: {error}", "Override `outputs`?"
            )
            raise ValueError(message) from error
        if self.loss is None and self.reading.loss is not None:
            self.loss = as_loss(self.reading.loss).to(self.dtype, self.device)
            self._learned = True

    def pair(self, batch: Batch) -> Any:
        """Return a raw batch as the pair (inputs, targets) that it stands for; a subclass's own as it is."""
        if not self._reads_pairs():
            return batch
        batch = split_labels(batch)
        if not isinstance(batch, tuple) or len(batch) != 2:
            return batch
        check_pair(batch)
        return self.reading.pair(*batch)

    def _reads_pairs(self) -> bool:
        return not self._own_loss() and type(self).outputs is TorchTwiceDifferentiable.outputs

    def settle(self, batches: Iterable[Batch]) -> None:
        """Take from the training data, once, what L depends on beside them: nothing here.

        Where processes share the data, the batches are one of all targets, without inputs.
        """

    def adopt(self, totals: Any) -> None:
        """Take what another object of this model settled."""

    @ordinary
    def forward(self, batch: Batch) -> Any:
        """Return the outputs, with gradients on, checked against the targets."""
        if self._reads_pairs() and not (isinstance(batch, tuple) and len(batch) == 2):
            got = f"a tuple of {len(batch)}" if isinstance(batch, tuple) else type(batch).__name__
            hint = "For other batches subclass TorchTwiceDifferentiable: `outputs` and `per_sample_loss`."
            if isinstance(batch, torch.Tensor):
                hint = "A list is a list of batches: give two arrays as a tuple `(X, y)`, a batch as `(x, y)`."
            raise ValueError(must_be("A batch", "a pair (inputs, targets)", got, hint))
        # Once for a copy: what it does on its first batch.
        watch, self.watch = self.watch, None
        give = torch.clone if self.writes_inputs else _unmarked
        # The fused attention kernels have no second derivative.
        kernels = _without_fused_rnn(self.module, self.device)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), kernels, eager(), PlainFunctions():
            compute = partial(self._given, give, batch)
            outputs = compute() if watch is None else watch.over_forward(compute)
        outputs = self._in_own_dtype(outputs)
        if watch is not None:
            watch.warn_of_casts()
            watch.warn_of_globals()
            if watch.own_eval is not None and not watch.quiet:
                watch.own_eval.check(self, batch, watch.look_out())
        if not self._own_loss():
            with nullcontext() if watch is None else watch.over_loss():
                self._check(outputs, batch)
        return outputs

    def mass(self, outputs: Batch, batch: Batch) -> torch.Tensor:
        """Return each row's share (m,) of the denominator of L; 1 where a subclass defines the loss."""
        if self._own_loss():
            return torch.ones_like(self.per_sample_loss(outputs, batch).detach())
        return self._loss().mass(outputs.detach(), batch[1])

    def verify_loss(self, outputs: Batch, targets: Batch, losses: torch.Tensor) -> None:
        """Raise unless the user's own loss of these rows is what these losses of single rows make."""
        if not self._own_loss():
            self._loss().verify_values(outputs, targets, losses)

    @ordinary
    def verify_second_derivative(self, batch: Batch) -> None:
        """Raise where autograd's second derivatives, on a few rows of a batch, are not those of the gradient."""
        few = first_rows(batch)
        check_second_derivative(self, few, doubled(few))

    @ordinary
    def in_float64(self, batch: Batch) -> TorchTwiceDifferentiable | None:
        """Return a copy that computes in float64, or None where the model does not take it or it does not fit."""
        few = first_rows(batch)
        return in_float64(self, doubled(few))

    @ordinary
    def verify_loss_derivative(self, outputs: torch.Tensor, batch: Batch) -> None:
        """Raise where autograd's second derivatives of the loss in the outputs are not those of its gradient."""
        check_loss_derivative(self, outputs.detach(), batch, doubled(batch))

    @ordinary
    def gradient_of(self, value: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
        """Return the flat gradient (p,) of a scalar that was computed from ``forward``."""
        return flat_gradient(value, self.theta, create_graph=create_graph)

    def penalty_diagonal(self) -> torch.Tensor | None:
        """Return the penalty's Hessian as a diagonal (p,), or None where there is no penalty."""
        decays = [self._decay[name] for name in self.layout.names]
        if not any(decays):
            return None
        sizes = torch.tensor(self.layout.sizes, device=self.device)
        return torch.tensor(decays, dtype=self.dtype, device=self.device).repeat_interleave(sizes)

    def penalty_gradient(self) -> torch.Tensor:
        """Return the penalty's gradient (p,) at θ."""
        decays = [self._decay[name] for name in self.layout.names]
        return torch.cat([mu * t.detach().reshape(-1) for mu, t in zip(decays, self.theta, strict=True)])

    def output_hessian(self, outputs: torch.Tensor, batch: Batch) -> OutputHessian | None:
        """Return ∇²_f sᵢ in closed form, or None."""
        return None if self._own_loss() else self._loss().output_hessian(outputs, batch[1])

    @property
    def affine(self) -> bool:
        """Whether the outputs are affine in θ by construction: then the Hessian is the GGN."""
        plain = self._reads_pairs() and not self.own_loss
        return plain and has_affine_outputs(self.module, self.theta)

    def predictive(self, outputs: torch.Tensor, batch: Batch) -> Predictive | None:
        """Return the labels that outputs predict, where the loss is their negative log-likelihood; else None."""
        return None if self._own_loss() else self._loss().predictive(outputs.detach(), batch[1])

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

    def _given(self, give: Callable[[torch.Tensor], torch.Tensor], batch: Batch) -> Any:
        return self.computed(self.module, map_tensors(give, batch))

    def _in_own_dtype(self, outputs: Batch) -> Any:
        """Return outputs in the dtype of θ; raise where they have lost accuracy."""
        if not isinstance(outputs, torch.Tensor) or outputs.dtype == self.dtype:
            return outputs
        if not outputs.is_floating_point():
            raise TypeError(must_be("The model's output", "floating, and differentiable", outputs.dtype))
        if outputs.dtype.itemsize < self.dtype.itemsize:
            hint = "Remove `torch.autocast` and casts such as `.float()` from its forward pass, or leave dtype=None."
            raise ValueError(must_be("The model's output", f"in {self.dtype}, as θ is", outputs.dtype, hint))
        return outputs.to(self.dtype)

    def _check(self, outputs: Batch, batch: Batch) -> None:
        if not isinstance(outputs, torch.Tensor):
            hint = "Subclass TorchTwiceDifferentiable and override `outputs` and `per_sample_loss`."
            raise TypeError(must_be("The model's output", "a tensor", type(outputs).__name__, hint))
        if not outputs.ndim:
            hint = "Return the outputs from `forward`, and give the loss as `loss=`."
            raise ValueError(must_be("The model's output", "one row per row of the batch", "a scalar", hint))
        self._loss().check(outputs.detach(), batch[1])
        if not self._verified:
            self._loss().verify(outputs.detach(), batch[1])
            self._verified = True


def _unmarked(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory: a model that differentiates by its inputs sets their ``requires_grad``."""
    return tensor if tensor.requires_grad else tensor.detach()


def _without_fused_rnn(module: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """CuDNN's recurrent layers have no second derivative, and none at all in eval mode."""
    if device.type == "cuda" and any(isinstance(child, nn.RNNBase) for child in module.modules()):
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


def _one_device(module: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in module.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise ValueError(must_be("The model", "on one device that holds numbers", ", ".join(sorted(map(str, devices)))))
    return devices.pop()


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that gradients pass through, whatever mode it was made in."""
    own = own_tensor(tensor)
    if own is tensor or not isinstance(tensor, nn.Parameter):
        return own
    return parameter_like(tensor, own, tensor.requires_grad)
