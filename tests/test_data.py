"""Every form of data gives the one curvature over all the rows, in dataset order, none dropped."""

import numpy as np
import pytest
import torch
from oracles import matrix_error, oracle_matrix
from problems import problem
from skorch.helper import SliceDataset, SliceDict
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from skinvert import HessianInverter
from skinvert.data import as_batches, count

CASE = problem("mlp", "class_weights", 0.1)
X, Y = CASE.data
FLOAT64 = {"dtype": torch.float64, "device": torch.device("cpu")}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(list(zip(X, Y, strict=True)))


class Batches:
    """A re-iterable of batches that is neither a list nor a loader."""

    def __iter__(self):
        return iter([(X[:5], Y[:5]), (X[5:], Y[5:])])


def half_and_half(samples):
    xs, ys = zip(*samples, strict=True)
    return torch.stack(xs), torch.stack(ys)


FORMS = {
    "tensors": (X, Y),
    "arrays": (X.numpy(), Y.numpy()),
    "lists": (X.tolist(), Y.tolist()),
    "short integers": (X, Y.to(torch.int8)),
    "data set": TensorDataset(X, Y),
    "subset": Subset(TensorDataset(X, Y), range(len(Y))),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=5),
    "shuffled loader that drops": DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, drop_last=True),
    "loader with collate_fn": DataLoader(TensorDataset(X, Y), batch_size=5, collate_fn=half_and_half),
    "random subset loader": DataLoader(TensorDataset(X, Y), 5, sampler=SubsetRandomSampler(range(len(Y)))),
    "stream": DataLoader(Stream(), batch_size=5),
    "list of batches": [(X[:5], Y[:5]), (X[5:], Y[5:])],
    "list of array batches": [(X[:5].numpy(), Y[:5].numpy()), [X[5:].numpy(), Y[5:].numpy()]],
    "re-iterable": Batches(),
    "skorch slices": (SliceDataset(TensorDataset(X, Y), 0), SliceDataset(TensorDataset(X, Y), 1)),
}


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("batch_size", [None, 4])
def test_form(data, batch_size):
    inverter = HessianInverter("direct", 2.0, **CASE.settings(batch_size=batch_size)).fit(CASE.module, data)
    assert inverter.n_samples_ == len(Y)
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(CASE)) <= 1e-12


ORDERED = [name for name in FORMS if name != "random subset loader"]


@pytest.mark.parametrize("data", [FORMS[name] for name in ORDERED], ids=ORDERED)
def test_weights_follow_the_rows(data):
    case = problem("mlp", "class_weights", 0.1, True)
    rows = TensorDataset(X, Y)
    assert torch.equal(case.X, X) and torch.equal(case.y, Y) and len(rows) == len(case.counts)
    inverter = HessianInverter("direct", 2.0, **case.settings(batch_size=None))
    inverter.fit(case.module, data, case.sample_weight)
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case)) <= 1e-12


def test_weights_refuse_a_sampler():
    with pytest.raises(ValueError, match="SubsetRandomSampler"):
        as_batches(FORMS["random subset loader"], sample_weight=np.ones(len(Y)), **FLOAT64)


def test_a_random_sampler_keeps_its_rows():
    loader = DataLoader(TensorDataset(X, Y), 2, sampler=SubsetRandomSampler([1, 3, 5]))
    batches = as_batches(loader, **FLOAT64)
    seen = [{tuple(row) for batch, _ in batches for row in batch[0].tolist()} for _ in range(3)]
    assert seen == [{tuple(X[i].tolist()) for i in (1, 3, 5)}] * 3


@pytest.mark.parametrize("given", [FORMS["shuffled loader that drops"], TensorDataset(X, Y), (X, Y)])
def test_rows_come_in_their_order(given):
    batches = as_batches(given, batch_size=5, **FLOAT64)
    assert [len(weights) for _, weights in batches] == [5, 5, 2]
    assert torch.equal(torch.cat([batch[0] for batch, _ in batches]), X)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = CASE.module

    def forward(self, first, second):
        return self.layer(torch.cat([first, second], dim=1))


MAPPINGS = {
    "dict": ({"first": X[:, :1], "second": X[:, 1:]}, Y),
    "dict of arrays": ({"first": X[:, :1].numpy(), "second": X[:, 1:].numpy()}, Y.numpy()),
    "SliceDict": (SliceDict(first=X[:, :1].numpy(), second=X[:, 1:].numpy()), Y.numpy()),
    "batches of dicts": [({"first": X[i : i + 5, :1], "second": X[i : i + 5, 1:]}, Y[i : i + 5]) for i in (0, 5, 10)],
}


@pytest.mark.parametrize("data", MAPPINGS.values(), ids=MAPPINGS.keys())
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
def test_inputs_by_name(data, curvature):
    inverter = HessianInverter("direct", 2.0, curvature=curvature, **CASE.settings(batch_size=5))
    inverter.fit(TwoInputs(), data)
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(CASE, curvature)) <= 1e-12


def test_mapping_rows_with_weights():
    case = problem("mlp", "class_weights", 0.1, True)
    inverter = HessianInverter("direct", 2.0, **case.settings(batch_size=5))
    inverter.fit(TwoInputs(), MAPPINGS["SliceDict"], case.sample_weight)
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case)) <= 1e-12


def test_float32_model_reads_float64_data():
    net = nn.Linear(4, 3)
    inverter = HessianInverter("direct", 1.0, loss="cross_entropy").fit(net, (X.numpy(), Y.numpy()))
    assert inverter.transform(np.ones((1, 15))).dtype == np.float64 and inverter.inverse_.dtype == torch.float32


def test_read_only_arrays_are_fine():
    frozen = X.numpy().copy(), Y.numpy().copy()
    for array in frozen:
        array.flags.writeable = False
    inverter = HessianInverter("direct", 2.0, **CASE.settings()).fit(CASE.module, frozen)
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(CASE)) <= 1e-12


def test_a_dataset_without_a_length_cannot_be_split():
    class Endless(Dataset):
        def __getitem__(self, index):
            return torch.ones(2), 0

    for data in (Endless(), DataLoader(Endless(), 4, sampler=range(8))):
        with pytest.raises(TypeError, match="Data to split into folds must be .* with a length"):
            count(data)
    assert count(TensorDataset(torch.ones(3, 2)))[0] == 3


def test_small_batches_are_joined_in_their_order():
    X, y = torch.arange(22.0).reshape(11, 2), torch.arange(11)
    loader = DataLoader(TensorDataset(X, y), batch_size=3)
    batches = as_batches(loader, dtype=torch.float32, device=torch.device("cpu"), sample_weight=np.arange(1.0, 12.0))
    merged = batches.merged(7)
    assert [len(batch[1]) for batch, _ in merged] == [6, 5]
    assert torch.equal(torch.cat([batch[0] for batch, _ in merged]), X)
    assert torch.equal(torch.cat([batch[1] for batch, _ in merged]), y)
    assert torch.equal(torch.cat([weights for _, weights in merged]), torch.arange(1.0, 12.0))
    # What was given stays as it is.
    assert [len(batch[1]) for batch, _ in batches] == [3, 3, 3, 2]


def test_batches_of_other_shapes_stay_as_they_are():
    raw = [(torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(2, 4), torch.zeros(2))]
    batches = as_batches(raw, dtype=torch.float32, device=torch.device("cpu"))
    assert [batch[0].shape for batch, _ in batches.merged(100)] == [(2, 3), (2, 4)]


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
def test_a_loader_of_small_batches_costs_no_pass_each(curvature):
    p = problem("mlp", "cross_entropy", weighted=True, n=40)
    loader = DataLoader(TensorDataset(p.X, p.y), batch_size=2)
    inverter = HessianInverter("cg", 1.0, curvature=curvature, loss=p.loss)
    A = inverter.fit(p.module, loader, sample_weight=p.sample_weight).curvature_
    assert len(A.objective.batches.kept) == 1
    assert matrix_error(A.to_dense(), oracle_matrix(p, curvature)) < 1e-10


@pytest.mark.parametrize(("method", "bar"), [("direct", "factor"), ("nystroem", "sketch of rank 16")])
def test_bars_know_how_long(method, bar, capsys):
    p = problem("mlp", "cross_entropy")
    batches = [(p.X[i : i + 5], p.y[i : i + 5]) for i in range(0, len(p.X), 5)]
    HessianInverter(method, 1.0, curvature="ggn", loss=p.loss, verbose=1).fit(p.module, batches)
    told = capsys.readouterr().err
    # A total, and so a percentage.
    assert f"loss and gradient:   0%|          | 0/{len(batches)} [" in told
    assert f"{bar}:   0%" in told
