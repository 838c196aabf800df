"""An estimator that is, once it has chosen, the inverter of its choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import scipy.sparse.linalg
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from .._arguments import check_fits_rows
from .._fitting import SharesModel
from .._lazy import StaysLazy, is_lazy
from .._shown import Shown
from .._types import Array, Data, RandomState, State
from ..files import Saved
from ..inverter import HessianInverter
from ..methods.base import InverseOperator, Method
from ..methods.quadratic import QuadraticForms
from ..operators import LinearOperator
from ..results import InverseHvpResult, Spectrum
from ..system import Function

__all__ = ["ChosenInverter"]


class ChosenInverter(Shown, SharesModel, StaysLazy, Saved):
    """Has the fitted attributes and the methods of ``inverter_``, where they say what they do.

    An attribute that the inverter lacks (``eigenvalues_`` of a method without a spectrum) is lacking here too.
    """

    inverter_: HessianInverter

    @property
    def n_features_in_(self) -> int:
        """The width p of a right-hand side."""
        return self.inverter_.n_features_in_

    @property
    def feature_names_in_(self) -> np.ndarray:
        """Names of the columns of plain rows, where those came in a frame."""
        return self.inverter_.feature_names_in_

    @property
    def n_samples_(self) -> int:
        """Number of training rows."""
        return self.inverter_.n_samples_

    @property
    def method_(self) -> Method | Function:
        """What inverts."""
        return self.inverter_.method_

    @property
    def inverse_(self) -> InverseOperator | None:
        """The fitted inverse."""
        return self.inverter_.inverse_

    @property
    def curvature_(self) -> LinearOperator:
        """H itself."""
        return self.inverter_.curvature_

    @property
    def curvature_name_(self) -> str:
        """Which curvature."""
        return self.inverter_.curvature_name_

    @property
    def hessian_perturbation_(self) -> float:
        """λ."""
        return self.inverter_.hessian_perturbation_

    @property
    def parameter_names_(self) -> list[str]:
        """Names of the selected parameters."""
        return self.inverter_.parameter_names_

    @property
    def gradient_norm_(self) -> float:
        """‖∇L(θ)‖."""
        return self.inverter_.gradient_norm_

    @property
    def eigenvalues_(self) -> np.ndarray:
        """Eigenvalues of H, ascending, where the method computed a spectrum."""
        return self.inverter_.eigenvalues_

    def transform(self, X: Array) -> Array:
        """Return the solutions of (H + λI) x = b, as ``HessianInverter.transform``."""
        chosen = self._chosen()
        chosen._check_namespace(X, "transform", type(self).__name__)
        return chosen.transform(X) if is_lazy(X) else chosen.solve(X).x

    def fit_transform(self, X: Array, y: Array | None = None, **fit_params: Array) -> Array:
        """Fit plain rows and return the solutions for them."""
        check_fits_rows(X, self.model)
        return self.fit(X, y, **fit_params).transform(X)

    def solve(self, b: Array, x0: Array | None = None) -> InverseHvpResult:
        """Return the solutions and what is known of them, as ``HessianInverter.solve``."""
        return self._chosen().solve(b, x0)

    def path(self, b: Array, hessian_perturbations: Iterable[float]) -> Array:
        """Return the solutions at many λ, as ``HessianInverter.path``."""
        return self._chosen().path(b, hessian_perturbations)

    def spectrum(self, *, of: str = "curvature", n_probes: int = 10, steps: int = 60) -> Spectrum:
        """Return the eigenvalues of H or their density, as ``HessianInverter.spectrum``."""
        return self._chosen().spectrum(of=of, n_probes=n_probes, steps=steps)

    def quadratic(self, G: Array, B: Array | None = None, *, one_sided: bool = False) -> QuadraticForms:
        """Return gᵀ(H + λI)⁻¹b with bounds, as ``HessianInverter.quadratic``."""
        return self._chosen().quadratic(G, B, one_sided=one_sided)

    def log_det(self) -> float:
        """Return log det(H + λI), as ``HessianInverter.log_det``."""
        return self._chosen().log_det()

    def sample(self, n_samples: int = 1, random_state: RandomState = None) -> np.ndarray:
        """Return draws from N(0, (H + λI)⁻¹), as ``HessianInverter.sample``."""
        return self._chosen().sample(n_samples, random_state)

    def covariance(self, kind: str = "hessian", *, dispersion: float | str = 1.0) -> np.ndarray:
        """Return the covariance of the trained parameters, as ``HessianInverter.covariance``."""
        return self._chosen().covariance(kind, dispersion=dispersion)

    def predictive_variance(
        self, X: Data, y: Data | None = None, *, outputs: str = "each", dispersion: float | str = 1.0
    ) -> Array:
        """Return the variance of the model's outputs, as ``HessianInverter.predictive_variance``."""
        return self._chosen().predictive_variance(X, y, outputs=outputs, dispersion=dispersion)

    def log_evidence(self, *, dispersion: float = 1.0) -> float:
        """Return the log marginal likelihood by Laplace, as ``HessianInverter.log_evidence``."""
        return self._chosen().log_evidence(dispersion=dispersion)

    def inverse_transform(self, X: Array) -> Array:
        """Return (H + λI) x for rows x (k, p), with the operator that the method inverts."""
        self._chosen()._check_namespace(X, "inverse_transform", type(self).__name__)
        return self._chosen().inverse_transform(X)

    def residual(self, b: Array, x: Array) -> Array:
        """Return ‖(H + λI)x − b‖ / ‖b‖ (k,) against the exact curvature."""
        return self._chosen().residual(b, x)

    def score(self, X: Data, y: Data | None = None, sample_weight: Array | None = None) -> float:
        """Return the held-out quadratic of rows that were not fitted, as ``HessianInverter.score``."""
        return self._chosen().score(X, y, sample_weight)

    def get_feature_names_out(self, input_features: object = None) -> np.ndarray:
        """Return the p names of the columns, as ``HessianInverter.get_feature_names_out``."""
        return self._chosen().get_feature_names_out(input_features)

    def flatten(self, mapping: Mapping[str, Array] | Iterable[Array]) -> Array:
        """Return rows (k, p) of named tensors or arrays, as ``HessianInverter.flatten``."""
        return self._chosen().flatten(mapping)

    def unflatten(self, x: Array) -> State:
        """Return named tensors or arrays ``(k, *shape)`` of rows (k, p)."""
        return self._chosen().unflatten(x)

    def aslinearoperator(self) -> scipy.sparse.linalg.LinearOperator:
        """Return (H + λI)⁻¹ as a ``scipy.sparse.linalg.LinearOperator``."""
        return self._chosen().aslinearoperator()

    def __sklearn_tags__(self) -> Tags:
        """Say what ``HessianInverter`` says."""
        tags = super().__sklearn_tags__()
        tags.array_api_support = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.target_tags.required = False
        return tags

    def _chosen(self) -> HessianInverter:
        check_is_fitted(self, "inverter_")
        return self.inverter_

    def _serves_alone(self) -> bool:
        inverter = vars(self).get("inverter_")
        return inverter is not None and inverter._serves_alone()
