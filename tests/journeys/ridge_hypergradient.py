"""Who tunes a penalty by its gradient: how the validation loss of a ridge regression changes with alpha."""

import numpy as np
from sklearn.linear_model import Ridge

from skinvert import HessianInverter, PerSampleGradient

rng = np.random.default_rng(0)
theta = rng.standard_normal(20)
X, X_valid = rng.standard_normal((50, 20)), rng.standard_normal((40, 20))
y, y_valid = 1 + X @ theta + rng.standard_normal(50), 1 + X_valid @ theta + rng.standard_normal(40)


def validation(alpha):
    return np.mean((Ridge(alpha=alpha).fit(X, y).predict(X_valid) - y_valid) ** 2) / 2


alpha = 5.0
model = Ridge(alpha=alpha).fit(X, y)

# begin skinvert
inverter = HessianInverter("direct").fit(model, (X, y))
b = PerSampleGradient(model).fit(X, y).transform((X_valid, y_valid)).mean(axis=0, keepdims=True)
change = inverter.flatten({"coef": model.coef_ / len(X), "intercept": 0.0})  # of ∇L, by alpha
hypergradient = float(-(inverter.transform(b) @ change.T).item())
# end skinvert

# Central differences of refits.
step = 1e-4
expected = (validation(alpha + step) - validation(alpha - step)) / (2 * step)
np.testing.assert_allclose(hypergradient, expected, rtol=1e-7)
