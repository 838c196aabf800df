"""A model whose own `train` and `eval` do more than set flags is the one that its `eval()` makes, or refused."""

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from skinvert import HessianInverter, PerSampleGradient

D = torch.float64
X = torch.linspace(-1, 2, 48, dtype=D).sin().reshape(12, 4)
Y = torch.arange(12) % 3
CALLED = []


class Net(nn.Module):
    """An MLP whose modes are its subclasses'."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5, dtype=D), nn.Linear(5, 3, dtype=D)

    def train(self, mode=True):
        CALLED.append(id(self))
        self.switch(mode)
        return super().train(mode)

    def switch(self, mode):
        raise NotImplementedError

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Temperature(Net):
    def switch(self, mode):
        self.temperature = 5.0 if mode else 1.0

    def forward(self, x):
        return super().forward(x) / self.temperature


class Mode(Net):
    def switch(self, mode):
        self.settings = {"mode": "train" if mode else "test"}

    def forward(self, x):
        return super().forward(x) * (2.0 if self.settings["mode"] == "train" else 1.0)


class Averaged(Net):
    """Takes averaged weights in eval mode."""

    def switch(self, mode):
        with torch.no_grad():
            self.last.weight.mul_(2.0 if mode else 0.5)


class OwnEvalAlone(Net):
    scale = 3.0

    def switch(self, mode):
        pass

    def eval(self):
        self.scale = 1.0
        return super().eval()

    def forward(self, x):
        return super().forward(x) * self.scale


class KeptInTraining(Net):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def train(self, mode=True):
        super().train(mode)
        self.drop.train()
        return self

    def switch(self, mode):
        pass

    def forward(self, x):
        return self.drop(super().forward(x))


def hessian(net):
    params = list(net.parameters())
    gradient = flat(torch.autograd.grad(F.cross_entropy(net(X), Y), params, create_graph=True))
    return gradient.detach(), torch.stack([flat(torch.autograd.grad(g, params, retain_graph=True)) for g in gradient])


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("kind", [Temperature, Mode, Averaged, OwnEvalAlone])
def test_another_model_in_train_mode_is_refused_until_eval(kind):
    net = kind().train()
    before = state(net)
    CALLED.clear()
    with pytest.raises(
        ValueError, match=r"must be in eval mode.*(temperature|settings|weight|scale).*`model\.eval\(\)`"
    ):
        HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, (X, Y))
    with pytest.raises(ValueError, match=r"`model\.eval\(\)`"):
        PerSampleGradient(net, loss="cross_entropy").fit_transform(X, Y)
    # What is the user's own was never called, nor changed.
    assert id(net) not in CALLED and net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    inverter = HessianInverter("direct", 30.0, loss="cross_entropy").fit(net.eval(), (X, Y))
    gradient, H = hessian(net)
    np.testing.assert_allclose(inverter.curvature_.to_dense(), H, rtol=0, atol=1e-12)
    rows = PerSampleGradient(net, loss="cross_entropy").fit_transform(X, Y)
    np.testing.assert_allclose(rows.mean(0), gradient, rtol=0, atol=1e-12)


def test_in_float32_and_in_another_dtype():
    for dtype in (None, "float64", "float32"):
        with pytest.raises(ValueError, match="temperature"):
            net = Temperature().float().train()
            HessianInverter("direct", 30.0, loss="cross_entropy", dtype=dtype).fit(net, (X.float(), Y))


def test_a_child_kept_in_train_mode_is_refused_until_its_flag_is_set():
    net = KeptInTraining().eval()
    with pytest.raises(ValueError, match=r"others by drop\.training"):
        HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, (X, Y))
    net.drop.training = False
    inverter = HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, (X, Y))
    np.testing.assert_allclose(inverter.curvature_.to_dense(), hessian(net)[1], rtol=0, atol=1e-12)


# -- what goes on without a word -----------------------------------------------------------------------------------


class FrozenNorm(Net):
    """BatchNorm keeps its statistics while the rest is trained."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5, dtype=D)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def switch(self, mode):
        pass

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


class Merging(Net):
    """An adapter that eval mode adds to its weight in place, as loralib does."""

    def __init__(self):
        super().__init__()
        self.adapter, self.merged = nn.Parameter(torch.full((3, 5), 0.1, dtype=D)), False

    def switch(self, mode):
        if self.merged == mode:
            self.last.weight.data += -self.adapter.data if mode else self.adapter.data
            self.merged = not mode

    def forward(self, x):
        extra = 0.0 if self.merged else F.linear(torch.tanh(self.first(x)), self.adapter)
        return super().forward(x) + extra


class Counting(Net):
    def switch(self, mode):
        self.switched = getattr(self, "switched", 0) + 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [FrozenNorm, Merging, Counting])
def test_the_same_outputs_are_no_matter(kind):
    net = kind().train()
    before = state(net)
    inverter = HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, (X, Y))
    still = copy.deepcopy(net)
    for child in still.modules():
        child.training = False
    np.testing.assert_allclose(inverter.curvature_.to_dense(), hessian(still)[1], rtol=0, atol=1e-12)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_hook_over_the_users_own_moves_nothing():
    net = FrozenNorm()
    net.outer = nn.BatchNorm1d(3, dtype=D)
    net.outer.temperature = Temperature()
    net.train()
    net.register_forward_hook(lambda module, args, result: net.outer(result))
    before = state(net)
    with pytest.warns(UserWarning, match=r"whose outer\.temperature\.temperature they .* a use of your own"):
        HessianInverter("direct", 30.0, loss="cross_entropy", params="first.*").fit(net, (X, Y))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_cannot_be_copied_is_told_of():
    net = Temperature().train()
    net.lock = threading.Lock()
    with pytest.warns(UserWarning, match=r"cannot be copied to see.*`model\.eval\(\)`") as told:
        HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, (X, Y))
    assert len(told) == 1 and told[0].filename == __file__
    HessianInverter("direct", 30.0, loss="cross_entropy").fit(net.eval(), (X, Y))


def test_a_function_on_the_object_itself_is_never_called():
    net = Temperature().train()
    net.train = lambda mode=True: CALLED.append(mode)
    CALLED.clear()
    HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, (X, Y))
    assert not CALLED
