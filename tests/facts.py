"""Which methods of the registry have a property: told by their classes and their inverses, never by a name."""

from functools import cache

import torch
from sklearn.base import clone
from torch import nn

from skinvert import HessianInverter
from skinvert.curvature import Gram, faces_of
from skinvert.methods.base import Method
from skinvert.testing import registered_methods

TIGHT = registered_methods()
KINDS = {name: type(method) for name, method in TIGHT.items()}
EVERY = list(KINDS)
# A solve walks the data; what the method keeps is not enough.
ITERATIVE = [name for name, kind in KINDS.items() if kind.keeps_operator]
# Exact to fewer digits: more would take them long.
LOOSE = [name for name, kind in KINDS.items() if kind.accuracy > 1e-8]
# An interrupted fit goes on from its checkpoint.
RESUMING = [name for name, kind in KINDS.items() if kind.resumes]
# Others do their work.
CHOOSING = [name for name, kind in KINDS.items() if kind.choose is not Method.choose]
# A positive semi-definite curvature that the method takes.
SEMIDEFINITE = {
    name: "ggn" if kind.default_curvature == "hessian" else kind.default_curvature for name, kind in KINDS.items()
}


def serving(faces):
    """Return the methods that need no other faces of an operator than these."""
    return [name for name, kind in KINDS.items() if set(kind.requires) <= faces]


def accepting(curvature):
    return serving(faces_of(curvature))


LAYERED = [name for name, kind in KINDS.items() if "kronecker_factors" in kind.requires]
ON_ROWS = serving(Gram.faces)


@cache
def is_approximate(name):
    """Return whether the method inverts another operator than A + λI at the tightest of its settings."""
    net, data = nn.Linear(2, 1).double(), (torch.eye(2).double(), torch.ones(2, 1).double())
    inverter = HessianInverter(TIGHT[name], 1.0, curvature=SEMIDEFINITE[name], loss="mse").fit(net, data)
    return inverter.inverse_.approximate


EXACT = [name for name in EVERY if not is_approximate(name)]
APPROXIMATE = [name for name in EVERY if is_approximate(name)]
PRECISE = [name for name in EXACT if name not in LOOSE]
FACTORISING = [name for name in PRECISE if name not in ITERATIVE]


def having(setting, names=PRECISE):
    """Return the methods with a setting of this name."""
    return [name for name in names if setting in TIGHT[name].get_params(deep=False)]


def at_rest(name):
    """Return the method with tight settings, but a tolerance that float32 reaches too: that of its dtype."""
    method = clone(TIGHT[name])
    return method.set_params(rtol=None) if name in having("rtol") else method


def matrix_of(net, data, loss, curvature, **settings):
    """Return a curvature as an array (p, p), and itself."""
    inverter = HessianInverter("direct", 1.0, curvature=curvature, loss=loss, **settings).fit(net, data)
    return inverter.curvature_.to_dense().numpy(), inverter.curvature_
