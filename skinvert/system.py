"""The system that is inverted: the curvature of a model over its data, or of plain rows, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import torch
from sklearn.utils import check_random_state

from ._autograd import ordinary
from ._check import check_number, check_sample_weight, check_shift, must_be, resolve_device, resolve_dtype
from ._checkpoint import NOWHERE, Checkpoint
from ._checksum import checksum
from ._distributed import Ranks
from ._frames import columns_of
from ._memory import available_memory, readable, working_memory
from ._progress import say
from ._state import held_bytes
from ._telling import warn
from ._types import Autocast, Device, Globs, Partition, RandomState
from .curvature import (
    CURVATURES,
    Gram,
    Sampled,
    Sharded,
    build_blocks,
    build_curvature,
    curvature_name,
    faces_of,
    of_probabilities,
    seeded_curvature,
)
from .data import Batches, Shard, batches_of, own_steps
from .methods.base import InverseOperator, Method
from .methods.blocks import invert_blocks
from .methods.mixed_precision import inverted
from .models import Loss, TorchTwiceDifferentiable, TwiceDifferentiable, resolve_autocast
from .operators import BlockDiagonal, LinearOperator
from .parameters import ParameterLayout, split_blocks

__all__ = [
    "Function",
    "Inverter",
    "System",
    "assemble",
    "check_requirements",
    "check_same_columns",
    "is_method",
    "random_seed",
    "seeded_method",
]

# A user's own function, registered in place of a method: it takes the model and the data themselves.
Function: TypeAlias = Callable[..., Any]
Inverter: TypeAlias = type[Method] | Function


@dataclass(frozen=True)
class System:
    """A curvature H and what it was made from.

    Parameters
    ----------
    curvature : LinearOperator
        H, the whole of it.
    curvature_name : str
        Which; ``"gram"`` for plain rows.
    n_samples : int
        Number of rows.
    gradient_norm : float or None
        ‖∇L(θ)‖; None for plain rows, as all that follows.
    model : TwiceDifferentiable or None
        At a fixed θ.
    batches : Batches or None
        The data.
    layout : ParameterLayout or None
        Names and shapes of θ.
    blocks : BlockDiagonal or None
        The part of H that is inverted, where it is not the whole.
    """

    curvature: LinearOperator
    curvature_name: str
    n_samples: int
    gradient_norm: float | None = None
    model: TwiceDifferentiable | None = None
    batches: Batches | None = None
    layout: ParameterLayout | None = None
    blocks: BlockDiagonal | None = None

    @ordinary
    def invert(
        self, method: Method, hessian_perturbation: float, verbose: int = 0, checkpoint: Checkpoint = NOWHERE
    ) -> tuple[Method, InverseOperator]:
        """Return the method that inverts, which is what ``method`` chooses, and the inverse at λ."""
        A, shift = self.curvature, check_shift(hessian_perturbation, self.curvature.dtype)
        check_requirements(method, A)
        self._say(shift, verbose)
        chosen, inverse = self._inverted(method, shift, verbose, checkpoint)
        if verbose:
            kept = "and solves with the curvature" if inverse.keeps_operator else "and serves alone"
            left = readable(available_memory(A.device))
            held = readable(held_bytes(inverse)) + (f" in {inverse.place}" if inverse.place else "")
            say(f"memory: the inverse holds {held} {kept}; {left} left on {A.device}", verbose)
        return chosen, inverse

    def _inverted(
        self, method: Method, shift: float, verbose: int, checkpoint: Checkpoint
    ) -> tuple[Method, InverseOperator]:
        if self.blocks is not None:
            return method, invert_blocks(method, self.blocks, shift, verbose, checkpoint).judged_by(self.curvature)
        chosen, why = method.explain(self.curvature, shift)
        say(f"method {chosen.name or type(chosen).__name__}: {why}", verbose)
        return chosen, inverted(chosen, self.curvature, shift, checkpoint, verbose)

    def _say(self, shift: float, verbose: int) -> None:
        A, numbers = self.curvature, str(self.curvature.dtype).removeprefix("torch.")
        rows = f"{self.n_samples:,} rows" + (f" (batches: {len(self.batches):,})" if self.batches is not None else "")
        if self.batches is not None and (shard := self.batches.shard) is not None:
            rows += f" on {shard.ranks.size} ranks, {shard.counts[shard.ranks.rank]:,} of them here"
        say(f"curvature {self.curvature_name}: {A.size:,} parameters, {rows}, {numbers} on {A.device}", verbose)
        say(f"λ = {shift:.4g}", verbose)


@ordinary
def assemble(
    model_or_rows: TwiceDifferentiable | torch.Tensor,
    data: object = None,
    *,
    method: Method | Function,
    curvature: str | Sampled = "auto",
    params: Globs = None,
    blocks: Partition = None,
    batch_size: int | None = None,
    device: Device = None,
    dtype: object = None,
    sample_weight: object = None,
    random_state: RandomState = None,
    verbose: int = 0,
    ranks: Ranks | None = None,
    autocast: Autocast = None,
) -> System:
    """Return the system of an adapted model over its data, or of plain rows (n, p).

    The settings are those of ``HessianInverter``. A method that draws is seeded by ``seeded_method`` before, so that a
    generator is drawn from in one order whoever asks. With ``ranks`` the data are this process's share, and the system
    is that of all shares.
    """
    if batch_size is not None:
        check_number(batch_size, "batch_size", owner="HessianInverter", low=1, integer=True)
    if isinstance(model_or_rows, torch.Tensor):
        if autocast is not None:
            hint = "Their curvature is computed from no forward pass."
            raise ValueError(must_be("autocast for plain rows", "None", repr(autocast), hint))
        return _of_rows(model_or_rows, method, curvature, blocks, device, dtype, sample_weight, ranks)
    model = model_or_rows.at_point(params, dtype, device)
    if isinstance(model, TorchTwiceDifferentiable):
        model.features = own_steps(model.features, data)
    half = resolve_autocast(autocast, model.dtype, model.device)
    chosen = seeded_curvature(_default_curvature(method, model) if curvature == "auto" else curvature, random_state)
    name = curvature_name(chosen)
    if ranks is not None:
        _check_alike(ranks, model, method, chosen)
    batches = batches_of(model, data, batch_size=batch_size, sample_weight=sample_weight, ranks=ranks)
    if batches.shard is not None and ranks is not None:
        check_same_columns(ranks, columns_of(data), empty=batches.shard.empty)
    if ranks is not None and isinstance(model, TorchTwiceDifferentiable):
        hint = "It is found in the data. Give `loss`, and pairs (inputs, targets)."
        ranks.meet("fit", {"how labels meet the loss": model.reading}, hint=hint)
    A: Any = build_curvature(chosen, model, batches, verbose)
    if name == "ggn":
        _warn_of_probabilities(model)
    parts = None
    if blocks is not None:
        if not isinstance(method, Method):
            raise ValueError(must_be("blocks", "None for a method that is a function", repr(blocks)))
        parts = build_blocks(chosen, model, batches, split_blocks(model.layout.names, blocks), verbose)
    if half is not None:
        _add_rough(A if parts is None else parts, half, method)
    n_samples = batches.n_samples if batches.shard is None else batches.shard.n_samples
    return System(A, name, n_samples, A.gradient_norm, model, batches, model.layout, parts)


def _default_curvature(method: Method | Function, model: TwiceDifferentiable) -> str:
    """Return what "auto" means: the method's, with the Fisher for the GGN of probabilities, which it is by logits."""
    default = method.default_curvature if isinstance(method, Method) else "hessian"
    return "fisher" if default == "ggn" and of_probabilities(model) else default


def _warn_of_probabilities(model: TwiceDifferentiable) -> None:
    """Warn where the GGN, as defined at the outputs, is not what one takes it for."""
    kinds = {"log_probabilities": "zero, since the loss is linear in them", "probabilities": "the empirical Fisher"}
    if kind := of_probabilities(model):
        warn(
            f"The GGN at outputs that are {kind.replace('_', '-')} is {kinds[kind]}. Try curvature='fisher', which is "
            f"what the GGN is by logits.",
            UserWarning,
        )


def _add_rough(A: Any, autocast: torch.dtype, method: Method | Function) -> None:
    """Give a curvature, or each of its blocks, its copy under autocast."""
    if not isinstance(method, Method):
        raise ValueError(must_be("autocast", "None for a method that is a function", str(autocast)))
    for own in A.operators if isinstance(A, BlockDiagonal) else [A]:
        own.rough = own.in_autocast(autocast)


def _check_alike(ranks: Ranks, model: TwiceDifferentiable, method: Method | Function, curvature: object) -> None:
    """Raise on all ranks where they have other settings or another model."""
    _check_settings(ranks, method, curvature, model.dtype)
    if not isinstance(model, TorchTwiceDifferentiable):
        ranks.meet("fit", {"parameters": [checksum(torch.as_tensor(tensor)) for tensor in model.parameters]})
        return
    ranks.meet("fit", {"selected parameters": model.layout, "weight decay": model.weight_decay})
    ranks.meet("fit", _settings_of(model.loss), hint="Class weights, say, must be of all ranks' labels.")
    hint = (
        "Running means differ after training, each of its rank's last batches. Try "
        "`torch.distributed.broadcast(tensor.detach(), 0)` for each of `net.parameters()` and `net.buffers()`."
    )
    parts = {"parameter": model.module.named_parameters(), "buffer": model.module.named_buffers()}
    for what, named in parts.items():
        # The first that differs, by its name.
        ranks.meet("the model", {f"{what} {name}": checksum(tensor) for name, tensor in named}, hint=hint)


def _check_settings(ranks: Ranks, method: Method | Function, curvature: object, dtype: torch.dtype) -> None:
    if not isinstance(method, Method):
        raise ValueError(must_be("process_group", "None for a method that is a function", "a group"))
    memory = {"scikit-learn's working_memory": working_memory()}
    ranks.meet("fit", {"method": method, "curvature": curvature, "dtype": dtype, **memory})


def check_same_columns(ranks: Ranks, columns: Mapping[str, Sequence[object]], *, empty: bool) -> None:
    """Raise on all ranks where frames, by their place in the data, have other columns or another order of them.

    A model takes its inputs by position. Of data without rows nothing is asked.
    """
    own = {f"column {i} of data{place}": name for place, names in columns.items() for i, name in enumerate(names)}
    told = ranks.gathered((empty, own), "the columns")
    others = next((known for none, known in told if not none), own)
    ranks.meet("fit", others if empty else own, hint="Try `X[columns]`, alike on all, or arrays on all.")


def _settings_of(loss: Loss | None) -> dict[str, object]:
    """Return what a loss says of itself: its kind, its tensors, and the settings of a module of torch's.

    What a function does shows in its values alone, which are compared later.
    """
    held = {} if loss is None else vars(loss)
    inner: Any = held.get("module", held.get("function", loss))
    own = {**vars(inner), **inner._parameters, **inner._buffers} if isinstance(inner, torch.nn.Module) else held
    plain = isinstance(inner, torch.nn.Module) and type(inner).__module__.startswith("torch.")
    found: dict[str, object] = {"loss": getattr(inner, "__qualname__", type(inner).__qualname__)}
    for name, value in own.items():
        if isinstance(value, torch.Tensor):
            found[f"loss.{name}"] = checksum(value)
        elif plain and name != "training" and isinstance(value, str | int | float):
            found[f"loss.{name}"] = value
    return found


def _of_rows(
    rows: torch.Tensor,
    method: Method | Function,
    curvature: object,
    blocks: object,
    device: Device,
    dtype: object,
    sample_weight: object,
    ranks: Ranks | None,
) -> System:
    weights = check_sample_weight(sample_weight, len(rows), vanishing=ranks is not None)
    if blocks is not None:
        raise ValueError(must_be("blocks for plain rows", "None", repr(blocks), "They have no layers."))
    if curvature not in ("auto", "gram"):
        hint = "Plain rows have one curvature, XᵀX/n. For a model's, give a model."
        raise ValueError(must_be("curvature for plain rows", "'auto'", repr(curvature), hint))
    rows = rows.detach().to(resolve_device(device, rows.device), resolve_dtype(dtype, rows.dtype))
    own = None if weights is None else torch.from_numpy(weights).to(rows)
    if ranks is None:
        return System(Gram(rows, own), "gram", len(rows))
    _check_settings(ranks, method, curvature, rows.dtype)
    ranks.meet("fit", {"width of the rows": rows.shape[1]})
    told = ranks.gathered((len(rows), float(len(rows) if weights is None else weights.sum())), "the rows")
    shard, total = Shard(ranks, [count for count, _ in told], dealt=False), sum(part for _, part in told)
    if not total > 0:
        raise ValueError(must_be("The rows of all ranks", "at least one, of a positive weight", "none"))
    return System(Sharded(Gram(rows, own, total), shard, None), "gram", shard.n_samples)


def seeded_method(method: Method, random_state: RandomState) -> Method:
    """Return ``method``, a random state given to it where it draws and has none of its own."""
    if random_state is not None and method.get_params().get("random_state", 0) is None:
        seed = random_seed(random_state)
        method.set_params(random_state=random_state if isinstance(random_state, int) else seed)
    return method


def random_seed(random_state: RandomState) -> int:
    """Return a seed that is drawn from a random state."""
    return int(check_random_state(random_state).randint(2**31 - 1))


def is_method(value: object) -> TypeGuard[type[Method]]:
    """Return whether a registered value is a ``Method`` class, rather than a function."""
    return isinstance(value, type) and issubclass(value, Method)


def check_requirements(method: Method, A: LinearOperator) -> None:
    """Raise where an operator lacks what a method declares; the error names the curvatures that have it."""
    for needed in method.requires:
        if needed not in A.faces:
            names = [name for name in CURVATURES if needed in faces_of(name)]
            hint = f"Try curvature= one of {names}." if names else ""
            got = f"{type(A).__name__}, which has none"
            raise ValueError(must_be(f"The curvature for {method.name}", f"one with `{needed}`", got, hint))
