"""One model at θ, its training rows and the inverse of its curvature: what every score is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .._check import must_be
from .._memory import working_memory
from ..curvature import Objective, Sharded
from ..data import Batches, batches_of
from ..inverter import HessianInverter
from ..models import TorchTwiceDifferentiable
from ..system import System
from .measurements import Measurement, RowMeasurement, measurement_of
from .removal import FirstOrder, Newton, Removal
from .sides import RowSide, SetSide

__all__ = ["Fitted"]


@dataclass(frozen=True)
class Fitted:
    """A fitted inverter of one model, with model and data at hand.

    Parameters
    ----------
    inverter : HessianInverter
        Fitted on a model.
    removal : {"first_order", "newton"}
        How rows are removed.
    measurement : str, callable or list of callables
        What is measured on test rows.
    batch_size : int or None
        Test rows per pass.
    memory : int or None
        Bytes for the solutions that are held at once.
    verbose : int
        1 shows progress bars.
    """

    inverter: HessianInverter
    removal: str = "first_order"
    measurement: str | Measurement | Sequence[Measurement] = "loss"
    batch_size: int | None = None
    memory: int | None = None
    verbose: int = 0

    @property
    def objective(self) -> Objective:
        """L at θ, over the training rows."""
        if self.inverter.curvature_name_ == "gram":
            hint = "Fit it on a model and data: `fit(model, (X, y))`."
            raise TypeError(must_be("InfluenceFunction's inverter", "of a model", "one of plain rows", hint))
        curvature = self.inverter._at_hand("curvature_", "InfluenceFunction")
        if isinstance(curvature, Sharded):
            hint = (
                "For the scores of each rank's own rows: solve for the test gradients on every rank, and multiply by "
                "those rows' PerSampleGradient; docs/howto/distributed.md has an example."
            )
            must, got = "one of one process", "one of several, by process_group"
            raise ValueError(must_be("InfluenceFunction's inverter", must, got, hint))
        found: object = curvature.of_data
        if not isinstance(found, Objective):
            hint = "Its rows need losses of their own."
            raise TypeError(must_be("InfluenceFunction's model", "a TorchTwiceDifferentiable", "another", hint))
        found.model.check_unchanged()
        return found

    @property
    def model(self) -> TorchTwiceDifferentiable:
        """The model at θ."""
        return self.objective.model

    @property
    def system(self) -> System:
        """What the inverter was fitted to."""
        own, batches = self.inverter, self.objective.batches
        return System(
            own.curvature_,
            own.curvature_name_,
            own.n_samples_,
            model=own._model,
            batches=batches,
            layout=own._layout,
        )

    @property
    def training(self) -> RowSide:
        """The training rows' losses, each times wᵢ/Σw."""
        return self._rows_of_training("loss", self.objective.weight_sum)

    @property
    def measured_training(self) -> RowSide:
        """What is measured, of the training rows, each counting once."""
        return self._rows_of_training(self.measurement, None)

    def is_of(self, data: object, sample_weight: object) -> bool:
        """Return whether the inverter was fitted to these rows; ValueError where it was to others.

        False where that is not known: without data, or of batches that are cut in another way.
        """
        if data is None:
            return False
        own, size = self.objective.batches, self.inverter.batch_size
        given = batches_of(self.model, data, batch_size=size, sample_weight=sample_weight, needs_row_order=True)
        same = given.checksums == own.checksums
        if given.n_samples != own.n_samples or (_cuts(given) == _cuts(own) and not same):
            got = f"{given.n_samples} rows for {own.n_samples}" if given.n_samples != own.n_samples else "others"
            hint = "Scores are of the inverter's own rows. Give these, or the inverter unfitted."
            raise ValueError(must_be("Data beside a frozen inverter", "the rows that it was fitted on", got, hint))
        if sample_weight is not None and not np.array_equal(_weights(given), _weights(own)):
            raise ValueError(must_be("sample_weight beside a frozen inverter", "that of its fit", "another"))
        return same

    def test(self, data: object) -> RowSide | SetSide:
        """Return what is measured of test data, in any form that ``fit`` takes."""
        rows = batches_of(self.model, data, batch_size=self.batch_size, needs_row_order=True)
        chosen = measurement_of(self.measurement, self.model, self.objective.scale, rows)
        if isinstance(chosen, RowMeasurement):
            return RowSide(self.model, rows, chosen, verbose=self.verbose)
        return SetSide(self.model, rows, chosen)

    def remove(self) -> Removal:
        """Return what removal does to θ."""
        if self.removal == "newton":
            return Newton(self.training, self.solve, self.objective)
        return FirstOrder(self.training, self.solve)

    def solve(self, B: torch.Tensor) -> torch.Tensor:
        """Return A⁻¹ of rows B (k, p)."""
        x: torch.Tensor = self.inverter.solve(B).x
        return x

    @property
    def most(self) -> int:
        """How many rows' gradients and solutions are held at once."""
        budget = working_memory() if self.memory is None else self.memory
        # Gradients, solutions, and what a solve makes of them.
        return max(1, budget // (4 * self.model.num_params * self.model.dtype.itemsize))

    def _rows_of_training(self, measurement: str | Measurement | Sequence[Measurement], total: float | None) -> RowSide:
        objective = self.objective
        rows: Batches = objective.batches
        chosen = measurement_of(measurement, objective.model, objective.scale, rows)
        if not isinstance(chosen, RowMeasurement):
            must = "one value a row for the training rows' own"
            raise ValueError(must_be("measurement", must, "one of all rows together", 'Try measurement="loss".'))
        return RowSide(objective.model, rows, chosen, total, self.verbose)


def _cuts(batches: Batches) -> list[tuple[int, ...]]:
    """Return how many rows each batch has."""
    return [found[-1][0][:1] for found in batches.checksums]


def _weights(batches: Batches) -> np.ndarray:
    return np.ones(batches.n_samples) if batches.sample_weight is None else batches.sample_weight
