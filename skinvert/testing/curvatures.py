"""What every curvature of a model must keep: one operator, whatever the batches, weights, penalty and blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch

from ..curvature import build_curvature
from ..inverter import HessianInverter
from ..models import TorchTwiceDifferentiable
from ..operators import LinearOperator
from .claims import claim, quiet, raise_faults
from .operators import OPERATOR_CHECKS
from .problems import N, batches_of, dense, network

__all__ = ["CURVATURE_CHECKS", "check_curvature"]


def check_curvature(name: str) -> None:
    """Hold a curvature, by the name under which it is registered, to what every curvature must keep.

    On a small network: all that ``check_operator`` asks, in float64 and float32; the same operator whatever the batch
    size; a weight of 2 as a row given twice and 0 as one left out; the penalty as its diagonal; and through
    ``HessianInverter``, the solution of its matrix and a score.

    Parameters
    ----------
    name : str
        In the registry of curvatures.

    Raises
    ------
    AssertionError
        With one line for each check that failed.

    Examples
    --------
    >>> check_curvature("ggn")
    """
    raise_faults(name, f"curvature {name!r}", CURVATURE_CHECKS)


def check_is_an_operator(name: str) -> None:
    """Hold it to the contract of operators, in float64 and float32."""
    for dtype in (torch.float64, torch.float32):
        A = _built(name, 5, dtype)
        for check in OPERATOR_CHECKS:
            check(A)


def check_batches_do_not_matter(name: str) -> None:
    """Hold the same matrix for batches of one row, of as many as there are classes, ragged ones, and one of all."""
    expected = dense(_built(name, N))
    for size in (1, 3, 5, N - 1):
        _near(dense(_built(name, size)), expected, f"the matrix at batch_size={size} is that of all rows at once")


def check_weights_count_rows(name: str) -> None:
    """Hold that a weight of 2 is a row given twice, 0 one left out, and that only proportions count."""
    counts = np.arange(N) % 3
    rows = torch.from_numpy(np.repeat(np.arange(N), counts))
    weighted = dense(_built(name, 5, sample_weight=0.5 * counts))
    _near(weighted, dense(_built(name, 5, rows=rows)), "weights are numbers of rows")


def check_penalty_is_a_diagonal(name: str) -> None:
    """Hold that weight decay adds its diagonal, and nothing else."""
    A, without = _built(name, 5, weight_decay=0.3), _built(name, 5, weight_decay=0.0)
    _near(dense(A) - dense(without), 0.3 * np.eye(A.size), "weight decay μ adds μI")


def check_inverter_takes_it(name: str) -> None:
    """Hold ``HessianInverter`` to a dense solve of its matrix, whole and by blocks, and its score to a number."""
    net, (X, y) = network()
    H = dense(_built(name, 5))
    shift = float(np.abs(np.linalg.eigvalsh(H)).max())
    b = torch.eye(len(H), dtype=torch.float64)
    with quiet():
        inverter = HessianInverter("direct", shift, curvature=name, loss="cross_entropy", weight_decay=0.1)
        inverter.fit(net, (X, y))
        expected = np.linalg.inv(H + shift * np.eye(len(H)))
        _near(inverter.transform(b).numpy(), expected, "`direct` solves its system")
        claim(inverter.curvature_name_ == name, f"curvature_name_ is {name!r}", inverter.curvature_name_)
        score = inverter.score((X, y))
        claim(np.isfinite(score), "the score of a definite matrix is a number", score)
        blocks = inverter.set_params(blocks="layer").fit(net, (X, y)).transform(b).numpy()
        # A layer's own is not always its part of H: what is relative to a whole gradient, say.
        layers = [dense(_built(name, 5, params=f"{index}.*")) for index in (0, 2)]
        expected = np.linalg.inv(scipy.linalg.block_diag(*layers) + shift * np.eye(len(H)))
        _near(blocks, expected, "`blocks` inverts the layers' own matrices")


CURVATURE_CHECKS: list[Callable[[str], None]] = [
    check_is_an_operator,
    check_batches_do_not_matter,
    check_weights_count_rows,
    check_penalty_is_a_diagonal,
    check_inverter_takes_it,
]


def _built(
    name: str,
    batch_size: int,
    dtype: torch.dtype = torch.float64,
    *,
    weight_decay: float = 0.1,
    sample_weight: np.ndarray | None = None,
    rows: torch.Tensor | None = None,
    params: str | None = None,
) -> LinearOperator:
    model = TorchTwiceDifferentiable(network(dtype)[0], "cross_entropy", weight_decay).at_point(params)
    return build_curvature(name, model, batches_of(model, batch_size, sample_weight, rows))


def _near(received: np.ndarray, expected: np.ndarray, what: str) -> None:
    gap, size = float(np.linalg.norm(received - expected)), float(np.linalg.norm(expected))
    claim(gap <= 1e-8 * size, what, f"a difference of {gap:.3g} in {size:.3g}")
