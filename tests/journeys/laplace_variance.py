"""Laplace's users: the variance of a regression's predictions."""

import numpy as np
from sklearn.linear_model import Ridge

from skinvert import HessianInverter

rng = np.random.default_rng(0)
X, sigma, delta = rng.standard_normal((60, 5)), 0.4, 3.0
y = 2 + X @ rng.standard_normal(5) + sigma * rng.standard_normal(60)
X_new = 2 * rng.standard_normal((10, 5))
model = Ridge(alpha=delta * sigma**2).fit(X, y)  # the prior of each coefficient is N(0, 1/δ)

# begin skinvert
laplace = HessianInverter("direct").fit(model, (X, y))
variance = laplace.predictive_variance(X_new, dispersion=sigma**2)
covariance = laplace.covariance(dispersion=sigma**2)
# end skinvert

# Bayesian linear regression in closed form, with a flat prior of the intercept.
design, design_new = np.c_[X, np.ones(60)], np.c_[X_new, np.ones(10)]
precision = design.T @ design / sigma**2 + np.diag([delta] * 5 + [0.0])
expected = np.einsum("ni,ij,nj->n", design_new, np.linalg.inv(precision), design_new)
np.testing.assert_allclose(covariance, np.linalg.inv(precision), rtol=1e-9, atol=1e-14)
assert variance.shape == (10, 1)
np.testing.assert_allclose(variance[:, 0], expected, rtol=1e-9)
np.testing.assert_allclose(np.linalg.solve(precision, design.T @ y / sigma**2), [*model.coef_, model.intercept_])
