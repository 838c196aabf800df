"""polars in and out: the names of columns as with pandas; what has no index has none."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from skinvert import HessianInverter, HessianInverterCV, InfluenceFunction, PerSampleGradient

pl = pytest.importorskip("polars")


def frames(n=40):
    rng = np.random.default_rng(0)
    array, labels = rng.normal(size=(n, 2)), rng.integers(0, 2, n)
    return pl.DataFrame(array, schema=["a", "b"]), pl.Series("y", labels), array, labels


def network():
    torch.manual_seed(0)
    return nn.Linear(2, 2).double()


knows_names = pytest.mark.skipif(
    not hasattr(StandardScaler().fit(pl.DataFrame({"a": [0.0, 1.0]})), "feature_names_in_"),
    reason="scikit-learn of that age does not read the columns of this polars",
)


@knows_names
def test_plain_rows():
    X, _, array, _ = frames()
    inverter = HessianInverter("direct", 0.1).fit(X)
    expected = HessianInverter("direct", 0.1).fit_transform(array)
    assert list(inverter.feature_names_in_) == ["a", "b"]
    np.testing.assert_array_equal(inverter.transform(X), expected)
    received = inverter.set_output(transform="polars").transform(X)
    assert received.columns == ["a", "b"]
    np.testing.assert_array_equal(received.to_numpy(), expected)
    with pytest.raises(ValueError, match="same order"):
        inverter.transform(X[["b", "a"]])


def test_right_hand_sides_by_the_names_of_parameters():
    _, _, array, labels = frames()
    inverter = HessianInverter("direct", 0.1, loss="cross_entropy").fit(network(), (array, labels))
    names = list(inverter.get_feature_names_out())
    rows = np.random.default_rng(1).normal(size=(3, 6))
    b = pl.DataFrame(rows, schema=names)
    np.testing.assert_array_equal(inverter.transform(b), inverter.transform(rows))
    with pytest.raises(ValueError, match="in this order"):
        inverter.transform(b[names[::-1]])


@pytest.mark.parametrize("kind", ["module", "scikit-learn", "pipeline"])
def test_scores_of_frames_are_those_of_arrays(kind):
    X, y, array, labels = frames()
    make = {
        "module": lambda X, y: network(),
        "scikit-learn": lambda X, y: LogisticRegression().fit(X, y),
        "pipeline": lambda X, y: make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y),
    }[kind]
    inverter = HessianInverter("direct", 0.1, loss="cross_entropy" if kind == "module" else None)
    plain = InfluenceFunction(inverter).fit(make(array, labels), (array, labels))
    expected = plain.transform((array[:3], labels[:3]))
    influence = InfluenceFunction(inverter).fit(make(X, y), (X, y))
    # By columns and by rows in memory: the same to rounding.
    np.testing.assert_allclose(influence.transform((X[:3], y[:3])), expected, rtol=1e-12, atol=1e-14)
    received = influence.set_output(transform="polars").transform((X[:3], y[:3]))
    assert received.columns == [str(place) for place in range(40)]
    np.testing.assert_allclose(received.to_numpy(), expected, rtol=1e-12, atol=1e-14)
    outputs = influence.predict_without([0], X[:3])
    np.testing.assert_allclose(outputs, plain.predict_without([0], array[:3]), rtol=1e-12)


def test_groups_and_the_largest_scores_as_frames():
    X, y, _, _ = frames()
    groups = np.array(["u", "v"] * 20)
    influence = InfluenceFunction(HessianInverter("direct", 0.1)).fit(LogisticRegression().fit(X, y), (X, y))
    plain, plain_top = influence.group_effect(groups, X[:3], y[:3]), influence.top(X[:3], y[:3], k=2)
    influence.set_output(transform="polars")
    effects, top = influence.group_effect(groups, X[:3], y[:3]), influence.top(X[:3], y[:3], k=2)
    assert effects.columns == ["u", "v"]
    np.testing.assert_array_equal(effects.to_numpy(), plain)
    np.testing.assert_array_equal(top.rows.to_numpy(), plain_top.rows)
    np.testing.assert_array_equal(top.scores.to_numpy(), plain_top.scores)


@knows_names
def test_gradients_and_their_inverse_in_a_pipeline():
    X, y, _, _ = frames()
    clf = LogisticRegression().fit(X, y)
    pipe = make_pipeline(PerSampleGradient(clf), HessianInverter("direct", 0.1)).set_output(transform="polars")
    received = pipe.fit(X, y).transform((X, y))
    assert received.columns == ["coef[0,0]", "coef[0,1]", "intercept[0]"]
    assert list(pipe[-1].feature_names_in_) == received.columns


@pytest.mark.parametrize("kind", ["gradients", "influence"])
def test_inputs_in_another_order_of_columns_are_refused(kind):
    X, y, _, _ = frames()
    net, other = network(), X[["b", "a"]]
    if kind == "gradients":
        fitted = PerSampleGradient(net, loss="cross_entropy").fit(X, y)
    else:
        fitted = InfluenceFunction(HessianInverter("direct", 0.1, loss="cross_entropy")).fit(net, (X, y))
    with pytest.raises(ValueError, match=r"\['a', 'b'\], in this order"):
        fitted.transform((other, y))


def test_inputs_alone_are_no_gradient():
    X, y, _, _ = frames()
    with pytest.raises(TypeError, match="A gradient needs the target"):
        PerSampleGradient(network(), loss="cross_entropy").fit(X, y).transform(X)


def test_folds_of_frames_score_as_those_of_arrays():
    X, y, array, labels = frames()
    for fit in (lambda cv, X, y: cv.fit(X), lambda cv, X, y: cv.fit(LogisticRegression().fit(X, y), (X, y))):
        received = fit(HessianInverterCV([0.1, 1.0]), X, y).cv_results_["mean_test_score"]
        expected = fit(HessianInverterCV([0.1, 1.0]), array, labels).cv_results_["mean_test_score"]
        np.testing.assert_array_equal(received, expected)


def test_diagnostics_as_a_frame():
    X, _, array, _ = frames()
    y = array @ [1.0, 2.0] + np.random.default_rng(2).normal(size=40)
    found = InfluenceFunction().fit(LinearRegression().fit(X, y), (X, y)).diagnostics()
    frame = found.to_frame("polars")
    assert frame.columns[0] == "index"
    np.testing.assert_array_equal(frame["index"].to_numpy(), np.arange(40))
    np.testing.assert_array_equal(frame["dffits"].to_numpy(), found.dffits)
