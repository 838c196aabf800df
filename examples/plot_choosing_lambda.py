"""
Choosing λ
==========

A curvature of few rows is a poor guide along directions that they hardly span; λ holds the inverse back there. The
held-out score says how well an inverse serves gradients of rows that it has not seen, and chooses λ for it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn import Linear, Sequential, Tanh, functional

from skinvert import HessianInverterCV, PerSampleGradient
from skinvert.plotting import PathDisplay, SpectrumDisplay

# %%
# A small network, trained on 1,000 digits; its curvature is taken from 300 of them.
torch.manual_seed(0)
torch.set_num_threads(1)
pixels, digits = load_digits(return_X_y=True)
X, y = torch.tensor(pixels[:1000] / 16), torch.tensor(digits[:1000])
net = Sequential(Linear(64, 8), Tanh(), Linear(8, 10)).double()
optimizer = torch.optim.Adam(net.parameters(), 1e-2, weight_decay=1e-4)
for _ in range(200):
    optimizer.zero_grad()
    functional.cross_entropy(net(X), y).backward()
    optimizer.step()

# %%
# One factorisation a fold serves every λ.
shifts = [10.0**k for k in range(-4, 3)]
search = HessianInverterCV(shifts, cv=4, loss="cross_entropy", curvature="ggn").fit(net, (X[:300], y[:300]))
print(f"λ = {search.hessian_perturbation_:g}, score {search.best_score_:.3f}")

# %%
# Scores with their standard deviation over the folds, and what the solutions are worth; then where λ lies among the
# eigenvalues: those far below it are as good as cut off.
b = PerSampleGradient(net, loss="cross_entropy").fit_transform(X[300:320], y[300:320])
figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
PathDisplay.from_estimator(search, b, ax=axes[0])
SpectrumDisplay.from_estimator(search, ax=axes[1])

output = Path(__file__).parent / "output" / "choosing_lambda.png"
output.parent.mkdir(exist_ok=True)
figure.savefig(output, dpi=120)
