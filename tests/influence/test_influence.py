"""InfluenceFunction as an estimator: forms of data, frames, settings, files of scores, models left as they were."""

import copy
import os
import pickle

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from facts import TIGHT
from problems import problem
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from skinvert import HessianInverter, HessianInverterCV, InfluenceFunction, PerSampleGradient, SampledGGN
from skinvert.influence import Accuracy

INVERTER = HessianInverter("direct", 50.0, loss="cross_entropy")


@pytest.fixture
def case():
    return problem("mlp", "cross_entropy")


@pytest.fixture
def scores(case):
    return InfluenceFunction(INVERTER).fit(case.module, case.data).transform(case.data)


def test_forms_of_data(case, scores):
    loader = DataLoader(TensorDataset(*case.data), 5, shuffle=True)
    influence = InfluenceFunction(INVERTER).fit(case.module, loader)
    torch.testing.assert_close(influence.transform(loader), scores)
    torch.testing.assert_close(influence.transform(*case.data), scores)
    torch.testing.assert_close(influence.transform([(case.X[:4], case.y[:4]), (case.X[4:], case.y[4:])]), scores)
    arrays = influence.transform((case.X.numpy(), case.y.numpy()))
    assert isinstance(arrays, np.ndarray)
    np.testing.assert_allclose(arrays, scores)
    bound = InfluenceFunction(clone(INVERTER).set_params(model=case.module)).fit(*case.data)
    torch.testing.assert_close(bound.transform(case.data), scores)


@pytest.mark.parametrize("of_test", [False, True])
def test_a_sampler_hides_the_order_of_rows(case, of_test):
    loader = DataLoader(TensorDataset(*case.data), 5, sampler=SubsetRandomSampler(range(12)))
    influence = InfluenceFunction(INVERTER)
    with pytest.raises(ValueError, match="sampler"):
        influence.fit(case.module, case.data).transform(loader) if of_test else influence.fit(case.module, loader)


def test_batches_that_are_mappings():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, input_ids, attention_mask):
            return self.out((self.embedding(input_ids) * attention_mask[..., None]).mean(1))

    torch.manual_seed(0)
    ids, labels = torch.randint(10, (18, 5)), torch.randint(3, (18,))
    batches = [{"input_ids": ids[i : i + 7], "attention_mask": torch.ones(len(ids[i : i + 7]), 5)} for i in (0, 7, 14)]
    for i, batch in zip((0, 7, 14), batches, strict=True):
        batch["labels"] = labels[i : i + 7]
    net = Tokens()
    plain = nn.Sequential(net.embedding, _Mean(), net.out)
    expected = InfluenceFunction(INVERTER, removal="newton").fit(plain, (ids, labels)).transform((ids[:7], labels[:7]))
    received = InfluenceFunction(INVERTER, removal="newton").fit(net, batches).transform(batches[:1])
    torch.testing.assert_close(received, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(TypeError, match="floats"):
        InfluenceFunction(INVERTER).fit(net, batches).feature_influence([0], batches)


class _Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def test_frames_give_both_indices():
    X, y = load_iris(return_X_y=True)
    train = pd.DataFrame(X, index=[f"flower {i}" for i in range(150)], columns=list("abcd"))
    model = LogisticRegression(max_iter=1000).fit(train, y)
    influence = InfluenceFunction().set_output(transform="pandas").fit(model, (train, y))
    scores = influence.transform((train[40:60], y[40:60]))
    assert list(scores.index) == list(train.index[40:60])
    assert list(scores.columns) == list(train.index)
    plain = InfluenceFunction().fit(model, (train, y)).transform((train[40:60], y[40:60]))
    np.testing.assert_array_equal(scores.to_numpy(), plain)


@pytest.mark.parametrize(
    "model", [LogisticRegression(tol=1e-10), Ridge(), LinearRegression(), PoissonRegressor(alpha=0.1, tol=1e-10)]
)
def test_in_a_pipeline_of_scikit_learn(model):
    X, y = load_iris(return_X_y=True)
    pipe = make_pipeline(StandardScaler(), clone(model)).fit(X, y)
    whole = InfluenceFunction().fit(pipe, (X, y)).transform((X[:5], y[:5]))
    Z = StandardScaler().fit_transform(X)
    np.testing.assert_allclose(whole, InfluenceFunction().fit(pipe[-1], (Z, y)).transform((Z[:5], y[:5])), atol=1e-12)


TEXTS = ["good film", "bad film", "nice one", "awful one", "good one", "bad one"]


def of_a_list(model, data, rows):
    """What takes X alone, of a list."""
    influence = InfluenceFunction(removal="newton").fit(model, data)
    return {
        "predict_without": influence.predict_without([], rows),
        "predict_without, no y": influence.predict_without([], (rows, None)),
        "predictive_variance": influence.inverter_.predictive_variance(rows),
        "output": PerSampleGradient(model, loss="output").fit(rows).transform(rows),
    }


@pytest.mark.parametrize("kind", ["texts", "rows", "rows of two", "rows in a pipeline"])
def test_a_list_alone_is_rows_to_a_model_that_takes_no_batches(kind):
    if kind == "texts":
        words = CountVectorizer(binary=True)
        X, y, Z = TEXTS * 4, np.tile([1, 0], 12), words.fit_transform(TEXTS * 4).toarray()
        model, rows = make_pipeline(words, LogisticRegression(tol=1e-10)).fit(X, y), X[:5]
    else:
        Z = load_iris().data[::3, : 2 if kind == "rows of two" else 3]
        X, y = Z.tolist(), np.arange(50) % 7 + Z[:, 0]
        model = Ridge() if kind != "rows in a pipeline" else make_pipeline(FunctionTransformer(), Ridge())
        model, rows = model.fit(X, y), X[:2]
    received = of_a_list(model, (X, y), rows)
    outputs = model.decision_function(rows) if kind == "texts" else model.predict(rows)
    J = np.c_[Z, np.ones(len(Z))]
    p = 1 / (1 + np.exp(-model.decision_function(X))) if kind == "texts" else None
    weights = p * (1 - p) if kind == "texts" else np.ones(len(Z))
    precision = (J * weights[:, None]).T @ J + np.diag([*np.ones(Z.shape[1]), 0.0])
    J = J[: len(rows)]
    variance = np.einsum("np,pq,nq->n", J, np.linalg.inv(precision), J)
    np.testing.assert_allclose(received["predict_without"].ravel(), outputs, rtol=1e-9)
    np.testing.assert_allclose(received["predict_without, no y"].ravel(), outputs, rtol=1e-9)
    np.testing.assert_allclose(received["predictive_variance"].ravel(), variance, rtol=1e-9)
    np.testing.assert_allclose(received["output"], J, rtol=1e-12)
    if kind != "texts":
        jackknife = InfluenceFunction(removal="newton").fit(model, (X, y)).jackknife_plus
        np.testing.assert_allclose(jackknife(rows), jackknife(np.array(rows)), rtol=1e-12)


@pytest.mark.parametrize("rows", [[[1.0, 2.0], [3.0, 4.0]], [[1, 2, 3]] * 2, ["a", "b"], [1.0, 2.0]], ids=str)
def test_a_list_that_may_be_batches_is_refused(rows):
    """Rows of two numbers would be samples (x, y)."""
    net = nn.Linear(2, 1)
    X, y = torch.randn(20, 2), torch.randn(20, 1)
    influence = InfluenceFunction(HessianInverter("direct", 1.0, loss="mse")).fit(net, (X, y))
    calls = [
        lambda: influence.predict_without([0], rows),
        lambda: influence.inverter_.predictive_variance(rows),
        lambda: influence.jackknife_plus(rows),
        lambda: PerSampleGradient(net, loss="output").fit(rows),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"Data must be an array .* A list is one of batches here: try `np.asarray"):
            call()
    # As batches are.
    batches = [(X[:3], y[:3]), (X[3:5], y[3:5])]
    torch.testing.assert_close(influence.predict_without([0], batches), influence.predict_without([0], X[:5]))
    variance = influence.inverter_.predictive_variance
    torch.testing.assert_close(variance(batches), variance(X[:5]))


def test_labels_that_are_words():
    X, y = load_iris(return_X_y=True)
    words = np.array(["a", "b", "c"])[y]
    numbers = InfluenceFunction().fit(LogisticRegression(max_iter=500).fit(X, y), (X, y))
    named = InfluenceFunction().fit(LogisticRegression(max_iter=500).fit(X, words), (X, words))
    np.testing.assert_allclose(named.transform((X[:3], words[:3])), numbers.transform((X[:3], y[:3])), rtol=1e-9)


def test_inverters(case, scores):
    frozen = FrozenEstimator(clone(INVERTER).fit(case.module, case.data))
    influence = InfluenceFunction(frozen).fit(case.module, case.data)
    assert influence.inverter_ is frozen.estimator
    torch.testing.assert_close(influence.transform(case.data), scores)
    cv = HessianInverterCV([50.0], method="direct", loss="cross_entropy", cv=2)
    torch.testing.assert_close(InfluenceFunction(cv).fit(case.module, case.data).transform(case.data), scores)
    for given in (StandardScaler(), "cg", FrozenEstimator(StandardScaler())):
        with pytest.raises(TypeError, match="HessianInverterCV"):
            InfluenceFunction(given).fit(case.module, case.data)
    with pytest.raises(NotFittedError):
        InfluenceFunction(FrozenEstimator(INVERTER)).fit(case.module, case.data)
    with pytest.raises(TypeError, match="of a model"):
        InfluenceFunction(HessianInverter("direct", 1.0)).fit(np.eye(3))


def frozen_on_frames(weights=None):
    X, y = load_iris(return_X_y=True)
    frame = pd.DataFrame(X[:40], index=[f"flower {i}" for i in range(40)], columns=list("abcd"))
    model = Ridge().fit(frame, y[:40] + X[:40, 0], weights)
    own = (frame, pd.Series(y[:40] + X[:40, 0], index=frame.index))
    return model, own, FrozenEstimator(HessianInverter("direct").fit(model, own, sample_weight=weights))


@pytest.mark.parametrize("cv", [False, True])
def test_a_frozen_inverter_is_given_its_own_rows(cv):
    model, (X, y), frozen = frozen_on_frames()
    if cv:
        frozen = FrozenEstimator(HessianInverterCV([1.0], method="direct", cv=2).fit(model, (X, y)))
    others = [(X[::-1], y[::-1]), (X[:30], y[:30]), (X, y[::-1]), (X + 1, y), (pd.concat([X, X]), pd.concat([y, y]))]
    for other in others:
        with pytest.raises(ValueError, match="frozen inverter must be the rows that it was fitted on"):
            InfluenceFunction(frozen).fit(model, other)
    assert list(InfluenceFunction(frozen).fit(model, (X, y)).index_) == list(X.index)
    # The same rows by other labels.
    named = X.set_axis([f"row {i}" for i in range(40)])
    assert list(InfluenceFunction(frozen).fit(model, (named, y)).index_) == list(named.index)


def test_a_frozen_inverters_rows_keep_their_labels_where_they_are_not_given_again():
    model, (X, _), frozen = frozen_on_frames()
    assert list(InfluenceFunction(frozen).fit(model).index_) == list(X.index)


def test_batches_cut_otherwise_leave_a_frozen_inverter_its_labels(case, scores):
    frozen = FrozenEstimator(clone(INVERTER).fit(case.module, case.data))
    influence = InfluenceFunction(frozen).fit(case.module, DataLoader(TensorDataset(*case.data), 5))
    torch.testing.assert_close(influence.transform(case.data), scores)
    with pytest.raises(ValueError, match="Got 11 rows for 12"):
        InfluenceFunction(frozen).fit(case.module, DataLoader(TensorDataset(case.X[1:], case.y[1:]), 5))


def test_weights_beside_a_frozen_inverter_are_its_own():
    weights = np.arange(1.0, 41.0)
    model, data, frozen = frozen_on_frames(weights)
    for same in (None, weights):
        InfluenceFunction(frozen).fit(model, data, sample_weight=same)
    with pytest.raises(ValueError, match="sample_weight beside a frozen inverter"):
        InfluenceFunction(frozen).fit(model, data, sample_weight=weights[::-1])
    model, data, frozen = frozen_on_frames()
    InfluenceFunction(frozen).fit(model, data, sample_weight=np.ones(40))
    with pytest.raises(ValueError, match="sample_weight beside a frozen inverter"):
        InfluenceFunction(frozen).fit(model, data, sample_weight=weights)


@pytest.mark.parametrize("name", sorted(TIGHT))
def test_every_method(case, name):
    """The scores are those of the inverter's own solutions."""
    curvature = "auto" if name == "harmonic_mean" else "ggn"
    inverter = HessianInverter(name, 50.0, loss="cross_entropy", curvature=curvature, random_state=0)
    influence = InfluenceFunction(inverter).fit(case.module, case.data)
    gradients = torch.cat([influence.inverter_.curvature_.objective.gradients(case.data)])
    expected = influence.inverter_.transform(gradients[:3]) @ gradients.mT / 12
    received = influence.transform((case.X[:3], case.y[:3]))
    torch.testing.assert_close(received, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("curvature", ["fisher", "sampled_fisher", "empirical_fisher"])
def test_every_curvature(case, curvature):
    """Batches that carry sampled labels too give the rows' own gradients."""
    inverter = HessianInverter("direct", 1.0, loss="cross_entropy", curvature=curvature, random_state=0)
    influence = InfluenceFunction(inverter).fit(case.module, case.data)
    gradients = PerSampleGradient(case.module, loss="cross_entropy").fit_transform(*case.data)
    expected = gradients @ influence.inverter_.transform(gradients).mT / 12
    torch.testing.assert_close(influence.transform(case.data), expected)
    np.testing.assert_allclose(influence.self_influence(), expected.diagonal())
    newton = InfluenceFunction(inverter, removal="newton").fit(case.module, case.data).transform(case.data)
    assert np.corrcoef(newton.numpy().ravel(), expected.numpy().ravel())[0, 1] > 0.99


def test_settings_are_checked(case):
    for settings, message in [
        ({"removal": "second"}, "removal"),
        ({"normalize": "l2"}, "normalize"),
        ({"normalize": "cosine", "removal": "newton"}, "normalize"),
        ({"memory": 0}, "memory"),
        ({"batch_size": 0}, "batch_size"),
        ({"score_rtol": -1.0}, "score_rtol"),
    ]:
        with pytest.raises(ValueError, match=message):
            InfluenceFunction(INVERTER, **settings).fit(case.module, case.data)


def test_rows_are_checked(case):
    influence = InfluenceFunction(INVERTER).fit(case.module, case.data)
    for rows in ([12], [-13], [1, 1], [3, -9]):
        with pytest.raises(ValueError, match="different places"):
            influence.removed_parameters(rows)
    for rows in (np.ones(12, bool), [0.5], [[1], [2]]):
        with pytest.raises(TypeError, match="flatnonzero"):
            influence.removed_parameters(rows)
    for groups in ([0, 1], np.zeros((12, 2)).tolist()):
        with pytest.raises((ValueError, TypeError), match="groups|rows"):
            influence.group_effect(groups, case.data)
    none = influence.removed_parameters([])
    for name, value in case.module.named_parameters():
        torch.testing.assert_close(none[name], value.detach())
    last, same = influence.removed_parameters(-1), influence.removed_parameters(11)
    assert all(torch.equal(last[name], same[name]) for name in same)
    with pytest.raises(ValueError, match="'k'|k must"):
        influence.top(case.data, k=0)
    with pytest.raises(TypeError, match="Test data"):
        influence.transform(case.module)
    with pytest.raises(NotFittedError):
        InfluenceFunction(INVERTER).self_influence()
    with pytest.raises(ValueError, match="all rows together"):
        InfluenceFunction(INVERTER, measurement=Accuracy()).fit(case.module, case.data).self_influence()


def test_the_model_is_left_as_it_was(case):
    net = copy.deepcopy(case.module).train()
    before = copy.deepcopy(net.state_dict())
    influence = InfluenceFunction(INVERTER, removal="newton").fit(net, case.data)
    with torch.no_grad():
        influence.transform(case.data)
        influence.predict_without([1, 2], case.data)
    assert net.training and all(child.training for child in net.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.load_state_dict(influence.removed_parameters([3]), strict=False)
    assert not torch.equal(net.state_dict()["0.weight"], before["0.weight"])


@pytest.mark.parametrize("state", [torch.no_grad, torch.inference_mode])
def test_under_any_state_of_autograd(case, scores, state):
    with state():
        received = InfluenceFunction(INVERTER).fit(case.module, case.data).transform(case.data)
    torch.testing.assert_close(received, scores)


def test_a_search_over_lambda(case):
    influence = InfluenceFunction(HessianInverter("direct", model=case.module, loss="cross_entropy", curvature="ggn"))
    search = GridSearchCV(influence, {"inverter__hessian_perturbation": [0.1, 10.0]}, cv=2)
    alone = GridSearchCV(clone(influence.inverter), {"hessian_perturbation": [0.1, 10.0]}, cv=2)
    X, y = case.X.numpy(), case.y.numpy()
    received = search.fit(X, y).cv_results_["mean_test_score"]
    np.testing.assert_allclose(received, alone.fit(X, y).cv_results_["mean_test_score"])


@pytest.mark.parametrize("method", ["cg", "direct"])
def test_pickles_with_model_and_data(case, scores, method):
    fitted = InfluenceFunction(HessianInverter(method, 50.0, loss="cross_entropy")).fit(case.module, case.data)
    for kept in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        torch.testing.assert_close(kept.transform(case.data), scores, rtol=1e-6, atol=1e-9)
    # Of the inverter alone a pickle holds no data.
    alone = pickle.loads(pickle.dumps(fitted.inverter_))
    assert hasattr(alone, "curvature_") == (method == "cg")


# -- files of scores -----------------------------------------------------------------------------------------------


def test_into_an_array(case, scores):
    array = np.full((12, 12), np.nan)
    received = InfluenceFunction(INVERTER).fit(case.module, case.data).transform(case.data, out=array)
    assert received is array
    np.testing.assert_allclose(array, scores)


@pytest.mark.parametrize(
    "array",
    [
        *(np.zeros((12, 12), dtype) for dtype in (int, bool, "U9", object, complex, np.float16)),
        torch.zeros(12, 12, dtype=torch.int32),
        torch.zeros(12, 12, dtype=torch.bfloat16),
    ],
    ids=lambda array: str(array.dtype),
)
def test_scores_are_cast_into_no_other_kind_of_number(case, array):
    with pytest.raises(ValueError, match=r"out must be of float32 or float64\. Got .* instead"):
        InfluenceFunction(INVERTER).fit(case.module, case.data).transform(case.data, out=array)


@pytest.mark.parametrize(
    "array", [np.zeros((12, 12), ">f8"), np.zeros((12, 12), "f4"), torch.zeros(12, 12)], ids=lambda a: str(a.dtype)
)
def test_into_floats_of_any_kind(case, scores, array):
    InfluenceFunction(INVERTER).fit(case.module, case.data).transform(case.data, out=array)
    np.testing.assert_allclose(array, scores, rtol=1e-6)


@pytest.mark.parametrize("n_test", [5, 12])
@pytest.mark.parametrize("removal", ["first_order", "newton"])
def test_a_file_is_resumed(case, tmp_path, removal, n_test, monkeypatch):
    influence = InfluenceFunction(INVERTER, removal=removal, memory=1, batch_size=4).fit(case.module, case.data)
    test, path = (case.X[:n_test], case.y[:n_test]), tmp_path / "scores.npy"
    expected = influence.transform(test)
    whole = influence.transform(test, out=path)
    np.testing.assert_allclose(whole, expected)
    # As an interruption leaves it.
    whole[3:, :] = np.nan
    whole.flush()
    solved = []
    solve = HessianInverter.solve
    monkeypatch.setattr(HessianInverter, "solve", lambda self, b, x0=None: solved.append(len(b)) or solve(self, b, x0))
    again = influence.transform(test, out=str(path))
    np.testing.assert_allclose(again, expected)
    np.testing.assert_allclose(np.load(path), expected)
    if removal == "first_order":
        assert sum(solved) == n_test - 3


def test_a_file_of_others_is_refused(case, tmp_path):
    path = tmp_path / "scores.npy"
    influence = InfluenceFunction(INVERTER).fit(case.module, case.data)
    influence.transform(case.data, out=path)
    with pytest.raises(ValueError, match="of others"):
        influence.transform((case.X[:5], case.y[:5]), out=path)
    other = InfluenceFunction(clone(INVERTER).set_params(hessian_perturbation=60.0)).fit(case.module, case.data)
    with pytest.raises(ValueError, match="of others"):
        other.transform(case.data, out=path)
    certified = InfluenceFunction(INVERTER, score_rtol=0.1).fit(case.module, case.data)
    with pytest.raises(ValueError, match="of others"):
        certified.transform(case.data, out=path)
    with pytest.raises(ValueError, match=r"\.npy"):
        influence.transform(case.data, out=tmp_path / "scores.txt")
    with pytest.raises(ValueError, match="of shape"):
        influence.transform(case.data, out=np.empty((12, 13)))


def small(dtype=torch.float32, change=1.0):
    """Return a net without weights, which gives rows of all inputs one loss."""
    torch.manual_seed(0)
    X, y = torch.randn(12, 4), torch.randint(3, (12,))
    net = nn.Linear(4, 3)
    nn.init.zeros_(net.weight)
    X[:, 1] *= change
    return net.to(dtype), (X.to(dtype), y)


def own(**settings):
    return HessianInverter("direct", **{"hessian_perturbation": 0.1, "loss": "cross_entropy", **settings})


def drawn(seed):
    return SampledGGN(1, random_state=seed)


LOSSES = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.3)]
OTHER_FITS = {
    "weight decay": (lambda: own(), lambda: own(weight_decay=0.5), {}),
    "weight decay of a part": (lambda: own(weight_decay={"weight": 0.5}), lambda: own(weight_decay={"bias": 0.5}), {}),
    "dtype": (lambda: own(), lambda: own(dtype=torch.float64), {}),
    "draws": (
        lambda: own(curvature=SampledGGN(1, random_state=0)),
        lambda: own(curvature=SampledGGN(1, random_state=5)),
        {},
    ),
    "loss": (lambda: own(loss=LOSSES[0]), lambda: own(loss=LOSSES[1]), {"measurement": "margin"}),
    "method": (lambda: own(), lambda: own().set_params(method="kfac"), {}),
}


@pytest.mark.parametrize("case", OTHER_FITS)
def test_the_file_of_another_fit_is_refused(case, tmp_path):
    path, (first, then, settings) = tmp_path / "scores.npy", OTHER_FITS[case]
    net, data = small()
    InfluenceFunction(first(), **settings).fit(net, data).transform(data, out=path)
    before = path.read_bytes()
    other = InfluenceFunction(then(), **settings).fit(net, data)
    with pytest.raises(ValueError, match="of others: another"):
        other.transform(data, out=path)
    assert path.read_bytes() == before


def test_the_file_of_another_penalty_of_a_scikit_learn_model_is_refused(tmp_path):
    net, data = small(torch.float64)
    X, y = (part.numpy() for part in data)
    one = LogisticRegression().fit(X, y)
    other = copy.deepcopy(one).set_params(C=0.01)
    inverter, path = HessianInverter("direct"), tmp_path / "scores.npy"
    InfluenceFunction(inverter).fit(one, (X, y)).transform(X, y, out=path)
    with pytest.raises(ValueError, match="another parameters"):
        InfluenceFunction(inverter).fit(other, (X, y)).transform(X, y, out=path)


@pytest.mark.parametrize(("of", "message"), [("training", "another data"), ("test", "another test data")])
def test_the_file_of_other_inputs_of_the_same_losses_is_refused(of, message, tmp_path):
    path, (net, data), (_, other) = tmp_path / "scores.npy", small(), small(change=3.0)
    InfluenceFunction(own()).fit(net, data).transform(data, out=path)
    again = InfluenceFunction(own()).fit(net, other if of == "training" else data)
    with pytest.raises(ValueError, match=message):
        again.transform(other if of == "test" else data, out=path)


@pytest.mark.parametrize("method", ["direct", "cg", "kfac"])
def test_a_file_is_resumed_in_other_batches(method, tmp_path):
    path, (net, data) = tmp_path / "scores.npy", small()
    batched = clone(own(batch_size=5)).set_params(method=method)
    whole = InfluenceFunction(batched, batch_size=2, memory=1).fit(net, data).transform(data, out=path)
    whole[3:] = np.nan
    whole.flush()
    again = InfluenceFunction(clone(batched).set_params(batch_size=7), batch_size=4).fit(net, data)
    with sklearn.config_context(working_memory=1e-3):
        found = again.transform(data, out=path)
    # To what cg is asked for in float32, over λ.
    expected = again.transform(data).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("note", ["", "[]", "{", "[" * 100_000, '{"job": {}, "numbers": {"inverse": "?"}}'])
def test_a_file_whose_note_is_none_of_ours_is_refused(note, tmp_path):
    path, (net, data) = tmp_path / "scores.npy", small()
    influence = InfluenceFunction(own()).fit(net, data)
    influence.transform(data, out=path)
    (tmp_path / "scores.npy.json").write_text(note)
    with pytest.raises(ValueError, match="of others: another origin"):
        influence.transform(data, out=path)


DAMAGES = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 480),
    "by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + bytes(8)),
    "empty": lambda path: path.write_bytes(b""),
    "a header alone": lambda path: os.truncate(path, 128),
    "text": lambda path: path.write_text("mine"),
    "another shape": lambda path: np.save(path, np.zeros((2, 2), np.float32)),
    "another dtype": lambda path: np.save(path, np.zeros((12, 12))),
    "another order": lambda path: np.save(path, np.zeros((12, 12), np.float32, order="F")),
    "objects": lambda path: np.save(path, np.array([None])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_whole_is_refused_and_left(damage, tmp_path):
    path, (net, data) = tmp_path / "scores.npy", small()
    influence = InfluenceFunction(own()).fit(net, data)
    influence.transform(data, out=path)
    DAMAGES[damage](path)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"out must be a whole file of float32 of shape \(12, 12\).*Delete it, or give"
    ):
        influence.transform(data, out=path)
    assert path.read_bytes() == before
    path.unlink()
    np.testing.assert_array_equal(influence.transform(data, out=path), influence.transform(data))


def test_too_large_a_matrix_is_told_before(case, monkeypatch):
    influence = InfluenceFunction(INVERTER).fit(case.module, case.data)
    monkeypatch.setattr("skinvert._memory.available_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match="`out`"):
        influence.transform(case.data)


def test_memory_changes_nothing(case, scores):
    with sklearn.config_context(working_memory=1e-4):
        received = InfluenceFunction(INVERTER).fit(case.module, case.data).transform(case.data)
    torch.testing.assert_close(received, scores)
