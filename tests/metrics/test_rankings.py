"""Label errors, removal curves, stability and baselines, against scikit-learn, SciPy and closed forms."""

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn

from skinvert import HessianInverter, PerSampleGradient
from skinvert.metrics import baselines, mislabel_auc, removal_curve, stability


def test_auc_is_scikit_learn_s():
    rng = np.random.default_rng(0)
    wrong, scores = rng.random(50) < 0.2, rng.standard_normal(50).round(1)
    assert mislabel_auc(torch.from_numpy(scores), wrong) == roc_auc_score(wrong, scores)


def test_flipped_labels_have_a_large_self_influence():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 3))
    wrong = rng.random(200) < 0.1
    y = (X[:, 0] > 0) ^ wrong
    model = LogisticRegression().fit(X, y)
    G = PerSampleGradient(model).fit_transform(X, y)
    own = (G * HessianInverter("direct").fit(model, (X, y)).transform(G)).sum(1)
    assert mislabel_auc(own, wrong) > 0.9
    assert mislabel_auc(baselines.row_loss(model, X, y), wrong) > 0.9


@pytest.mark.parametrize(
    ("scores", "wrong", "match"),
    [
        (np.ones(4), [True] * 4, "is_mislabelled must be true for some"),
        (np.ones(4), [0, 1, 2, 1], "is_mislabelled must be of booleans"),
        (np.ones(3), [0, 1, 0, 1], r"scores must be of shape \(4,\)"),
        (np.ones((4, 4)), [0, 1, 0, 1], "its diagonal"),
        ([0, 1, np.nan, 2], [0, 1, 0, 1], "contains NaN"),
    ],
)
def test_bad_label_errors(scores, wrong, match):
    with pytest.raises(ValueError, match=match):
        mislabel_auc(scores, wrong)


def test_the_rows_of_the_highest_scores_are_removed():
    rng = np.random.default_rng(0)
    X, y, scores = rng.standard_normal((20, 3)), rng.standard_normal(20), rng.standard_normal(20)
    trainer = Ridge(2.0, fit_intercept=False)
    n_removed, changes = removal_curve(scores, trainer, X, y, X[:4], y[:4], fractions=[0.0, 0.1, 0.5])
    assert n_removed.tolist() == [0, 2, 10]
    losses = []
    for k in n_removed:
        kept = np.sort(np.argsort(scores)[: 20 - k])
        theta = np.linalg.solve(X[kept].T @ X[kept] + 2 * np.eye(3), X[kept].T @ y[kept])
        losses.append(0.5 * (X[:4] @ theta - y[:4]) ** 2)
    np.testing.assert_allclose(changes, np.array(losses) - losses[0], atol=1e-12)


@pytest.mark.parametrize("fractions", [[1.0], [], [-0.1]])
def test_bad_fractions(fractions):
    X = np.random.default_rng(0).standard_normal((20, 3))
    with pytest.raises(ValueError, match="raction"):
        removal_curve(X[:, 0], Ridge(), X, X[:, 0], X, X[:, 0], fractions=fractions)


def test_agreement_of_three_fits():
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 5, 30))
    found = stability([a, b, torch.from_numpy(c)], k=4)
    for row, (first, second) in enumerate([(a, b), (a, c), (b, c)]):
        for i in range(5):
            expected = scipy.stats.spearmanr(first[i], second[i]).statistic
            assert found.rank_correlation[row, i] == pytest.approx(expected, abs=1e-12)
            top = [set(np.argsort(scores[i])[-4:]) for scores in (first, second)]
            assert found.overlap[row, i] == len(top[0] & top[1]) / 4


def test_rows_that_a_fit_did_not_see_are_left_out():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 30))
    expected = stability([np.delete(a, [3, 8], 1), np.delete(b, [3, 8], 1)], k=4)
    a[:, 3], b[:, 8] = np.nan, np.nan
    received = stability([a, b], k=4)
    np.testing.assert_array_equal(received.rank_correlation, expected.rank_correlation)
    np.testing.assert_array_equal(received.overlap, expected.overlap)


def test_a_constant_row_agrees_with_nothing():
    a = np.random.default_rng(0).standard_normal((2, 20))
    constant = np.zeros_like(a)
    assert (stability([a, constant]).rank_correlation == 0).all()
    assert (stability([constant, a]).rank_correlation == 0).all()


@pytest.mark.parametrize(
    ("matrices", "k", "match"),
    [
        ([np.ones((2, 5))], 1, "two or more"),
        ([np.ones((2, 5)), np.ones((2, 6))], 1, "two or more of one shape"),
        ([np.ones((2, 5)), np.ones((2, 5))], 5, "k must be less than the 5"),
        ([np.array([[1.0, np.nan], [1.0, 2.0]])] * 2, 1, "NaN in the whole column"),
    ],
)
def test_bad_matrices(matrices, k, match):
    with pytest.raises(ValueError, match=match):
        stability(matrices, k=k)


def test_baselines_of_gradients():
    generator = torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    X, X_test = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64).split(1)
    X, X_test, y = X[0], X_test[0, :4], torch.arange(9) % 2
    G = PerSampleGradient(net, loss="cross_entropy").fit_transform(X, y).numpy()
    T = PerSampleGradient(net, loss="cross_entropy").fit_transform(X_test, y[:4]).numpy()
    train, test = (X, y), (X_test, y[:4])
    norms = baselines.gradient_norm(net, X, y, loss="cross_entropy")
    np.testing.assert_allclose(norms, np.sqrt((G**2).sum(1)))
    dots = baselines.gradient_dot(net, train, test, loss="cross_entropy")
    np.testing.assert_allclose(dots, T @ G.T / 9)
    cosine = baselines.gradient_cosine(net, train, test, loss="cross_entropy")
    np.testing.assert_allclose(cosine, cosine_similarity(T, G))
    expected = nn.functional.cross_entropy(net(X), y, reduction="none").detach().numpy()
    np.testing.assert_allclose(baselines.row_loss(net, X, y, loss="cross_entropy"), expected)


def test_the_dot_product_is_the_influence_at_large_lambda():
    X = np.random.default_rng(0).standard_normal((20, 3))
    y = (X[:, 0] > 0).astype(int)
    model = LogisticRegression().fit(X, y)
    gradient = PerSampleGradient(model).fit(X, y)
    G = gradient.transform((X, y))
    scores = G @ HessianInverter("direct", 1e6).fit(model, (X, y)).transform(G).T / len(X)
    np.testing.assert_allclose(baselines.gradient_dot(model, (X, y), (X, y)), 1e6 * scores, rtol=1e-5)


def test_features_that_are_alike():
    rng = np.random.default_rng(0)
    X, X_test = rng.standard_normal((6, 2, 3)), rng.standard_normal((4, 2, 3))
    y, y_test = np.arange(6) % 2, np.arange(4) % 2
    expected = cosine_similarity(X_test.reshape(4, 6), X.reshape(6, 6))
    np.testing.assert_allclose(baselines.feature_cosine(torch.from_numpy(X), X_test), expected)
    signed = baselines.feature_cosine(X, X_test, y=y, y_test=y_test)
    np.testing.assert_allclose(signed, expected * np.where(y_test[:, None] == y, 1, -1))
    with pytest.raises(ValueError, match="given both"):
        baselines.feature_cosine(X, X_test, y=y)
    with pytest.raises(ValueError, match="of lengths"):
        baselines.feature_cosine(X, X_test, y=y[:5], y_test=y_test)


def test_random_scores():
    a, b, c = (baselines.random_scores(50, 40, random_state=seed) for seed in (0, 0, 1))
    assert a.shape == (50, 40)
    assert (a == b).all()
    assert (a != c).all()
