"""Kronecker-factored curvature, inverted layer by layer in the eigenbases of its factors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import scipy.linalg
import torch

from .._validation import check_choice
from ..block_operators import BlockDiagonal, Eigenbasis, Kronecker, KroneckerBlock, KroneckerFactors, Rotated
from ..operators import Diagonal, LinearOperator, Shifted
from ..results import InverseHvpResult
from .base import InverseOperator, Method, relative_residual

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
    every sample (positions) counts once a sample. Scale and shift of norms (torch's own, BatchNorm in eval mode, and
    modules named ...Norm with one weight an entry) have the curvature's exact diagonal. In every chunk of the data the
    factors' product is held against the derivative by the weights themselves.

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

    >>> from skinvert.block_operators import KroneckerBlock, KroneckerFactors
    >>> one = torch.ones(1, 1)
    >>> class Layered(Diagonal):
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
        return KroneckerInverse(placed(factors, blocks), placed(factors, spectrum), hessian_perturbation)


class KroneckerInverse(InverseOperator):
    """(A + λI)⁻¹ of a block-diagonal A with known eigenbases.

    Eigenvalues of A + λI within rounding of their block's largest are left out (the pseudo-inverse), and a right-hand
    side with a part in their span is warned of.

    Parameters
    ----------
    curvature : BlockDiagonal
        A, whose products judge the solutions.
    spectrum : BlockDiagonal
        The same A by its eigenbases: blocks ``Rotated`` and ``Diagonal``.
    hessian_perturbation : float
        λ.
    """

    _fields: ClassVar[dict[str, str]] = {
        "curvature": "LinearOperator",
        "spectrum": "LinearOperator",
        "shift": "float",
        "inverted": "LinearOperator",
        "positive_definite": "bool",
    }

    def __init__(self, curvature: BlockDiagonal, spectrum: BlockDiagonal, hessian_perturbation: float) -> None:
        self.curvature, self.spectrum, self.shift = curvature, spectrum, float(hessian_perturbation)
        pairs = [_inverted(block, self.shift) for block in spectrum.operators]
        self.inverted = spectrum.with_operators([operator for operator, _ in pairs])
        self.positive_definite = all(definite for _, definite in pairs)

    @property
    def operator(self) -> LinearOperator:  # type: ignore[override]
        """A + λI, with A the approximation."""
        return Shifted(self.curvature, self.shift)

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the solutions alone, without a residual."""
        return self.inverted.apply(V)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions.

        ``info`` holds ``residual`` (k,) against the approximation, ``converged`` (k,), and ``approximate`` True.
        """
        X = self.apply(B)
        residual = relative_residual(self.operator, B, X)
        converged = residual <= {torch.float32: 1e-3}.get(B.dtype, 1e-6)
        outside = int((~converged).sum())
        if outside and not self.positive_definite:
            warnings.warn(
                f"The approximate A + λI is singular and {outside} of {len(B)} right-hand sides have a part outside "
                "its range: the pseudo-inverse leaves it out. Try hessian_perturbation > 0.",
                scipy.linalg.LinAlgWarning,
                stacklevel=4,
            )
        return InverseHvpResult(X, {"residual": residual, "converged": converged, "approximate": True})

    def at(self, hessian_perturbation: float) -> KroneckerInverse:
        """Return the inverse at another λ, from the same eigenbases."""
        return KroneckerInverse(self.curvature, self.spectrum, hessian_perturbation)


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
    return BlockDiagonal([*operators, Diagonal(factors.rest_diagonal)], [*indices, factors.rest])


def _own(block: KroneckerBlock, spectral: Rotated) -> LinearOperator:
    """Return G ⊗ A plus the penalty, from the factors themselves where the penalty allows it."""
    uniform = block.uniform_penalty
    return spectral if uniform is None else Shifted(Kronecker(block.left, block.right), uniform)


def _inverted(block: Any, shift: float) -> tuple[LinearOperator, bool]:
    """Return the pseudo-inverse of a block plus λ, and whether it is positive definite."""
    diagonal = isinstance(block, Diagonal)
    values = (block.entries if diagonal else block.eigenvalues) + shift
    # The entries of a diagonal are known to relative precision; the eigenvalues of two `eigh` are not.
    # Each group of a grouped layer has its own.
    sides = 0 if diagonal else sum(values.shape[-2:])
    largest = values.abs().max() if diagonal else values.abs().amax((-2, -1), keepdim=True)
    cut = sides * torch.finfo(values.dtype).eps * largest
    inverse = torch.where(values > cut, 1 / values, 0.0)
    definite = bool((values > cut).all())
    return (Diagonal(inverse) if diagonal else Rotated(block.basis, inverse)), definite
