"""What an ``InfluenceFunction`` says of the training rows themselves, and of predictions without each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Self

import numpy as np
import torch

from .._autograd import ordinary
from .._check import check_choice, check_number, must_be
from .._checkpoint import Checkpoint
from .._types import Array, Data
from .diagnostics import Diagnostics, diagnose, leverage
from .fitted import Fitted
from .jackknife import jackknife_plus
from .left_out import predictions_left_out

__all__ = ["RowStatistics"]

SCALES = ("link", "response")


class RowStatistics(ABC):
    """The statistics of training rows that users of linear models know, from a fitted inverter."""

    index_: np.ndarray

    @ordinary
    def leverage(self) -> np.ndarray:
        """Return (n_train,) the leverages: the diagonal of the hat matrix of a linear regression, for any convex loss.

        tr(Fᵢ A⁻¹ Fᵢᵀ), FᵢᵀFᵢ = (wᵢ/Σw) Jᵢᵀ(∇²_f ℓᵢ)Jᵢ the row's own part of the GGN: from 0 to 1 for each output, where
        A is the GGN plus a penalty and λ; in sum the (effective) number of parameters. Rows near 1 decide their own
        prediction: there first-order scores are far too small.

        Examples
        --------
        >>> from sklearn.linear_model import LinearRegression
        >>> from skinvert import InfluenceFunction
        >>> X, y = np.array([[1.0], [2.0]]), np.array([1.0, 3.0])
        >>> model = LinearRegression(fit_intercept=False).fit(X, y)
        >>> InfluenceFunction().fit(model, (X, y)).leverage().round(6).tolist()  # x² / Σx²
        [0.2, 0.8]
        """
        return leverage(self._alone("leverage")).cpu().numpy()

    @ordinary
    def diagnostics(self) -> Diagnostics:
        """Return leverage, studentised residuals, Cook's distance, DFFITS and DFBETAS of a regression with one output.

        For squared error, logistic and Poisson regression, of scikit-learn's models or torch's; by one step of
        Newton's method, whatever ``removal`` is. Without a penalty they are those of statsmodels. Of a network they are
        those of the model linearised at θ, by ``curvature="ggn"``.

        Returns
        -------
        Diagnostics
            Arrays (n_train,), DFBETAS (n_train, p); ``to_frame()`` has them with the training rows' labels.

        Raises
        ------
        ValueError, TypeError
            Of several outputs; a loss that says nothing of the targets' scatter; an inverse that is not the GGN's.

        Examples
        --------
        The mean of three numbers: leverage 1/3, and without the 4 the others are 1 and 1 themselves.

        >>> from sklearn.linear_model import LinearRegression
        >>> from skinvert import InfluenceFunction
        >>> X, y = np.ones((3, 1)), np.array([1.0, 1.0, 4.0])
        >>> model = LinearRegression(fit_intercept=False).fit(X, y)
        >>> found = InfluenceFunction().fit(model, (X, y)).diagnostics()
        >>> found.dispersion, found.cooks_distance.round(6).tolist()
        (3.0, [0.25, 0.25, 1.0])
        """
        fitted = self._alone("diagnostics")
        names = fitted.inverter.get_feature_names_out()
        return replace(diagnose(fitted), index=self.index_, parameter_names=names)

    @ordinary
    def loo_predict(self, *, scale: str = "link") -> np.ndarray:
        """Return the outputs of each training row at the parameters that training without it is predicted to give.

        For the price of one fit: a solve a row, by ``removal="newton"`` one for each of its outputs beside it, and no
        row but itself is evaluated. fᵢ + Jᵢ stepᵢ: by Newton's step what refits give for least squares with or without
        a ridge penalty, yᵢ − eᵢ/(1 − hᵢ), or ``cross_val_predict(model, X, y, cv=LeaveOneOut())``; an approximation
        for other losses; to first order fᵢ − hᵢeᵢ, too small by 1 − hᵢ. Of a network they are linear in the step, by
        ``curvature="ggn"`` and a small ``hessian_perturbation``.

        Parameters
        ----------
        scale : {"link", "response"}, default="link"
            ``"link"``: the module's outputs, logits or logarithms where the loss takes these. ``"response"``: the mean
            of the targets that they stand for, as ``predict`` of a regression and ``predict_proba`` give it; of two
            classes by one logit the probability of the second. TypeError for a loss that names no mean.

        Returns
        -------
        ndarray of shape (n_train, ...)
            In the shape of the outputs: one column for a scikit-learn model of one output. Of an ensemble the mean.

        Examples
        --------
        >>> from sklearn.linear_model import LinearRegression
        >>> from skinvert import InfluenceFunction
        >>> X, y = np.ones((3, 1)), np.array([1.0, 1.0, 4.0])
        >>> model = LinearRegression(fit_intercept=False).fit(X, y)
        >>> newton = InfluenceFunction(removal="newton").fit(model, (X, y))
        >>> newton.loo_predict().ravel().round(6).tolist()  # the mean of the others
        [2.5, 2.5, 1.0]
        """
        check_choice(scale, "scale", SCALES)
        found = self._mean(lambda member, _: predictions_left_out(member._fitted(), scale))
        return found.cpu().numpy()

    @ordinary
    def jackknife_plus(self, X: Data, *, alpha: float = 0.1) -> Array:
        r"""Return jackknife+ prediction intervals (n_test, 2) of a regression with one real target, lower and upper.

        From the ⌊α(n + 1)⌋-th smallest of μ₍ᵢ₎(x) − Rᵢ to the ⌈(1 − α)(n + 1)⌉-th smallest of μ₍ᵢ₎(x) + Rᵢ, with μ₍ᵢ₎
        the model without training row i and Rᵢ = \|yᵢ − μ₍ᵢ₎(xᵢ)\|: on the scale of y, as ``loo_predict`` finds them.
        With n refits they cover a new target with probability 1 − 2α at least, and 1 − α as a rule; here refits are
        predicted: exact by ``removal="newton"`` for least squares with or without a ridge penalty, to first order too
        narrow where rows have leverage.

        Parameters
        ----------
        X : array, tensor, frame or sparse matrix of shape (n_test, ...), or data
            Inputs, as ``predict_without`` takes them; targets beside them do not count.
        alpha : float, default=0.1
            In (0, 1).

        Returns
        -------
        array or tensor of shape (n_test, 2)
            Infinite where α(n + 1) < 1: n is too small. Training rows of weight 0 do not count.

        References
        ----------
        Barber, Candès, Ramdas & Tibshirani (2021), "Predictive inference with the jackknife+".

        Examples
        --------
        >>> from sklearn.linear_model import LinearRegression
        >>> from skinvert import InfluenceFunction
        >>> X, y = np.ones((3, 1)), np.array([1.0, 1.0, 4.0])
        >>> model = LinearRegression(fit_intercept=False).fit(X, y)
        >>> newton = InfluenceFunction(removal="newton").fit(model, (X, y))
        >>> newton.jackknife_plus(X[:1], alpha=0.5).round(6).tolist()  # of 2.5 ± 1.5, 2.5 ± 1.5, 1 ± 3
        [[1.0, 4.0]]
        """
        alpha = check_number(alpha, "alpha", low=0.0, high=1.0)
        if not 0 < alpha < 1:
            raise ValueError(must_be("alpha", "in (0, 1)", alpha))
        data = self._test_data(X, None)
        return self._back(jackknife_plus(self._alone("jackknife_plus"), data, alpha), data)

    @abstractmethod
    def _members(self) -> list[Self]: ...

    @abstractmethod
    def _fitted(self) -> Fitted: ...

    @abstractmethod
    def _mean(self, of: Callable[[Self, Checkpoint], torch.Tensor]) -> torch.Tensor: ...

    @abstractmethod
    def _test_data(self, X: object, y: object) -> object: ...

    @abstractmethod
    def _back(self, found: torch.Tensor, data: object) -> Array: ...

    def _alone(self, what: str) -> Fitted:
        if len(self._members()) > 1:
            raise TypeError(must_be(what, "asked of one model", "an ensemble", f"Try `members_[0].{what}()`."))
        return self._fitted()
