"""What a solve tells: every entry is explained in one place, and the common ones are always there."""

import re

import numpy as np
import pytest
import torch
from facts import EVERY
from torch import nn

from skinvert import HessianInverter, InverseHvpResult

ALWAYS = {"residual", "converged", "reason", "stagnated", "negative_curvature", "approximate"}


def documented():
    return set(re.findall(r"^ +``([a-z_]+)`` {2,}", InverseHvpResult.__doc__, re.MULTILINE))


def told(method, blocks=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    X, y = torch.randn(30, 3, dtype=torch.float64), torch.randint(0, 2, (30,))
    curvature = "auto" if method in ("kfac", "ekfac", "harmonic_mean") else "ggn"
    inverter = HessianInverter(method, 0.5, curvature=curvature, loss="cross_entropy", blocks=blocks)
    fitted = inverter.fit(net, (X, y))
    return fitted.solve(torch.ones(2, fitted.n_features_in_, dtype=torch.float64)).info


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("blocks", [None, "layer"])
@pytest.mark.parametrize("method", EVERY)
def test_every_entry_is_explained(method, blocks):
    info = told(method, blocks)
    assert ALWAYS <= set(info) <= documented()
    for name, value in info.items():
        if isinstance(value, torch.Tensor):
            assert value.shape == (2,), name
    for block in info.get("blocks", []):
        assert ALWAYS <= set(block) <= documented()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_entry_that_is_explained_is_told_by_some_method():
    assert documented() == set().union(*(told(method) for method in EVERY), told("direct", "layer"))


def test_entries_are_arrays_for_arrays():
    info = HessianInverter("cg").fit(np.eye(3)).solve(np.ones((2, 3))).info
    assert isinstance(info["residual"], np.ndarray)
