"""A forward pass that knows its modules by a global is told of: the copy's are others."""

import functools
import warnings

import pytest
import torch
from torch import nn

from skinvert import HessianInverter, PerSampleGradient

X, Y = torch.linspace(-1, 2, 48).sin().reshape(12, 4), torch.arange(12) % 3
ABLATED: list[nn.Module] = []
SCALES: dict[object, float] = {}
ONE: nn.Module | None = None
OTHER = nn.Linear(4, 4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        # What only a constructor names is no part of a forward pass.
        ABLATED.clear()

    def forward(self, x):
        return torch.tanh(self.layer(x)) * self.scale()

    def scale(self):
        return 1.0


class ByIdentity(Block):
    def forward(self, x):
        return super().forward(x) * (0.0 if self is ONE else 1.0)


class InAMethod(Block):
    def scale(self):
        return 0.0 if any(self is module for module in ABLATED) else 1.0


class InAFunction(Block):
    def scale(self):
        return looked_up(self)


def looked_up(module):
    return (lambda: SCALES.get(module, 1.0))()


def by_hook(module, args, result):
    return result * SCALES.get(module, 1.0)


def by_number(scale, module, args, result):
    return result * SCALES.get(id(module), scale)


class Hook:
    def __call__(self, module, args, result):
        return by_hook(module, args, result)


def hooked(hook):
    block = Block()
    block.register_forward_hook(hook)
    return block


CASES = {
    "identity": (ByIdentity, "ONE"),
    "method": (InAMethod, "ABLATED"),
    "function": (InAFunction, "SCALES"),
    "hook": (lambda: hooked(by_hook), "SCALES"),
    "partial": (lambda: hooked(functools.partial(by_number, 1.0)), "SCALES"),
    "object": (lambda: hooked(Hook()), "SCALES"),
}


@pytest.fixture
def tell():
    def know(block):
        global ONE
        ONE = block
        ABLATED.append(block)
        SCALES.update({block: 0.0, id(block): 0.0})

    yield know
    globals()["ONE"] = None
    ABLATED.clear()
    SCALES.clear()


@pytest.mark.parametrize("name", CASES)
def test_what_knows_a_module_by_a_global_is_told_of(name, tell):
    make, what = CASES[name]
    net = nn.Sequential(make(), make(), nn.Linear(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, (X, Y))
    tell(net[1])
    told = rf"a global '{what}' that is, or holds, the module '1', which its copy is not.* on the module itself"
    with pytest.warns(UserWarning, match=told) as caught:
        HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, (X, Y))
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match=told):
        PerSampleGradient(net, loss="cross_entropy").fit_transform(X, Y)


class Attribute(Block):
    """Has an attribute by the name of a global, and uses a module that is none of the model's."""

    def __init__(self):
        super().__init__()
        self.ONE = self.layer

    def forward(self, x):
        return torch.tanh(self.ONE(x)) + OTHER(x).detach()


def test_other_names_are_no_matter(tell, recwarn):
    net = nn.Sequential(Attribute(), nn.Linear(4, 3))
    tell(net[0])
    HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, (X, Y))
    assert not recwarn.list
