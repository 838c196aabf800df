"""PerSampleGradient's faces: rows (X, y) to (n, p) gradients, whatever the form of data, the chunks or the layers."""

import numpy as np
import pytest
import sklearn
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from skinvert import HessianInverter, PerSampleGradient
from skinvert.curvature import per_sample as curvature_rows


def classification(n=10):
    generator = torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    X = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return net, X, torch.randint(0, 2, (n,), generator=generator)


def one_by_one(net, X, y):
    """Return the gradients by one backward pass a row."""
    losses = [nn.functional.cross_entropy(net(X[i : i + 1]), y[i : i + 1]) for i in range(len(y))]
    rows = [torch.autograd.grad(loss, net.parameters()) for loss in losses]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def test_rows_equal_one_backward_pass_each():
    net, X, y = classification()
    received = PerSampleGradient(net, loss="cross_entropy").fit_transform(X, y)
    torch.testing.assert_close(received, one_by_one(net, X, y))


def test_fit_then_transform_equals_fit_transform():
    net, X, y = classification()
    expected = PerSampleGradient(net, loss="cross_entropy").fit_transform(X, y)
    received = PerSampleGradient(net, loss="cross_entropy").fit(X, y).transform((X, y))
    assert torch.equal(received, expected)


def test_rows_that_were_not_fitted():
    net, X, y = classification()
    received = PerSampleGradient(net, loss="cross_entropy").fit(X[:6], y[:6]).transform((X[6:], y[6:]))
    torch.testing.assert_close(received, one_by_one(net, X[6:], y[6:]))


@pytest.mark.parametrize(
    "loss", ["mse", nn.MSELoss(reduction="sum"), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))]
)
def test_their_mean_is_the_gradient_of_the_loss(loss):
    net, X, y = classification()
    targets = y if isinstance(loss, nn.CrossEntropyLoss) else X[:, :2]
    fitted = HessianInverter("cg", loss=loss).fit(net, (X, targets))
    received = PerSampleGradient(net, loss=loss).fit_transform(X, targets).mean(0).norm()
    assert float(received) == pytest.approx(fitted.gradient_norm_, rel=1e-10)


def test_they_are_the_factor_of_the_empirical_fisher():
    net, X, y = classification()
    G = PerSampleGradient(net, loss="cross_entropy").fit_transform(X, y)
    fitted = HessianInverter("cg", 1.0, loss="cross_entropy", curvature="empirical_fisher").fit(net, (X, y))
    torch.testing.assert_close(fitted.curvature_.to_dense(), G.T @ G / len(G))


@pytest.mark.parametrize("form", ["data set", "loader", "batches"])
def test_other_forms_of_data_give_the_same_rows_in_order(form):
    net, X, y = classification()
    data = TensorDataset(X, y)
    forms = {
        "data set": data,
        "loader": DataLoader(data, batch_size=3, shuffle=True, drop_last=True),
        "batches": [(X[:7], y[:7]), (X[7:], y[7:])],
    }
    expected = one_by_one(net, X, y).numpy()
    received = PerSampleGradient(net, loss="cross_entropy").fit_transform(forms[form])
    np.testing.assert_allclose(received, expected, rtol=1e-10, atol=1e-14)


def test_a_sampler_of_one_s_own_is_refused():
    net, X, y = classification()
    loader = DataLoader(TensorDataset(X, y), sampler=SubsetRandomSampler(range(10)))
    with pytest.raises(ValueError, match="SubsetRandomSampler"):
        PerSampleGradient(net, loss="cross_entropy").fit(loader)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_give_a_tensor_and_arrays_an_array(dtype):
    net, X, y = classification()
    fitted = PerSampleGradient(net, loss="cross_entropy", dtype=dtype).fit(X, y)
    tensor, array = fitted.transform((X, y)), fitted.transform((X.numpy(), y.numpy()))
    assert (type(tensor), tensor.dtype) == (torch.Tensor, dtype)
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, tensor.numpy())


def test_feature_names_and_attributes():
    net, X, y = classification()
    fitted = PerSampleGradient(net, loss="cross_entropy", params="2.*").fit(X, y)
    expected = [f"2.weight[{i},{j}]" for i in range(2) for j in range(4)] + ["2.bias[0]", "2.bias[1]"]
    assert fitted.get_feature_names_out().tolist() == expected
    assert fitted.parameter_names_ == ["2.weight", "2.bias"]
    assert fitted.n_features_out_ == fitted.transform((X, y)).shape[1] == 10


def test_params_take_the_columns_of_the_whole():
    net, X, y = classification()
    received = PerSampleGradient(net, loss="cross_entropy", params="2.*").fit_transform(X, y)
    torch.testing.assert_close(received, one_by_one(net, X, y)[:, 16:])


@pytest.mark.parametrize("batch_size", [1, 3, 10, 99])
def test_the_batch_size_does_not_matter(batch_size):
    net, X, y = classification()
    received = PerSampleGradient(net, loss="cross_entropy", batch_size=batch_size).fit_transform(X, y)
    torch.testing.assert_close(received, one_by_one(net, X, y), rtol=1e-12, atol=1e-14)


def test_little_working_memory_means_small_chunks_and_the_same_rows(monkeypatch):
    net, X, y = classification()
    sizes = []

    def counted(model, batch):
        sizes.append(len(batch[1]))
        return curvature_rows.gradient_rows(model, batch)

    monkeypatch.setattr("skinvert.gradients.gradient_rows", counted)
    # 3 gradients of 26 numbers for each row: 4 rows.
    with sklearn.config_context(working_memory=4 * 3 * 26 * 8 / 2**20):
        received = PerSampleGradient(net, loss="cross_entropy").fit_transform(X, y)
    assert sizes == [4, 4, 2]
    torch.testing.assert_close(received, one_by_one(net, X, y), rtol=1e-12, atol=1e-14)


def test_more_rows_than_memory_are_refused(monkeypatch):
    net, X, y = classification()
    fitted = PerSampleGradient(net, loss="cross_entropy").fit(X, y)
    monkeypatch.setattr("skinvert._memory.available_memory", lambda device: 100)
    with pytest.raises(
        MemoryError, match=r"A gradient for each of 10 rows needs about 2.84 KiB.*100 bytes.*fewer rows"
    ):
        fitted.transform((X, y))


class Recurrent(nn.Module):
    """An LSTM's last state, classified: no layer of it can be vmapped."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def test_an_lstm_goes_row_by_row():
    torch.manual_seed(0)
    net = Recurrent().double()
    X, y = torch.randn(5, 6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    received = PerSampleGradient(net, loss="cross_entropy").fit_transform(X, y)
    torch.testing.assert_close(received, one_by_one(net, X, y))


@pytest.mark.parametrize("verbose", [0, 1])
def test_verbose_shows_a_bar(verbose, capfd):
    net, X, y = classification()
    PerSampleGradient(net, loss="cross_entropy", verbose=verbose).fit_transform(X, y)
    assert ("per-sample gradients" in capfd.readouterr().err) == bool(verbose)
