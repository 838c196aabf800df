"""Scores against actual retraining: correlation, slope and parameters, of torch and of scikit-learn models.

    python docs/benchmarks/leave_one_out.py

Each line is of all pairs of test rows and 40 training rows, each left out and the model trained anew. *slope* is that
of the change that retraining made on the predicted one: 1 is the right scale, 1.9 an underestimate. Where pyinfluence
is installed (the environment of ``make bench``), its first-order predictions stand beside those of the models it takes.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from skinvert import HessianInverter, InfluenceFunction
from skinvert.metrics import leave_one_out

DECAY = 1e-3


def softmax_regression(
    X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray, start: nn.Linear | None = None
) -> nn.Linear:
    """Minimise Σ wᵢℓᵢ / n + ½ 10⁻³ ‖θ‖² by L-BFGS, to a gradient of 1e-9, from another model's parameters."""
    X, y, w = (torch.as_tensor(part) for part in (X, y, sample_weight))
    model = nn.Linear(64, 10).double()
    for name, parameter in model.named_parameters():
        parameter.data = torch.zeros_like(parameter) if start is None else start.state_dict()[name].clone()
    settings = {"max_iter": 2000, "tolerance_grad": 1e-10, "tolerance_change": 0.0, "history_size": 50}
    optimiser = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", **settings)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        losses = nn.functional.cross_entropy(model(X), y, reduction="none")
        loss = (w * losses).sum() / len(y) + DECAY / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    for _ in range(3):
        optimiser.step(closure)
    return model


def report(name: str, predicted: np.ndarray, actual: np.ndarray) -> None:
    """Print correlation and slope of the pairs."""
    p, a = predicted.ravel(), actual.ravel()
    print(f"{name:<58s} r = {np.corrcoef(p, a)[0, 1]:.4f}   slope {np.polyfit(p, a, 1)[0]:.3f}", flush=True)


def digits(n: int) -> None:
    """Softmax regression on n digits, weight decay 1e-3: 40 rows removed, 150 test rows."""
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = X[order] / 16, y[order]
    train, test = (X[:n], y[:n]), (X[n : n + 150], y[n : n + 150])
    rows = np.random.default_rng(1).choice(n, 40, replace=False)
    full = softmax_regression(*train, np.ones(n))

    def trainer(X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray) -> nn.Linear:
        return softmax_regression(X, y, sample_weight, full)

    actual = leave_one_out(trainer, *train, *test, rows=rows, loss="cross_entropy", full=full)
    inverter = HessianInverter("direct", loss="cross_entropy", weight_decay=DECAY)
    for removal in ("first_order", "newton"):
        influence = InfluenceFunction(inverter, removal=removal).fit(full, train)
        report(f"digits, softmax regression, n = {n}, {removal}", influence.transform(test)[:, rows], actual)
        errors = [_parameter_error(influence, row, trainer(*train, np.arange(n) != row), full) for row in rows]
        print(f"    error of the change of the parameters: median {np.median(errors):.3f}, largest {max(errors):.3f}")
    print(f"    gradient at the full model: {influence.inverter_.gradient_norm_:.1e}")


def _parameter_error(influence: InfluenceFunction, row: int, model: nn.Module, full: nn.Module) -> float:
    predicted = influence.removed_parameters(int(row))
    gap = sum(float((predicted[name] - p.detach()).square().sum()) for name, p in model.named_parameters())
    size = sum(
        float((p - q).detach().square().sum()) for p, q in zip(model.parameters(), full.parameters(), strict=True)
    )
    return (gap / size) ** 0.5


def scikit_learn() -> None:
    """Models of scikit-learn, on its own data sets."""
    X_d, y_d = load_diabetes(return_X_y=True)
    X_d = StandardScaler().fit_transform(X_d)
    counts = np.random.default_rng(0).poisson(np.exp(1 + 0.5 * X_d[:, 2]))
    mlp = MLPRegressor(
        hidden_layer_sizes=(8,), activation="tanh", solver="lbfgs", alpha=1.0, tol=1e-12, max_iter=50_000
    )
    # By L-BFGS the gradient ends where the loss changes by less than rounding, which is too early here.
    tight = {"tol": 1e-12, "max_iter": 20_000, "solver": "newton-cholesky"}
    cases: list[tuple[str, Any, np.ndarray, np.ndarray]] = [
        (
            "LogisticRegression, two classes",
            LogisticRegression(**tight),
            *_scaled(*load_breast_cancer(return_X_y=True)),
        ),
        ("LogisticRegression, three classes", LogisticRegression(**tight), *_scaled(*load_wine(return_X_y=True))),
        (
            "LogisticRegression, class weights",
            LogisticRegression(class_weight={0: 1.0, 1: 3.0}, **tight),
            *_scaled(*load_breast_cancer(return_X_y=True)),
        ),
        (
            "LogisticRegression in a Pipeline",
            make_pipeline(StandardScaler(), LogisticRegression(**tight)),
            *load_breast_cancer(return_X_y=True),
        ),
        ("Ridge", Ridge(alpha=1.0), X_d, y_d),
        ("PoissonRegressor", PoissonRegressor(alpha=0.1, tol=1e-10, max_iter=10_000), X_d, counts),
        ("MLPRegressor", mlp.set_params(random_state=0), X_d, (y_d - y_d.mean()) / y_d.std()),
    ]
    for name, model, X, y in cases:
        train, test = (X[:-40], y[:-40]), (X[-40:], y[-40:])
        rows = np.random.default_rng(1).choice(len(train[0]), 40, replace=False)
        full = model.fit(*train)
        actual = leave_one_out(_trainer(model), *train, *test, rows=rows, full=full)
        for removal in ("first_order", "newton"):
            influence = InfluenceFunction(removal=removal).fit(full, train)
            report(f"{name}, n = {len(train[0])}, {removal}", influence.transform(test)[:, rows], actual)
        theirs = _pyinfluence(full, train, test)
        if theirs is not None:
            report(f"{name}, n = {len(train[0])}, pyinfluence", theirs[:, rows], actual)


def _pyinfluence(model: Any, train: Any, test: Any) -> np.ndarray | None:
    """Return pyinfluence's scores; None where it is not installed, or does not take the model."""
    two_classes = isinstance(model, LogisticRegression) and model.class_weight is None and len(model.classes_) == 2
    if not (two_classes or isinstance(model, Ridge)):
        return None
    try:
        from pyinfluence import InfluenceFunctions
    except ImportError:
        return None
    return InfluenceFunctions(damping=0.0).fit(model, *train).explain(*test)


def _trainer(model: Any) -> Any:
    """Return the estimator; of a pipeline with its fitted steps before the last held, as scores hold them."""
    if not hasattr(model, "steps"):
        return model
    from sklearn.frozen import FrozenEstimator

    return make_pipeline(FrozenEstimator(model[:-1]), model[-1])


def _scaled(X: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(0).permutation(len(X))
    return StandardScaler().fit_transform(X)[order], y[order]


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    scikit_learn()
    digits(300)
    digits(1000)
