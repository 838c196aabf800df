"""
The ladder of Hessians
======================

Each step approximates the one above: the GGN drops second derivatives of the network, its blocks what layers share,
EKFAC all but a diagonal in Kronecker eigenvectors, KFAC that diagonal's exact values. How well sums of scores rank the
outcomes of training on halves, the linear datamodeling score, says what that costs.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from skinvert import HessianInverter, InfluenceFunction
from skinvert.metrics import linear_datamodeling_score, retrain_subsets

# %%
# A network on 400 digits, brought near a minimum by L-BFGS, always from the same start; weight 0 leaves a row out.
torch.set_num_threads(1)
pixels, digits = load_digits(return_X_y=True)
X, y = torch.tensor(pixels / 16), torch.tensor(digits)
train, test, decay = (X[:400], y[:400]), (X[400:500], y[400:500]), 1e-3


def trainer(X, y, sample_weight):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(net(X), y, reduction="none")
        penalty = decay / 2 * sum(w.square().sum() for w in net.parameters())
        objective = (torch.tensor(sample_weight) * losses).mean() + penalty
        objective.backward()
        return objective

    optimizer.step(closure)
    return net


net = trainer(*train, np.ones(400))
retrained = retrain_subsets(trainer, *train, *test, n_subsets=60, loss="cross_entropy", full=net, random_state=0)

# %%
# Intervals are a bootstrap's over subsets and test digits, the same for the difference, whose interval is narrower.
ladder = {
    "Hessian": {"method": "direct", "curvature": "hessian"},
    "GGN": {"method": "direct", "curvature": "ggn"},
    "GGN, blocks": {"method": "direct", "curvature": "ggn", "blocks": "layer"},
    **{"EKFAC": {"method": "ekfac"}, "KFAC": {"method": "kfac"}},
}
common = {"hessian_perturbation": 1e-3, "loss": "cross_entropy", "weight_decay": decay, "check_residual": False}
scores, found, r = {}, {}, {}
for name, settings in ladder.items():
    scores[name] = InfluenceFunction(HessianInverter(**settings, **common)).fit(net, train).transform(test).numpy()
    found[name] = linear_datamodeling_score(scores[name], *retrained, compare=scores["Hessian"], random_state=0)
    r[name] = np.corrcoef(scores[name].ravel(), scores["Hessian"].ravel())[0, 1]
    print(f"{name:<11}  LDS {found[name].mean:.3f}, less Hessian's {found[name].difference:+.3f}, r = {r[name]:.3f}")

# %%
# What a step costs is seen in the middle, where the noise that all share is gone.
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", sharey=True)
for place, (name, score) in enumerate(found.items()):
    spans = (score.mean, *score.interval), (score.difference, *score.difference_interval), (r[name], r[name], r[name])
    for ax, (at, *ends) in zip(axes, spans, strict=True):
        ax.plot([ends[0], at, ends[1]], [place] * 3, "o-", color=f"C{place}", linewidth=3, markevery=[1])
labels = ("Linear datamodeling score, 95 %", "Less that of the Hessian, 95 %", "Correlation with the Hessian's scores")
for ax, label in zip(axes, labels, strict=True):
    ax.set(xlabel=label, yticks=range(len(found)), yticklabels=found)
    ax.locator_params(axis="x", nbins=5)
axes[0].invert_yaxis()
output = Path(__file__).parent / "output"
output.mkdir(exist_ok=True)
figure.savefig(output / "hessian_ladder.png", dpi=120)
