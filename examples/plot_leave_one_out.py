"""
Leave-one-out against prediction
================================

A score predicts what the loss of a test row would be without a training row. Retraining tells: to first order scores
rank well and are too small for rows that the model hangs on; ``removal="newton"`` takes the row's own curvature out.
"""

from pathlib import Path

import matplotlib.pyplot as plt
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from skinvert import InfluenceFunction
from skinvert.metrics import leave_one_out
from skinvert.plotting import LeaveOneOutDisplay

# %%
# A logistic regression of 31 parameters on 100 rows, solved tightly: what one row changes must be above the tolerance.
X, y = load_breast_cancer(return_X_y=True)
X = StandardScaler().fit(X[:100]).transform(X)
train, test = (X[:100], y[:100]), (X[100:120], y[100:120])
model = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(*train)

# %%
# A hundred retrainings, and the two predictions of them, from one fit.
actual = leave_one_out(model, *train, *test, full=model)
figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained", sharex=True, sharey=True)
for ax, removal in zip(axes, ("first_order", "newton"), strict=True):
    influence = InfluenceFunction(removal=removal).fit(model, train)
    display = LeaveOneOutDisplay.from_predictions(influence.transform(test), actual, name=removal, ax=ax)
    print(f"{removal:<11}  correlation {display.correlation:.4f}, slope {display.slope:.3f}")

output = Path(__file__).parent / "output" / "leave_one_out.png"
output.parent.mkdir(exist_ok=True)
figure.savefig(output, dpi=120)
