"""Do jackknife+ intervals from one fit cover what those from n refits cover, and are they as wide?

Each split draws training rows and test rows of a data set; inputs are standardised by the training rows. Intervals for
a new target at α = 0.1, the model fitted once, beside two ways that need no skinvert:

- refits: the model fitted anew without each training row, as jackknife+ is defined;
- residuals: f(x) ± the ⌈(1 − α)(n + 1)⌉-th smallest of the training rows' own |y − f|, for the price of nothing.

Of each: the share of test targets in their interval, and the mean width over that of the refits, both as means over the
splits; seconds, as medians.

    python docs/benchmarks/jackknife.py
    python docs/benchmarks/jackknife.py --model mlp --splits 10
"""

import argparse
import copy
import math
import time
import warnings

import numpy as np
from sklearn.datasets import load_diabetes, make_friedman1, make_friedman2, make_friedman3, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.neural_network import MLPRegressor

from skinvert import HessianInverter, InfluenceFunction

SETS = {
    "diabetes": lambda _: load_diabetes(return_X_y=True),
    "make_regression": lambda seed: make_regression(500, 30, n_informative=10, noise=50.0, random_state=seed),
    "friedman1": lambda seed: make_friedman1(500, noise=1.0, random_state=seed),
    "friedman2": lambda seed: make_friedman2(500, noise=100.0, random_state=seed),
    "friedman3": lambda seed: make_friedman3(500, noise=0.1, random_state=seed),
}
MODELS = {
    "ridge": Ridge,
    "mlp": lambda penalty: MLPRegressor(
        hidden_layer_sizes=(5,),
        activation="tanh",
        solver="lbfgs",
        alpha=penalty,
        tol=1e-7,
        max_iter=5000,
        max_fun=100_000,
        random_state=0,
    ),
}
WAYS = ("refits", "newton", "first_order", "residuals")
N_TEST, ALPHA = 200, 0.1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="ridge")
    parser.add_argument("--splits", type=int, default=50)
    parser.add_argument("--rows", type=int, default=100, help="training rows")
    parser.add_argument("--penalty", type=float, default=1.0, help="the model's alpha")
    args = parser.parse_args()
    print(f"| data | p | coverage: {', '.join(WAYS)} | width: {', '.join(WAYS[1:])} | seconds: {', '.join(WAYS[:3])} |")
    print("|---|---|---|---|---|")
    every = []
    for name, make in SETS.items():
        found = [
            of_split(MODELS[args.model](args.penalty), *make(seed), args.rows, seed) for seed in range(args.splits)
        ]
        coverage, width, seconds = (np.array([[split[way][k] for way in WAYS] for split in found]) for k in range(3))
        every.append((coverage.mean(0), (width / width[:, :1]).mean(0), np.median(seconds, 0)))
        print(line(name, make(0)[0].shape[1], *every[-1]), flush=True)
    print(line("mean", "", *np.mean(every, axis=0)))


def line(name, p, coverage, width, seconds):
    """Return a row of the table."""
    cells = [", ".join(f"{100 * value:.1f}" for value in coverage), ", ".join(f"{value:.3f}" for value in width[1:])]
    return f"| {name} | {p} | {cells[0]} | {cells[1]} | {', '.join(f'{value:.3f}' for value in seconds[:3])} |"


def of_split(model, X, y, n, seed):
    """Return coverage, mean width and seconds of each way."""
    order = np.random.default_rng(seed).permutation(len(X))[: n + N_TEST]
    X, y = (X[order] - X[order[:n]].mean(0)) / X[order[:n]].std(0), y[order]
    y = (y - y[:n].mean()) / y[:n].std()
    train, test = (X[:n], y[:n]), X[n:]
    model.fit(*train)
    found = {}
    for way in WAYS:
        start = time.perf_counter()
        low, high = intervals(way, model, *train, test).T
        seconds = time.perf_counter() - start
        found[way] = (((low <= y[n:]) & (y[n:] <= high)).mean(), (high - low).mean(), seconds)
    return found


def intervals(way, model, X, y, test):
    """Return (n_test, 2)."""
    if way == "residuals":
        size = np.sort(np.abs(y - model.predict(X)))[math.ceil((1 - ALPHA) * (len(y) + 1)) - 1]
        return model.predict(test)[:, None] + [-size, size]
    if way == "refits":
        return by_refits(model, X, y, test)
    inverter = HessianInverter("direct", curvature="ggn")
    return InfluenceFunction(inverter, removal=way).fit(model, (X, y)).jackknife_plus(test, alpha=ALPHA)


def by_refits(model, X, y, test):
    """Return the intervals of jackknife+ as it is defined; a network is trained on from where it was."""
    low, high = np.empty((len(y), len(test))), np.empty((len(y), len(test)))
    for i in range(len(y)):
        kept = np.arange(len(y)) != i
        other = copy.deepcopy(model)
        if isinstance(other, MLPRegressor):
            other.set_params(warm_start=True)
        other.fit(X[kept], y[kept])
        residual, predicted = abs(y[i] - other.predict(X[i : i + 1])[0]), other.predict(test)
        low[i], high[i] = predicted - residual, predicted + residual
    n = len(y)
    # By whole numbers: 10 α is 1.
    lower, upper = (n + 1) // 10, -(-9 * (n + 1) // 10)
    return np.column_stack([np.sort(low, 0)[lower - 1], np.sort(high, 0)[upper - 1]])


if __name__ == "__main__":
    warnings.simplefilter("error")
    # A network that L-BFGS leaves at its own tolerance is told of by its gradient's norm; it is what users have.
    warnings.simplefilter("ignore", ConvergenceWarning)
    main()
