"""How an inverter is fitted: what its settings and data make a system of, and the inverse of that.

Mixed into ``HessianInverter``, whose settings these are.
"""

from __future__ import annotations

import os
from abc import ABC
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import validate_data

from ._arguments import check_fit_arguments, check_method, refuse_model_settings
from ._check import check_choice, check_shift, must_be
from ._checkpoint import NOWHERE, Checkpoint
from ._distributed import Ranks
from ._namespaces import like_rows, namespace_of, to_numpy
from ._types import Array, Autocast, Decay, Device, DType, Globs, LossLike, Partition, RandomState, TrainedModel
from .checkpoint import check_checkpoint, open_checkpoint
from .curvature import Sampled
from .data import as_data
from .methods.base import Method
from .models import TwiceDifferentiable, as_model, is_model
from .persistence import require_present
from .perturbation import check_perturbation, resolve
from .registry import find_method
from .system import Function, System, assemble, check_same_columns

__all__ = ["Fitting"]


class Fitting(ABC):
    """The fit of an inverter from its settings."""

    method: str | Method
    hessian_perturbation: float | str
    curvature: str | Sampled
    model: TrainedModel
    loss: LossLike
    weight_decay: Decay
    params: Globs
    blocks: Partition
    batch_size: int | None
    device: Device
    dtype: DType
    autocast: Autocast
    random_state: RandomState
    check_residual: bool
    checkpoint: str | os.PathLike[str] | None
    verbose: int
    method_: Method | Function
    eigenvalues_: Array
    # The processes that are fitted together; None where this one is alone.
    _ranks: Ranks | None = None

    def _fit_at(self, X: object, y: object, sample_weight: object) -> None:
        check_method(self.method)
        check_fit_arguments(X, y, self.model)
        shift = check_perturbation(self.hessian_perturbation, "HessianInverter")
        if self._ranks is not None:
            own = {name: vars(self)[name] for name in ("params", "blocks", "autocast", "check_residual")}
            self._ranks.meet("fit", {"hessian_perturbation": shift, **own})
        check_choice(self.check_residual, "check_residual", [True, False])
        if is_model(X):
            system = self._model_system(X, y, sample_weight)
        elif self.model is not None:
            system = self._model_system(self.model, as_data(X, y), sample_weight)
        else:
            system = self._rows_system(X, y, sample_weight)
        self._keep(system, shift)
        if system.layout is None and "eigenvalues_" in vars(self):
            self.eigenvalues_ = like_rows(X, self.eigenvalues_)

    def _keep(self, system: System, setting: float | str) -> None:
        """Invert a system at the λ that is set, and keep both."""
        (shift,) = resolve([setting], system.curvature, self.random_state)
        self._layout, self._model = system.layout, system.model
        if system.layout is not None and system.gradient_norm is not None:
            self.parameter_names_, self.gradient_norm_ = list(system.layout.names), system.gradient_norm
        self.n_samples_, self.curvature_name_ = system.n_samples, system.curvature_name
        self.curvature_, self.n_features_in_ = system.curvature, system.curvature.size
        self.hessian_perturbation_ = check_shift(shift, system.curvature.dtype)
        self.inverse_ = None
        if isinstance(self.method_, Method):
            checkpoint = self._checkpoint(self.method_, system, setting)
            self.method_, self.inverse_ = system.invert(self.method_, shift, self.verbose, checkpoint)
            if self.inverse_.eigenvalues is not None:
                self.eigenvalues_ = self.inverse_.eigenvalues.cpu().numpy()
            checkpoint.remove()

    def _checkpoint(self, method: Method, system: System, shift: float | str) -> Checkpoint:
        if self.checkpoint is None:
            return NOWHERE
        names = ("curvature", "loss", "blocks", "batch_size", "autocast", "random_state")
        settings = {"hessian_perturbation": shift, **{name: vars(self)[name] for name in names}}
        return open_checkpoint(self.checkpoint, method, system, settings, self.verbose)

    def _model_system(self, model: object, data: object, sample_weight: object) -> System:
        if data is None:
            raise ValueError(must_be("fit(model, data)'s data", "given", "None", "Try fit(model, (X, y))."))
        model, loss = require_present(model, "model"), require_present(self.loss, "loss")
        adapted = as_model(model, loss, self.weight_decay)
        self.method_, self._data = find_method(self.method, type(adapted), self.random_state), data
        return self._assembled(adapted, data, sample_weight)

    def _rows_system(self, X: Any, y: object, sample_weight: object) -> System:
        home = X.device if isinstance(X, torch.Tensor) else torch.device("cpu")
        self._namespace = namespace_of(X)
        least = 1 if self._ranks is None else 0
        X = validate_data(self, to_numpy(X), dtype=[np.float64, np.float32], ensure_min_samples=least)
        if self._ranks is not None:
            names = {"": list(vars(self).get("feature_names_in_", ()))}
            check_same_columns(self._ranks, names, empty=not len(X))
        self.method_, self._data = find_method(self.method, None, self.random_state), None
        if y is not None:
            refuse_model_settings(self.loss, self.weight_decay, self.params)
        return self._assembled(torch.from_numpy(np.array(X, order="C", copy=True)), None, sample_weight, home)

    def _assembled(
        self,
        model_or_rows: TwiceDifferentiable | torch.Tensor,
        data: object,
        sample_weight: object,
        home: torch.device | None = None,
    ) -> System:
        check_checkpoint(self.checkpoint, self.method_, together=self._ranks is not None)
        if isinstance(self.method_, Method):
            self.method_.check()
        return assemble(
            model_or_rows,
            data,
            method=self.method_,
            curvature=self.curvature,
            params=self.params,
            blocks=self.blocks,
            batch_size=self.batch_size,
            device=home if self.device is None else self.device,
            dtype=self.dtype,
            sample_weight=sample_weight,
            random_state=self.random_state,
            verbose=self.verbose,
            ranks=self._ranks,
            autocast=self.autocast,
        )
