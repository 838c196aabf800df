"""Data frames: rows keep their index, columns their names, and a frame in another order is refused."""

from importlib.util import find_spec

import numpy as np
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from torch import nn

from skinvert import (
    HessianInverter,
    HessianInverterCV,
    InfluenceFunction,
    PerSampleGradient,
    TorchTwiceDifferentiable,
    make_quadratic_scorer,
    solve_hvp,
)

pd = pytest.importorskip("pandas")


def split(n=40):
    """Rows whose index is in no order, and a model of them."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(n, 2)), columns=["a", "b"])
    labels = pd.Series(rng.integers(0, 2, n))
    X, _, y, _ = train_test_split(frame, labels, random_state=0)
    return LogisticRegression().fit(X, y), X, y


def network():
    torch.manual_seed(0)
    X, y = torch.randn(20, 3), torch.randint(0, 2, (20,))
    return nn.Linear(3, 2), X, y


def fitted():
    net, X, y = network()
    return HessianInverter("direct", 0.1, loss="cross_entropy").fit(net, (X, y))


def gradients(inverter, k=3):
    """Rows as a frame with the parameters' names, and as an array."""
    array = np.random.default_rng(1).standard_normal((k, inverter.n_features_in_))
    return pd.DataFrame(array, columns=inverter.get_feature_names_out(), index=list("xyz")[:k]), array


# -- the index -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fit_transform", "a pair", "two arguments", "clone", "global"])
def test_gradients_have_the_index_of_their_rows(call):
    clf, X, y = split()
    plain = PerSampleGradient(clf).fit_transform(X, y)
    transformer = PerSampleGradient(clf)
    if call == "global":
        with sklearn.config_context(transform_output="pandas"):
            received = transformer.fit(X, y).transform((X, y))
    else:
        transformer.set_output(transform="pandas")
        received = {
            "fit_transform": lambda: transformer.fit_transform(X, y),
            "a pair": lambda: transformer.fit(X, y).transform((X, y)),
            "two arguments": lambda: transformer.fit(X, y).transform(X, y),
            "clone": lambda: clone(transformer).fit(X, y).transform((X, y)),
        }[call]()
    pd.testing.assert_index_equal(received.index, X.index)
    assert list(received.columns) == list(transformer.fit(X, y).get_feature_names_out())
    np.testing.assert_array_equal(received.to_numpy(), plain)


def test_a_mapping_of_frames_has_their_index():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2).double()

        def forward(self, left):
            return self.linear(left)

    _, X, y = split()
    transformer = PerSampleGradient(Sum(), loss="cross_entropy").set_output(transform="pandas")
    received = transformer.fit({"left": X}, y).transform(({"left": X}, y))
    pd.testing.assert_index_equal(received.index, X.index)


def test_without_a_container_arrays_stay_arrays():
    clf, X, y = split()
    assert isinstance(PerSampleGradient(clf).fit(X, y).transform((X, y)), np.ndarray)


def test_arrays_get_a_plain_index():
    net, X, y = network()
    for rows in ((X, y), (X.numpy(), y.numpy())):
        transformer = PerSampleGradient(net, loss="cross_entropy").set_output(transform="pandas")
        assert list(transformer.fit(*rows).transform(rows).index) == list(range(20))


@pytest.mark.skipif(find_spec("polars") is not None, reason="polars is installed")
def test_without_polars_it_says_what_to_install():
    clf, X, y = split()
    with pytest.raises(ImportError, match="requires polars to be installed"):
        PerSampleGradient(clf).set_output(transform="polars").fit_transform(X, y)


def test_polars():
    polars = pytest.importorskip("polars")
    clf, X, y = split()
    received = PerSampleGradient(clf).set_output(transform="polars").fit_transform(X, y)
    assert isinstance(received, polars.DataFrame)


def test_a_pipeline_of_frames():
    clf, X, y = split()
    pipe = make_pipeline(PerSampleGradient(clf), HessianInverter("direct", 0.1)).set_output(transform="pandas")
    received = pipe.fit(X, y).transform((X, y))
    pd.testing.assert_index_equal(received.index, X.index)
    assert list(pipe[-1].feature_names_in_) == list(received.columns) == ["coef[0,0]", "coef[0,1]", "intercept[0]"]


def test_solutions_have_the_index_of_their_right_hand_sides():
    inverter = fitted().set_output(transform="pandas")
    frame, array = gradients(inverter)
    received = inverter.transform(frame)
    pd.testing.assert_index_equal(received.index, frame.index)
    np.testing.assert_array_equal(received.to_numpy(), fitted().transform(array))


# -- scores --------------------------------------------------------------------------------------------------------


def influence_of(labels=None):
    clf, X, y = split()
    if labels is not None:
        X.index = y.index = labels(len(X))
    return InfluenceFunction(HessianInverter("direct", 0.1)).fit(clf, (X, y)), X, y


def test_group_effects_have_the_index_of_the_test_rows_and_the_labels_of_the_groups():
    influence, X, y = influence_of()
    groups = pd.Series(np.where(X["a"] > 0, "up", "down"), index=X.index)
    plain = influence.group_effect(groups, X[:4], y[:4])
    listed = [np.flatnonzero(groups == "up"), [0, 1]]
    influence.set_output(transform="pandas")
    received = influence.group_effect(groups, X[:4], y[:4])
    pd.testing.assert_frame_equal(received, pd.DataFrame(plain, index=X.index[:4], columns=["down", "up"]))
    assert list(influence.group_effect(listed, X[:4], y[:4]).columns) == [0, 1]


@pytest.mark.parametrize("labels", [None, lambda n: [f"row {i}" for i in range(n)]])
def test_the_largest_scores_are_named_by_the_labels_of_their_rows(labels):
    influence, X, y = influence_of(labels)
    plain = influence.top(X[:4], y[:4], k=2)
    with sklearn.config_context(transform_output="pandas"):
        received = influence.top(X[:4], y[:4], k=2)
    expected = pd.DataFrame(X.index.to_numpy()[plain.rows], index=X.index[:4])
    pd.testing.assert_frame_equal(received.rows, expected)
    pd.testing.assert_frame_equal(received.scores, pd.DataFrame(plain.scores, index=X.index[:4]))


def test_scores_are_found_by_the_labels_of_both_rows_and_their_names_are_strings():
    influence, X, y = influence_of()
    plain = influence.transform((X, y))
    frame = influence.set_output(transform="pandas").transform((X, y))
    one, other = X.index[3], X.index[7]
    assert frame.loc[one, other] == plain[3, 7]
    assert list(influence.get_feature_names_out()) == [str(label) for label in X.index]


def test_influence_refuses_inputs_in_another_order_of_columns():
    net, X, y = named_data()
    influence = InfluenceFunction(HessianInverter("direct", 0.1, loss="cross_entropy")).fit(net, (X, y))
    for call in (influence.transform, influence.top, lambda X, y: influence.predict_without([0], X)):
        with pytest.raises(ValueError, match=r"\['a', 'b', 'c'\], in this order"):
            call(X[["c", "a", "b"]], y)


def test_diagnostics_have_the_index_of_the_rows_and_the_names_of_the_parameters():
    _, X, _ = split()
    y = X["a"] + np.random.default_rng(3).normal(size=len(X))
    found = InfluenceFunction().fit(LinearRegression().fit(X, y), (X, y)).diagnostics()
    frame = found.to_frame()
    pd.testing.assert_index_equal(frame.index, X.index)
    np.testing.assert_array_equal(frame["cooks_distance"], found.cooks_distance)
    np.testing.assert_array_equal(frame["dfbetas[coef[0,1]]"], found.dfbetas[:, 1])
    assert list(frame.columns)[-1] == "dfbetas[intercept[0]]"
    with pytest.raises(ValueError, match="library must be one of 'pandas', 'polars'"):
        found.to_frame("dask")


# -- the columns ---------------------------------------------------------------------------------------------------

FACES = {
    "transform": lambda inverter, b: inverter.transform(b),
    "solve": lambda inverter, b: inverter.solve(b).x,
    "path": lambda inverter, b: inverter.path(b, [0.1]),
    "inverse_transform": lambda inverter, b: inverter.inverse_transform(b),
    "residual": lambda inverter, b: inverter.residual(b, np.ones((3, inverter.n_features_in_))),
    "unflatten": lambda inverter, b: inverter.unflatten(b)["weight"],
    "scorer": lambda inverter, b: make_quadratic_scorer(b)(inverter, network()[1:]),
}


@pytest.mark.parametrize("face", FACES)
def test_columns_of_the_parameters_are_silent_and_others_refused(face):
    inverter = fitted()
    frame, array = gradients(inverter)
    np.testing.assert_array_equal(FACES[face](inverter, frame), FACES[face](inverter, array))
    with pytest.raises(ValueError, match=r"get_feature_names_out\(\)`, in this order. Got 'bias\[1\]' for 'weight"):
        FACES[face](inverter, frame[frame.columns[::-1]])
    with pytest.raises(ValueError, match="Got 'g0' for"):
        FACES[face](inverter, frame.set_axis([f"g{i}" for i in range(array.shape[1])], axis=1))


def test_columns_without_names_go_by_position():
    inverter = fitted()
    frame, array = gradients(inverter)
    received = inverter.transform(frame.set_axis(range(array.shape[1]), axis=1))
    np.testing.assert_array_equal(received, inverter.transform(array))


@pytest.mark.parametrize("face", FACES)
def test_columns_too_few_or_too_many_or_twice_are_told_by_their_names(face):
    inverter = fitted()
    frame, _ = gradients(inverter)
    names = list(frame.columns)
    with pytest.raises(ValueError, match=r"Got 3 columns, with \[\] beyond them and without \['weight\[1,0\]'"):
        FACES[face](inverter, frame.iloc[:, :3])
    with pytest.raises(ValueError, match=r"Got 9 columns, with \['more'\] beyond them and without \[\]"):
        FACES[face](inverter, frame.assign(more=1.0))
    with pytest.raises(ValueError, match="Got 9 columns"):
        FACES[face](inverter, frame[[*names, names[0]]])
    with pytest.raises(ValueError, match=r"Got 'weight\[0,0\]' for 'weight\[0,1\]' at 1"):
        FACES[face](inverter, frame[[names[0], *names[:-1]]])


@pytest.mark.parametrize("face", FACES)
def test_columns_of_which_some_have_names_are_refused(face):
    inverter = fitted()
    frame, _ = gradients(inverter)
    with pytest.raises(ValueError, match=r"Got 0 for 'weight\[0,0\]' at 0"):
        FACES[face](inverter, frame.rename(columns={"weight[0,0]": 0}))


@pytest.mark.parametrize("face", FACES)
def test_numbers_for_columns_are_in_their_order(face):
    inverter = fitted()
    frame, array = gradients(inverter)
    numbered = frame.set_axis(range(8), axis=1)
    expected = FACES[face](inverter, array)
    np.testing.assert_array_equal(FACES[face](inverter, numbered), expected)
    # Numbers of another frame say nothing of the order.
    np.testing.assert_array_equal(FACES[face](inverter, frame.set_axis(range(17, 9, -1), axis=1)), expected)
    with pytest.raises(ValueError, match="must be 0 to 7 in order"):
        FACES[face](inverter, numbered[[*range(1, 8), 0]])


def test_the_functional_face_compares_columns_too():
    net, X, y = network()
    inverter = fitted()
    frame, array = gradients(inverter)
    model = TorchTwiceDifferentiable(net, "cross_entropy")
    received = solve_hvp("direct", model, (X, y), frame, hessian_perturbation=0.1).x
    np.testing.assert_allclose(received, inverter.transform(array), rtol=1e-5)
    with pytest.raises(ValueError, match="in this order"):
        solve_hvp("direct", model, (X, y), frame[frame.columns[::-1]], hessian_perturbation=0.1)


def test_the_functional_face_refuses_what_the_others_do():
    net, X, y = network()
    frame, _ = gradients(fitted())
    model = TorchTwiceDifferentiable(net, "cross_entropy")
    others = (frame.iloc[:, :3], frame.rename(columns={"bias[0]": 0}), frame.set_axis([1, 0, *range(2, 8)], axis=1))
    for other in others:
        with pytest.raises(ValueError, match="The columns of b must be"):
            solve_hvp("direct", model, (X, y), other, hessian_perturbation=0.1)


# -- the columns of the data, which a module takes by their places ---------------------------------------------------


def named_data():
    net, X, y = network()
    return net, pd.DataFrame(X.numpy(), columns=["a", "b", "c"]), y.numpy()


@pytest.mark.parametrize("form", ["frame", "mapping"])
def test_gradients_of_rows_in_another_order_of_columns_are_refused(form):
    net, X, y = named_data()
    given = {"frame": lambda frame: frame, "mapping": lambda frame: {"input": frame}}[form]
    transformer = PerSampleGradient(net, loss="cross_entropy").fit(given(X), y)
    np.testing.assert_array_equal(
        transformer.transform((given(X), y)),
        PerSampleGradient(net, loss="cross_entropy").fit(X.to_numpy(), y).transform((X.to_numpy(), y)),
    )
    with pytest.raises(ValueError, match=r"those of the fit, \['a', 'b', 'c'\], in this order. Got \['c', 'a', 'b'\]"):
        transformer.transform((given(X[["c", "a", "b"]]), y))
    with pytest.raises(ValueError, match="those of the fit"):
        transformer.transform((given(X.rename(columns={"a": "z"})), y))
    # An array has no names to compare.
    transformer.transform((given(X.to_numpy()), y))


@pytest.mark.parametrize("chosen", [False, True])
def test_a_score_of_rows_in_another_order_of_columns_is_refused(chosen):
    net, X, y = named_data()
    settings = {"method": "direct", "curvature": "ggn", "loss": "cross_entropy"}
    settings |= {"hessian_perturbations": [0.1, 1.0]} if chosen else {"hessian_perturbation": 0.1}
    kind = HessianInverterCV if chosen else HessianInverter
    inverter, expected = kind(**settings).fit(net, (X, y)), kind(**settings).fit(net, (X.to_numpy(), y))
    assert inverter.score(X, y) == expected.score(X.to_numpy(), y)
    with pytest.raises(ValueError, match="those of the fit"):
        inverter.score(X[["b", "a", "c"]], y)


def test_targets_in_another_order_of_columns_are_refused():
    X = pd.DataFrame(np.random.default_rng(0).standard_normal((20, 3)).astype("f4"), columns=["a", "b", "c"])
    targets = X[["a", "b"]] * 2
    transformer = PerSampleGradient(nn.Linear(3, 2), loss="mse").fit(X, targets)
    with pytest.raises(ValueError, match=r"data\[1\] must be those of the fit"):
        transformer.transform((X, targets[["b", "a"]]))


def test_frames_that_we_made_are_taken_back_without_a_warning():
    clf, X, y = split()
    rows = PerSampleGradient(clf).set_output(transform="pandas").fit_transform(X, y)
    inverter = HessianInverter("direct", 0.1).set_output(transform="pandas").fit(clf, (X, y))
    b = inverter.inverse_transform(inverter.transform(rows))
    np.testing.assert_allclose(b, rows.to_numpy(), atol=1e-12)
    # Of plain rows without names of their own.
    plain = HessianInverter("direct", 0.1).set_output(transform="pandas").fit(X.to_numpy())
    np.testing.assert_allclose(plain.inverse_transform(plain.transform(X.to_numpy())), X.to_numpy(), atol=1e-12)


def test_plain_rows_follow_scikit_learn():
    _, X, _ = split()
    inverter = HessianInverter("direct", 0.1).fit(X)
    assert list(inverter.feature_names_in_) == list(inverter.get_feature_names_out()) == ["a", "b"]
    with pytest.raises(ValueError, match="same order"):
        inverter.transform(X[["b", "a"]])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        inverter.transform(X.to_numpy())
    assert not hasattr(inverter.fit(X.to_numpy()), "feature_names_in_")


def test_cross_validation_over_a_frame_scores_a_frame():
    _, X, _ = split()
    chosen = HessianInverterCV([0.1, 1.0], scoring=make_quadratic_scorer(X[:3])).fit(X)
    expected = HessianInverterCV([0.1, 1.0], scoring=make_quadratic_scorer(X[:3].to_numpy())).fit(X.to_numpy())
    np.testing.assert_array_equal(chosen.cv_results_["mean_test_score"], expected.cv_results_["mean_test_score"])
