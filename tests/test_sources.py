"""Samplers, samples and inputs of many kinds: every row once, or the reason why not."""

import copy
from collections import namedtuple

import numpy as np
import pytest
import scipy.sparse
import torch
from oracles import matrix_error, oracle_matrix
from problems import problem
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from skinvert import HessianInverter, HessianInverterCV, PerSampleGradient

CASE = problem("mlp", "cross_entropy", 0.1)
X, Y = CASE.data
N = len(Y)
ROWS = TensorDataset(X, Y)
ALL_CURVATURES = pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])


def fitted(data, module=None, curvature="hessian", **settings):
    inverter = HessianInverter("direct", 5.0, curvature=curvature, **{**CASE.settings(batch_size=None), **settings})
    return inverter.fit(CASE.module if module is None else module, data)


def check(data, module=None, curvature="hessian", **settings):
    inverter = fitted(data, module, curvature, **settings)
    assert inverter.n_samples_ == N
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(CASE, curvature)) <= 1e-12


# -- samplers ----------------------------------------------------------------------------------------------------------


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield 0


class InBatches(Sampler):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Prebatched(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]


WHOLE = {
    "batch sampler that drops": {"batch_sampler": BatchSampler(RandomSampler(ROWS), 5, drop_last=True)},
    "sequential batch sampler": {"batch_sampler": BatchSampler(SequentialSampler(ROWS), 5, drop_last=True)},
    "subset batch sampler that drops": {"batch_sampler": BatchSampler(SubsetRandomSampler(range(N)), 5, True)},
    "with replacement": {"batch_size": 5, "sampler": RandomSampler(ROWS, replacement=True, num_samples=30)},
    "list": {"batch_size": 5, "sampler": list(range(N))[::-1]},
    "batches at once": {"batch_size": None, "sampler": BatchSampler(RandomSampler(ROWS), 5, drop_last=True)},
    "own batches": {"batch_sampler": InBatches([[0, 5, 7, 9], [1, 2, 3, 4, 6, 8, 10, 11]])},
}
PARTIAL = {
    "weighted": ({"sampler": WeightedRandomSampler(torch.ones(N), N)}, "sample_weight="),
    "weighted batches": (
        {"batch_sampler": BatchSampler(WeightedRandomSampler(torch.ones(N), N), 5, False)},
        "sample_weight=",
    ),
    "weighted batches at once": (
        {"batch_size": None, "sampler": BatchSampler(WeightedRandomSampler(torch.ones(N), N), 5, False)},
        "sample_weight=",
    ),
    "endless": ({"sampler": Endless()}, "each once"),
    "a share": ({"sampler": DistributedSampler(ROWS, 2, 0, shuffle=False)}, "one process's share"),
    "repeated": ({"sampler": [0, 0, 1]}, "repeats rows"),
    "own batches that drop": ({"batch_sampler": InBatches([[0, 1, 2], [3, 4, 5]])}, "6 of 12 rows"),
    "own batches that repeat": ({"batch_sampler": InBatches([range(N), [0]])}, "13 draws"),
}


@pytest.mark.parametrize("settings", WHOLE.values(), ids=WHOLE.keys())
def test_every_row_once(settings):
    check(DataLoader(ROWS, **settings))


@pytest.mark.parametrize(("settings", "reason"), PARTIAL.values(), ids=PARTIAL.keys())
def test_refused_samplers(settings, reason):
    with pytest.raises(ValueError, match=reason):
        fitted(DataLoader(ROWS, **settings))


def test_a_stream_that_drops_its_rest_is_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(X, Y, strict=True))

    with pytest.raises(ValueError, match="drop_last=False"):
        fitted(DataLoader(Stream(), batch_size=5, drop_last=True))


def test_items_that_are_batches_come_in_order():
    check(DataLoader(Prebatched(), batch_size=None, shuffle=True))


def test_a_subset_is_the_users_choice():
    inverter = fitted(DataLoader(ROWS, 2, sampler=[1, 3, 5]))
    expected = fitted((X[[1, 3, 5]], Y[[1, 3, 5]]))
    assert matrix_error(inverter.curvature_.to_dense(), expected.curvature_.to_dense().numpy()) <= 1e-12


# -- samples -----------------------------------------------------------------------------------------------------------


class Rows:
    """A data set in all but its class."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i], int(Y[i])


Pair = namedtuple("Pair", ["x", "y"])
SAMPLES = {
    "pairs of tensors": list(zip(X, Y, strict=True)),
    "pairs of arrays and ints": [(x.numpy(), int(y)) for x, y in ROWS],
    "pairs of lists": [[x.tolist(), int(y)] for x, y in ROWS],
    "named pairs": [Pair(x, y) for x, y in ROWS],
    "duck": Rows(),
}
BATCHES = {
    "named": [Pair(X[:5], Y[:5]), Pair(X[5:], Y[5:])],
    "lists": [(X[:5].tolist(), Y[:5].tolist()), [X[5:].tolist(), Y[5:].tolist()]],
    "one named pair": Pair(X, Y),
}


@pytest.mark.parametrize("data", [*SAMPLES.values(), *BATCHES.values()], ids=[*SAMPLES, *BATCHES])
def test_samples_and_batches(data):
    check(data)
    check(data, batch_size=5)


def test_samples_of_many_outputs():
    case = problem("mlp", "mse", 0.1)
    inverter = HessianInverter("direct", 5.0, **case.settings()).fit(case.module, list(zip(*case.data, strict=True)))
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case)) <= 1e-12


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(X[:5], Y[:4])], "same number of rows"),
        (DataLoader(ROWS, batch_size=None), "single sample has no rows"),
        ([(X[i, : 2 + i % 2].tolist(), 0) for i in range(N)], "pads"),
        (((X[:, :1], X[:-1]), Y), "same length"),
    ],
)
def test_faults_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        fitted(data)


class WithoutLength(torch.utils.data.Dataset):
    def __getitem__(self, i):
        return X[i], Y[i]


@pytest.mark.parametrize("data", [WithoutLength(), DataLoader(WithoutLength(), sampler=range(N))])
def test_a_data_set_without_a_length(data):
    with pytest.raises(TypeError, match="must be one with a length.*WithoutLength.*IterableDataset"):
        fitted(data)


@pytest.mark.parametrize("form", [lambda pair: pair, lambda pair: [pair]], ids=["tuple", "batches"])
@pytest.mark.parametrize("dtypes", [(">f8", ">i8"), (np.longdouble, ">u2")], ids=["big-endian", "long double"])
def test_numbers_that_torch_does_not_take(dtypes, form):
    check(form((X.numpy().astype(dtypes[0]), Y.numpy().astype(dtypes[1]))))


def test_dates_are_no_numbers():
    with pytest.raises(ValueError, match=r"must be numeric. Got dtype datetime64\[D\]"):
        fitted((X.numpy(), np.zeros(N, "datetime64[D]")))


# -- several inputs ----------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = CASE.module

    def forward(self, first, second, temperature=1.0):
        return self.net(torch.cat([first, second], 1)) / temperature


class Together(Two):
    """A forward of one argument, which holds both."""

    def forward(self, both):
        first, second = both.values() if isinstance(both, dict) else both
        return super().forward(first, second)


A, B = X[:, :1], X[:, 1:]


def named(start, stop, **more):
    return {"first": A[start:stop], "second": B[start:stop], **more}


INPUTS = {
    "tuple": ((A, B), Y),
    "tuple of arrays": ((A.numpy(), B.numpy()), Y.numpy()),
    "batches of tuples": [((A[:5], B[:5]), Y[:5]), [[A[5:], B[5:]], Y[5:]]],
    "mapping": (named(0, N), Y),
    "loader": DataLoader(TensorDataset(A, B, Y), 5, collate_fn=lambda rows: _collated(rows)),
}


def _collated(rows):
    first, second, y = (torch.stack(column) for column in zip(*rows, strict=True))
    return (first, second), y


@pytest.mark.parametrize("module", [Two, Together])
@pytest.mark.parametrize("data", INPUTS.values(), ids=INPUTS.keys())
@ALL_CURVATURES
def test_several_inputs(data, module, curvature):
    check(data, module(), curvature, batch_size=None)


def test_several_inputs_in_folds():
    inverter = HessianInverterCV(loss="cross_entropy", curvature="ggn", cv=3).fit(Two(), ((A, B), Y))
    expected = HessianInverterCV(loss="cross_entropy", curvature="ggn", cv=3).fit(CASE.module, (X, Y))
    np.testing.assert_allclose(inverter.cv_results_["mean_test_score"], expected.cv_results_["mean_test_score"])


SHARED = {
    "tensor": (named(0, N, temperature=torch.tensor(1.0)), Y),
    "number": (named(0, N, temperature=1.0), Y),
    "batches": [(named(i, i + 5, temperature=torch.tensor(1.0)), Y[i : i + 5]) for i in (0, 5, 10)],
    "mappings": [named(i, i + 5, label=Y[i : i + 5], temperature=torch.tensor(1.0)) for i in (0, 5, 10)],
    "texts": [named(i, i + 5, label=Y[i : i + 5], text=["a"] * 5) for i in (0, 5, 10)],
}


@pytest.mark.parametrize("data", SHARED.values(), ids=SHARED.keys())
@ALL_CURVATURES
def test_what_all_rows_share(data, curvature):
    check(data, Two(), curvature)


def test_what_all_rows_share_counts():
    """Halving the temperature doubles the logits."""
    doubled = copy.deepcopy(CASE.module)
    for tensor in doubled[-1].parameters():
        tensor.data.mul_(2)
    gradients = PerSampleGradient(Two(), loss="cross_entropy", params="net.0.*")
    received = gradients.fit_transform(named(0, N, temperature=torch.tensor(0.5)), Y)
    expected = PerSampleGradient(doubled, loss="cross_entropy", params="0.*").fit_transform(X, Y)
    np.testing.assert_allclose(received, expected, atol=1e-12)


def test_samples_by_chance_share_too():
    data = (named(0, N, temperature=torch.tensor(1.0)), Y)
    inverter = HessianInverter("lissa", 5.0, loss="cross_entropy", curvature="ggn", batch_size=5).fit(Two(), data)
    assert inverter.solve(CASE.right_hand_sides(2)).info["converged"].all()


def test_wrong_names_are_told():
    with pytest.raises(TypeError, match=r"forward\(first, second, temperature=1.0\).*'third'.*`outputs`"):
        fitted(({"first": A, "third": B}, Y), Two())


def test_a_name_too_many_is_told():
    """A forward of one argument might have taken the mapping itself."""
    with pytest.raises(TypeError, match=r"those that the module's forward\(input\) takes.*Leave out idx"):
        fitted(({"input": X, "idx": torch.arange(N)}, Y))


# -- labels and sparse rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int8", "int16", "int32"])
@pytest.mark.parametrize("kind", ["tensor", "array", "batches", "mapping"])
def test_integer_labels_of_any_width(dtype, kind):
    y = torch.from_numpy(Y.numpy().astype(dtype))
    data = {
        "tensor": (X, y),
        "array": (X.numpy(), y.numpy()),
        "batches": [(X, y)],
        "mapping": [{"input": X, "labels": y}],
    }
    check(data[kind], curvature="ggn")


def test_bytes_of_images_stay_bytes():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, x):
            return self.net(x.float() / 255 if x.dtype == torch.uint8 else x)

    net, pixels = Scaled(), torch.randint(256, (N, 4), dtype=torch.uint8)
    received = HessianInverter("direct", 1.0, loss="cross_entropy").fit(net, (pixels, Y)).curvature_.to_dense()
    expected = HessianInverter("direct", 1.0, loss="cross_entropy").fit(net, (pixels.float() / 255, Y))
    torch.testing.assert_close(received, expected.curvature_.to_dense())


def test_a_module_refuses_sparse_rows():
    with pytest.raises(TypeError, match="toarray"):
        fitted((scipy.sparse.csr_array(X.numpy()), Y))
