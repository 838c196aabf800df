"""Kronecker-factored curvature, inverted layer by layer in the eigenbases of its factors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from .._check import all_finite, check_choice, must_be
from .._checkpoint import NOWHERE, Checkpoint, like
from .._memory import naming_memory
from .._storage import HERE, Storage, check_offload, storage_of
from ..operators import (
    Basis,
    BlockBasis,
    BlockDiagonal,
    DiagonalMatrix,
    Kronecker,
    KroneckerBasis,
    KroneckerBlock,
    KroneckerFactors,
    LinearOperator,
    Shifted,
    Spectral,
    StandardBasis,
)
from .base import Method
from .null_space import without_rounding
from .spectral_inverse import SpectralInverse

__all__ = ["KFAC"]


class KFAC(Method):
    r"""H ≈ blocks G ⊗ A of one layer each, inverted exactly: (G ⊗ A + λI)⁻¹ = Q (Λ_G ⊗ Λ_A + λ)⁻¹ Qᵀ, Q = U_G ⊗ U_A.

    For a layer z = W a, with the bias as the coordinate 1 of a, gradients are g aᵀ, and E[ggᵀ ⊗ aaᵀ] is replaced by
    E[ggᵀ] ⊗ E[aaᵀ]. For ``ggn`` and ``fisher`` the g are the exact columns of the output Hessian's factor, pulled back
    to z; for ``empirical_fisher`` the gradients of the true labels. λ is added to the product, never split by its root.

    A penalty that is the same for all of a layer's parameters is added to λ. One that is not (unpenalised biases)
    enters by its diagonal in the eigenbasis, diag(QᵀRQ), the nearest matrix of that basis.

    Served are Linear (on any number of axes), convolutions of one to three axes and their transposes, Embedding, the
    ``Conv1D`` of transformers, and MultiheadAttention as its four projections. Each group of a grouped convolution is a
    block of its own; a layer that is called several times sees the rows of all its calls; one that sees the same for
    every sample (positions) counts once a sample. The scale and shift of norms (torch's own, BatchNorm in eval mode,
    and modules named ...Norm with one weight an entry) have the curvature's exact diagonal. In every chunk of the data
    the factors' product is held against the derivative by the weights themselves.

    Eigenvalues of A + λI within rounding of their layer's largest are left out (the pseudo-inverse); those of the exact
    diagonal are judged one by one, as ``diagonal`` does. With λ > 0 and a positive semi-definite A none is left out.

    It costs one pass with c backward passes for c outputs, O(d³ + i³) per layer, and d² + i² numbers twice over.

    Parameters
    ----------
    approx : {"expand", "reduce"}, default="expand"
        For layers that see T rows a sample (convolutions, sequences). ``"expand"`` takes them as T samples,
        A = Σ aaᵀ / n and G = Σ ggᵀ / (nT) over n and t; ``"reduce"`` takes the mean of a and the sum of g over t.
        Both are the same for T = 1. For ``"reduce"`` the factor of an Embedding of V rows is V × V.
    unsupported : {"error", "diagonal"}, default="error"
        What to do with selected parameters outside these layers (recurrent ones, tied weights, bare parameters): raise,
        or take the exact diagonal of the curvature there.
    offload : None, "cpu" or path of a folder, default=None
        Where the factors, their eigenbases and the eigenvalues lie, in the fit and after it. None is the device of the
        model. ``"cpu"`` is the CPU's memory, for a model on a GPU: a layer's are moved there and back for each use. A
        folder that exists (one named cpu is ``"./cpu"``), on a disk: files mapped into memory, so that the process
        itself needs room for the model, some rows of length p and the factors of one layer, however many layers there
        are. Solutions are the same. The files have no names, so that none is left behind; their room,
        4 (d² + i²) + 8 d i numbers a layer, is taken before the work starts, and given back with the inverse.
        A pickle, a copy or a saved file holds the numbers themselves, and is loaded into memory.

    References
    ----------
    Martens & Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate curvature", eq. 3.
    Grosse & Martens (2016), "A Kronecker-factored approximate Fisher matrix for convolution layers", eq. 27; the T is
    in G here.
    Eschenhagen, Immer, Turner, Schneider & Hennig (2023), "Kronecker-factored approximate curvature for modern neural
    network architectures", eqs. 12 and 14.

    Examples
    --------
    One block, G = 2 and A = 3; for a model, ``HessianInverter("kfac")``.

    >>> from skinvert.operators import DiagonalMatrix, KroneckerBlock, KroneckerFactors
    >>> one = torch.ones(1, 1)
    >>> class Layered(DiagonalMatrix):
    ...     def kronecker_factors(self, approx, unsupported, verbose=0):
    ...         block = KroneckerBlock("fc", torch.zeros(1, 1, dtype=torch.long), 2 * one, 3 * one, None)
    ...         return KroneckerFactors((block,), torch.empty(0, dtype=torch.long), torch.empty(0), None)
    >>> KFAC().invert(Layered(torch.tensor([6.0])), 2.0).solve(torch.tensor([[4.0]])).x
    tensor([[0.5000]])
    """

    name: ClassVar[str] = "kfac"
    gaussian: ClassVar[bool] = True
    resumes: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("kronecker_factors",)
    default_curvature: ClassVar[str] = "ggn"
    cost: ClassVar[str] = "c backward passes once; (d + i) d i a layer and row"
    memory: ClassVar[str] = "2 (d² + i²) a layer"
    exactness: ClassVar[str] = "one Kronecker product a layer"
    choose_it_for: ClassVar[str] = "layered networks too large for a matrix"
    placing: ClassVar[tuple[str, ...]] = ("offload",)

    def __init__(
        self,
        *,
        approx: str = "expand",
        unsupported: str = "error",
        offload: str | os.PathLike[str] | None = None,
    ) -> None:
        self.approx = approx
        self.unsupported = unsupported
        self.offload = offload

    def check(self) -> None:
        """Raise where ``offload`` is no place for factors."""
        check_offload(self.offload)

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> SpectralInverse:
        """Compute the factors and their eigenbases."""
        return self.resume(A, hessian_perturbation, NOWHERE, verbose)

    def resume(
        self, A: LinearOperator, hessian_perturbation: float, checkpoint: Checkpoint, verbose: int = 0
    ) -> SpectralInverse:
        """Compute them from where ``checkpoint`` has them."""
        storage = storage_of(self.offload, A.device)
        factors = factors_of(A, self.approx, self.unsupported, verbose, checkpoint, storage)
        spectrum, parts = spectrum_of(factors, storage)
        bases = []
        found = decomposed(factors.blocks, checkpoint, storage)
        for block, part, (basis, eigenvalues) in zip(factors.blocks, parts, found, strict=True):
            bases.append(basis)
            part.copy_(with_penalty(block, basis, eigenvalues))
        sources = [_own(*each, storage.device) for each in zip(factors.blocks, bases, parts, strict=True)]
        layers = (factors, bases, spectrum, hessian_perturbation, storage)
        return inverse_of_layers(*layers, name=self.name, sources=sources).judged_by(A)


def factors_of(
    A: LinearOperator, approx: str, unsupported: str, verbose: int, checkpoint: Checkpoint, storage: Storage
) -> KroneckerFactors:
    """Return the factors of a layered curvature, for checked settings."""
    check_choice(approx, "approx", ["expand", "reduce"])
    check_choice(unsupported, "unsupported", ["error", "diagonal"])
    # An operator of one's own need know of none of these.
    further: dict[str, Any] = {"checkpoint": checkpoint} if checkpoint.keeps else {}
    if storage is not HERE:
        further["storage"] = storage
    return A.kronecker_factors(approx=approx, unsupported=unsupported, verbose=verbose, **further)


def decomposed(
    blocks: Sequence[KroneckerBlock], checkpoint: Checkpoint, storage: Storage
) -> Iterator[tuple[KroneckerBasis, torch.Tensor]]:
    """Yield each layer's eigenbasis and eigenvalues, flat; ValueError, with its name, where they are not finite.

    A basis is kept, not made again: another one of the same eigenspace may come out, and sums in it are of no use.
    """
    for j, block in enumerate(blocks):
        words = like({"right": block.right})["right"] + ("|None" if block.right.ndim == 1 else "")
        fields = {**like({"left": block.left}), "right": words, "eigenvalues": f"tensor[{block.index.numel()}]"}
        known = checkpoint.resumed(f"eigenbasis {j}", fields)
        if known is None:
            with naming_memory(f"The eigenbasis of {block.name}", "Try `params` with fewer parameters."):
                basis, eigenvalues = block.decompose(storage)
        else:
            left, right = storage.keep(known["left"], "inverse"), known["right"]
            right = None if right is None else storage.keep(right, "inverse")
            basis = KroneckerBasis(left, right, block.index.shape[-1])
            eigenvalues = known["eigenvalues"]
        if not all_finite(eigenvalues):
            hint = "Try dtype=torch.float64."
            raise ValueError(must_be(f"The eigenvalues of {block.name}", "finite", "NaN or infinity", hint))
        if checkpoint.keeps:
            # It holds them as long as it goes.
            eigenvalues = storage.keep(eigenvalues, "eigenvalues").to(eigenvalues.device)
        state = {"left": basis.left, "right": basis.right, "eigenvalues": eigenvalues}
        checkpoint.finish(f"eigenbasis {j}", state)
        yield basis, eigenvalues


def spectrum_of(factors: KroneckerFactors, storage: Storage) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return room for the eigenvalues, that of the rest filled, and each layer's part of it."""
    rest = without_rounding(factors.rest_diagonal) if len(factors.rest) else factors.rest_diagonal
    sizes = [block.index.numel() for block in factors.blocks]
    dtype = factors.blocks[0].left.dtype if factors.blocks else rest.dtype
    spectrum = storage.empty((sum(sizes) + len(rest),), dtype, rest.device, "inverse")
    *parts, last = spectrum.split([*sizes, len(rest)])
    last.copy_(rest)
    return spectrum, parts


def with_penalty(block: KroneckerBlock, basis: KroneckerBasis, eigenvalues: torch.Tensor) -> torch.Tensor:
    """Return e + diag(QᵀRQ), flat, with R the penalty: itself where it is one value; on the device of the e."""
    uniform = block.uniform_penalty
    if uniform is None and block.penalty is not None:
        return eigenvalues.reshape(-1) + basis.quadratic(block.penalty.to(eigenvalues.device))
    return eigenvalues.reshape(-1) + (uniform or 0.0)


def inverse_of_layers(
    factors: KroneckerFactors,
    bases: Sequence[Basis],
    spectrum: torch.Tensor,
    hessian_perturbation: float,
    storage: Storage,
    *,
    name: str,
    sources: Sequence[LinearOperator] | None = None,
) -> SpectralInverse:
    """Return the inverse of the layers' eigenbases and eigenvalues, and of the exact diagonal of the rest."""
    indices: list[torch.Tensor] = [block.index for block in factors.blocks]
    operators = list(sources or [])
    if rest := len(factors.rest):
        indices, bases = [*indices, factors.rest], [*bases, StandardBasis(rest)]
        operators.append(DiagonalMatrix(spectrum[-rest:].to(factors.rest.device)))
    basis = BlockBasis(bases, indices, storage)
    source = None if sources is None else BlockDiagonal(operators, order=basis.order)
    hint = 'Try curvature="ggn".'
    inverse = SpectralInverse(
        basis, spectrum, hessian_perturbation, name=name, source=source, hint=hint, storage=storage
    )
    # What no tensor of the inverse has taken is for others to use.
    storage.close()
    return inverse


def _own(
    block: KroneckerBlock, basis: KroneckerBasis, eigenvalues: torch.Tensor, device: torch.device | None
) -> LinearOperator:
    """Return G ⊗ A plus the penalty, from the factors themselves where the penalty allows it."""
    uniform = block.uniform_penalty
    if uniform is None:
        return Spectral(basis, eigenvalues, device=device)
    return Shifted(Kronecker(block.left, block.right, device), uniform)
