"""Is the λ that the score picks the λ that predicts leave-one-out retraining best?

Softmax regression on 300 digits, trained to convergence in float64. Every row is left out in turn and the model is
retrained; the change of the loss of 300 other digits is held against what influence predicts, gᵀ(H + λI)⁻¹g, with a
curvature H of 60 of the 300 rows alone. Three choices of λ:

- best: the λ of the grid whose prediction correlates best with retraining (nobody can know it beforehand);
- score: ``HessianInverterCV`` on the 60 rows, 5 folds;
- naive: the same quadratic, a row's own curvature not left out of the mean that judges it.

A correlation is Pearson's over the rows left out, its mean over the test rows.

    python docs/benchmarks/score_against_retraining.py
"""

import argparse
import warnings

import numpy as np
import torch
from sklearn.datasets import load_digits

from skinvert import HessianInverterCV, PerSampleGradient, make_quadratic_scorer

GRID = 10.0 ** np.arange(-6, 2.01, 0.5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--curvature-rows", type=int, default=60)
    parser.add_argument("--weight-decay", type=float, default=1e-3)
    args = parser.parse_args()
    print("| seed | best: λ, correlation | score: λ, correlation | naive: λ, correlation |\n|---|---|---|---|")
    rows = []
    for seed in args.seeds:
        found = compare(seed, args.curvature_rows, args.weight_decay)
        rows.append([found[name][1] for name in ("best", "score", "naive")])
        cells = [f"{found[name][0]:.2g}, {found[name][1]:.3f}" for name in ("best", "score", "naive")]
        print(f"| {seed} | {' | '.join(cells)} |")
    print(f"| mean | {' | '.join(f'{mean:.3f}' for mean in np.mean(rows, axis=0))} |")


def compare(seed, n_curvature=60, weight_decay=1e-3):
    """Return the λ and the correlation of each choice."""
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(X))
    X, y = torch.from_numpy(X[order] / 16), torch.from_numpy(y[order])
    train, test = (X[:300], y[:300]), (X[300:600], y[300:600])
    net, changes = retrained(*train, *test, weight_decay)
    gradient = PerSampleGradient(net, loss="cross_entropy").fit(train)
    g, g_test = gradient.transform(train), gradient.transform(test)
    seen = (X[:n_curvature], y[:n_curvature])
    settings = {"method": "direct", "loss": "cross_entropy", "weight_decay": weight_decay}
    search = HessianInverterCV(GRID, cv=5, **settings).fit(net, seen)
    scoring = NaiveScorer(gradient)
    naive = HessianInverterCV(GRID, cv=5, scoring=scoring, **settings).fit(net, seen)
    predicted = g_test @ search.path(g, GRID).mT / 300
    correlations = [mean_correlation(each, changes) for each in predicted]
    picks = {"best": int(np.argmax(correlations)), "score": search.best_index_, "naive": naive.best_index_}
    return {name: (GRID[index], correlations[index]) for name, index in picks.items()}


class NaiveScorer:
    """The held-out quadratic of the rows' own gradients, without leaving a row's own curvature out."""

    def __init__(self, gradient):
        self.gradient = gradient

    def __call__(self, estimator, X, y):
        return make_quadratic_scorer(self.gradient.transform((X, y)))(estimator, X, y)


def retrained(X, y, X_test, y_test, weight_decay):
    """Return the trained network, and by how much each test row's loss grows (rows) as each row is left out (columns).

    All 300 retrainings at once: Newton's steps with the Hessian of the full problem, until each gradient vanishes.
    """
    n, X1 = len(X), torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)
    X1_test = torch.cat([X_test, torch.ones(len(X_test), 1, dtype=X.dtype)], 1)
    onehot = torch.nn.functional.one_hot(y, 10).to(X.dtype)
    theta = torch.zeros(1, 10, X1.shape[1], dtype=X.dtype)
    for _ in range(50):
        theta = theta - newton_step(
            X1, theta, gradient_of(X1, onehot, theta, torch.ones(1, n), weight_decay), weight_decay
        )
    kept = 1 - torch.eye(n, dtype=X.dtype)
    left = theta.repeat(n, 1, 1)
    for _ in range(500):
        gradients = gradient_of(X1, onehot, left, kept, weight_decay)
        if gradients.abs().max() < 1e-10:
            break
        left = left - newton_step(X1, theta, gradients, weight_decay)
    else:
        message = f"Retraining did not converge: gradient {gradients.abs().max():.2g}. Try more --weight-decay."
        raise RuntimeError(message)
    change = losses(X1_test, y_test, left) - losses(X1_test, y_test, theta)
    net = torch.nn.Linear(X.shape[1], 10).to(X.dtype)
    with torch.no_grad():
        net.weight.copy_(theta[0, :, :-1])
        net.bias.copy_(theta[0, :, -1])
    return net, change.mT


def gradient_of(X1, onehot, theta, kept, weight_decay):
    """Return the gradients (k, 10, d) of the objectives of k models, each over its own rows ``kept`` (k, n)."""
    residual = ((X1 @ theta.mT).softmax(2) - onehot) * kept[:, :, None]
    return residual.mT @ X1 / kept.sum(1)[:, None, None] + weight_decay * theta


def newton_step(X1, theta, gradients, weight_decay):
    """Return H⁻¹ g with the Hessian of all rows at ``theta`` (1, 10, d)."""
    P = (X1 @ theta[0].mT).softmax(1)
    D = (torch.diag_embed(P) - P[:, :, None] * P[:, None, :]) / len(X1)
    H = torch.einsum("nab,ni,nj->aibj", D, X1, X1).reshape(gradients[0].numel(), -1)
    H = H + weight_decay * torch.eye(len(H), dtype=H.dtype)
    return torch.cholesky_solve(gradients.flatten(1).mT, torch.linalg.cholesky(H)).mT.reshape(gradients.shape)


def losses(X1, y, theta):
    """Return the losses (k, m) of k models on m rows."""
    return -(X1 @ theta.mT).log_softmax(2)[:, torch.arange(len(y)), y]


def mean_correlation(predicted, actual):
    """Return the mean over rows of the correlation along each row."""
    a, b = (v - v.mean(1, keepdim=True) for v in (predicted, actual))
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
