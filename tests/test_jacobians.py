"""``PerSampleGradient(loss="output")``: rows of the outputs' Jacobian, against ``torch.autograd.functional``'s."""

import numpy as np
import pytest
import scipy.sparse
import sklearn
import torch
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from skinvert import HessianInverter, PerSampleGradient, TorchTwiceDifferentiable
from skinvert import gradients as module_of_gradients

N = 11


class Sequences(nn.Module):
    """Outputs (m, T, 2) of inputs (m, T, 3)."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,)


def one_output():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)), (3,)


def image():
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2).eval(), nn.ReLU()), (1, 4, 3)


def sequence():
    return Sequences(), (5, 3)


BUILT = {build.__name__: build for build in (mlp, one_output, image, sequence)}


def problem(name, dtype=torch.float64):
    torch.manual_seed(0)
    net, shape = BUILT[name]()
    return net.to(dtype), torch.randn(N, *shape, dtype=dtype)


def expected_of(net, X, names=None):
    """Return the Jacobian (n c, p) of all outputs in float64, row by row, by torch's own."""
    net, X = net.double().eval(), X.double()
    theta = {name: t.detach() for name, t in net.named_parameters() if names is None or name in names}
    rows = []
    for x in X:

        def outputs(*values, x=x):
            return torch.func.functional_call(net, dict(zip(theta, values, strict=True)), (x[None],)).reshape(-1)

        parts = torch.autograd.functional.jacobian(outputs, tuple(theta.values()))
        rows.append(torch.cat([part.reshape(len(part), -1) for part in parts], dim=1))
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("batch_size", [None, 4, 1])
def test_rows_of_the_jacobian(name, batch_size):
    net, X = problem(name)
    received = PerSampleGradient(net, loss="output", batch_size=batch_size).fit_transform(X)
    assert isinstance(received, torch.Tensor)
    np.testing.assert_allclose(received, expected_of(net, X), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", BUILT)
def test_single_precision(name):
    net, X = problem(name, torch.float32)
    received = PerSampleGradient(net, loss="output").fit_transform(X.numpy())
    expected = expected_of(net, X)
    assert received.dtype == np.float32
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_targets_do_not_count():
    net, X = problem("mlp")
    jacobian, y = PerSampleGradient(net, loss="output"), torch.randint(0, 2, (N,))
    expected = jacobian.fit(X).transform(X)
    assert jacobian.loss_scale_ == 1.0
    for data in ((X, None), (X, y), (X, 100 + y), (X, y.double()), DataLoader(TensorDataset(X, y), 4)):
        assert torch.allclose(jacobian.fit(data).transform(data), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(jacobian.fit(X, y).transform(X, y), expected)
    assert torch.equal(jacobian.fit(X[:3]).transform((X, None)), expected)
    assert not jacobian.__sklearn_tags__().target_tags.required
    assert PerSampleGradient(net, loss="mse").__sklearn_tags__().target_tags.required
    assert clone(jacobian).loss == "output"


def test_frozen_parameters_and_names():
    net, X = problem("mlp")
    net[0].weight.requires_grad_(False)
    jacobian = PerSampleGradient(net, loss="output")
    received = jacobian.fit_transform(X)
    names = ["0.bias", "2.weight", "2.bias"]
    assert jacobian.parameter_names_ == names and jacobian.n_features_out_ == received.shape[1] == 14
    assert list(jacobian.get_feature_names_out()[[0, 4, 13]]) == ["0.bias[0]", "2.weight[0,0]", "2.bias[1]"]
    np.testing.assert_allclose(received, expected_of(net, X, names), rtol=1e-10, atol=1e-13)
    chosen = PerSampleGradient(net, loss="output", params="2.*").fit_transform(X)
    assert torch.equal(chosen, received[:, 4:])


def test_sequences_of_another_length_in_each_batch():
    net, X = problem("sequence")
    batches = [(X[:4], torch.zeros(4)), (X[4:9, :2], torch.zeros(5)), (X[9:, :3], torch.zeros(2))]
    received = PerSampleGradient(net, loss="output").fit_transform(batches)
    expected = np.concatenate([expected_of(net, x) for x, _ in batches])
    assert received.shape == (4 * 10 + 5 * 4 + 2 * 6, sum(t.numel() for t in net.parameters()))
    np.testing.assert_allclose(received, expected, rtol=1e-10, atol=1e-13)


def test_several_inputs_by_name_and_by_place():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2, dtype=torch.float64)

        def forward(self, a, b):
            return self.fc(a) * b

    net, a, b = Two(), torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    expected = PerSampleGradient(net, loss="output").fit_transform((({"a": a, "b": b}), torch.zeros(4)))
    for inputs in ({"a": a, "b": b}, ((a, b), None)):
        assert torch.equal(PerSampleGradient(net, loss="output").fit_transform(inputs), expected)
    direct = torch.autograd.grad(net(a[:1], b[:1])[0, 1], list(net.parameters()))
    torch.testing.assert_close(expected[1], torch.cat([part.reshape(-1) for part in direct]), rtol=1e-12, atol=1e-14)


def test_memory_changes_nothing_and_is_asked_for(monkeypatch):
    net, X = problem("mlp")
    whole = PerSampleGradient(net, loss="output").fit_transform(X)
    with sklearn.config_context(working_memory=1e-3):
        assert torch.allclose(PerSampleGradient(net, loss="output").fit_transform(X), whole, rtol=1e-12, atol=1e-14)
    asked = []
    monkeypatch.setattr(module_of_gradients, "check_memory", lambda needed, what, *_: asked.append((needed, what)))
    PerSampleGradient(net, loss="output").fit_transform(X)
    (needed, what) = asked[0]
    assert whole.nbytes <= needed <= 1.5 * whole.nbytes and what == "A gradient for output of each of 11 rows"


# -- scikit-learn and skorch -------------------------------------------------------------------------------------------


def rows(n=30, d=3, classes=3):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, d)), np.arange(n) % classes


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("form", ["array", "sparse", "frame", "pair", "names"])
def test_logistic_regression(classes, form):
    X, y = rows(classes=classes)
    model = LogisticRegression().fit(X, np.array(["a", "b", "c"])[y])
    given = {"array": X, "pair": (X, None), "sparse": scipy.sparse.csr_array(X), "names": (X, np.array(["new"] * 30))}
    if form == "frame":
        pd = pytest.importorskip("pandas")
        given["frame"] = pd.DataFrame(X)
    received = PerSampleGradient(model, loss="output").fit_transform(given[form])
    # Of one logit for two classes; the intercepts come last.
    c = 1 if classes == 2 else 3
    expected = np.concatenate([np.hstack([np.kron(np.eye(c), x), np.eye(c)]) for x in X])
    np.testing.assert_allclose(received, expected, atol=1e-14)


@pytest.mark.parametrize("kind", [MLPRegressor, MLPClassifier])
def test_multilayer_perceptrons(kind):
    X, y = rows()
    target = np.stack([X[:, 0], y], 1) if kind is MLPRegressor else y
    model = kind(hidden_layer_sizes=(4,), activation="tanh", random_state=0, max_iter=20)
    with pytest.warns(sklearn.exceptions.ConvergenceWarning):
        model.fit(X, target)
    jacobian = PerSampleGradient(model, loss="output").fit(X)
    received, c = jacobian.transform(X), target.shape[1] if target.ndim == 2 else 3

    def outputs(*theta):
        (W0, W1), (b0, b1) = theta[:2], theta[2:]
        return torch.tanh(torch.from_numpy(X) @ W0 + b0) @ W1 + b1

    theta = tuple(torch.from_numpy(value) for value in (*model.coefs_, *model.intercepts_))
    parts = torch.autograd.functional.jacobian(outputs, theta)
    order = {"coefs.0": 0, "coefs.1": 1, "intercepts.0": 2, "intercepts.1": 3}
    expected = [parts[order[name]].reshape(30 * c, -1) for name in jacobian.parameter_names_]
    np.testing.assert_allclose(received, torch.cat(expected, dim=1), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", [LinearRegression, PoissonRegressor])
def test_linear_predictors(kind):
    X, y = rows()
    received = PerSampleGradient(kind().fit(X, y), loss="output").fit_transform(X)
    np.testing.assert_allclose(received, np.hstack([X, np.ones((30, 1))]), atol=1e-14)


def test_a_pipeline_reads_the_rows_of_its_last_step():
    X, y = rows()
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, y)
    received = PerSampleGradient(model, loss="output").fit_transform(X)
    expected = PerSampleGradient(model[-1], loss="output").fit_transform(model[0].transform(X))
    np.testing.assert_allclose(received, expected, atol=1e-14)


@pytest.mark.parametrize("with_targets", [False, True])
def test_skorch(with_targets):
    torch.manual_seed(0)
    net, X = problem("mlp", torch.float32)
    net = nn.Sequential(net, nn.Softmax(1))
    wrapped = NeuralNetClassifier(net, train_split=None, verbose=0).initialize()
    X = X.numpy()
    data = (X, np.zeros(N, dtype=np.int64)) if with_targets else X
    received = PerSampleGradient(wrapped, loss="output").fit_transform(data)
    expected = expected_of(wrapped.module_, torch.from_numpy(X))
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_loss_of_its_own_keeps_its_targets():
    class Squares(TorchTwiceDifferentiable):
        def per_sample_loss(self, outputs, batch):
            return (outputs - batch[1]).square().sum(1)

    net, X = problem("mlp")
    received = PerSampleGradient(Squares(net, None), loss="output").fit_transform(X, torch.zeros(N, 2).double())
    np.testing.assert_allclose(received, expected_of(net, X), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("c", [1, 2])
def test_a_frame_has_the_index_of_its_rows(c):
    pd = pytest.importorskip("pandas")
    net = nn.Linear(3, c, dtype=torch.float64)
    frame = pd.DataFrame(rows(4)[0], index=list("wxyz"))
    received = PerSampleGradient(net, loss="output").set_output(transform="pandas").fit_transform(frame)
    assert list(received.index) == [label for label in "wxyz" for _ in range(c)]
    assert list(received.columns[-c:]) == [f"bias[{k}]" for k in range(c)]


def test_the_gauss_newton_matrix_is_theirs():
    net, X = problem("mlp")
    y = torch.randn(N, 2, dtype=torch.float64)
    J = PerSampleGradient(net, loss="output").fit_transform(X)
    ggn = HessianInverter("direct", 1.0, curvature="ggn", loss="mse").fit(net, (X, y)).curvature_.to_dense()
    # mse is the mean over rows and outputs, of second derivative 2.
    torch.testing.assert_close(2 * J.mT @ J / (2 * N), ggn, rtol=1e-10, atol=1e-12)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_refused():
    net, X = problem("mlp")
    with pytest.raises(TypeError, match="The model is a setting"):
        PerSampleGradient(net, loss="output").fit(net, X)
    with pytest.raises(TypeError, match=r"\(X, y\)"):
        PerSampleGradient(net, loss="mse").fit(X)
    with pytest.raises(ValueError, match="finite"):
        PerSampleGradient(net, loss="output").fit(X * torch.nan)


# -- flatten -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensors", "arrays", "sequence"])
def test_flatten_of_rows_and_outputs(kind):
    net, X = problem("mlp")
    inverter = HessianInverter("direct", 1.0, loss="mse").fit(net, (X, torch.zeros(N, 2, dtype=torch.float64)))
    theta = {name: t.detach() for name, t in net.named_parameters()}
    parts = torch.func.jacrev(lambda values: torch.func.functional_call(net, values, (X,)))(theta)
    given = {
        "tensors": parts,
        "arrays": {name: part.numpy() for name, part in parts.items()},
        "sequence": list(parts.values()),
    }[kind]
    received = inverter.flatten(given)
    assert isinstance(received, np.ndarray if kind == "arrays" else torch.Tensor)
    np.testing.assert_allclose(received, expected_of(net, X), rtol=1e-10, atol=1e-13)
    named = inverter.unflatten(received)
    assert named["0.weight"].shape == (2 * N, 4, 3)
    assert (inverter.flatten(named) == received).all()
    wrong = dict(given) if kind != "sequence" else dict(zip(parts, given, strict=True))
    wrong["2.bias"] = wrong["2.bias"][:, 0]
    with pytest.raises(ValueError, match=r"2.bias must be of shape \(11, 2, 2\).*Got shape \(11, 2\)"):
        inverter.flatten(wrong)
    with pytest.raises(ValueError, match="0.weight"):
        inverter.flatten({name: part[None] for name, part in parts.items()})
