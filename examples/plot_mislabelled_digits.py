"""
Mislabelled digits
==================

A row's self-influence is what its own loss would rise by if the network were trained without it: large for wrong
labels. So is its loss, for nothing; but a ranking cannot say which rows made the network wrong about one test digit.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from skinvert import HessianInverterCV, InfluenceFunction
from skinvert.metrics import baselines

# %%
# Five per cent of the training labels are changed to another digit.
pixels, digits = load_digits(return_X_y=True)
X, X_test, y, y_test = train_test_split(pixels / 16, digits, stratify=digits, random_state=0)
rng, n, n_flips = np.random.default_rng(0), len(y), round(0.05 * len(y))
flipped = rng.permutation(n) < n_flips
given = np.where(flipped, (y + rng.integers(1, 10, n)) % 10, y)


# %%
# A small network, trained on them, or without some rows, to a minimum of cross-entropy with weight decay.
def train(decay, without=()):
    kept = ~np.isin(range(n), without)
    net = MLPClassifier(16, activation="tanh", solver="lbfgs", alpha=decay * n, max_iter=5000, random_state=0)
    return net.fit(X[kept], given[kept])


# %%
# One network learns the wrong labels, one refuses most. Cross-validation chooses λ, and sees the given labels only.
print(f"{n_flips} of {n} training labels are wrong")
for decay in (1e-4, 1e-3):
    net = train(decay)
    inverter = HessianInverterCV([3e-4, 3e-3, 3e-2], cv=3, curvature="ggn")
    influence = InfluenceFunction(inverter).fit(net, (X, given))
    wrong, learnt = np.flatnonzero(net.predict(X_test) != y_test), net.predict(X[flipped]) == given[flipped]
    print(f"weight decay {decay:g}: {learnt.sum()} wrong labels are learnt, {len(wrong)} test digits are misread")
    scores = {"loss": baselines.row_loss(net, X, given), "self-influence": influence.self_influence()}
    for name, score in scores.items():
        order = (-score).argsort()
        precision, found = flipped[order[:n_flips]].mean(), flipped[order[: n // 10]].sum() / n_flips
        print(f"  {name:<14}  precision at 5 %: {precision:6.1%}  flips found in the top 10 %: {found:6.1%}")

# %%
# Of the digits misread, how many are read after training without ten rows?
harmful = influence.top(X_test[wrong], y_test[wrong], k=10, harmful=True).rows
cases = {"by what harms each": harmful} | {f"by {name}": [(-score).argsort()[:10]] for name, score in scores.items()}
for name, groups in cases.items():
    seen = np.broadcast_to([train(decay, rows).predict(X_test[wrong]) for rows in groups], (len(wrong), len(wrong)))
    print(f"  read without ten rows, {name:<18}: {(seen.diagonal() == y_test[wrong]).sum()} of {len(wrong)}")

# %%
# The first rows by self-influence, the first whose label is right, and two test digits with what harms them most.
rows = np.r_[order[:5], order[~flipped[order]][0], harmful[0, :5], harmful[1, :5]]
shown = [(X[i], f"given {given[i]}, was {y[i]}", "C3" if flipped[i] else "C0") for i in rows]
for place, i in ((6, wrong[0]), (12, wrong[1])):
    shown.insert(place, (X_test[i], f"test: {y_test[i]}, read as {net.predict(X_test[[i]])[0]}", "black"))
figure, axes = plt.subplots(3, 6, figsize=(8, 5), layout="constrained", subplot_kw={"xticks": [], "yticks": []})
for ax, (picture, title, color) in zip(axes.flat, shown, strict=True):
    ax.imshow(picture.reshape(8, 8), cmap="gray_r")
    ax.set_title(title, fontsize=8, color=color)
figure.suptitle(
    "Most suspicious, and the first right label among them (above); most harmful to a test digit (below)", fontsize=10
)
key = [Patch(color="C3", label="label was changed"), Patch(color="C0", label="label is the original")]
figure.legend(handles=key, loc="outside lower center", ncols=2)
output = Path(__file__).parent / "output" / "mislabelled_digits.png"
output.parent.mkdir(exist_ok=True)
figure.savefig(output, dpi=120)
print(f"The picture is in {output}")
