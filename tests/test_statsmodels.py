"""Standard errors of scikit-learn's models, and of the same in torch, are statsmodels'."""

import numpy as np
import pytest
import statsmodels.api as sm
from test_covariance import N, design, fitted, twin


def results(kind, **settings):
    X, targets = design()
    Z, y = np.c_[X, np.ones(N)], targets[kind]
    if kind == "linear":
        return sm.OLS(y, Z).fit(**settings)
    if kind == "logistic":
        return sm.Logit(y, Z).fit(tol=1e-14, maxiter=200, disp=0, **settings)
    return sm.GLM(y, Z, family=sm.families.Poisson()).fit(tol=1e-14, maxiter=200, **settings)


@pytest.mark.parametrize("kind", ["linear", "logistic", "poisson"])
@pytest.mark.parametrize("make", [lambda kind: fitted(kind)[0], twin], ids=["sklearn", "torch"])
def test_covariances(kind, make):
    inverter = make(kind)
    dispersion = "residual" if kind == "linear" else 1.0
    received = inverter.covariance(dispersion=dispersion)
    np.testing.assert_allclose(received, results(kind).cov_params(), rtol=1e-8, atol=1e-12)
    robust = results(kind, cov_type="HC0").cov_params()
    np.testing.assert_allclose(inverter.covariance("sandwich"), robust, rtol=1e-8, atol=1e-12)


def test_the_standard_error_of_a_mean():
    inverter, X, _ = fitted("linear")
    Z = np.c_[X[:5], np.ones(5)]
    scale = results("linear").scale
    variance = inverter.predictive_variance(X[:5], dispersion=scale)[:, 0]
    np.testing.assert_allclose(np.sqrt(variance), results("linear").get_prediction(Z).se_mean, rtol=1e-8)
