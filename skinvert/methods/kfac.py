"""Kronecker-factored curvature, inverted layer by layer in the eigenbases of its factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from .._check import all_finite, check_choice, must_be
from .._checkpoint import NOWHERE, Checkpoint, like
from .._memory import naming_memory
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

    def __init__(self, *, approx: str = "expand", unsupported: str = "error") -> None:
        self.approx = approx
        self.unsupported = unsupported

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> SpectralInverse:
        """Compute the factors and their eigenbases."""
        return self.resume(A, hessian_perturbation, NOWHERE, verbose)

    def resume(
        self, A: LinearOperator, hessian_perturbation: float, checkpoint: Checkpoint, verbose: int = 0
    ) -> SpectralInverse:
        """Compute them from where ``checkpoint`` has them."""
        factors = factors_of(A, self.approx, self.unsupported, verbose, checkpoint)
        found = zip(factors.blocks, decomposed(factors.blocks, checkpoint), strict=True)
        pairs = [(basis, with_penalty(block, basis, eigenvalues)) for block, (basis, eigenvalues) in found]
        sources = [_own(block, *pair) for block, pair in zip(factors.blocks, pairs, strict=True)]
        inverse = inverse_of_layers(factors, pairs, hessian_perturbation, name=self.name, sources=sources)
        return inverse.judged_by(A)


def factors_of(
    A: LinearOperator, approx: str, unsupported: str, verbose: int, checkpoint: Checkpoint
) -> KroneckerFactors:
    """Return the factors of a layered curvature, for checked settings."""
    check_choice(approx, "approx", ["expand", "reduce"])
    check_choice(unsupported, "unsupported", ["error", "diagonal"])
    if not checkpoint.keeps:
        # An operator of one's own need not know of any.
        return A.kronecker_factors(approx=approx, unsupported=unsupported, verbose=verbose)
    return A.kronecker_factors(approx=approx, unsupported=unsupported, verbose=verbose, checkpoint=checkpoint)


def decomposed(blocks: Sequence[KroneckerBlock], checkpoint: Checkpoint) -> list[tuple[KroneckerBasis, torch.Tensor]]:
    """Return each layer's eigenbasis and eigenvalues, flat; ValueError, with its name, where they are not finite.

    A basis is kept, not made again: another one of the same eigenspace may come out, and sums in it are of no use.
    """
    found = []
    for j, block in enumerate(blocks):
        right = like({"right": block.right})["right"] + ("|None" if block.right.ndim == 1 else "")
        fields = {**like({"left": block.left}), "right": right, "eigenvalues": f"tensor[{block.index.numel()}]"}
        known = checkpoint.resumed(f"eigenbasis {j}", fields)
        if known is None:
            with naming_memory(f"The eigenbasis of {block.name}", "Try `params` with fewer parameters."):
                basis, eigenvalues = block.decompose()
        else:
            basis = KroneckerBasis(known["left"], known["right"], block.index.shape[-1])
            eigenvalues = known["eigenvalues"]
        if not all_finite(eigenvalues):
            hint = "Try dtype=torch.float64."
            raise ValueError(must_be(f"The eigenvalues of {block.name}", "finite", "NaN or infinity", hint))
        state = {"left": basis.left, "right": basis.right, "eigenvalues": eigenvalues}
        checkpoint.finish(f"eigenbasis {j}", state)
        found.append((basis, eigenvalues))
    return found


def with_penalty(block: KroneckerBlock, basis: KroneckerBasis, eigenvalues: torch.Tensor) -> torch.Tensor:
    """Return e + diag(QᵀRQ), flat, with R the penalty: itself where it is one value."""
    uniform = block.uniform_penalty
    if uniform is None and block.penalty is not None:
        return eigenvalues.reshape(-1) + basis.quadratic(block.penalty)
    return eigenvalues.reshape(-1) + (uniform or 0.0)


def inverse_of_layers(
    factors: KroneckerFactors,
    pairs: Sequence[tuple[KroneckerBasis, torch.Tensor]],
    hessian_perturbation: float,
    *,
    name: str,
    sources: Sequence[LinearOperator] | None = None,
) -> SpectralInverse:
    """Return the inverse of the layers' eigenbases and eigenvalues, and of the exact diagonal of the rest."""
    indices: list[torch.Tensor] = [block.index for block in factors.blocks]
    bases: list[Basis] = [basis for basis, _ in pairs]
    spectra = [eigenvalues for _, eigenvalues in pairs]
    operators = list(sources or [])
    if len(factors.rest):
        diagonal = without_rounding(factors.rest_diagonal)
        indices, spectra = [*indices, factors.rest], [*spectra, diagonal]
        bases, operators = [*bases, StandardBasis(len(diagonal))], [*operators, DiagonalMatrix(diagonal)]
    source = None if sources is None else BlockDiagonal(operators, indices)
    hint, basis, spectrum = 'Try curvature="ggn".', BlockBasis(bases, indices), torch.cat(spectra)
    return SpectralInverse(basis, spectrum, hessian_perturbation, name=name, source=source, hint=hint)


def _own(block: KroneckerBlock, basis: KroneckerBasis, eigenvalues: torch.Tensor) -> LinearOperator:
    """Return G ⊗ A plus the penalty, from the factors themselves where the penalty allows it."""
    uniform = block.uniform_penalty
    return Spectral(basis, eigenvalues) if uniform is None else Shifted(Kronecker(block.left, block.right), uniform)
