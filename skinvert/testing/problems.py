"""Small problems with dense float64 matrices, on which the kit holds methods, curvatures and operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn

from ..curvature import CURVATURES, Gram, build_curvature
from ..data import Batches
from ..data import batches_of as batches_of_data
from ..methods.base import InverseOperator, Method
from ..models import TorchTwiceDifferentiable
from ..operators import LinearOperator
from .tabulated import Tabulated

__all__ = ["Problem", "batches_of", "dense", "fixed_network", "network", "problems_for", "rows"]

# Training rows: of no batch size below a multiple.
N = 23
# λ of the definite problems brings the condition to about this.
CONDITION = 50.0


@dataclass(frozen=True)
class Problem:
    """One operator A with its dense matrix, and a λ.

    Attributes
    ----------
    name : str
        For messages.
    A : LinearOperator
        What a method sees.
    H : ndarray of shape (p, p), float64
        A's matrix.
    shift : float
        λ.
    """

    name: str
    A: LinearOperator
    H: np.ndarray
    shift: float

    @property
    def matrix(self) -> np.ndarray:
        """A + λI."""
        return self.H + self.shift * np.eye(len(self.H))

    @property
    def definite(self) -> bool:
        """Whether A + λI is positive definite."""
        return bool(np.linalg.eigvalsh(self.matrix)[0] > 0)

    @property
    def semidefinite(self) -> bool:
        """Whether A has no negative eigenvalue beyond rounding."""
        values = np.linalg.eigvalsh(self.H)
        return bool(values[0] >= -1e-6 * abs(values[-1]))

    @property
    def condition(self) -> float:
        """max|eig| / min|eig| of A + λI."""
        values = np.abs(np.linalg.eigvalsh(self.matrix))
        return float(values.max() / values.min())

    def solutions(self, B: torch.Tensor) -> torch.Tensor:
        """Return the dense solutions (k, p), float64."""
        return torch.from_numpy(np.linalg.solve(self.matrix, B.double().cpu().numpy().T).T)

    def residuals(self, B: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """Return ‖(A + λI)x − b‖ / ‖b‖ (k,), by the dense matrix; ‖(A + λI)x‖ where b = 0."""
        b, x = B.double().cpu().numpy(), X.double().cpu().numpy()
        gap, size = np.linalg.norm(x @ self.matrix - b, axis=1), np.linalg.norm(b, axis=1)
        return torch.from_numpy(gap / np.where(size > 0, size, 1.0))

    def invert(self, method: Method, shift: float | None = None) -> InverseOperator:
        """Return the method's inverse, judged against A."""
        shift = self.shift if shift is None else shift
        return method.choose(self.A, shift).invert(self.A, shift).judged_by(self.A)

    def at(self, shift: float) -> Problem:
        """Return the problem at another λ."""
        return Problem(self.name, self.A, self.H, shift)


def problems_for(method: Method, dtype: torch.dtype = torch.float64) -> Iterator[Problem]:
    """Yield problems of each kind of operator that has the faces which ``method`` requires, positive definite first."""
    for name, A in _operators(dtype, tuple(CURVATURES)).items():
        if set(method.requires) <= A.faces:
            H = _matrix(A)
            values = np.linalg.eigvalsh(H)
            yield Problem(name, A, H, float(max(values.max() / CONDITION - values.min(), values.max() / CONDITION)))
            if values.min() < -1e-3 * values.max():
                yield Problem(f"{name}, indefinite", A, H, float(-values.min() / 2))


@cache
def _operators(dtype: torch.dtype, curvatures: tuple[str, ...]) -> dict[str, Tabulated]:
    if dtype != torch.float64:
        return {name: Tabulated(A, dtype) for name, A in _operators(torch.float64, curvatures).items()}
    model = fixed_network(dtype)
    batches = batches_of(model, 5)
    found: dict[str, LinearOperator] = {"plain rows": Gram(rows(9, 12, dtype))}
    found |= {name: build_curvature(name, model, batches) for name in curvatures}
    return {name: Tabulated(A) for name, A in found.items()}


@cache
def _matrix(A: LinearOperator) -> np.ndarray:
    return dense(A)


def dense(A: LinearOperator) -> np.ndarray:
    """Return the symmetric float64 matrix (p, p) of A, from its products alone."""
    matrix = A.apply(torch.eye(A.size, dtype=A.dtype, device=A.device)).double().cpu().numpy()
    return (matrix + matrix.T) / 2


def rows(k: int, p: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Return k Gaussian rows (k, p)."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((k, p))).to(dtype)


def network(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Return a small classifier that is not at a minimum, and its data ``(X, y)``."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return net, (rows(N, 3, dtype), torch.arange(N) % 3)


def fixed_network(dtype: torch.dtype = torch.float64) -> TorchTwiceDifferentiable:
    """Return that classifier with its loss and a penalty, at its θ."""
    return TorchTwiceDifferentiable(network(dtype)[0], "cross_entropy", weight_decay=0.1).at_point()


def batches_of(
    model: TorchTwiceDifferentiable,
    batch_size: int,
    sample_weight: np.ndarray | None = None,
    chosen: torch.Tensor | None = None,
) -> Batches:
    """Return the network's data, or the rows of these indices, in batches of so many rows."""
    X, y = network(model.dtype)[1]
    data = (X, y) if chosen is None else (X[chosen], y[chosen])
    return batches_of_data(model, data, batch_size=batch_size, sample_weight=sample_weight)
