"""The Gauss–Newton matrix by random signs: a backward pass a draw, however many outputs there are."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from .._types import Batch
from ..models import FactoredHessian, OutputHessian
from .draws import Drawn, Sampled, with_draws
from .objective import Objective

__all__ = ["SampledGGN", "SignedGGN"]


class SampledGGN(Sampled):
    r"""Settings of the GGN by random signs: ``HessianInverter("ekfac", curvature=SampledGGN())``.

    With ∇²_f ℓᵢ = SᵢSᵢᵀ, each row takes the mean of ``n_samples`` squares (Sᵢ ε)(Sᵢ ε)ᵀ, ε of random signs, whose
    expectation is SᵢSᵢᵀ: its mean over seeds is ``curvature="ggn"``. It costs ``n_samples`` backward passes where that
    takes one an output, and serves every loss that the GGN does. Where the model is sure of its labels it is nearer
    than as many draws of ``SampledFisher``, to which nearly every row then gives nothing and a few give much.

    Parameters
    ----------
    n_samples : int, default=1
        Draws of signs a row, ≥ 1. The standard error falls with the root of n · n_samples.
    random_state : int, default=None
        Seed of the draws; None is the estimator's own, and 0 without one. No batch size changes a row's draws.

    References
    ----------
    Martens, Sutskever & Swersky (2012), "Estimating the Hessian by back-propagating curvature": the same at the
    outputs alone, whose Jacobian is exact here.

    Examples
    --------
    The outputs θ of one row, each with the second derivative 2/c = 1: SεεᵀSᵀ has ones on the diagonal, and signs beside
    it, which the mean over draws takes to 0.

    >>> import torch
    >>> from skinvert import HessianInverter
    >>> net = torch.nn.Linear(1, 2, bias=False)
    >>> data = torch.ones(1, 1), torch.zeros(1, 2)
    >>> one, many = (
    ...     HessianInverter("direct", 1.0, curvature=SampledGGN(n), loss="mse").fit(net, data).curvature_.to_dense()
    ...     for n in (1, 10_000)
    ... )
    >>> one.abs()
    tensor([[1., 1.],
            [1., 1.]])
    >>> many.round(decimals=1).abs()
    tensor([[1., 0.],
            [0., 1.]])
    """

    curvature: ClassVar[str] = "ggn"

    def drawn(self, objective: Objective, n_samples: int, seed: int) -> SignedGGN:
        """Return the GGN by n_samples draws of signs a row."""
        return SignedGGN(objective, n_samples, seed)


class SignedGGN(Drawn):
    """The GGN with Sᵢ of each row in place of as many columns as it draws, each a sum of Sᵢ's under random signs.

    Parameters
    ----------
    objective : Objective
        Model, data and denominators.
    n_draws : int
        Of a row.
    seed : int
        Of the draws.
    """

    def __init__(self, objective: Objective, n_draws: int, seed: int = 0) -> None:
        # What the exact GGN asks of the loss is asked here too, of batches without draws.
        super().__init__(objective)
        self._of_data = objective
        self.objective = with_draws(objective, (n_draws, self.rank), seed, signs=True)
        self.n_draws = self.rank = n_draws

    def closed_hessian(self, outputs: torch.Tensor, batch: Batch) -> OutputHessian | None:
        """Return the estimate in the outputs; before there are draws what the loss has in closed form."""
        if self.n_draws is None:
            return super().closed_hessian(outputs, batch)
        exact = self.exact_hessian(outputs, batch[0])
        signs = self.draws_of(batch, exact.rank)
        columns = [exact.combined(signs[:, j]) for j in range(self.n_draws)]
        return FactoredHessian(torch.stack(columns, dim=2) / math.sqrt(self.n_draws))
