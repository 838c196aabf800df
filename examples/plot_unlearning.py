"""
Unlearning
==========

A customer asks that their rows be forgotten. ``removed_parameters`` gives the parameters that training without them is
predicted to give, from the fit at hand: here beside parameters that were trained again, and those that were not moved.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import Linear, Sequential, functional

from skinvert import HessianInverter, InfluenceFunction

# %%
# Softmax regression with weight decay, trained to its minimum; a weight of 0 removes a row and leaves 1/n as it is.
pixels, digits = load_digits(return_X_y=True)
X, y = torch.tensor(pixels[:600] / 16), torch.tensor(digits[:600])
torch.set_num_threads(1)
decay, n = 1e-2, len(y)


def train(kept):
    net = Sequential(Linear(64, 10)).double()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        losses = functional.cross_entropy(net(X[kept]), y[kept], reduction="sum") / n
        objective = losses + decay / 2 * sum(w.square().sum() for w in net.parameters())
        objective.backward()
        return objective

    optimizer.step(closure)
    return net


def distance(a, b):
    return float(sum((a[name] - b[name]).square().sum() for name in b).sqrt())


# %%
# Forget the first m rows of the digit 3, for growing m.
net = train(torch.ones(n, dtype=torch.bool))
inverter = HessianInverter("direct", loss="cross_entropy", weight_decay=decay)
threes, sizes = np.flatnonzero(y == 3), [1, 3, 10, 30, 55]
found = {"not moved": [], "first_order": [], "newton": []}
for m in sizes:
    kept = torch.ones(n, dtype=torch.bool)
    kept[threes[:m]] = False
    again = train(kept).state_dict()
    found["not moved"].append(distance(net.state_dict(), again))
    for removal in ("first_order", "newton"):
        unlearned = InfluenceFunction(inverter, removal=removal).fit(net, (X, y)).removed_parameters(threes[:m])
        found[removal].append(distance(unlearned, again))
for name, distances in found.items():
    print(f"{name:<11}  distance from retraining " + "  ".join(f"{value:.1e}" for value in distances))

# %%
# Newton's step stays nearer to what retraining gives than the first order does, the more rows go the less near.
figure, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
for name, distances in found.items():
    ax.loglog(sizes, distances, marker="o", label=name)
ax.set(xlabel=f"Rows removed, of {len(threes)} threes", ylabel="Distance from retrained parameters")
ax.set_xticks(sizes, sizes)
ax.minorticks_off()
ax.legend()

output = Path(__file__).parent / "output" / "unlearning.png"
output.parent.mkdir(exist_ok=True)
figure.savefig(output, dpi=120)
