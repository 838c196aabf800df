"""Kronecker-factored curvature, inverted layer by layer in the eigenbases of its factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from .._check import check_choice, check_hessian_perturbation
from ..operators import (
    BlockDiagonal,
    DiagonalMatrix,
    Eigenbasis,
    Kronecker,
    KroneckerBlock,
    KroneckerFactors,
    LinearOperator,
    Rotated,
    Shifted,
)
from ..results import InverseHvpResult
from .base import InverseOperator, Method, default_tolerance, relative_residual, warn_not_converged
from .null_space import invert_spectrum, warn_of_indefinite, warn_of_null_part

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

    >>> from skinvert.operators import KroneckerBlock, KroneckerFactors
    >>> one = torch.ones(1, 1)
    >>> class Layered(DiagonalMatrix):
    ...     def kronecker_factors(self, approx, unsupported, verbose=0):
    ...         block = KroneckerBlock("fc", torch.zeros(1, 1, dtype=torch.long), 2 * one, 3 * one, None)
    ...         return KroneckerFactors((block,), torch.empty(0, dtype=torch.long), torch.empty(0), None)
    >>> KFAC().invert(Layered(torch.tensor([6.0])), 2.0).solve(torch.tensor([[4.0]])).x
    tensor([[0.5000]])
    """

    name: ClassVar[str] = "kfac"
    requires: ClassVar[tuple[str, ...]] = ("kronecker_factors",)
    default_curvature: ClassVar[str] = "ggn"
    cost: ClassVar[str] = "c backward passes once; (d + i) d i a layer and row"
    memory: ClassVar[str] = "2 (d² + i²) a layer"
    exactness: ClassVar[str] = "one Kronecker product a layer"
    choose_it_for: ClassVar[str] = "layered networks too large for a matrix"

    def __init__(self, *, approx: str = "expand", unsupported: str = "error") -> None:
        self.approx = approx
        self.unsupported = unsupported

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> KroneckerInverse:
        """Compute the factors and their eigenbases."""
        factors = factors_of(A, self.approx, self.unsupported, verbose)
        pairs = [block.decompose() for block in factors.blocks]
        spectrum = [rotated(block, *pair) for block, pair in zip(factors.blocks, pairs, strict=True)]
        blocks = [_own(block, pair) for block, pair in zip(factors.blocks, spectrum, strict=True)]
        inverse = KroneckerInverse(placed(factors, blocks), placed(factors, spectrum), hessian_perturbation, self.name)
        return inverse.judged_by(A)


class KroneckerInverse(InverseOperator):
    """(A + λI)⁻¹ of a block-diagonal A with known eigenbases.

    Eigenvalues of A + λI within rounding of their block's largest are left out (the pseudo-inverse), and a right-hand
    side with a part in their span is warned of; with A positive semi-definite and λ > 0 none is. Negative ones are
    inverted as they are, with a warning.

    Parameters
    ----------
    curvature : BlockDiagonal
        A, whose products judge the solutions.
    spectrum : BlockDiagonal
        The same A by its eigenbases: blocks ``Rotated`` and ``DiagonalMatrix``.
    hessian_perturbation : float
        λ.
    """

    _fields: ClassVar[dict[str, str]] = {
        "curvature": "LinearOperator",
        "spectrum": "LinearOperator",
        "hessian_perturbation": "float",
        "name": "str",
        "judges": "bool|missing",
        "inverted": "LinearOperator",
        "lost": "LinearOperator",
        "n_lost": "int",
        "positive_definite": "bool",
    }

    approximate = True
    curvature: BlockDiagonal

    def __init__(
        self, curvature: BlockDiagonal, spectrum: BlockDiagonal, hessian_perturbation: float, name: str = "kfac"
    ) -> None:
        self.curvature, self.spectrum, self.name = curvature, spectrum, name
        self.hessian_perturbation = check_hessian_perturbation(hessian_perturbation)
        shift = self.hessian_perturbation
        found = [invert_spectrum(_eigenvalues(block), shift, block.size) for block in spectrum.operators]
        self.inverted = spectrum.with_operators(
            [_of_eigenvalues(block, each.inverse) for block, each in zip(spectrum.operators, found, strict=True)]
        )
        self.lost = spectrum.with_operators(
            [
                _of_eigenvalues(block, each.lost.to(spectrum.dtype))
                for block, each in zip(spectrum.operators, found, strict=True)
            ]
        )
        self.n_lost = sum(int(each.lost.sum()) for each in found)
        self.positive_definite = all(each.positive_definite for each in found)
        if any(each.indefinite for each in found):
            least = f"the approximation has the eigenvalue {min(each.least for each in found):.3g}"
            hint = 'Try curvature="ggn".'
            warn_of_indefinite(least, self.hessian_perturbation, "The solution is no minimiser.", hint)

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the solutions alone, without a residual."""
        return self.inverted.apply(V)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions.

        ``info`` holds ``residual`` (k,) against the exact curvature, ``converged`` (k,) by it,
        ``residual_of_approximation`` (k,), and ``approximate`` True.
        """
        X, tolerance = self.apply(B), default_tolerance(B.dtype)
        own = relative_residual(self.operator, B, X)
        outside = torch.zeros_like(own, dtype=torch.bool)
        if self.n_lost:
            outside = self.lost.apply(B).norm(dim=1) > tolerance * B.norm(dim=1)
            what = f"The approximate A + λI is singular ({self.n_lost} of {self.size} eigenvalues are zero)"
            warn_of_null_part(what, outside, "Try hessian_perturbation > 0.")
        hint = "Rounding does not allow less. Try a larger hessian_perturbation or dtype=torch.float64."
        warn_not_converged(self.name, own[~outside], own[~outside] <= tolerance, tolerance, hint)
        return InverseHvpResult(X, self.verdict(B, X, own, outside))

    def at(self, hessian_perturbation: float) -> KroneckerInverse:
        """Return the inverse at another λ, from the same eigenbases."""
        other = KroneckerInverse(self.curvature, self.spectrum, hessian_perturbation, self.name)
        return other.judged_as(self)


def factors_of(A: Any, approx: str, unsupported: str, verbose: int) -> KroneckerFactors:
    """Return the factors of a layered curvature, for checked settings."""
    check_choice(approx, "approx", ["expand", "reduce"])
    check_choice(unsupported, "unsupported", ["error", "diagonal"])
    return A.kronecker_factors(approx=approx, unsupported=unsupported, verbose=verbose)


def rotated(block: KroneckerBlock, basis: Eigenbasis, eigenvalues: torch.Tensor) -> Rotated:
    """Return Q diag(e + diag(QᵀRQ)) Qᵀ, with R the penalty."""
    uniform = block.uniform_penalty
    if uniform is None and block.penalty is not None:
        return Rotated(basis, eigenvalues + basis.quadratic(block.penalty))
    return Rotated(basis, eigenvalues + (uniform or 0.0))


def placed(factors: KroneckerFactors, operators: Sequence[LinearOperator]) -> BlockDiagonal:
    """Return the layers' operators, and the exact diagonal of the rest, where their parameters lie."""
    indices = [block.index for block in factors.blocks]
    if not len(factors.rest):
        return BlockDiagonal(operators, indices)
    return BlockDiagonal([*operators, DiagonalMatrix(factors.rest_diagonal)], [*indices, factors.rest])


def _own(block: KroneckerBlock, spectral: Rotated) -> LinearOperator:
    """Return G ⊗ A plus the penalty, from the factors themselves where the penalty allows it."""
    uniform = block.uniform_penalty
    return spectral if uniform is None else Shifted(Kronecker(block.left, block.right), uniform)


def _eigenvalues(block: Any) -> torch.Tensor:
    return block.entries if isinstance(block, DiagonalMatrix) else block.eigenvalues


def _of_eigenvalues(block: Any, eigenvalues: torch.Tensor) -> LinearOperator:
    """Return the operator of other eigenvalues along the eigenvectors of a block."""
    return DiagonalMatrix(eigenvalues) if isinstance(block, DiagonalMatrix) else Rotated(block.basis, eigenvalues)
