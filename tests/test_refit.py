"""A fit is whole or none: what fails or is interrupted leaves the estimator as it was."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import nn

from skinvert import HessianInverter, HessianInverterCV, PerSampleGradient, methods


def data(n=20, d=3):
    torch.manual_seed(0)
    return nn.Linear(d, 2).double(), torch.randn(n, d, dtype=torch.float64), torch.randint(0, 2, (n,))


class Stopped(methods.Direct):
    """Raises in place of the n-th factorisation."""

    left = 0
    error = KeyboardInterrupt

    def invert(self, *args, **kwargs):
        Stopped.left -= 1
        if Stopped.left < 0:
            raise self.error
        return super().invert(*args, **kwargs)


def estimators():
    settings = {"loss": "cross_entropy", "curvature": "ggn"}
    yield HessianInverter(Stopped(), 0.1, **settings), 1
    # Five folds, then the fit on all rows.
    yield HessianInverterCV([0.1, 1.0], method=Stopped(), **settings), 6


EACH = pytest.mark.parametrize(("estimator", "fits"), list(estimators()), ids=["inverter", "search"])


def state(estimator):
    return {name: id(value) for name, value in vars(estimator).items()}


@EACH
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("stop", ["at once", "at the end"])
def test_an_interrupted_refit_leaves_the_first_fit(estimator, fits, error, stop, monkeypatch):
    net, X, y = data()
    monkeypatch.setattr(Stopped, "left", fits)
    monkeypatch.setattr(Stopped, "error", error)
    estimator.fit(net, (X, y))
    b = np.ones((1, 8))
    before, expected = state(estimator), estimator.transform(b)

    Stopped.left = 0 if stop == "at once" else fits - 1
    other, Z, _ = data(d=5)
    with pytest.raises(error):
        estimator.fit(other, (Z, y))
    assert state(estimator) == before
    np.testing.assert_array_equal(estimator.transform(b), expected)
    assert len(estimator.get_feature_names_out()) == 8


@EACH
def test_a_failed_first_fit_is_no_fit(estimator, fits, monkeypatch):
    net, X, y = data()
    monkeypatch.setattr(Stopped, "left", 0)
    fresh = type(estimator)(**estimator.get_params(deep=False))
    with pytest.raises(KeyboardInterrupt):
        fresh.fit(net, (X, y))
    with pytest.raises(NotFittedError):
        fresh.transform(np.ones((1, 8)))
    assert not [name for name in vars(fresh) if name.endswith("_")]


@pytest.mark.parametrize(
    "broken",
    [
        lambda net, X, y: (net, (X * torch.nan, y)),
        lambda net, X, y: (net, (X, y[:3])),
        lambda net, X, y: (net, None),
        lambda net, X, y: (nn.Linear(7, 2).double(), (X, y)),
    ],
    ids=["NaN", "lengths", "no data", "width"],
)
def test_bad_data_leave_the_first_fit(broken):
    net, X, y = data()
    inverter = HessianInverter("direct", 0.1, loss="cross_entropy").fit(net, (X, y))
    before = state(inverter)
    with pytest.raises((ValueError, TypeError)):
        inverter.fit(*broken(net, X, y))
    assert state(inverter) == before


def test_nothing_of_an_earlier_fit_stays():
    net, X, y = data()
    inverter = HessianInverter("direct", 0.1, loss="cross_entropy").fit(net, (X, y))
    inverter.fit(np.random.default_rng(0).standard_normal((9, 4)))
    rows = HessianInverter("direct", 0.1).fit(np.random.default_rng(0).standard_normal((9, 4)))
    assert set(vars(inverter)) == set(vars(rows))


def test_gradients_too():
    net, X, y = data()
    transformer = PerSampleGradient(net, loss="cross_entropy").fit(X, y)
    before, expected = state(transformer), transformer.transform((X, y))
    with pytest.raises(ValueError, match="finite"):
        transformer.fit(X * torch.nan, y)
    transformer.set_params(loss="mse")
    with pytest.raises(ValueError, match="shape"):
        transformer.fit(X, y)
    transformer.set_params(loss="cross_entropy")
    assert state(transformer) == before
    assert torch.equal(transformer.transform((X, y)), expected)
