"""How far below the best λ of a grid is the one that HessianInverterCV picks? By linear datamodeling scores.

The retrainings are those of ``lds.py``; λ are shares of the mean eigenvalue. The pick is by the held-out quadratic, on
training rows alone: the curvature of some judges the gradients of others. With ``--rows`` the curvature is that of
so few training rows, as where all are too many; scores are of all of them.

    OMP_NUM_THREADS=1 python docs/benchmarks/lds_lambda.py --retrainings softmax.npz
    OMP_NUM_THREADS=1 python docs/benchmarks/lds_lambda.py --retrainings softmax.npz --rows 200 --methods direct ekfac
"""

import warnings

import numpy as np
from lds import METHODS, arguments, as_rows, digits, mlp, retrainings, softmax
from sklearn.model_selection import ShuffleSplit

from skinvert import HessianInverter, HessianInverterCV, PerSampleGradient
from skinvert.metrics import linear_datamodeling_score


def main():
    parser = arguments(__doc__)
    parser.add_argument("--shares", nargs="+", default=["1e-4", "1e-3", "1e-2", "1e-1", "1", "10"])
    parser.add_argument("--rows", type=int, help="training rows of the curvature; all by default")
    parser.add_argument("--held-out", type=int, default=200, help="of these, for the pick")
    parser.add_argument("--splits", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=["ekfac", "cg"])
    args = parser.parse_args()
    train, test = digits(args.test_rows)
    problem = softmax(train) if args.model == "softmax" else mlp(args, train)
    retrained = retrainings(problem, train, test, args)
    model, settings = problem["scored"], problem["settings"]
    train, test = as_rows(model, train), as_rows(model, test)
    some = tuple(part[: args.rows] for part in train)
    print(f"{args.model}, curvature of {len(some[1])} of {len(train[1])} rows, {len(retrained.subsets)} subsets")
    print(f"| method | picked: λ / mean eigenvalue, LDS | best: λ, LDS | {' | '.join(args.shares)} |")
    print("|---|---|---|" + len(args.shares) * "---|", flush=True)
    gradient = PerSampleGradient(model, loss=settings.get("loss")).fit(*train)
    g_train, g_test = (np.asarray(gradient.transform(rows)) for rows in (train, test))
    for method in args.methods:
        found = [lds(method, share, model, some, settings, g_test, g_train, retrained) for share in args.shares]
        pick, best = picked(method, model, some, settings, args), int(np.argmax(found))
        cells = [f"{args.shares[index]}, {found[index]:.3f}" for index in (pick, best)]
        print(f"| {method} | {' | '.join(cells)} | {' | '.join(f'{value:.3f}' for value in found)} |", flush=True)


def lds(method, share, model, rows, settings, g_test, g_train, retrained):
    """Return the linear datamodeling score of all training rows' scores, by the curvature of ``rows``."""
    inverter = HessianInverter(METHODS[method][0], f"{share} rel", **common(method, settings)).fit(model, rows)
    scores = inverter.transform(g_test) @ g_train.T / len(g_train)
    return linear_datamodeling_score(scores, *retrained, n_bootstraps=1).mean


def picked(method, model, rows, settings, args):
    """Return the place in the grid of the share that the held-out quadratic picks."""
    held_out = min(args.held_out, len(rows[1]) // 5)
    cv = ShuffleSplit(args.splits, test_size=held_out, random_state=0)
    shares = [f"{share} rel" for share in args.shares]
    search = HessianInverterCV(shares, cv=cv, method=METHODS[method][0], **common(method, settings))
    return search.fit(model, rows).best_index_


def common(method, settings):
    return {"curvature": METHODS[method][1], "random_state": 0, "check_residual": False, **settings}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
