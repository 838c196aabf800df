"""Why a row of a solve ended as it did: one closed list, each with its cure."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

__all__ = ["Reason", "reasons", "views"]


class Reason(IntEnum):
    """The entries of ``info["reason"]``; ``cure`` says what to try.

    Examples
    --------
    >>> Reason(3).name, Reason(3).cure
    ('NEGATIVE_CURVATURE', 'Try a larger hessian_perturbation, curvature="ggn", or method="minres" or "direct".')
    """

    #: The residual is within the tolerance.
    CONVERGED = 0
    #: The iterations were spent.
    MAX_ITERATIONS = 1
    #: The rounding of the dtype allows no smaller residual.
    STAGNATED = 2
    #: A + λI is not positive definite, and the method needs it to be.
    NEGATIVE_CURVATURE = 3
    #: A + λI is singular, and b has a part outside its range.
    SINGULAR = 4
    #: The solution is outside the range of the dtype.
    OUT_OF_RANGE = 5
    #: The method inverts an approximation, whose solution is not within the tolerance of the exact system.
    APPROXIMATE = 6
    #: The exact curvature is not at hand, or the residual was not asked for.
    NOT_JUDGED = 7

    @property
    def cure(self) -> str:
        """What to try."""
        return _CURES[self]


_CURES = {
    Reason.CONVERGED: "",
    Reason.MAX_ITERATIONS: "Try a larger `maxiter`, a preconditioner, or a larger hessian_perturbation.",
    Reason.STAGNATED: "Try dtype=torch.float64, or a larger hessian_perturbation or tolerance.",
    Reason.NEGATIVE_CURVATURE: ('Try a larger hessian_perturbation, curvature="ggn", or method="minres" or "direct".'),
    Reason.SINGULAR: "Try hessian_perturbation > 0, or a larger one.",
    Reason.OUT_OF_RANGE: "Try dtype=torch.float64, b of another scale, or a larger hessian_perturbation.",
    Reason.APPROXIMATE: 'Try a larger hessian_perturbation, a larger rank where it has one, or method="cg".',
    Reason.NOT_JUDGED: "Try a fit in this process, and check_residual=True.",
}


def reasons(converged: torch.Tensor, rest: Reason, *causes: tuple[Reason, torch.Tensor]) -> torch.Tensor:
    """Return the ``Reason`` of each row (k,), int8: CONVERGED, else the last cause that holds, else ``rest``.

    Examples
    --------
    >>> converged, negative = torch.tensor([True, False, False]), torch.tensor([False, False, True])
    >>> reasons(converged, Reason.MAX_ITERATIONS, (Reason.NEGATIVE_CURVATURE, negative))
    tensor([0, 1, 3], dtype=torch.int8)
    """
    found = torch.full(converged.shape, int(rest), dtype=torch.int8, device=converged.device)
    for reason, holds in causes:
        found[holds] = int(reason)
    found[converged] = int(Reason.CONVERGED)
    return found


def views(reason: torch.Tensor | np.ndarray) -> dict[str, torch.Tensor | np.ndarray]:
    """Return the entries of ``info`` that follow from ``reason`` (k,) alone, each bool (k,).

    ``stagnated``: no smaller residual is possible, by rounding or since A + λI is singular; ``negative_curvature``.

    Examples
    --------
    >>> views(torch.tensor([0, 3, 4], dtype=torch.int8))
    {'stagnated': tensor([False, False,  True]), 'negative_curvature': tensor([False,  True, False])}
    """
    return {
        "stagnated": (reason == Reason.STAGNATED) | (reason == Reason.SINGULAR),
        "negative_curvature": reason == Reason.NEGATIVE_CURVATURE,
    }
