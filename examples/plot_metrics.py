"""
Influence on an AUROC and on fairness
=====================================

Not only losses: which training rows hold the AUROC of a whole test set down, widen the gap between two groups, or raise
the loss of the worst one? The rows that scores name are removed, and the model is trained again.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from skinvert import InfluenceFunction
from skinvert.influence import AUROC, FairnessGap, WorstGroupLoss

# %%
# Applicants of two groups, equally able. Who judged the training rows refused half of those of group 1 who would repay,
# and some labels are mere mistakes; test rows say who did repay.
rng, n, n_test = np.random.default_rng(0), 600, 2000
group = rng.integers(0, 2, n + n_test)
ability = rng.standard_normal((n + n_test, 4))
X = np.c_[ability + 0.7 * rng.standard_normal(ability.shape), group]
repaid = (ability.sum(1) + rng.standard_normal(n + n_test) > 0).astype(int)
refused = (group == 1) & (repaid == 1) & (rng.random(n + n_test) < 0.5)
mistaken = rng.random(n + n_test) < 0.1
given = np.where(refused, 0, np.where(mistaken, 1 - repaid, repaid))
train, test = (X[:n], given[:n]), (X[n:], repaid[n:])

# %%
# A number of all test rows is one row of scores: the predicted change of the number when a training row is removed.
model = LogisticRegression(C=1.0, tol=1e-8).fit(*train)
members = group[n:]
numbers = {
    "AUROC, smooth": (AUROC(0.2), 1),
    "Fairness gap, group 1 − group 0": (FairnessGap(members), 1),
    "Loss of the worst group": (WorstGroupLoss(members, temperature=0.05), -1),
}
measurement = [number for number, _ in numbers.values()]
scores = InfluenceFunction(measurement=measurement).fit(model, train).transform(test)
newton = InfluenceFunction(measurement=measurement, removal="newton").fit(model, train)


# %%
# Rows go in the order of their scores, those first that spoil the number most, or at random. A sum of scores predicts
# what training again gives, and so does one Newton step for all the rows that go, which takes their curvature along.
def actual(number, rows):
    kept = np.delete(np.arange(n), rows)
    again = LogisticRegression(C=1.0, tol=1e-8).fit(train[0][kept], train[1][kept])
    return float(number(torch.tensor(again.decision_function(test[0])), torch.tensor(test[1])))


sizes = np.arange(0, 101, 10)
figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained")
for i, (name, (number, sign)) in enumerate(numbers.items()):
    order, by_chance, start = np.argsort(-sign * scores[i]), rng.permutation(n), actual(number, [])
    found = {
        "by scores, trained again": [actual(number, order[:m]) for m in sizes],
        "by scores, predicted by their sum": [start + scores[i, order[:m]].sum() for m in sizes],
        "by scores, predicted by Newton's step": start + newton.group_effect([order[:m] for m in sizes], test)[i],
        "at random, trained again": [actual(number, by_chance[:m]) for m in sizes],
    }
    for (label, values), style in zip(found.items(), ("ko-", "C0--", "C1-", "C7s-"), strict=True):
        axes[i].plot(sizes, values, style, markersize=4, label=label)
    axes[i].set(title=name, xlabel=f"Rows removed, of {n}")
    wrong = (given != repaid)[order[: sizes[-1]]].mean()
    print(f"{name}: {start:.3f}; without {sizes[-1]} rows, of which {wrong:.0%} have a wrong label:")
    print("".join(f"  {label:<38} {values[-1]:.3f}\n" for label, values in found.items()))
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)

output = Path(__file__).parent / "output" / "metrics.png"
output.parent.mkdir(exist_ok=True)
figure.savefig(output, dpi=120)
