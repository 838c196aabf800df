"""
The hypergradient of a ridge's λ
================================

How does the validation loss change with a hyperparameter? By the implicit function theorem dV/dα = −∇V(θ)ᵀ H⁻¹ ∂∇L/∂α,
one solve with the Hessian of the training loss: descent along it finds α without a grid.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import Ridge

from skinvert import HessianInverter, PerSampleGradient

# %%
# More columns than the noise allows: some penalty helps.
rng = np.random.default_rng(0)
X, X_val = rng.standard_normal((80, 40)), rng.standard_normal((200, 40))
theta = rng.standard_normal(40) * 0.3
y, y_val = X @ theta + 1.5 * rng.standard_normal(80), X_val @ theta + 1.5 * rng.standard_normal(200)


def validated(log_alpha):
    """Return the validation loss ½ mean (f − y)² and its derivative by log α."""
    alpha = np.exp(log_alpha)
    model = Ridge(alpha=alpha, fit_intercept=False).fit(X, y)
    gradient = PerSampleGradient(model).fit(X, y).transform((X_val, y_val)).mean(axis=0)
    # L = ½ mean (f − y)² + α/(2n) ‖θ‖², so that ∂∇L/∂ log α = α θ / n.
    change = alpha * model.coef_ / len(X)
    solved = HessianInverter("direct").fit(model, (X, y)).transform(change[None])[0]
    return 0.5 * np.mean((model.predict(X_val) - y_val) ** 2), -gradient @ solved


# %%
# Held against differences, then followed downhill.
step = 1e-5
for log_alpha in (0.0, 3.0):
    difference = (validated(log_alpha + step)[0] - validated(log_alpha - step)[0]) / (2 * step)
    print(
        f"α = {np.exp(log_alpha):5.1f}: hypergradient {validated(log_alpha)[1]:+.8f}, by differences {difference:+.8f}"
    )
steps = [0.0]
for _ in range(25):
    steps.append(steps[-1] - 2 * validated(steps[-1])[1])
print(f"after {len(steps) - 1} steps α = {np.exp(steps[-1]):.2f}, gradient {validated(steps[-1])[1]:+.1e}")

# %%
# The path of the descent on the curve that a grid would have searched.
grid = np.linspace(-1, 6, 60)
figure, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
ax.plot(np.exp(grid), [validated(value)[0] for value in grid], color="0.4", label="validation loss")
ax.plot(np.exp(steps), [validated(value)[0] for value in steps], "o", color="C0", markersize=4, label="descent")
ax.plot(np.exp(steps[-1]), validated(steps[-1])[0], "*", color="C3", markersize=12, label="where it ends")
ax.set(xlabel="α", ylabel="Validation loss", xscale="log")
ax.legend()

output = Path(__file__).parent / "output" / "hypergradient.png"
output.parent.mkdir(exist_ok=True)
figure.savefig(output, dpi=120)
