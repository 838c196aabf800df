"""The linear datamodeling score: its sign, its correlations against SciPy's, its intervals, its retrainings."""

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from skinvert import HessianInverter, PerSampleGradient
from skinvert.metrics import linear_datamodeling_score, retrain_subsets
from skinvert.metrics.ranks import Ranked, spearman


def noisy(n_test=30, n=40, n_subsets=60, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((n_test, n))
    subsets = np.argsort(rng.random((n_subsets, n)), axis=1) < n // 2
    outcomes = -(subsets @ scores.T) + noise * rng.standard_normal((n_subsets, n_test))
    return scores, subsets, outcomes


@pytest.mark.parametrize("rounded", [False, True])
def test_correlations_are_scipy_s(rounded):
    scores, subsets, outcomes = noisy()
    if rounded:
        # With ties.
        scores, outcomes = scores.round(), outcomes.round()
    predicted = -(subsets @ scores.T)
    expected = [scipy.stats.spearmanr(p, o).statistic for p, o in zip(predicted.T, outcomes.T, strict=True)]
    received = linear_datamodeling_score(scores, subsets, outcomes, n_bootstraps=5, random_state=0)
    np.testing.assert_allclose(received.per_row, expected, atol=1e-12)
    assert received.mean == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("rounded", [False, True])
def test_a_resample_s_correlations_are_scipy_s(rounded):
    scores, subsets, outcomes = noisy()
    a, b = -(subsets @ scores.T).T, outcomes.T
    a, b = (a.round(), b.round()) if rounded else (a, b)
    drawn = np.random.default_rng(1).integers(len(subsets), size=len(subsets))
    counts = np.bincount(drawn, minlength=len(subsets)).astype(float)
    expected = [scipy.stats.spearmanr(p, o).statistic for p, o in zip(a[:, drawn], b[:, drawn], strict=True)]
    np.testing.assert_allclose(spearman(Ranked(a), Ranked(b), counts), expected, atol=1e-12)


def test_influence_scores_are_positive():
    rng = np.random.default_rng(0)
    X, X_test = rng.standard_normal((200, 4)), rng.standard_normal((30, 4))
    y, y_test = (X[:, 0] > 0).astype(int), (X_test[:, 0] > 0).astype(int)
    trainer = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000)
    model = trainer.fit(X, y)
    retrained = retrain_subsets(trainer, X, y, X_test, y_test, n_subsets=30, full=model, random_state=0)
    gradient = PerSampleGradient(model).fit(X, y)
    solved = HessianInverter("direct").fit(model, (X, y)).transform(gradient.transform((X, y)))
    scores = gradient.transform((X_test, y_test)) @ solved.T / len(X)
    assert linear_datamodeling_score(scores, *retrained, random_state=0).mean > 0.7


def test_subsets_are_removed_rows_as_leave_one_out_removes_them():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((20, 3)), rng.standard_normal(20)
    subsets, outcomes = retrain_subsets(
        Ridge(2.0, fit_intercept=False), X, y, X[:4], y[:4], n_subsets=5, fraction=0.3, random_state=0
    )
    assert subsets.dtype == bool
    assert (subsets.sum(1) == 6).all()
    assert len(np.unique(subsets, axis=0)) == 5
    for kept, outcome in zip(subsets, outcomes, strict=True):
        theta = np.linalg.solve(X[kept].T @ X[kept] + 2 * np.eye(3), X[kept].T @ y[kept])
        np.testing.assert_allclose(outcome, 0.5 * (X[:4] @ theta - y[:4]) ** 2, atol=1e-12)


def test_the_seed_decides_the_subsets():
    X = np.random.default_rng(0).standard_normal((20, 3))
    arguments = (Ridge(), X, X[:, 0], X[:4], X[:4, 0])
    a, b, c = (retrain_subsets(*arguments, n_subsets=3, random_state=seed).subsets for seed in (0, 0, 1))
    assert (a == b).all()
    assert (a != c).any()


@pytest.mark.parametrize("noise", [0.5, 6.0])
def test_the_interval_covers_the_mean_over_many_draws(noise):
    scores, subsets, outcomes = noisy(300, n_subsets=3000, noise=noise)
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        some, rows = rng.choice(3000, 50, replace=False), rng.choice(300, 40, replace=False)
        drawn = (scores[rows], subsets[some], outcomes[some][:, rows])
        found.append(linear_datamodeling_score(*drawn, n_bootstraps=200, random_state=seed))
    truth = np.mean([each.mean for each in found])
    covered = sum(each.interval[0] <= truth <= each.interval[1] for each in found)
    # Of 60 at 95 %: at least 53 in all but one of some 1,000 runs.
    assert covered >= 53
    # And no interval is without its own score.
    assert all(each.interval[0] < each.mean < each.interval[1] for each in found)


def test_subsets_are_resampled_and_rows_too():
    scores, subsets, outcomes = noisy(noise=6.0)
    width = {}
    for resample in ("rows", "subsets", "both"):
        found = linear_datamodeling_score(scores, subsets, outcomes, resample=resample, random_state=0)
        width[resample] = found.interval[1] - found.interval[0]
    assert width["both"] > max(width["rows"], width["subsets"]) > 0


def test_a_paired_difference_is_narrower_than_its_parts():
    scores, subsets, outcomes = noisy(noise=4.0)
    worse = scores + 0.1 * np.random.default_rng(1).standard_normal(scores.shape)
    found = linear_datamodeling_score(scores, subsets, outcomes, compare=worse, random_state=0)
    other = linear_datamodeling_score(worse, subsets, outcomes, random_state=0)
    assert found.difference == pytest.approx(found.mean - other.mean)
    low, high = found.difference_interval
    assert low <= found.difference <= high
    assert high - low < 0.5 * (found.interval[1] - found.interval[0])


def test_the_same_scores_do_not_differ():
    scores, subsets, outcomes = noisy()
    found = linear_datamodeling_score(scores, subsets, outcomes, compare=torch.from_numpy(scores), random_state=0)
    assert found.difference == 0
    assert found.difference_interval == (0, 0)


def test_one_row_of_scores_serves_every_test_row():
    scores, subsets, outcomes = noisy()
    expected = linear_datamodeling_score(np.tile(scores[0], (30, 1)), subsets, outcomes, random_state=0)
    received = linear_datamodeling_score(scores[0], subsets, outcomes, random_state=0)
    assert received.mean == expected.mean


def test_what_predicts_nothing_is_zero_and_what_cannot_be_predicted_is_left_out():
    scores, subsets, outcomes = noisy()
    scores[0], outcomes[:, 1] = 0.0, 3.0
    found = linear_datamodeling_score(scores, subsets, outcomes, random_state=0)
    assert found.per_row[0] == 0
    assert np.isnan(found.per_row[1])
    assert found.mean == pytest.approx(np.delete(found.per_row, 1).mean())
    assert np.isfinite(found.interval).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scores": np.ones((30, 39))}, r"scores must be of shape \(30, 40\)"),
        ({"scores": np.full((30, 40), np.nan)}, "contains NaN"),
        ({"subsets": np.full((60, 40), 0.5)}, "subsets must be of booleans"),
        ({"outcomes": np.ones((59, 30))}, "outcomes must be of 60 rows"),
        ({"outcomes": np.ones((60, 30))}, "The outcomes must be different"),
        ({"resample": "columns"}, "resample must be"),
        ({"n_bootstraps": 0}, "n_bootstraps must be an int"),
        ({"confidence_level": 95}, "confidence_level must be a float"),
    ],
)
def test_bad_input(change, match):
    scores, subsets, outcomes = noisy()
    with pytest.raises(ValueError, match=match):
        linear_datamodeling_score(**{"scores": scores, "subsets": subsets, "outcomes": outcomes, **change})


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.01])
def test_a_subset_has_some_rows_and_not_all(fraction):
    X = np.random.default_rng(0).standard_normal((20, 3))
    with pytest.raises(ValueError, match="fraction must be"):
        retrain_subsets(Ridge(), X, X[:, 0], X, X[:, 0], fraction=fraction)
