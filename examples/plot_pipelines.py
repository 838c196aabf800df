"""
Pipelines that mean something
=============================

Rows of per-sample gradients are ordinary rows, and XᵀX/n of them is the empirical Fisher: so a fitted inverter is the
last step of a pipeline, alone, after a random projection, or in TRAK's form.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.random_projection import SparseRandomProjection
from torch.nn import Linear, Sequential, Tanh, functional

from skinvert import HessianInverter, PerSampleGradient

# %%
# A network on digits: 1,200 to train on, the others to ask about.
torch.manual_seed(0)
torch.set_num_threads(1)
pixels, digits = load_digits(return_X_y=True)
X, y = torch.tensor(pixels / 16), torch.tensor(digits)
train, test = (X[:1200], y[:1200]), (X[1200:], y[1200:])
net = Sequential(Linear(64, 16), Tanh(), Linear(16, 10)).double()
optimizer = torch.optim.Adam(net.parameters(), 1e-2)
for _ in range(150):
    optimizer.zero_grad()
    functional.cross_entropy(net(train[0]), train[1]).backward()
    optimizer.step()

# %%
# The empirical Fisher's inverse, whole and on 512 random projections: each maps (X, y) to rows (E + λI)⁻¹ g.
whole = make_pipeline(PerSampleGradient(net, loss="cross_entropy"), HessianInverter(hessian_perturbation=1e-3))
whole.fit(*train)
projection = SparseRandomProjection(512, random_state=0)
projected = make_pipeline(
    PerSampleGradient(net, loss="cross_entropy"), projection, HessianInverter(hessian_perturbation=1e-3)
).fit(*train)


# %%
# Influence of every training row on every test row is one product of rows.
def influence(pipeline):
    return np.asarray(pipeline[:-1].transform(test)) @ np.asarray(pipeline.transform(train)).T


# %%
# TRAK: the gradients of the margin log(p / (1 − p)), projected; each training row counts by 1 − p.
trak = make_pipeline(PerSampleGradient(net, loss="margin"), projection, HessianInverter(hessian_perturbation=1e-3))
trak.fit(*train)
p = net(train[0]).softmax(1).gather(1, train[1][:, None])[:, 0].detach().numpy()
scores = {"whole": influence(whole), "projected": influence(projected), "TRAK": influence(trak) * (1 - p)}
for name in ("projected", "TRAK"):
    r = np.corrcoef(scores["whole"].ravel(), scores[name].ravel())[0, 1]
    print(f"{name:<9}  correlation with the whole empirical Fisher's influence: {r:+.3f}")

# %%
# The test digit that the training rows pull at most, and the rows that help it most, by each pipeline.
asked = int(np.abs(scores["whole"]).max(1).argmax())
figure, axes = plt.subplots(3, 6, figsize=(8, 4.6), layout="constrained", subplot_kw={"xticks": [], "yticks": []})
for line, (name, score) in zip(axes, scores.items(), strict=True):
    shown = [(test[0][asked], f"asked: {test[1][asked]}")]
    shown += [(train[0][i], f"{train[1][i]}: {score[asked, i]:.3g}") for i in (-score[asked]).argsort()[:5]]
    for ax, (picture, title) in zip(line, shown, strict=True):
        ax.imshow(picture.numpy().reshape(8, 8), cmap="gray_r")
        ax.set_title(title, fontsize=8)
    line[0].set_ylabel(name)
output = Path(__file__).parent / "output"
output.mkdir(exist_ok=True)
figure.savefig(output / "pipelines.png", dpi=120)
