"""Kronecker factors of a curvature's layers, and the curvature's diagonal in any Kronecker eigenbasis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..._check import check_choice
from ..._checkpoint import NOWHERE, Checkpoint, like
from ..._memory import check_memory
from ..._storage import HERE, Storage
from ..._types import State
from ...operators import KroneckerBasis, KroneckerBlock, KroneckerFactors
from ..objective import Objective
from .found import refuse
from .kinds import Inputs, KroneckerLayer, Layer, symmetric_gram
from .passes import Chunk, Kept, Passes, UnexplainedError
from .probe import probe
from .recording import PulledBack
from .room import check_room
from .squares import Squares, SquaresOfSums, add_squares

__all__ = ["kronecker_factors"]

# What a checkpoint calls the sums of the two passes.
FACTORS, EIGENVALUES = "Kronecker factors", "eigenvalues"


def kronecker_factors(
    curvature: PulledBack,
    approx: str = "expand",
    unsupported: str = "error",
    verbose: int = 0,
    checkpoint: Checkpoint = NOWHERE,
    storage: Storage = HERE,
) -> KroneckerFactors:
    r"""Return a curvature's factors, layer by layer.

    With a the layer's inputs and g the signals pulled back to its results, W = Σ wᵢmᵢ the denominator of L and the
    weights and denominators of H inside g, over samples i and the T rows t that the layer sees of each:

    - ``"expand"``: A = Σᵢₜ wᵢmᵢ aaᵀ / W, G = Σᵢₜ ggᵀ / T;
    - ``"reduce"``: A = Σᵢ wᵢmᵢ āāᵀ / W with ā the mean over t, G = Σᵢ ĝĝᵀ with ĝ the sum over t.

    Samples count in A as they do in L, so that an ignored target is a row left out and a class weight is a sample
    weight. A grouped convolution has one A and G a group, an attention one a projection, and a layer that is called
    several times sees the rows of all its calls. The scale and shift of norms have their exact diagonal.

    Parameters
    ----------
    curvature : Layered
        It says by ``signals`` what it pulls back.
    approx : {"expand", "reduce"}, default="expand"
        How rows that share weights are taken.
    unsupported : {"error", "diagonal"}, default="error"
        What to do with parameters outside the layers that have factors.
    verbose : int, default=0
        1 shows a progress bar.
    checkpoint : Checkpoint
        Where the sums are kept, chunk by chunk.
    storage : Storage
        Where the sums lie, and the numbers of the layers' parameters; room is made for all that a method makes of them.

    Returns
    -------
    KroneckerFactors
        One block a layer, the exact diagonal of the rest, and ``refit``.

    References
    ----------
    Eschenhagen, Immer, Turner, Schneider & Hennig (2023), "Kronecker-factored approximate curvature for modern neural
    network architectures", eqs. 12 and 14.
    """
    check_choice(approx, "approx", ["expand", "reduce"])
    check_choice(unsupported, "unsupported", ["error", "diagonal"])
    found, row_bytes = probe(curvature)
    known = checkpoint.resumed("layers left out", {"reasons": "plain"})
    if known is not None:
        found = found.without(known["reasons"])
    while True:
        if found.reasons and unsupported == "error":
            refuse(found.reasons)
        check_room(found.layers, row_bytes, curvature, storage, checkpoint)
        found = found._replace(layers=[_numbered_in(storage, layer) for layer in found.layers])
        try:
            return _summed(Passes(curvature, found, row_bytes, verbose), approx, checkpoint, storage)
        except UnexplainedError as error:
            found = found.without(error.reasons)
            storage.close(["factors"])
            checkpoint.finish("layers left out", {"reasons": found.reasons}, replaces=FACTORS)


def _numbered_in(storage: Storage, layer: Layer) -> Layer:
    """Return a layer whose parameters' numbers lie in the storage."""
    return replace(layer, index=storage.keep(layer.index, "numbers")) if isinstance(layer, KroneckerLayer) else layer


def _summed(passes: Passes, approx: str, checkpoint: Checkpoint, storage: Storage) -> KroneckerFactors:
    objective, layers = passes.curvature.objective, passes.found.layers
    sums = [
        _Factors(layer, objective, approx, storage) if isinstance(layer, KroneckerLayer) else Squares(layer)
        for layer in layers
    ]
    done = _restored(sums, checkpoint)
    # What an earlier run has seen, this one has not.
    kept = Kept([j for j, one in enumerate(sums) if isinstance(one, _Factors)], whole=done == 0)
    for seen, mass, inputs in passes.over(layers, done):
        for one, a in zip(sums, inputs, strict=True):
            if a is not None:
                one.add_inputs(a, mass)
        for parts in kept.taken(passes, inputs, passes.signals(seen, inputs, check=True)):
            for one, g in zip(sums, parts, strict=True):
                if g is not None:
                    one.add_signals(g)
        passes.check_finite("Kronecker factors", layers, [one.scales() for one in sums])
        done = passes.rows.stop
        checkpoint.keep(FACTORS, partial(_state, sums, done))
    checkpoint.finish(FACTORS, _state(sums, done))
    places, values = _rest(passes, [one for one in sums if isinstance(one, Squares)], checkpoint)
    blocks = []
    # Its sums are the block's own now.
    while sums:
        if isinstance(one := sums.pop(0), _Factors):
            blocks.append(one.block(passes.curvature.penalty))
    refit = _Refit(passes, [layer for layer in layers if isinstance(layer, KroneckerLayer)], kept, checkpoint, storage)
    return KroneckerFactors(tuple(blocks), places, values, refit)


def _rest(passes: Passes, norms: Sequence[Squares], checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places of the parameters without factors, those of norms first, and the exact diagonal there."""
    curvature, reasons = passes.curvature, passes.found.reasons
    own = curvature.objective.places(reasons)
    values = [one.entries(curvature.penalty) for one in norms]
    if reasons:
        known = checkpoint.resumed("diagonal of the rest", {"values": f"tensor[{len(own)}]"})
        values.append(curvature.diagonal_at(reasons) if known is None else known["values"])
        checkpoint.finish("diagonal of the rest", {"values": values[-1]})
    empty = torch.empty(0, dtype=curvature.objective.dtype, device=curvature.objective.device)
    return torch.cat([*(one.layer.index for one in norms), own]), torch.cat([*values, empty])


def _state(sums: Sequence[_Factors | Squares], done: int) -> State:
    tensors = {f"{j} {name}": tensor for j, one in enumerate(sums) for name, tensor in one.tensors().items()}
    return _with_rows(tensors, done)


def _with_rows(tensors: dict[str, torch.Tensor], done: int) -> State:
    return {"rows": done, **tensors}


def _restored(sums: Sequence[_Factors | Squares], checkpoint: Checkpoint) -> int:
    """Set the sums to what an earlier run left, and return how many rows of the data are in them."""
    fields = {f"{j} {name}": words for j, one in enumerate(sums) for name, words in one.fields().items()}
    known = checkpoint.resumed(FACTORS, {"rows": "int", **fields})
    if known is None:
        return 0
    for j, one in enumerate(sums):
        one.restore({name: known[f"{j} {name}"] for name in one.tensors()})
    rows: int = known["rows"]
    return rows


@dataclass
class _Refit:
    """The exact diagonal in other eigenbases, by one more pass, or from what was kept of the first."""

    passes: Passes
    layers: list[KroneckerLayer]
    kept: Kept
    checkpoint: Checkpoint
    storage: Storage

    def __call__(self, bases: Sequence[KroneckerBasis]) -> list[torch.Tensor]:
        """Return Σ (U_Gᵀ (Σₜ gₜaₜᵀ) U_A)² of each layer: the exact diagonal of H, without the penalty, in its basis."""
        pairs = zip(self.layers, bases, strict=True)
        sums = [SquaresOfSums(layer, basis, self.storage) for layer, basis in pairs]
        named = {f"{j} sums": one.total for j, one in enumerate(sums)}
        known, done = self.checkpoint.resumed(EIGENVALUES, {"rows": "int", **like(named)}), 0
        if known is not None:
            done = known["rows"]
            for name, total in named.items():
                total.copy_(known[name])
        for inputs, signals in self._chunks(done):
            add_squares(sums, inputs, signals)
            self.passes.check_finite("eigenvalues", self.layers, list(named.values()))
            done = self.passes.rows.stop
            self.checkpoint.keep(EIGENVALUES, partial(_with_rows, named, done))
        self.checkpoint.finish(EIGENVALUES, _with_rows(named, done))
        return list(named.values())

    def _chunks(self, done: int) -> Iterator[Chunk]:
        """Yield each chunk's inputs, and its signals direction by direction; not of the first rows."""
        if self.kept.whole:
            for batch, rows, chunk in self.kept.chunks:
                self.passes.batch, self.passes.rows = batch, rows
                yield chunk
            return
        for seen, _, inputs in self.passes.over(self.layers, done):
            yield inputs, self.passes.signals(seen, inputs)


class _Factors:
    """A and G of one layer as they grow."""

    def __init__(self, layer: KroneckerLayer, objective: Objective, approx: str, storage: Storage) -> None:
        self.layer, self.approx, self.storage, self.device = layer, approx, storage, objective.device
        *groups, d, i = layer.index.shape
        self.left = self._zeros((*groups, d, d), objective.dtype)
        self.right = self._zeros((i,) if layer.is_one_hot else (*groups, i, i), objective.dtype)

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self.storage.zeros(shape, dtype, self.device, "factors")

    def add_inputs(self, inputs: Inputs, mass: torch.Tensor) -> None:
        (a,) = inputs
        if self.approx == "reduce" and a.shape[-2] > 1:
            a = a.mean(-2, keepdim=True)
            if self.right.ndim == 1:
                self._make_dense()
        weighted = a * mass.reshape(-1, *[1] * (a.ndim - 1))
        seen = (weighted * a).sum((0, 1)) if self.right.ndim == 1 else symmetric_gram(weighted, a)
        self.right += seen.to(self.right.device)

    def _make_dense(self) -> None:
        """Make room for a second moment of means of one-hot rows, which is not diagonal."""
        needed = 4 * self.right.numel() ** 2 * self.right.element_size()
        way_out = 'Try approx="expand", of which an Embedding\'s factor is diagonal.'
        check_memory(needed, f"The reduced factor of {self.layer.name}", way_out, self.device)
        diagonal = self.right
        self.right = self._zeros((len(diagonal), len(diagonal)), diagonal.dtype)
        self.right.diagonal().copy_(diagonal)

    def add_signals(self, g: torch.Tensor) -> None:
        rows = g.sum(-2, keepdim=True) if self.approx == "reduce" else g
        self.left += (symmetric_gram(rows, rows) / rows.shape[-2]).to(self.left.device)

    def scales(self) -> torch.Tensor:
        """Return the diagonals: where they are finite, all entries are."""
        right = self.right if self.right.ndim == 1 else self.right.diagonal(dim1=-2, dim2=-1)
        both = torch.cat([self.left.diagonal(dim1=-2, dim2=-1).reshape(-1), right.reshape(-1)])
        return both.to(self.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"left": self.left, "right": self.right}

    def fields(self) -> dict[str, str]:
        fields, width = like(self.tensors()), self.right.shape[-1]
        return {**fields, "right": f"{fields['right']}|tensor[{width},{width}]"}

    def restore(self, known: State) -> None:
        if known["right"].ndim > self.right.ndim:
            self._make_dense()
        self.left.copy_(known["left"])
        self.right.copy_(known["right"])

    def block(self, penalty: torch.Tensor | None) -> KroneckerBlock:
        own, index = None, self.layer.index
        if penalty is not None:
            own = self.storage.keep(penalty[index.to(penalty.device)], "factors")
        for side in (self.left, self.right):
            if side.ndim > 1:
                side.copy_((side + side.mT) / 2)
        return KroneckerBlock(self.layer.name, index, self.left, self.right, own)
