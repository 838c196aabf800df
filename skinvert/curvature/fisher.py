"""The Fisher of the labels that the model predicts: in closed form, or by labels sampled."""

from __future__ import annotations

from typing import ClassVar

import torch

from .._types import Batch
from ..models import OutputHessian, TorchTwiceDifferentiable, TwiceDifferentiable
from .draws import Drawn, Sampled, with_draws
from .ggn import GGN
from .objective import Objective
from .predictive import SampledHessian, predictive_of

__all__ = ["Fisher", "SampledFisher", "gauss_newton", "of_probabilities"]


def of_probabilities(model: TwiceDifferentiable) -> str | None:
    """Return "probabilities" or "log_probabilities" where the loss takes these for its outputs; None for others.

    The GGN depends on where the model ends and the loss begins. A loss of log-probabilities is linear in them, and the
    GGN zero; at probabilities it is the empirical Fisher. By logits, of the same model, it is the Fisher.
    """
    if not isinstance(model, TorchTwiceDifferentiable) or model.own_loss or model.loss is None:
        return None
    return None if model.loss.takes == "logits" else model.loss.takes


def gauss_newton(objective: Objective) -> GGN:
    """Return the GGN as it is by logits: the Fisher, of a loss of probabilities."""
    return GGN(objective) if of_probabilities(objective.model) is None else Fisher(objective)


class SampledFisher(Sampled):
    """Settings of the Fisher by sampled labels: ``HessianInverter(curvature=SampledFisher(n_samples=10))``.

    Its mean over seeds is ``curvature="fisher"``, which takes no samples; its cost is that of ``n_samples`` outputs,
    however many the model has. Each row of the data has its own draws, which no batch size changes.

    Parameters
    ----------
    n_samples : int, default=1
        Labels drawn per row, ≥ 1. The standard error falls with the root of n · n_samples.
    random_state : int, default=None
        Seed of the draws; None is the estimator's own, and 0 without one.

    Examples
    --------
    >>> SampledFisher(n_samples=100)
    SampledFisher(n_samples=100)
    """

    curvature: ClassVar[str] = "fisher"

    def drawn(self, objective: Objective, n_samples: int, seed: int) -> Fisher:
        """Return the Fisher by n_samples labels a row."""
        return Fisher(objective, n_samples, seed)


class Fisher(Drawn):
    r"""F = Σᵢ wᵢ s·E_{y∼p(·;xᵢ)}[∇log p ∇log pᵀ] / Σᵢ wᵢ + penalty, for a loss ℓ = −s·log p + const.

    s is 1 for ``cross_entropy``, ``nll`` and ``poisson_nll``, 2/c for ``mse`` over c outputs (unit variance), 1/c for
    ``bce_with_logits``, and 1 for scikit-learn's ½ ‖f − y‖². The expectation is over the labels that the model itself
    predicts; class weights and ignored targets stay those of the true ones. It equals the GGN where the output Hessian
    of the loss does not depend on the label: ``cross_entropy``, squared errors, ``bce_with_logits`` and ``poisson_nll``
    of logarithms. For ``nll`` of log-probabilities it is that of ``cross_entropy``, where the GGN, of a loss linear in
    them, is zero.

    Parameters
    ----------
    objective : Objective
        Model, data and denominators.
    n_labels : int or None
        Labels drawn per row; None takes the expectation in closed form.
    seed : int
        Of the draws.

    References
    ----------
    Martens (2020), "New insights and perspectives on the natural gradient method", secs. 5 and 9.2.
    """

    name: ClassVar[str] = "fisher"
    of_the_loss: ClassVar[bool] = False

    def __init__(self, objective: Objective, n_labels: int | None = None, seed: int = 0) -> None:
        batch, _ = next(iter(objective.batches))
        predictive = predictive_of(objective.model, objective.model.forward(batch), batch)
        self.n_draws, self._of_data = n_labels, objective
        if n_labels is not None:
            objective = with_draws(objective, (n_labels, predictive.labels), seed)
        super().__init__(objective)

    def closed_hessian(self, outputs: torch.Tensor, batch: Batch) -> OutputHessian:
        """Return the Fisher in the outputs: columns of sampled labels, or the closed form."""
        predictive = predictive_of(self.objective.model, outputs, self.data_of(batch))
        if self.n_draws is None:
            return predictive.fisher()
        return SampledHessian(predictive, self.draws_of(batch, predictive.labels))
