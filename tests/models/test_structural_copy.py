"""Whatever is bound to the user's module is bound to the copy: the same curvature and rows as the plain module's."""

import array
import copy
import functools
import random
import types
import weakref
from collections import UserDict, deque, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import sklearn
import torch
import torch.nn.functional as F
from oracles import Oracle, matrix_error, oracle_matrix
from problems import problem
from torch import nn
from torch.export import Dim, export

from skinvert import HessianInverter, PerSampleGradient
from skinvert.models.structural_copy import structural_copy

Pair = namedtuple("Pair", "module other")


@dataclass(frozen=True)
class Frozen:
    module: nn.Module


@dataclass(slots=True)
class Slotted:
    module: nn.Module


class Meter:
    """An object that holds nothing of the model."""


class Wrapper:
    """A forward pass in an object, as accelerate's `convert_outputs_to_fp32` has it."""

    def __init__(self, function):
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args):
        return self.function(*args)


# -- replaced forward passes ---------------------------------------------------------------------------------------


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


def compiled_child(net):
    net[0] = torch.compile(net[0], backend="eager")
    return net


def compiled_forward(net):
    net[2].forward = torch.compile(net[2].forward, backend="eager")
    return net


def own_forward(net):
    net.forward = net.forward
    return net


def closure_over_forward(net):
    old = net.forward

    def forward(x):
        return old(x)

    net.forward = functools.update_wrapper(forward, old)
    return net


def lambda_over_modules(net):
    net.forward = lambda x: net[2](net[1](net[0](x)))
    return net


def default_argument(net):
    def forward(x, *, body=tuple(net)):
        for module in body:
            x = module(x)
        return x

    net.forward = forward
    return net


def hooked_as_accelerate(net):
    def new_forward(module, *args, **kwargs):
        return module._old_forward(*args, **kwargs)

    for module in (net[2], net):
        module._old_forward = module.forward
        module.forward = functools.update_wrapper(functools.partial(new_forward, module), module.forward)
    return net


def prepared_as_accelerate(net):
    wrapped = Wrapper(net.forward.__func__)

    def forward(*args):
        return wrapped(*args)

    forward.__wrapped__ = wrapped
    net.forward = types.MethodType(forward, net)
    return net


def traced(net):
    return torch.fx.symbolic_trace(net)


def exported(net):
    X = torch.randn(12, 4, dtype=torch.float64)
    return export(net.eval(), (X,), dynamic_shapes=({0: Dim("rows")},)).module()


def child_in_data_parallel(net):
    return nn.Sequential(nn.Identity(), nn.DataParallel(net))


def child_scripted(net):
    net[0] = torch.jit.script(net[0])
    return net


FORWARDS = [
    lambda net: torch.compile(net, backend="eager"),
    nn.DataParallel,
    compiled_in_place,
    compiled_child,
    compiled_forward,
    own_forward,
    closure_over_forward,
    lambda_over_modules,
    default_argument,
    hooked_as_accelerate,
    prepared_as_accelerate,
    traced,
    exported,
    torch.jit.script,
    child_in_data_parallel,
    child_scripted,
]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrap", FORWARDS, ids=lambda wrap: wrap.__name__)
def test_replaced_forward(wrap):
    case = problem("mlp", "cross_entropy")
    net = wrap(copy.deepcopy(case.module))
    check(net, case)


# -- modules and parameters where no `named_parameters` looks ------------------------------------------------------


class Held(nn.Module):
    """An MLP that reaches its layers by ways of its own."""

    def __init__(self, net, hold):
        super().__init__()
        self.first, self.last = net[0], net[2]
        self.layers = hold(self)

    def forward(self, x):
        first, last = self.layers()
        return last(first(x).tanh())


def in_list(net):
    held = [[net.first], {"last": net.last}]
    net.held = held
    return lambda: (net.held[0][0], net.held[1]["last"])


def in_deque(net):
    net.held = deque([net.first, net.last], maxlen=2)
    return net.held.copy


def in_namedtuple(net):
    net.held = Pair(net.first, (net.last,))
    return lambda: (net.held.module, net.held.other[0])


def in_set(net):
    net.held = ({net.first}, frozenset([net.last]))
    return lambda: [next(iter(part)) for part in net.held]


def in_objects(net):
    net.held = (Frozen(net.first), Slotted(types.SimpleNamespace(module=net.last)))
    return lambda: (net.held[0].module, net.held[1].module.module)


def in_weak_references(net):
    first, last = weakref.ref(net.first), weakref.proxy(net.last)
    return lambda: (first(), last)


def parameters_in_list(net):
    net.held = [net.first.weight, net.first.bias, net.last.weight, net.last.bias]
    return lambda: [functools.partial(F.linear, weight=w, bias=b) for w, b in (net.held[:2], net.held[2:])]


def in_partials(net):
    first = functools.partial(F.linear, weight=net.first.weight, bias=net.first.bias)
    last = functools.partial(F.linear, weight=net.last.weight, bias=net.last.bias)
    return lambda: (first, last)


def tensor_methods(net):
    first, last = net.first.weight.t, net.last.weight.t
    return lambda: (lambda x: x @ first() + net.first.bias, lambda x: x @ last() + net.last.bias)


HOLDERS = [
    in_list,
    in_deque,
    in_namedtuple,
    in_set,
    in_objects,
    in_weak_references,
    parameters_in_list,
    in_partials,
    tensor_methods,
]


@pytest.mark.parametrize("hold", HOLDERS, ids=lambda hold: hold.__name__)
def test_held_elsewhere(hold):
    case = problem("mlp", "cross_entropy")
    check(Held(copy.deepcopy(case.module), hold), case)


def test_hooks_over_the_original():
    case = problem("mlp", "cross_entropy")
    net = copy.deepcopy(case.module)
    hooked = copy.deepcopy(case.module)
    hooked[0].register_forward_hook(lambda module, args, result: result * hooked[2].bias.sum())
    hooked.register_forward_pre_hook(lambda module, args: (args[0] + hooked[0].bias.mean(),))

    def by_hand(x):
        return net[2](torch.tanh(net[0](x + net[0].bias.mean()) * net[2].bias.sum()))

    params = list(net.parameters())
    gradient = flat_gradient(F.cross_entropy(by_hand(case.X), case.y), params)
    H = np.stack([flat_gradient(g, params, False).numpy() for g in gradient])
    inverter = HessianInverter("direct", 30.0, loss="cross_entropy").fit(hooked, case.data)
    assert matrix_error(inverter.curvature_.to_dense(), H) <= 1e-12


def flat_gradient(value, params, create_graph=True):
    parts = torch.autograd.grad(value, params, create_graph=create_graph, retain_graph=True)
    return torch.cat([part.reshape(-1) for part in parts])


def check(net, case):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for curvature in ("hessian", "ggn"):
        inverter = HessianInverter("direct", 30.0, loss="cross_entropy", curvature=curvature, batch_size=5)
        received = inverter.fit(net, case.data).curvature_.to_dense()
        assert matrix_error(received, oracle_matrix(case, curvature)) <= 1e-12
    rows = PerSampleGradient(net, loss="cross_entropy").fit_transform(*case.data)
    np.testing.assert_allclose(rows, Oracle(case).gradient_rows(), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# -- the parts of the copy -----------------------------------------------------------------------------------------


def test_names_of_a_compiled_module_are_the_originals():
    case = problem("mlp", "cross_entropy")
    inverter = HessianInverter("direct", 30.0, loss="cross_entropy")
    inverter.fit(torch.compile(case.module, backend="eager"), case.data)
    assert inverter.parameter_names_ == [name for name, _ in case.module.named_parameters()]


def test_running_statistics_do_not_move():
    case = problem("batchnorm_dropout", "cross_entropy")
    net = own_forward(copy.deepcopy(case.module)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, case.data)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_cycle_and_what_holds_nothing():
    net, plain, config = nn.Linear(2, 1), types.SimpleNamespace(name="plain"), Meter()
    net.config, net.owner, net.plain = config, types.SimpleNamespace(net=net, again=[]), plain
    net.owner.again.append(net.owner)
    duplicate = structural_copy(net)
    assert duplicate.owner.net is duplicate and duplicate.owner.again[0] is duplicate.owner
    assert duplicate.owner is not net.owner and duplicate.config is config
    assert duplicate.plain == plain and duplicate.plain is not plain


class Counting(nn.Linear):
    """Counts and draws in whatever there is."""

    def __init__(self):
        super().__init__(4, 3)
        self.load, self.loads, self.seen, self.raw = np.zeros(3), [np.zeros(3)], {0}, bytearray(1)
        self.ints, self.stats, self.table = array.array("i", [0]), types.SimpleNamespace(calls=0), UserDict(calls=0)
        self.torch_draws = torch.Generator().manual_seed(0)
        self.draws, self.numpy_draws, self.old_draws = (
            random.Random(0),
            np.random.default_rng(0),
            np.random.RandomState(0),
        )
        self.add, self.draw = self.seen.add, self.numpy_draws.random

    def state(self):
        draws = (self.draws.getstate(), self.numpy_draws.bit_generator.state, self.old_draws.get_state()[2])
        counts = (self.load.tolist(), self.loads[0].tolist(), set(self.seen), bytes(self.raw), self.ints.tolist())
        return counts, self.stats.calls, dict(self.table), self.torch_draws.get_state().tolist(), draws

    def forward(self, x):
        self.load += 1
        self.loads[0][:] += 1
        self.add(len(self.seen))
        self.raw.append(0)
        self.ints[0] += 1
        self.stats.calls += 1
        self.table["calls"] += 1
        torch.rand(1, generator=self.torch_draws)
        self.draws.random(), self.draw(), self.old_draws.rand()
        return super().forward(x)


def test_what_a_forward_pass_counts_in_or_draws_from_stays():
    net, (X, y) = Counting(), (torch.randn(12, 4), torch.randint(3, (12,)))
    before = copy.deepcopy(net.state())
    HessianInverter("direct", 30.0, loss="cross_entropy", batch_size=5).fit(net, (X, y)).transform(torch.ones(1, 15))
    PerSampleGradient(net, loss="cross_entropy").fit_transform(X, y)
    assert net.state() == before
    duplicate = structural_copy(net)
    assert duplicate.state() == before
    duplicate.double()(X.double())
    assert net.state() == before and len(duplicate.seen) == 2


@pytest.mark.parametrize("memory", [1e-6, 1024])
def test_large_arrays_and_files_are_shared(memory, tmp_path):
    net = nn.Linear(2, 1)
    net.table, net.mapped = np.ones(3), np.memmap(tmp_path / "table", float, "w+", shape=3)
    with sklearn.config_context(working_memory=memory):
        duplicate = structural_copy(net)
    assert (duplicate.table is net.table) == (memory < 1) and duplicate.mapped is net.mapped


def test_functions_share_their_variables():
    net, calls = nn.Linear(2, 1), 0

    def count():
        nonlocal calls
        calls += 1
        return net

    def counted():
        return calls, net

    net.count, net.counted = count, counted
    duplicate = structural_copy(net)
    duplicate.count()
    assert duplicate.counted() == (1, duplicate) and net.counted() == (0, net)


def test_lazy_layers_are_refused():
    net = nn.Sequential(nn.LazyLinear(3), nn.Tanh())
    with pytest.raises(ValueError, match=r"'0\.weight' .* must be initialised"):
        HessianInverter("direct", 30.0, loss="mse").fit(net, (torch.randn(4, 2), torch.randn(4, 3)))


# -- what is asked of a parameter beside its values ------------------------------------------------------------------


class Tagged(nn.Parameter):
    """A parameter of a class of its own, with a constructor of its own."""

    def __new__(cls, data, mult):
        made = super().__new__(cls, data)
        made.mult = mult
        return made


class Marked(torch.Tensor):
    """A class that knows no `nn.Parameter`."""


class Scaled(nn.Linear):
    """The multiplier of muP lies on the weight, as a number or in a tensor, and counts for some classes alone."""

    def forward(self, x):
        scaled = isinstance(self.weight, self.kind) and isinstance(self.weight, nn.Parameter)
        return super().forward(x) * (self.weight.mult if scaled else 1.0)


def with_number(layer):
    layer.kind, layer.weight.mult = nn.Parameter, 0.1


def with_tensor(layer):
    layer.kind, layer.weight.mult = nn.Parameter, torch.tensor(0.1, dtype=torch.float64)


def with_owner(layer):
    layer.kind, layer.weight.mult, layer.weight.owner = nn.Parameter, 0.1, layer


def with_class(layer):
    layer.kind, layer.weight = Tagged, Tagged(layer.weight.data, 0.1)


def with_tensor_class(layer):
    layer.kind, layer.weight = Marked, nn.Parameter(layer.weight.data.as_subclass(Marked))
    layer.weight.mult = 0.1


MARKS = [with_number, with_tensor, with_owner, with_class, with_tensor_class]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: mark.__name__)
def test_marks_on_parameters(mark, frozen):
    case = problem("mlp", "cross_entropy")
    net = copy.deepcopy(case.module)
    scaled = Scaled(net[2].in_features, net[2].out_features).double()
    scaled.load_state_dict(net[2].state_dict())
    net[2] = scaled
    mark(scaled)
    net[2].requires_grad_(not frozen)
    params = [tensor for tensor in net.parameters() if tensor.requires_grad]

    def by_hand(x):
        return case.module[2](torch.tanh(net[0](x))) * 0.1 if frozen else net(x)

    gradient = flat_gradient(F.cross_entropy(by_hand(case.X), case.y), params)
    H = np.stack([flat_gradient(g, params, False).numpy() for g in gradient])
    inverter = HessianInverter("direct", 30.0, loss="cross_entropy").fit(net, case.data)
    assert matrix_error(inverter.curvature_.to_dense(), H) <= 1e-12
    rows = PerSampleGradient(net, loss="cross_entropy").fit_transform(*case.data)
    np.testing.assert_allclose(np.asarray(rows).mean(0), gradient.detach().numpy(), rtol=1e-9, atol=1e-12)


def test_a_mark_that_leads_to_the_module_leads_to_the_copy():
    net, found = nn.Linear(2, 1), {}
    net.weight.owner = [net]
    duplicate = structural_copy(net, lambda tensor: nn.Parameter(tensor.detach().clone()), found)
    assert duplicate.weight.owner == [duplicate] and net.weight.owner == [net]


class Unwrapping(torch.Tensor):
    """A tensor whose operations give plain ones."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [arg.inner if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def test_a_class_that_no_copy_can_be_of_is_refused():
    net, weight = nn.Linear(2, 1), Unwrapping(torch.ones(1, 2))
    weight._is_param = True
    net._parameters["weight"] = weight
    with pytest.raises(ValueError, match=r"parameter weight must be of a class.*Got Unwrapping.*nn\.Parameter"):
        HessianInverter("direct", 30.0, loss="mse", params="*").fit(net, (torch.randn(4, 2), torch.randn(4, 1)))


# -- tensors in attributes -----------------------------------------------------------------------------------------


class Attributes(nn.Module):
    """Constants of a kind that `Module.to` does not move."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.prototypes = torch.randn(5, 3)
        self.scales = {"in": [torch.randn(4)]}

    def forward(self, x):
        return torch.tanh(self.inner(x * self.scales["in"][0])) @ self.prototypes


def test_plain_tensors_follow_the_dtype():
    net, X, y = Attributes(), torch.randn(12, 4), torch.randint(3, (12,))
    received = HessianInverter("direct", 30.0, loss="cross_entropy", dtype="float64").fit(net, (X, y))
    exact = copy.deepcopy(net).double()
    exact.prototypes, exact.scales = net.prototypes.double(), {"in": [net.scales["in"][0].double()]}
    params = list(exact.parameters())
    gradient = flat_gradient(F.cross_entropy(exact(X.double()), y), params)
    H = np.stack([flat_gradient(g, params, False).numpy() for g in gradient])
    assert matrix_error(received.curvature_.to_dense(), H) <= 1e-12
    assert net.prototypes.dtype == torch.float32


class Sparse(nn.Module):
    """A graph convolution: a sparse adjacency of the columns."""

    def __init__(self, layout):
        super().__init__()
        self.inner = nn.Linear(4, 5)
        with torch.sparse.check_sparse_tensor_invariants(False):
            self.register_buffer("adjacency", (torch.rand(3, 5) < 0.5).float().to_sparse(layout=layout))

    def forward(self, x):
        return torch.sparse.mm(self.adjacency, torch.tanh(self.inner(x)).mT).mT


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_sparse_buffers(layout, curvature):
    net, X, y = Sparse(layout), torch.randn(12, 4), torch.randint(3, (12,))
    dense = nn.Sequential(net.inner, nn.Tanh(), nn.Linear(5, 3, bias=False).requires_grad_(False))
    dense[2].weight.copy_(net.adjacency.to_dense())
    settings = {"loss": "cross_entropy", "curvature": curvature, "dtype": "float64"}
    received = HessianInverter("direct", 30.0, **settings).fit(net, (X, y)).curvature_.to_dense()
    expected = HessianInverter("direct", 30.0, **settings).fit(dense, (X, y)).curvature_.to_dense()
    assert matrix_error(received, expected.numpy()) <= 1e-12
