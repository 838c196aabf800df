"""The Hessian of a model whose layers see one row a sample: by the second derivatives at their results.

With z = W a + b a layer's results and ε added to them, the second derivative of a sample's loss by the entries (o, i)
of one layer's [W, b] and (o', i') of another's is a_i a'_i' ∂²ℓ/∂ε_o∂ε'_o' + a_i ∂a'_i'/∂ε_o ∂ℓ/∂ε'_o', and the like
with the two exchanged. So Σ d directions of ε give all of it, where products take p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..._memory import rows_within
from ..._progress import progress
from ..._types import Batch
from ..objective import Objective
from ..per_sample import split_batch
from ..products import forward_products, recorded_products
from ..tangents import Program, Recording, recorded
from .assembly import PairSums, linear_layers
from .found import layers_of
from .kinds import Call, KroneckerLayer

__all__ = ["hessian_diagonal_from_layers", "hessian_from_layers"]

# Samples at a time: many enough for the products, few enough for the caches.
CHUNK = 1024


def hessian_from_layers(objective: Objective, verbose: int = 0) -> torch.Tensor | None:
    """Return the Hessian (p, p) without the penalty; None unless all parameters are in layers that see one row each.

    n p² operations, as for the GGN; products with the identity take some 12 n p².
    """
    layers = _modules(objective)
    if layers is None:
        return None
    sums, width = PairSums(layers), sum(sum(layer.index.shape) for layer in layers)
    most = max(len(a.index) * len(b.index) * a.index.shape[1] for a in layers for b in layers)
    chunk = min(CHUNK, rows_within((8 * width**2 + 2 * most) * objective.dtype.itemsize))
    for batch, weights in progress(objective.batches, "layers", verbose):
        for rows, part in split_batch(batch, objective.scale * weights / objective.weight_sum, chunk):
            if not _add(sums, layers, objective, rows, part):
                return None
    return sums.matrix()


def hessian_diagonal_from_layers(objective: Objective, verbose: int = 0) -> torch.Tensor | None:
    """Return the Hessian's diagonal (p,) without the penalty; None unless all parameters are in layers of one row each.

    Of the entry (o, i) of a layer's [W, b] it is Σ a_i² ∂²ℓ/∂ε_o²: Σ d directions, each through the layers above its
    own and back, at most a third of a product, where products with the identity take p.
    """
    layers = _modules(objective)
    if layers is None:
        return None
    diagonal = torch.zeros(objective.size, dtype=objective.dtype, device=objective.device)
    # What a sample's record holds of each layer.
    held = 16 * sum(sum(layer.index.shape) for layer in layers) * objective.dtype.itemsize
    for batch, weights in progress(objective.batches, "layers", verbose):
        for rows, part in split_batch(
            batch, objective.scale * weights / objective.weight_sum, rows_within(held, CHUNK)
        ):
            if not _add_to_diagonal(diagonal, layers, objective, rows, part):
                return None
    return diagonal


def _modules(objective: Objective) -> list[KroneckerLayer] | None:
    """Return the layers, or None unless they are modules that hold all parameters."""
    layers = linear_layers(layers_of(objective.model).layers, objective.size)
    return None if layers is None or any(layer.key is not layer.module for layer in layers) else layers


def _add_to_diagonal(
    diagonal: torch.Tensor,
    layers: Sequence[KroneckerLayer],
    objective: Objective,
    batch: Batch,
    weights: torch.Tensor,
) -> bool:
    """Add samples to the diagonal; return whether the layers are all that parameters are used in, as for ``_add``."""
    noisy = _Noisy(layers, len(weights))
    record, loss = recorded(lambda: noisy.loss(objective, batch, weights))
    if loss is None or not noisy.explains(objective.model.gradient_of(loss, create_graph=True).detach()):
        return False
    for layer, noise, slope, a in zip(layers, noisy.noise, noisy.slopes, noisy.rows(), strict=True):
        program = _program(record, [noise], slope)
        if program is None:
            return False
        diagonal[layer.index] += _own_derivatives(program, noise).mT @ a.square()
    return True


def _program(record: Recording, noise: list[torch.Tensor], value: torch.Tensor) -> Program | None:
    """Return the derivative of a value along the noise; None where an operation has no rule."""
    return recorded_products(record, noise, value, lambda V: forward_products(value, noise)(V).flatten(1))


def _own_derivatives(program: Program, noise: torch.Tensor) -> torch.Tensor:
    """Return the derivative (m, d) of each slope by its own noise."""
    (m, d), found = noise.shape, torch.empty_like(noise, requires_grad=False)
    unit = torch.eye(d, dtype=noise.dtype, device=noise.device)
    for start in range(0, d, program.rows):
        some = slice(start, start + program.rows)
        along = program(unit[some].repeat(1, m))
        found[:, some] = along.reshape(-1, m, d)[:, :, some].diagonal(dim1=0, dim2=2)
    return found


def _add(
    sums: PairSums, layers: Sequence[KroneckerLayer], objective: Objective, batch: Batch, weights: torch.Tensor
) -> bool:
    """Add samples; return whether each layer saw one row of each, once, by operations that have rules."""
    noisy = _Noisy(layers, len(weights))

    def compute() -> torch.Tensor | None:
        loss = noisy.loss(objective, batch, weights)
        return None if loss is None else noisy.joined()

    record, joined = recorded(compute)
    if joined is None:
        return False
    program = _program(record, noisy.noise, joined)
    if program is None:
        return False
    _add_pairs(sums, noisy, program(noisy.directions()).reshape(-1, len(weights), joined.numel() // len(weights)))
    return True


def _add_pairs(sums: PairSums, noisy: _Noisy, along: torch.Tensor) -> None:
    """Add every pair of layers, given the derivatives (Σ d, m, Σ (d + i)) of slopes and inputs along the noise."""
    count = len(noisy.layers)
    widths, depths = [one.shape[1] for one in noisy.noise], [a.shape[1] for a in noisy.inputs]
    # parts[j][i]: of layer i's slopes, then of its input, by layer j's noise.
    parts = [block.split([*widths, *depths], dim=2) for block in along.split(widths)]
    rows = noisy.rows()
    for i in range(count):
        for j in range(count):
            if j <= i:
                sums.add_pair(i, j, parts[j][i].permute(1, 2, 0), rows[i], rows[j])
            K = parts[j][count + i].permute(1, 2, 0)
            if noisy.layers[i].has_weight and i != j and bool(K.any()):
                # A bias sees a constant.
                K = F.pad(K, (0, 0, 0, int(noisy.layers[i].has_bias)))
                sums.add_crossed(i, j, noisy.slopes[i].detach(), K, rows[j])


class _Noisy:
    """Layers whose results have noise ε of zeros added, and what they saw.

    Attributes
    ----------
    noise : list of tensor
        The ε (m, d) of each layer.
    inputs, slopes : list of tensor
        The a (m, i) and the ∂ℓ/∂ε (m, d), ℓ the weighted loss.
    plain : bool
        Whether each layer was called once, on one row a sample.
    """

    def __init__(self, layers: Sequence[KroneckerLayer], m: int) -> None:
        self.layers, self.m = layers, m
        one = layers[0].parameters[0]
        self.noise = [one.new_zeros(m, len(layer.index)).requires_grad_(True) for layer in layers]
        self.calls: dict[int, list[torch.Tensor]] = {}
        self.inputs: list[torch.Tensor] = []
        self.slopes: list[torch.Tensor] = []

    @property
    def plain(self) -> bool:
        """Whether each layer was called once, on one row a sample."""
        shapes = [[a.shape for a in self.calls.get(j, [])] for j in range(len(self.layers))]
        return all(len(own) == 1 and own[0] in _one_row(self.m, own[0][-1]) for own in shapes)

    def loss(self, objective: Objective, batch: Batch, weights: torch.Tensor) -> torch.Tensor | None:
        """Return Σ wℓ, having taken its slopes and the inputs; None where a layer saw anything but one row a sample."""
        model = objective.model
        with self.hooked():
            loss = (model.per_sample_loss(model.forward(batch), batch) * weights).sum()
        if not self.plain:
            return None
        self.slopes = list(torch.autograd.grad(loss, self.noise, create_graph=True, materialize_grads=True))
        self.inputs = [self.calls[j][0].reshape(self.m, -1) for j in range(len(self.layers))]
        return loss

    def explains(self, gradient: torch.Tensor) -> bool:
        """Return whether the gradient (p,) is that of what the layers saw: else weights are used outside them too."""
        for layer, slope, a in zip(self.layers, self.slopes, self.rows(), strict=True):
            scale, eps = float(slope.detach().norm() * a.norm()), torch.finfo(a.dtype).eps
            if not float((slope.detach().mT @ a - gradient[layer.index]).norm()) <= 1e3 * eps * scale:
                return False
        return True

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Add the noise while the context lasts."""
        with ExitStack() as stack:
            for j, layer in enumerate(self.layers):
                stack.callback(layer.module.register_forward_hook(partial(self._add, j)).remove)
            yield

    def joined(self) -> torch.Tensor:
        """Return the slopes and the inputs, sample by sample, as one vector."""
        return torch.cat([*self.slopes, *self.inputs], dim=1).reshape(-1)

    def directions(self) -> torch.Tensor:
        """Return one direction for each entry of a layer's results, the same for all samples: (Σ d, Σ m d)."""
        blocks = [torch.eye(one.shape[1], dtype=one.dtype, device=one.device).repeat(1, self.m) for one in self.noise]
        return torch.block_diag(*blocks)

    def rows(self) -> list[torch.Tensor]:
        """Return the inputs with the bias's coordinate."""
        pairs = zip(self.layers, self.inputs, strict=True)
        return [layer.inputs([Call(a, a.shape, None)], self.m, a.dtype)[0][:, 0] for layer, a in pairs]

    def _add(self, j: int, module: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
        self.calls.setdefault(j, []).append(args[0] if args else result.new_empty(0))
        fits = result.numel() == self.noise[j].numel()
        return result + self.noise[j].reshape(result.shape) if fits else result


def _one_row(m: int, i: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of an input of one row a sample."""
    return ((m, i), (m, 1, i))
