"""What is measured: by name, a callable, a number of the whole test set; each against autograd of its own form."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import Oracle, oracle_matrix, perturbation_for, solution
from problems import problem
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from skinvert import HessianInverter, InfluenceFunction, PerSampleGradient, TorchTwiceDifferentiable
from skinvert.influence import AUROC, Accuracy, FairnessGap, WorstGroupLoss


def scores_of(case, measured, **settings):
    """∇v A⁻¹ b, the derivatives of ``measured(outputs, y)`` (q,) by autograd on the oracle's module."""
    oracle = Oracle(case)
    H = oracle_matrix(case)
    shift = 1.0 + perturbation_for(H, 1e3)
    theta = oracle.theta.clone()
    J = torch.autograd.functional.jacobian(lambda t: measured(oracle.outputs(t, oracle.X), oracle.y), theta)
    expected = J.numpy() @ solution(H, shift, oracle.gradient_rows()).T / oracle.n
    influence = InfluenceFunction(HessianInverter("direct", shift, **case.settings()), **settings)
    return influence.fit(case.module, case.data), expected


def log_odds(f, y):
    p = f.softmax(1)[torch.arange(len(y)), y]
    return p.log() - (1 - p).log()


def own_logit(f, y):
    return f[torch.arange(len(y)), y]


def first_output(f, y):
    return f[:, 0] * (1 + y)


@pytest.mark.parametrize(
    ("name", "measured"), [("margin", log_odds), ("logit", own_logit), (first_output, first_output)]
)
@pytest.mark.parametrize("model", ["mlp", "batchnorm_dropout", "lstm"])
def test_one_value_a_row(model, name, measured):
    case = problem(model, "cross_entropy")
    influence, expected = scores_of(case, measured, measurement=name)
    np.testing.assert_allclose(influence.transform(case.data), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(influence.self_influence(), expected.diagonal(), rtol=1e-6, atol=1e-9)


def accuracy(f, y):
    return torch.sigmoid(log_odds(f, y) / 0.5).mean()


def worst(f, y):
    groups = torch.arange(12) % 3
    losses = F.cross_entropy(f, y, reduction="none")
    means = torch.stack([losses[groups == g].mean() for g in range(3)])
    return 0.2 * torch.log((means / 0.2).exp().mean())


@pytest.mark.parametrize(
    ("functional", "measured"),
    [
        (Accuracy(0.5), accuracy),
        (WorstGroupLoss(np.arange(12) % 3, 0.2), worst),
        (lambda f, y: f.square().sum(), lambda f, y: f.square().sum()),
    ],
)
@pytest.mark.parametrize("removal", ["first_order", "newton"])
def test_a_number_of_all_rows(functional, measured, removal):
    case = problem("mlp", "cross_entropy")
    settings = {"measurement": functional, "removal": removal, "batch_size": 5}
    influence, expected = scores_of(case, lambda f, y: measured(f, y)[None], **settings)
    received = influence.transform(case.data)
    assert received.shape == (1, 12)
    if removal == "first_order":
        np.testing.assert_allclose(received, expected, rtol=1e-6, atol=1e-9)
        return
    oracle, named = Oracle(case), influence.removed_parameters(4)
    theta = torch.cat([value.reshape(-1) for value in named.values()])
    gap = measured(oracle.outputs(theta, case.X), case.y) - measured(oracle.outputs(oracle.theta, case.X), case.y)
    np.testing.assert_allclose(received[0, 4], gap, rtol=1e-9, atol=1e-12)


def test_several_numbers_are_a_row_each():
    case = problem("mlp", "cross_entropy")
    functions = [Accuracy(), WorstGroupLoss([0, 1] * 6)]
    both, _ = scores_of(case, first_output, measurement=functions)
    alone = [scores_of(case, first_output, measurement=each)[0].transform(case.data) for each in functions]
    torch.testing.assert_close(both.transform(case.data), torch.cat(alone))


def test_smooth_forms_become_the_exact_ones():
    torch.manual_seed(0)
    f, y = torch.randn(60, dtype=torch.float64), torch.arange(60) % 2
    two = torch.stack([-f, f], dim=1)
    assert float(AUROC(1e-4)(f, y)) == pytest.approx(roc_auc_score(y, f), abs=1e-6)
    assert float(AUROC(1e-4)(two, y)) == pytest.approx(roc_auc_score(y, f), abs=1e-6)
    assert float(Accuracy(1e-5)(two, y)) == pytest.approx(accuracy_score(y, f > 0), abs=1e-6)
    assert float(Accuracy(1e-5)(f, y)) == pytest.approx(accuracy_score(y, f > 0), abs=1e-6)
    groups = torch.arange(60) % 3
    losses = F.binary_cross_entropy_with_logits(f, y.double(), reduction="none")
    worst_mean = max(float(losses[groups == g].mean()) for g in range(3))
    assert float(WorstGroupLoss(groups, 1e-4)(f, y)) == pytest.approx(worst_mean, abs=2e-4)
    means = np.array([float(losses[groups == g].mean()) for g in range(3)])
    assert float(WorstGroupLoss(groups, 0.5)(f, y)) == pytest.approx(0.5 * np.log(np.exp(means / 0.5).mean()))
    p, one = torch.sigmoid(f), groups == 1
    gap = FairnessGap(one)(f, y)
    assert float(gap) == pytest.approx(float(p[one].mean() - p[~one].mean()))
    given = FairnessGap(one, given=1)(f, y)
    assert float(given) == pytest.approx(float(p[one & (y == 1)].mean() - p[~one & (y == 1)].mean()))


@pytest.mark.parametrize("make", [lambda a: AUROC(), lambda a: FairnessGap(a), lambda a: Accuracy()])
def test_of_a_scikit_learn_model(make):
    """Against differences of refits with one row's weight a little less."""
    X, y = load_breast_cancer(return_X_y=True)
    X = (X[:150, :6] - X[:150, :6].mean(0)) / X[:150, :6].std(0)
    y, functional = y[:150], make(X[:150, 0] > 0)
    model = LogisticRegression(C=0.5, tol=1e-12, max_iter=10_000).fit(X, y)
    scores = InfluenceFunction(HessianInverter("direct"), measurement=functional).fit(model, (X, y)).transform((X, y))
    for j in (0, 3, 77):
        values = []
        for step in (1e-3, -1e-3):
            weights = np.ones(150)
            weights[j] -= step
            refit = LogisticRegression(C=0.5, tol=1e-12, max_iter=10_000).fit(X, y, weights)
            values.append(float(functional(torch.tensor(refit.decision_function(X)), torch.tensor(y))))
        assert scores[0, j] == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("measurement", "error", "message"),
    [
        ("accuracy", ValueError, "'loss', 'margin', 'logit'"),
        (3, TypeError, "callable"),
        ([], TypeError, "callable"),
        ([Accuracy(), "loss"], TypeError, "callable"),
        (lambda f, y: f, ValueError, "one value a row"),
        (lambda f, y: 1.0, TypeError, "a tensor"),
        (lambda f, y: f[:, 0].detach(), ValueError, "differentiable"),
        (lambda f, y: f[:, 0] - f[:, 0].mean(), ValueError, "of this row alone"),
        (lambda f, y: f.sum() * torch.nan, ValueError, "finite"),
        (WorstGroupLoss([0, 1]), ValueError, "one for each of the 12"),
        (WorstGroupLoss([0.0, 1.0, np.nan] * 4), ValueError, "known for each"),
        (Accuracy(0), ValueError, "positive"),
        (AUROC(), ValueError, "two classes"),
    ],
)
def test_what_is_no_measurement(measurement, error, message):
    case = problem("mlp", "cross_entropy")
    influence = InfluenceFunction(HessianInverter("direct", 5.0, **case.settings()), measurement=measurement)
    with pytest.raises(error, match=message):
        influence.fit(case.module, case.data).transform(case.data)


def test_targets_of_a_callable_are_a_tensor():
    class TwoTargets(TorchTwiceDifferentiable):
        def per_sample_loss(self, outputs, batch):
            return (outputs - batch[1]["a"] - batch[1]["b"]).square().sum(1)

    torch.manual_seed(0)
    rows = [(torch.randn(6, 4), {"a": torch.randn(6, 2), "b": torch.randn(6, 2)})]
    model = TwoTargets(nn.Linear(4, 2), None)
    assert InfluenceFunction(HessianInverter("direct", 1.0)).fit(model, rows).transform(rows).shape == (6, 6)
    influence = InfluenceFunction(HessianInverter("direct", 1.0), measurement=lambda f, y: f[:, 0]).fit(model, rows)
    with pytest.raises(TypeError, match="a tensor each"):
        influence.transform(rows)


@pytest.mark.parametrize("measurement", ["margin", "logit"])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("kind", [Ridge, lambda: make_pipeline(StandardScaler(), Ridge()), PoissonRegressor])
def test_margins_are_of_classifiers(kind, labels, measurement):
    """Outputs of a regression are no logits, whether or not its targets would do for classes."""
    X, y = load_iris(return_X_y=True)
    X, y = X[:, :3], (y > 0).astype(float) if labels else X[:, 3]
    model = kind().fit(X, y)
    with pytest.raises(TypeError, match="The model for the margin must be a classifier"):
        InfluenceFunction(measurement=measurement).fit(model, (X, y)).transform((X, y))
    with pytest.raises(TypeError, match="The model for the margin must be a classifier"):
        PerSampleGradient(model, loss="margin").fit(X, y)


def test_probabilities_and_one_logit():
    torch.manual_seed(0)
    X, y = torch.randn(30, 4, dtype=torch.float64), (torch.arange(30) % 2).double()[:, None]
    one = nn.Linear(4, 1).double()
    inverter = HessianInverter("direct", 1.0, loss="bce_with_logits")
    logit = InfluenceFunction(inverter, measurement="logit").fit(one, (X, y)).transform((X, y))
    margin = InfluenceFunction(inverter, measurement="margin").fit(one, (X, y)).transform((X, y))
    torch.testing.assert_close(logit, margin)
    squashed = nn.Sequential(one, nn.Sigmoid())
    inverter = HessianInverter("direct", 1.0, loss="bce")
    again = InfluenceFunction(inverter, measurement="margin").fit(squashed, (X, y)).transform((X, y))
    torch.testing.assert_close(again, margin)
