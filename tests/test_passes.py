"""Data that a solve reads more than once are the same each time, or the user is told; what was fitted stays so."""

import copy
import pickle

import numpy as np
import pytest
import sklearn
import torch
from facts import EVERY, ITERATIVE, SEMIDEFINITE
from problems import problem
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from skinvert import HessianInverter, PerSampleGradient, solve_hvp

CASE = problem("mlp", "cross_entropy", 0.1)
X, Y = CASE.data
B = CASE.right_hand_sides(2)
# In place of data larger than the memory.
SMALL = 1e-5


class Augmented(Dataset):
    def __len__(self):
        return len(Y)

    def __getitem__(self, i):
        return X[i] + 0.1 * torch.randn(X.shape[1], dtype=X.dtype), Y[i]


class Flipped(Augmented):
    """The same values of a row in another order."""

    def __getitem__(self, i):
        return X[i] if torch.rand(()) < 0.5 else X[i].flip(0), Y[i]


class Noisy(Augmented):
    """Labels drawn anew."""

    def __getitem__(self, i):
        return X[i], torch.randint(3, ())


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(X[i], Y[i]) for i in torch.randperm(len(Y)).tolist()])


class Counted:
    """Batches of which each pass after the first ``stop`` yields ``rows`` rows."""

    def __init__(self, rows, stop):
        self.rows, self.stop, self.passes = rows, stop, 0

    def __iter__(self):
        self.passes += 1
        rows = len(Y) if self.passes <= self.stop else self.rows
        return iter([(X[i : min(i + 5, rows)], Y[i : min(i + 5, rows)]) for i in range(0, rows, 5)])


CHANGING = {
    "augmented": Augmented,
    "flipped": Flipped,
    "labels": Noisy,
    "loader": lambda: DataLoader(Augmented(), batch_size=5),
    "shuffled stream": lambda: DataLoader(Stream(), batch_size=5),
    "shuffled mappings": lambda: DataLoader(
        Stream(), 5, collate_fn=lambda rows: {"x": rows[0][0][None], "label": Y[:1]}
    ),
}


@pytest.mark.parametrize("data", CHANGING.values(), ids=CHANGING.keys())
@pytest.mark.parametrize(("method", "curvature"), [("direct", "hessian"), ("cg", "ggn"), ("kfac", "ggn")])
def test_random_data_are_refused(data, method, curvature):
    with sklearn.config_context(working_memory=SMALL), pytest.raises(ValueError, match="differ between passes: random"):
        HessianInverter(method, 1.0, curvature=curvature, loss="cross_entropy").fit(CASE.module, data()).transform(B)


@pytest.mark.parametrize("form", ["gradients", "function"])
def test_the_other_faces_refuse_them(form):
    with sklearn.config_context(working_memory=SMALL), pytest.raises(ValueError, match="deterministic"):
        if form == "gradients":
            PerSampleGradient(CASE.module, loss="cross_entropy").fit(Augmented())
        model = HessianInverter("cg", 1.0, loss="cross_entropy").fit(CASE.module, CASE.data)._model
        solve_hvp("cg", model, Augmented(), B, hessian_perturbation=5.0)


def test_random_data_that_the_memory_holds_are_drawn_once():
    inverter = HessianInverter("cg", 5.0, loss="cross_entropy", curvature="ggn").fit(CASE.module, Augmented())
    x, info = inverter.solve(B)
    assert info["converged"].all() and np.allclose(inverter.residual(B, x), info["residual"], atol=1e-12)


@pytest.mark.parametrize("rows", [5, 10, 11])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_other_numbers_of_rows_are_refused(rows, stop):
    with sklearn.config_context(working_memory=SMALL), pytest.raises(ValueError, match="same data in every pass"):
        HessianInverter("cg", 5.0, loss="cross_entropy").fit(CASE.module, Counted(rows, stop)).transform(B)


def test_more_rows_are_refused():
    longer = [(X[:5], Y[:5])]
    with sklearn.config_context(working_memory=SMALL):
        inverter = HessianInverter("cg", 5.0, loss="cross_entropy").fit(CASE.module, longer)
        longer.append((X[5:], Y[5:]))
        with pytest.raises(ValueError, match="another batch 1"):
            inverter.transform(B)


def forms(X, Y):
    yield "tensors", (X, Y)
    yield "arrays", (X.numpy(), Y.numpy())
    yield "batches", [(X[:5], Y[:5]), (X[5:], Y[5:])]
    yield "data set", TensorDataset(X, Y)
    yield "mapping", ({"input": X}, Y)


@pytest.mark.parametrize("form", [name for name, _ in forms(X, Y)])
@pytest.mark.parametrize("method", ITERATIVE)
def test_kept_data_are_a_copy(form, method):
    own = X.clone()
    data = dict(forms(own, Y))[form]
    inverter = HessianInverter(method, 5.0, loss="cross_entropy").fit(CASE.module, data)
    before = inverter.transform(B)
    own.mul_(2)
    assert np.array_equal(inverter.transform(B), before)


@pytest.mark.parametrize("form", [name for name, _ in forms(X, Y)])
def test_data_changed_since_fit_are_refused(form):
    own = X.clone()
    data = dict(forms(own, Y))[form]
    with sklearn.config_context(working_memory=SMALL):
        inverter = HessianInverter("cg", 5.0, loss="cross_entropy").fit(CASE.module, data)
        own[-1, -1] += 1
        with pytest.raises(ValueError, match="changed since fit"):
            inverter.transform(B)


def test_large_data_survive_a_pickle():
    with sklearn.config_context(working_memory=SMALL):
        inverter = HessianInverter("cg", 5.0, loss="cross_entropy").fit(CASE.module, CASE.data)
        assert np.array_equal(pickle.loads(pickle.dumps(inverter)).transform(B), inverter.transform(B))


@pytest.mark.parametrize("method", EVERY)
def test_frozen_parameters_trained_later_do_not_count(method):
    net = copy.deepcopy(CASE.module)
    inverter = HessianInverter(method, 5.0, curvature=SEMIDEFINITE[method], loss="cross_entropy", params="2.*")
    b = B[:, : inverter.fit(net, CASE.data).n_features_in_]
    before = inverter.transform(b)
    nn.init.ones_(net[0].weight)
    assert np.array_equal(inverter.transform(b), before)


def test_large_frozen_parameters_trained_later_are_told():
    net = copy.deepcopy(CASE.module)
    with sklearn.config_context(working_memory=SMALL):
        inverter = HessianInverter("cg", 5.0, loss="cross_entropy", params="2.*").fit(net, CASE.data)
        b = B[:, : inverter.n_features_in_]
        inverter.transform(b)
        nn.init.ones_(net[2].weight)
        inverter.transform(b)
        nn.init.ones_(net[0].weight)
        with pytest.raises(ValueError, match=r"others in \['0.weight'\]"):
            inverter.transform(b)
