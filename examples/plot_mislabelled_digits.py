"""
Mislabelled digits
==================

A wrong label pulls the parameters where no other row wants them. How far, its self-influence gᵢᵀ(H + λI)⁻¹gᵢ says: to
first order, n times what the row's own loss would rise by if the network were trained without it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from torch.nn import Linear, Sequential, Tanh, functional

from skinvert import HessianInverter, PerSampleGradient

# %%
# Five per cent of the training labels are changed to another digit.
pixels, digits = load_digits(return_X_y=True)
X, X_test, y, y_test = map(torch.tensor, train_test_split(pixels / 16, digits, stratify=digits, random_state=0))
rng, n, n_flips = np.random.default_rng(0), len(y), round(0.05 * len(y))
flipped = rng.permutation(n) < n_flips
given = torch.where(torch.tensor(flipped), (y + torch.tensor(rng.integers(1, 10, n))) % 10, y)


# %%
# A small network, trained on them to a minimum of cross-entropy with weight decay.
def train(weight_decay):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # All is small here: threads would wait for each other.
    net = Sequential(Linear(64, 16), Tanh(), Linear(16, 10)).double()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        penalty = sum(w.square().sum() for w in net.parameters())
        objective = functional.cross_entropy(net(X), given) + weight_decay / 2 * penalty
        objective.backward()
        return objective

    optimizer.step(closure)
    return net


# %%
# A gradient for each row, and one inverse for all. Cross-validation chooses λ, and sees the given labels only.
def self_influence(net, weight_decay):
    inverter = HessianInverter("direct", model=net, loss="cross_entropy", curvature="ggn", weight_decay=weight_decay)
    search = GridSearchCV(inverter, {"hessian_perturbation": [3e-4, 3e-3, 3e-2]}, cv=3).fit(X.numpy(), given.numpy())
    print(f"  λ = {search.best_params_['hessian_perturbation']:g} by cross-validation")
    g = PerSampleGradient(net, loss="cross_entropy").fit_transform(X, given)
    return (g * search.transform(g)).sum(dim=1)


# %%
# The baseline is the row's own loss, small once a wrong label is learnt: one network learns them, one refuses most.
print(f"{n_flips} of {n} training labels are wrong")
for weight_decay in (1e-4, 1e-3):
    net = train(weight_decay)
    predicted, right = net(X).argmax(1), net(X_test).argmax(1) == y_test
    accuracy, learnt = right.double().mean(), (predicted == given)[flipped].double().mean()
    print(f"weight decay {weight_decay:g}: test accuracy {accuracy:.1%}, wrong labels learnt {learnt:.1%}")
    loss, influence = functional.cross_entropy(net(X), given, reduction="none"), self_influence(net, weight_decay)
    for name, order in (("loss", (-loss).argsort()), ("self-influence", (-influence).argsort())):
        precision, found = flipped[order[:n_flips]].mean(), flipped[order[: n // 10]].sum() / n_flips
        print(f"  {name:<14}  precision at 5 %: {precision:6.1%}  flips found in the top 10 %: {found:6.1%}")

# %%
# The 20 most suspicious digits, by self-influence on the second network.
figure, axes = plt.subplots(4, 5, figsize=(7, 7), layout="constrained", subplot_kw={"xticks": [], "yticks": []})
for i, ax in zip(order[:20], axes.flat, strict=True):
    ax.imshow(X[i].numpy().reshape(8, 8), cmap="gray_r")
    ax.set_title(f"given {given[i]}, predicted {predicted[i]}", fontsize=9, color="C3" if flipped[i] else "C0")
figure.suptitle("Most suspicious first. The label was changed (red), or is the original (blue).", fontsize=10)
output = Path(__file__).parent / "output"
output.mkdir(exist_ok=True)
figure.savefig(output / "mislabelled_digits.png", dpi=120)
