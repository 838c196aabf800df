"""InfluenceFunction's scores against dense inverses in float64, row by row, over the table of problems."""

import numpy as np
import pandas as pd
import pytest
import torch
from oracles import Oracle, oracle_matrix, perturbation_for, solution
from problems import LOSSES, MODELS, problem, table
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

from skinvert import HessianInverter, InfluenceFunction

# Each model with every fourth loss, the settings taking turns.
CASES = [case for i, case in enumerate(table()) if (i + i // len(LOSSES)) % 4 == 0]
LAMBDA = 5.0


def shift_of(case):
    return LAMBDA + perturbation_for(oracle_matrix(case), 1e3)


def fitted(case, **settings):
    inverter = HessianInverter("direct", shift_of(case), **case.settings())
    return InfluenceFunction(inverter, **settings).fit(case.module, case.data, sample_weight=case.sample_weight)


def parts_of(case):
    """Gradients of the table's rows, each once, shares wᵢ/Σw, and A = H + λI."""
    counts = np.ones(len(case.y)) if case.counts is None else case.counts
    whole = Oracle(case)
    once = Oracle(_unweighted(case))
    H = whole.hessian() + shift_of(case) * np.eye(whole.p)
    return once.gradient_rows() * whole.scale / once.scale, counts / counts.sum(), H


def _unweighted(case):
    return type(case)(**{**vars(case), "counts": None})


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("arguments", "k"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_first_order(arguments, k):
    case = problem(*arguments)
    rows, shares, H = parts_of(case)
    expected = rows @ solution(H, 0, rows).T * shares
    influence = fitted(case)
    received = influence.transform(case.data)
    assert isinstance(received, torch.Tensor)
    np.testing.assert_allclose(received, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
    np.testing.assert_allclose(influence.self_influence(), expected.diagonal(), rtol=1e-7, atol=1e-12)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("n_test", [1, 3, 12])
@pytest.mark.parametrize("model", MODELS)
def test_few_and_many_test_rows(model, n_test):
    """Either side is the smaller one; in forward mode where there are rules, else from gradients."""
    case = problem(model, "cross_entropy" if "cross_entropy" in LOSSES else "mse")
    rows, shares, H = parts_of(case)
    expected = rows[:n_test] @ solution(H, 0, rows).T * shares
    received = fitted(case, batch_size=5).transform((case.X[:n_test], case.y[:n_test]))
    np.testing.assert_allclose(received, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
    few = fitted(case, memory=1).transform(case.X[:n_test], case.y[:n_test])
    np.testing.assert_allclose(few, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("model", "loss", "weighted"),
    [
        ("softmax", "cross_entropy", False),
        ("mlp", "class_weights", True),
        ("linear", "mse", False),
        ("sequence", "ignore_index", True),
        ("cnn2d", "bce_with_logits", False),
        ("lstm", "callable_each", False),
        ("tied", "huber", True),
    ],
)
def test_newton(model, loss, weighted):
    """Each row's own GGN is out of A, and the loss that of the shifted parameters."""
    case = problem(model, loss, 0.1, weighted)
    whole, once = Oracle(case), Oracle(_unweighted(case))
    rows, shares, H = parts_of(case)
    own = once.ggn_rows() * whole.scale / once.scale
    losses = [_losses(once, np.zeros(whole.p), whole.scale)]
    for g, h, share in zip(rows, own, shares, strict=True):
        step = np.linalg.solve(H - share * h, share * g)
        losses.append(_losses(once, step, whole.scale))
    expected = np.stack(losses[1:], axis=1) - losses[0][:, None]
    influence = fitted(case, removal="newton")
    np.testing.assert_allclose(influence.transform(case.data), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(influence.self_influence(), expected.diagonal(), rtol=1e-6, atol=1e-9)


def _losses(oracle, step, scale):
    theta = oracle.theta + torch.as_tensor(step)
    each = [oracle.summed(oracle.outputs(theta, oracle.X[i : i + 1]), oracle.y[i : i + 1]) for i in range(oracle.n)]
    return scale * np.array([float(value) for value in each])


@pytest.mark.parametrize("model", ["mlp", "softmax"])
@pytest.mark.parametrize("removal", ["first_order", "newton"])
def test_groups_and_parameters(removal, model):
    """The last group has more rows of the GGN's factor than the softmax regression has parameters."""
    case = problem(model, "class_weights", 0.1, True)
    whole, once = Oracle(case), Oracle(_unweighted(case))
    rows, shares, H = parts_of(case)
    own = once.ggn_rows() * whole.scale / once.scale
    influence = fitted(case, removal=removal)
    groups = [[0, 1, 5], [2], [0, 1, 2, 3, 4, 5, 7, 9, 11]]
    received = influence.group_effect(groups, case.data)
    now = _losses(once, np.zeros(whole.p), whole.scale)
    for j, group in enumerate(groups):
        A = H
        if removal == "newton":
            A = A - np.einsum("i,ipq->pq", shares[group], own[group])
        step = np.linalg.solve(A, shares[group] @ rows[group])
        effect = _losses(once, step, whole.scale) - now if removal == "newton" else rows @ step
        np.testing.assert_allclose(received[:, j], effect, rtol=1e-6, atol=1e-9)
        named = influence.removed_parameters(group)
        flat = torch.cat([value.reshape(-1) for value in named.values()])
        np.testing.assert_allclose(flat, whole.theta + torch.as_tensor(step), rtol=1e-9, atol=1e-9)
        expected = once.outputs(whole.theta + torch.as_tensor(step), case.X)
        for data in (case.data, case.X):
            np.testing.assert_allclose(influence.predict_without(group, data), expected, rtol=1e-8, atol=1e-9)


def test_labels_are_groups_in_sorted_order():
    case = problem("mlp", "cross_entropy")
    influence = fitted(case)
    labels = np.array(["b", "a", "c"] * 4)
    scores = influence.transform(case.data)
    expected = torch.stack([scores[:, labels == label].sum(1) for label in "abc"], dim=1)
    torch.testing.assert_close(influence.group_effect(labels, case.data), expected)


MISSING = {
    "floats": np.array([np.nan, 1.0, 2.0]),
    "complex": np.array([np.nan, 1j, 2j]),
    "strings": np.array([None, "a", "b"], dtype=object),
    "strings and NaN": np.array([np.nan, "a", "b"], dtype=object),
    "dates": np.array(["NaT", "2024-01-01", "2024-01-02"], dtype="M8[ns]"),
    "Int64": pd.array([None, 1, 2], dtype="Int64"),
    "boolean": pd.array([None, False, True], dtype="boolean"),
    "string": pd.array([pd.NA, "a", "b"], dtype="string"),
    "objects": pd.Series([pd.NA, "a", "b"], dtype=object),
    "category": pd.Categorical([None, "a", "b"]),
    "category of floats": pd.Categorical([np.nan, 1.0, 2.0]),
    "pandas' dates": pd.to_datetime([None, "2024-01-01", "2024-01-02"]),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_labels_are_a_group_the_last(name):
    case, labels = problem("mlp", "cross_entropy"), MISSING[name]
    rows, shares, H = parts_of(case)
    scores = rows @ solution(H, 0, rows).T * shares
    # Rows 0, 3, 6 and 9 have no label.
    expected = np.stack([scores[:, place::3].sum(1) for place in (1, 2, 0)], axis=1)
    influence = fitted(case).set_output(transform="pandas")
    received = influence.group_effect(labels[[0, 1, 2] * 4], pd.DataFrame(case.X.numpy()), case.y.numpy())
    np.testing.assert_allclose(received, expected, rtol=1e-6, atol=1e-9)
    assert list(received.columns[:2]) == list(labels[1:])
    assert pd.isna(received.columns[2])


def test_different_missing_labels_are_one_group():
    case = problem("mlp", "cross_entropy")
    influence = fitted(case)
    labels = np.array(["a", None, np.nan, pd.NA, pd.NaT, "a"] * 2, dtype=object)
    expected = influence.group_effect([[0, 5, 6, 11], [1, 2, 3, 4, 7, 8, 9, 10]], case.data)
    torch.testing.assert_close(influence.group_effect(labels, case.data), expected)
    alone = influence.group_effect(torch.full((12,), torch.nan), case.data)
    torch.testing.assert_close(alone[:, 0], influence.transform(case.data).sum(1))


def test_labels_that_cannot_be_sorted():
    case = problem("mlp", "cross_entropy")
    with pytest.raises(TypeError, match="groups must be labels of one kind"):
        fitted(case).group_effect(np.array(["a", 1] * 6, dtype=object), case.data)


@pytest.mark.parametrize("norm", ["cosine", "relatif", "l_relatif"])
def test_normalized(norm):
    case = problem("mlp", "class_weights", 0.1, True)
    rows, shares, H = parts_of(case)
    X = solution(H, 0, rows)
    b, x = shares[:, None] * rows, shares[:, None] * X
    sizes = {"relatif": np.linalg.norm(x, axis=1), "l_relatif": np.sqrt((b * x).sum(1))}
    columns = sizes.get(norm, sizes["l_relatif"])
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(rows @ x.T / columns)
    if norm == "cosine":
        expected = expected / np.sqrt((rows * X).sum(1))[:, None]
        assert np.abs(expected).max() <= 1 + 1e-9
    np.testing.assert_allclose(fitted(case, normalize=norm).transform(case.data), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("harmful", [False, True])
@pytest.mark.parametrize("k", [1, 4, 50])
def test_top(k, harmful):
    case = problem("mlp", "cross_entropy")
    influence = fitted(case, memory=1)
    scores = influence.transform(case.data).numpy()
    rows, values = influence.top(case.data, k=k, harmful=harmful)
    order = np.argsort(scores if harmful else -scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(values, np.take_along_axis(scores, order, 1), rtol=1e-9)


def test_features():
    """By finite differences of the gradient in the inputs, A held."""
    case = problem("mlp", "cross_entropy", 0.1, True)
    rows, shares, H = parts_of(case)
    Z, chosen = solution(H, 0, rows), [1, 4, 10]
    received = fitted(case).feature_influence(chosen, case.data)
    assert received.shape == (12, 3, 4)
    whole = Oracle(case)
    for place, j in enumerate(chosen):
        for d in range(4):
            gradients = []
            for sign in (1, -1):
                moved = problem("mlp", "cross_entropy", 0.1, True)
                X = moved.X.clone()
                X[j, d] += sign * 1e-5
                other = type(case)(**{**vars(moved), "X": X, "counts": None})
                once = Oracle(other)
                gradients.append(once.gradient_rows()[j] * whole.scale / once.scale)
            slope = (gradients[0] - gradients[1]) / 2e-5
            np.testing.assert_allclose(received[:, place, d], -shares[j] * Z @ slope, rtol=1e-5, atol=1e-9)


def test_an_ensemble_is_the_mean_of_its_members():
    cases = [problem("mlp", "cross_entropy"), problem("no_bias", "cross_entropy")]
    data = cases[0].data
    inverter = HessianInverter("direct", LAMBDA, loss="cross_entropy")
    alone = [InfluenceFunction(inverter).fit(case.module, data) for case in cases]
    both = InfluenceFunction(inverter).fit([case.module for case in cases], data)
    expected = (alone[0].transform(data) + alone[1].transform(data)) / 2
    torch.testing.assert_close(both.transform(data), expected)
    np.testing.assert_allclose(both.self_influence(), expected.diagonal())
    np.testing.assert_array_equal(both.top(data, k=3).rows, torch.topk(expected, 3).indices)
    with pytest.raises(TypeError, match="members_"):
        both.removed_parameters(0)


def test_predictions_of_a_scikit_learn_model_are_its_decision_function():
    X, y = load_iris(return_X_y=True)
    model = LogisticRegression(C=0.5, tol=1e-12, max_iter=5_000).fit(X, y)
    influence = InfluenceFunction(removal="newton").fit(model, (X, y))
    received = influence.predict_without([0, 60, 130], X[:20])
    kept = np.delete(np.arange(150), [0, 60, 130])
    refit = LogisticRegression(C=0.5, tol=1e-12, max_iter=5_000).fit(X[kept], y[kept])
    change = refit.decision_function(X[:20]) - model.decision_function(X[:20])
    assert np.linalg.norm(received - model.decision_function(X[:20]) - change) <= 0.1 * np.linalg.norm(change)
    np.testing.assert_allclose(influence.predict_without([], X), model.decision_function(X), atol=1e-12)
