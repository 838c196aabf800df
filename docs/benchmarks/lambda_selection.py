"""HessianInverterCV against GridSearchCV over the same λ and folds: how much one factorisation a fold saves.

Softmax regression on digits, p = 650, float64. Prints seconds (the least of the repeats), their ratio, the largest
relative difference of the scores, and both choices of λ.

    OMP_NUM_THREADS=1 python docs/benchmarks/lambda_selection.py
"""

import argparse
import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV

from skinvert import HessianInverter, HessianInverterCV


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1797)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--curvatures", nargs="+", default=["ggn", "empirical_fisher", "hessian"])
    args = parser.parse_args()
    X, y = load_digits(return_X_y=True)
    X, y = X[: args.rows] / 16, y[: args.rows]
    net = trained(X, y)
    shifts = [10.0**k for k in range(-6, 3)]
    print("| curvature | GridSearchCV, s | HessianInverterCV, s | ratio | scores differ by | λ, λ |")
    print("|---|---|---|---|---|---|")
    for curvature in args.curvatures:
        settings = {"method": "direct", "curvature": curvature, "model": net, "loss": "cross_entropy"}
        search = GridSearchCV(HessianInverter(**settings), {"hessian_perturbation": shifts}, cv=args.folds)
        ours = HessianInverterCV(shifts, cv=args.folds, **settings)
        theirs_s, ours_s = (least_seconds(each, X, y, args.repeats) for each in (search, ours))
        expected, received = search.cv_results_["mean_test_score"], ours.cv_results_["mean_test_score"]
        gap = np.max(np.abs(received - expected) / np.abs(expected))
        choices = f"{search.best_params_['hessian_perturbation']:g}, {ours.hessian_perturbation_:g}"
        print(f"| {curvature} | {theirs_s:.2f} | {ours_s:.2f} | {theirs_s / ours_s:.1f} | {gap:.1g} | {choices} |")


def trained(X, y):
    """Return the network after 100 steps of L-BFGS."""
    torch.manual_seed(0)
    net = torch.nn.Linear(64, 10).double()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=100, line_search_fn="strong_wolfe")
    X, y = torch.from_numpy(X), torch.from_numpy(y)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(X), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return net


def least_seconds(estimator, X, y, repeats):
    """Return the least time of a fit, in seconds, after one that is not counted."""
    estimator.fit(X[:100], y[:100])
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        estimator.fit(X, y)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
