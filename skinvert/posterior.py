"""What a fitted inverter says beside solutions: quadratic forms with bounds, and the Gaussian with H + λI as precision.

Mixed into ``HessianInverter``, which says what is fitted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state

from ._autograd import ordinary
from ._check import check_number, must_be
from ._frames import check_inputs, columns_of
from ._memory import rows_within
from ._rows import Rows
from ._types import Array, Data, RandomState
from .covariance import checked_dispersion, evidence, output_variances, parameter_covariance
from .curvature import Curvature, Sharded
from .data import batches_of, holds_tensors, is_data, is_rows
from .methods.base import InverseOperator, Method
from .methods.quadratic import QuadraticForms
from .models import TorchTwiceDifferentiable
from .registry import InversionRegistry
from .results import Spectrum
from .system import Function, is_method

__all__ = ["Posterior", "own_spectrum"]


def own_spectrum(inverse: InverseOperator) -> Spectrum:
    """Return the eigenvalues of A as the method inverts it; TypeError where it knows none."""
    found = inverse.own_eigenvalues
    if found is None:
        must, hint = 'a method that knows its own, for of="inverse"', 'Try of="curvature".'
        raise TypeError(must_be("method", must, repr(inverse.name), hint))
    values = found.double().cpu().numpy()
    ends = (float(values[0]), 0.0), (float(values[-1]), 0.0)
    return Spectrum(values, np.full(len(values), 1 / len(values)), True, *ends)


class Posterior(ABC):
    """Quadratic forms of a fitted inverse, and the Gaussian that it is the covariance of."""

    method_: Method | Function
    n_samples_: int

    @ordinary
    def quadratic(self, G: Array, B: Array | None = None, *, one_sided: bool = False) -> QuadraticForms:
        r"""Return gᵀ(H + λI)⁻¹b of the exact H for all pairs of rows, with bounds that hold.

        Whatever the method inverts and however far it was run: solutions x are corrected by their true residuals r,

        .. math:: |g^T(H+λI)^{-1}b - (x_g^T b + r_g^T x_b)| ≤ ‖r_g‖ ‖r_b‖ / μ,

        with μ a lower bound of the eigenvalues of H + λI: λ and the least penalty of a curvature that is positive
        semi-definite by construction, what a second factorisation proves of a Hessian that ``"direct"`` inverts, and
        else unknown. Residuals are computed in float64 from the parameters and data as they were fitted, a float32
        model's too. Costs a solve and a product for each row, in float32 also a pass over the data, once.

        Parameters
        ----------
        G : array or tensor of shape (q, p)
            Rows g; test gradients, say.
        B : array or tensor of shape (k, p), default=None
            Rows b; None gives gᵀ(H + λI)⁻¹g of each row alone, self-influence, which its value never exceeds.
        one_sided : bool, default=False
            Solve for G alone: the bound is ‖r_g‖‖b‖/μ, and k may be large.

        Returns
        -------
        QuadraticForms
            ``values``, ``bounds``, ``lower`` and ``upper``, (q, k) or (q,), of G's kind and device, in float64.
            ``bounds`` are NaN where μ is not known, or H not at hand: an approximate or a float32 inverse that was
            loaded.

        Examples
        --------
        One step of conjugate gradients; the exact value is 4/2 + 4/4 = 3.

        >>> import numpy as np
        >>> from skinvert import HessianInverter
        >>> from skinvert.methods import CG
        >>> X = np.array([[np.sqrt(2.0), 0.0], [0.0, np.sqrt(6.0)]])  # H = XᵀX / n is diag(1, 3)
        >>> inverter = HessianInverter(CG(rtol=0.5), hessian_perturbation=1.0).fit(X)
        >>> forms = inverter.quadratic(np.array([[2.0, 2.0]]), np.array([[2.0, 2.0]]))
        >>> forms.values.round(3), forms.bounds.round(3), bool(abs(forms.values - 3.0) <= forms.bounds)
        (array([[2.64]]), array([[0.8]]), True)
        """
        with self._together("quadratic", of_all="curvature_" in vars(self)):
            inverse = self._certified("quadratic")
            g, b = self._rows(G, double=True), None if B is None else self._rows(B, double=True)
            forms = inverse.quadratic(g.tensor, None if b is None else b.tensor, one_sided=one_sided)
        forms = forms.times(2 * g.powers if b is None else g.powers[:, None] + b.powers)
        return QuadraticForms(**g.back_info(vars(forms)))

    @ordinary
    def log_det(self) -> float:
        """Return log det(H + λI) of the operator that the method inverts: an approximation's own for ``"kfac"``.

        Returns
        -------
        float
            Of the natural logarithm, summed in float64.

        Raises
        ------
        TypeError
            Where the method knows no root of H + λI; the error names those that do.
        ValueError
            Where H + λI is not positive definite.

        Examples
        --------
        >>> import numpy as np
        >>> from skinvert import HessianInverter
        >>> X = np.sqrt(2) * np.eye(2)  # H = XᵀX / n is the identity
        >>> HessianInverter("direct", hessian_perturbation=1.0).fit(X).log_det()  # log 4
        1.386...
        """
        return self._gaussian("log_det").log_det()

    @ordinary
    def sample(self, n_samples: int = 1, random_state: RandomState = None) -> np.ndarray:
        """Return draws from N(0, (H + λI)⁻¹), one per row, of the operator that the method inverts.

        The Laplace posterior of θ is θ̂ plus such a draw over √N, with N the factor between the mean loss and the
        negative log posterior, see ``covariance``: n for a negative log-likelihood without weights.

        Parameters
        ----------
        n_samples : int, default=1
            Number of draws.
        random_state : int, RandomState or None, default=None
            Of the draws.

        Returns
        -------
        ndarray of shape (n_samples, p)
            In the inverse's dtype; ``unflatten`` names its parts.

        Examples
        --------
        >>> import numpy as np
        >>> from skinvert import HessianInverter
        >>> X = np.sqrt(2) * np.eye(2)  # H = XᵀX / n is the identity
        >>> inverter = HessianInverter("direct", hessian_perturbation=3.0).fit(X)
        >>> bool(abs(inverter.sample(4000, random_state=0).std() - 0.5) < 0.02)
        True
        """
        n_samples = check_number(n_samples, "n_samples", owner="sample", low=1, integer=True)
        inverse, generator = self._gaussian("sample"), check_random_state(random_state)
        draws = torch.empty(n_samples, inverse.size, dtype=inverse.dtype, device=inverse.device)
        for part in draws.split(rows_within(5 * inverse.noise_size * 8, n_samples)):
            noise = generator.standard_normal((len(part), inverse.noise_size))
            part.copy_(inverse.root(torch.from_numpy(noise).to(part)))
        return draws.cpu().numpy()

    @ordinary
    def covariance(self, kind: str = "hessian", *, dispersion: float | str = 1.0) -> np.ndarray:
        r"""Return the covariance of the trained parameters θ̂.

        ``"hessian"``, right where the model is: (H + λI)⁻¹ / N. ``"sandwich"``, right where only its mean is (robust
        standard errors, HC0): (H + λI)⁻¹ (Σ wᵢ² gᵢgᵢᵀ / (Σw)²) (H + λI)⁻¹, with gᵢ = ∇ℓᵢ.

        N = Σ wᵢmᵢ / φ, with mᵢ what the mean loss lets row i weigh beside wᵢ: the class weight of its label, 0 where
        that is ignored, the sum of these over the tokens of a row, and 1 for all else.

        With λ = 0 at a minimum without a penalty these are statsmodels' covariances of ``OLS`` (``"residual"``),
        ``Logit`` and Poisson ``GLM``, and with ``cov_type="HC0"``. Costs p solves, and for ``"sandwich"`` a pass of
        per-sample gradients and n p²; the curvature should be the Hessian, or one that equals it. Of what the method
        inverts: an approximate one gives an approximate covariance.

        Parameters
        ----------
        kind : {"hessian", "sandwich"}, default="hessian"
            Which.
        dispersion : float or "residual", default=1.0
            φ > 0, with N times the mean loss the negative log-likelihood; no part of a sandwich. 1 for cross-entropy,
            Poisson and other losses that are one, 1/c where torch takes their mean over c outputs; for squared errors
            of variance σ² it is σ² with ½ (f − y)², as scikit-learn's models have it, and 2σ²/c with torch's mean over
            c outputs, ``"mse"``. ``"residual"`` estimates it from squared errors, 2 Σ wᵢℓᵢ / (c Σw − p), which is
            RSS / (n − p) for σ².

        Returns
        -------
        ndarray of shape (p, p)
            Its diagonal's roots are the standard errors, ``unflatten`` names them.

        References
        ----------
        White (1980), "A heteroskedasticity-consistent covariance matrix estimator and a direct test for
        heteroskedasticity", Econometrica 48; Huber (1967), "The behavior of maximum likelihood estimates under
        nonstandard conditions".

        Examples
        --------
        A mean of n values has variance σ²/n: here 2 / 4, and Σ (y − ȳ)² / n² = 6 / 16 without the division by n − 1.

        >>> from sklearn.linear_model import LinearRegression
        >>> from skinvert import HessianInverter
        >>> X, y = np.ones((4, 1)), np.array([0.0, 1.0, 2.0, 3.0]) * np.sqrt(6 / 5)
        >>> model = LinearRegression(fit_intercept=False).fit(X, y)
        >>> inverter = HessianInverter("direct").fit(model, (X, y))
        >>> inverter.covariance(dispersion="residual").round(6), inverter.covariance("sandwich").round(6)
        (array([[0.5]]), array([[0.375]]))
        """
        A = self._at_hand("curvature_", "covariance")
        share = checked_dispersion(dispersion, A) / self._n_observed()
        return parameter_covariance(self._judged("covariance"), A, kind, share)

    @ordinary
    def predictive_variance(
        self, X: Data, y: Data | None = None, *, outputs: str = "each", dispersion: float | str = 1.0
    ) -> Array:
        r"""Return the variance of the model's outputs that the uncertainty of θ̂ makes: J (H + λI)⁻¹ Jᵀ / N.

        J (c, p) is the Jacobian of a row's outputs (logits, not probabilities) at θ̂: the linearised Laplace
        approximation, with λ = δ / N for a prior of precision δ, and N as in ``covariance``. Costs c Jacobian rows and
        c solves a row.

        Parameters
        ----------
        X : array or tensor of shape (n, ...) or data
            Inputs, or data of pairs in any form that ``fit`` takes. A list is inputs for a model of scikit-learn or a
            pipeline, else batches.
        y : array of shape (n, ...), default=None
            Targets; their values do not count. None repeats the first of the training targets where these came as
            ``(X, y)``.
        outputs : {"each", "joint"}, default="each"
            The variance of each output, or the covariance of all c.
        dispersion : float or "residual", default=1.0
            φ, as in ``covariance``.

        Returns
        -------
        array or tensor of shape (n, c) or (n, c, c)
            Of X's kind.

        Examples
        --------
        With xᵀθ and ½ squared error J = xᵀ and H = XᵀX / n, here I.

        >>> from sklearn.linear_model import LinearRegression
        >>> from skinvert import HessianInverter
        >>> X, y = np.sqrt(2) * np.eye(2), np.array([1.0, 2.0])
        >>> model = LinearRegression(fit_intercept=False).fit(X, y)
        >>> HessianInverter("direct").fit(model, (X, y)).predictive_variance(np.array([[3.0, 4.0]]))
        array([[12.5]])
        """
        model = self._at_hand("_model", "predictive_variance")
        if not isinstance(model, TorchTwiceDifferentiable):
            must, hint = "one with outputs", "Subclass TorchTwiceDifferentiable."
            raise TypeError(must_be("The model for predictive_variance", must, type(model).__name__, hint))
        data: object = X
        if y is not None or (is_rows(X, model) if isinstance(X, list) else not is_data(X)):
            data = (X, self._some_targets(X) if y is None else y)
        check_inputs(data, columns_of(vars(self).get("_data")))
        A = self._at_hand("curvature_", "predictive_variance")
        share = checked_dispersion(dispersion, A) / self._n_observed()
        batches = batches_of(model, data, needs_row_order=True, hold=False)
        found = output_variances(self._factorised("predictive_variance"), model, batches, share, outputs)
        return found if holds_tensors(data) else found.cpu().numpy()

    @ordinary
    def log_evidence(self, *, dispersion: float = 1.0) -> float:
        r"""Return the logarithm of the marginal likelihood by Laplace's approximation at θ̂.

        .. math:: -N \tfrac{Σ_i w_iℓ_i}{Σ_i w_i} - \tfrac12 Σ_j δ_jθ_j² + \tfrac12 Σ_j \log δ_j
            - \tfrac12 \log\det P, \quad P = N (H + λI)

        with N as in ``covariance`` and the Gaussian prior about 0 that λ and the penalty stand for, of precision
        δⱼ = N (λ + penaltyⱼ): ``weight_decay=δ / N``, or ``hessian_perturbation=δ / N`` with no weight decay. From
        log p(D) ≈ log p(D | θ̂) + log p(θ̂) + (p/2) log 2π − ½ log det P, where the prior's and the integral's 2π cancel.
        It is laplace-torch's ``log_marginal_likelihood`` for classification; for squared errors of variance σ², which
        ℓ/φ knows up to a constant, add −(n c / 2) log 2πσ². ``path``-like sweeps: fit at each λ, or see ``spectrum``.

        Parameters
        ----------
        dispersion : float, default=1.0
            φ, as in ``covariance``, but a number: estimated, it would be another at each λ.

        Returns
        -------
        float
            The log evidence; larger is better.

        References
        ----------
        MacKay (1992), "Bayesian interpolation", Neural Computation 4, eq. 2.6; Immer, Bauer, Fortuin, Rätsch & Khan
        (2021), "Scalable marginal likelihood estimation for model selection in deep learning", eq. 6.

        Examples
        --------
        θ̂ = 0 fits y = 0: what is left is ½ log δ − ½ log(n + δ), here with n = δ = 2.

        >>> from sklearn.linear_model import LinearRegression
        >>> from skinvert import HessianInverter
        >>> X, y = np.ones((2, 1)), np.zeros(2)
        >>> model = LinearRegression(fit_intercept=False).fit(X, y)
        >>> HessianInverter("direct", hessian_perturbation=1.0).fit(model, (X, y)).log_evidence()  # -½ log 2
        -0.3465...
        """
        A = self._at_hand("curvature_", "log_evidence")
        return evidence(self._gaussian("log_evidence"), A, checked_dispersion(dispersion, None))

    # -- what the estimator says of itself ---------------------------------------------------------------------------

    @abstractmethod
    def _factorised(self, what: str, hint: str = ...) -> InverseOperator: ...

    @property
    @abstractmethod
    def _used(self) -> str: ...

    @abstractmethod
    def _judged(self, what: str, hint: str = ...) -> InverseOperator: ...

    @abstractmethod
    def _at_hand(self, name: str, what: str) -> Any: ...

    @abstractmethod
    def _rows(self, b: Array, *, double: bool = False) -> Rows: ...

    @abstractmethod
    def _together(self, step: str, *, of_all: bool | None = None) -> AbstractContextManager[None]: ...

    def _n_observed(self) -> float:
        """Return N at φ = 1; of plain rows, whose weights count in proportion alone, n."""
        A = self._at_hand("curvature_", "covariance")
        objective = A.objective if isinstance(A, Curvature | Sharded) else None
        return float(self.n_samples_) if objective is None else objective.n_observed

    def _some_targets(self, X: Any) -> Any:
        """Return as many targets as inputs: the first one of the training data, repeated."""
        data, n = vars(self).get("_data"), len(next(iter(X.values())) if isinstance(X, Mapping) else X)
        if not isinstance(data, tuple) or len(data) != 2 or isinstance(data[1], Mapping | tuple):
            hint = "Their values do not count."
            raise ValueError(must_be("y", "given where the training data were no (X, y)", "None", hint))
        y = data[1]
        return y[:1].repeat_interleave(n, 0) if isinstance(y, torch.Tensor) else np.repeat(np.asarray(y)[:1], n, 0)

    def _gaussian(self, what: str) -> InverseOperator:
        """Return the inverse, which has a root; TypeError that names the methods that do."""
        inverse = self._factorised(what)
        if not inverse.gaussian:
            kinds = [kind for kind in InversionRegistry.registry.values() if is_method(kind)]
            names = sorted(kind.name for kind in kinds if kind.gaussian)
            raise TypeError(must_be(f"method for {what}", f"one of {names}", self._used))
        return inverse

    def _certified(self, what: str) -> InverseOperator:
        """Return the inverse, held against the exact curvature where that is at hand, whatever ``check_residual``."""
        return self._factorised(what).judged_by(vars(self).get("curvature_"))
