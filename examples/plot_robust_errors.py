"""
Robust standard errors
======================

Where the variance of the targets is not what a regression assumes, its standard errors are wrong; the sandwich
H⁻¹ (Σ gᵢgᵢᵀ) H⁻¹ is right all the same. Both are those of statsmodels, from the model that scikit-learn fitted.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import statsmodels.api as sm
from sklearn.linear_model import LinearRegression

from skinvert import HessianInverter

# %%
# Targets whose noise grows with the first column.
rng, n = np.random.default_rng(0), 600
names = ["size", "age", "rooms", "distance", "constant"]
X = np.c_[rng.lognormal(0, 0.4, n), rng.standard_normal((n, 3))]
y = X @ [1.0, -0.5, 0.3, 0.0] + 2 + X[:, 0] * rng.standard_normal(n)

# %%
# statsmodels and skinvert, each by the model and by the sandwich (HC0).
model = LinearRegression().fit(X, y)
inverter = HessianInverter("direct").fit(model, (X, y))
ours = {
    "model": np.sqrt(np.diag(inverter.covariance(dispersion="residual"))),
    "sandwich": np.sqrt(np.diag(inverter.covariance("sandwich"))),
}
design = sm.add_constant(X, prepend=False)
theirs = {"model": sm.OLS(y, design).fit().bse, "sandwich": sm.OLS(y, design).fit(cov_type="HC0").bse}
for kind in ours:
    print(f"{kind:<9} largest relative difference {np.max(np.abs(ours[kind] / theirs[kind] - 1)):.1e}")

# %%
# What is true: the scatter of the coefficients over 500 draws of the noise.
draws = [X @ model.coef_ + model.intercept_ + X[:, 0] * rng.standard_normal(n) for _ in range(500)]
scatter = np.std([np.linalg.lstsq(design, draw, rcond=None)[0] for draw in draws], axis=0)

# %%
# The model's error of the first coefficient is far too small; statsmodels' crosses lie on skinvert's bars.
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
places = np.arange(len(names))
for shift, kind, color in ((-0.2, "model", "C0"), (0.2, "sandwich", "C1")):
    ax.bar(places + shift, ours[kind], 0.38, color=color, alpha=0.7, label=f"{kind}, skinvert")
    ax.plot(places + shift, theirs[kind], "x", color="black", label="statsmodels" if kind == "model" else None)
ax.plot(places, scatter, "_", color="C3", markersize=40, markeredgewidth=2, label="scatter over 500 draws")
ax.set_xticks(places, names)
ax.set_ylabel("Standard error")
ax.set_ylim(0, 1.5 * scatter.max())
ax.legend(ncols=2, markerscale=0.5)

output = Path(__file__).parent / "output" / "robust_errors.png"
output.parent.mkdir(exist_ok=True)
figure.savefig(output, dpi=120)
