"""What several processes call together, and what goes wrong on one of them: functions of (rank, size)."""

import copy
import os
import pickle
import re
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import sklearn
import torch
import torch.distributed as dist
from problems import problem
from shared_fits import PROBLEM, SHIFT, bounds, known, share
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from skinvert import (
    HessianInverter,
    InfluenceFunction,
    InversionRegistry,
    TorchTwiceDifferentiable,
    TwiceDifferentiable,
)
from skinvert.methods import EKFAC, KFAC, Direct, LiSSA

CASE = problem(*PROBLEM)
B = CASE.right_hand_sides(3)


def group_of(size):
    return None if size == 1 else "world"


def inverter(method="direct", **settings):
    own = {"hessian_perturbation": SHIFT, "process_group": "world", **settings}
    return HessianInverter(method, **{**CASE.settings(), **own})


def fitted(rank, size, method="direct", kind="ragged", **settings):
    X, y, weights = share(kind, rank, size, CASE.X, CASE.y, CASE.sample_weight)
    return inverter(method, **settings).fit(CASE.module, (X, y), weights)


def of_one(method="direct", **settings):
    return inverter(method, process_group=None, **settings).fit(CASE.module, CASE.data, CASE.sample_weight)


PAGE = Path(__file__).parents[1] / "docs" / "howto" / "distributed.md"


def the_page(rank, size):
    """Run the page on several processes as each process that torchrun starts does."""
    exec(compile(script_of(PAGE.read_text(encoding="utf-8")), str(PAGE), "exec"), {"__name__": "__main__"})


def script_of(text):
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))


# -- what is called after a fit ------------------------------------------------------------------------------------


def answers(own, b=B):
    """Return what else an inverter answers."""
    x = own.transform(b)
    quadratic = own.quadratic(b)
    assert np.isfinite(quadratic.bounds).all() or own.curvature_name_ == "hessian"
    return {
        "path": own.path(b, [0.7, SHIFT, 3.0]),
        "residual": own.residual(b, x + 0.1),
        "inverse_transform": own.inverse_transform(x),
        "spectrum": own.spectrum().smallest,
        "quadratic": quadratic.values,
        "operator": own.aslinearoperator() @ b[0],
        "score": own.score(CASE.X[:7], CASE.y[:7]),
        "matrix": own.curvature_.to_dense(),
        "diagonal": own.curvature_.diagonal(),
        "product": own.curvature_.apply(torch.from_numpy(b)),
    }


def answers_of(rank, size, method, **settings):
    return answers(fitted(rank, size, method, **settings))


def posterior(own):
    """Return what the Gaussian with H + λI as its precision says."""
    return {
        "covariance": own.covariance(),
        "sandwich": own.covariance(kind="sandwich"),
        "evidence": own.log_evidence(),
        "variance": own.predictive_variance(CASE.X[:4]),
    }


def posterior_of(rank, size, curvature):
    return posterior(fitted(rank, size, "direct", curvature=curvature))


def in_float32(rank, size):
    """A float32 fit whose bounds are of products in float64, of the rows of all ranks."""
    net, (X, y) = copy.deepcopy(CASE.module).float(), (CASE.X.float(), CASE.y)
    own = HessianInverter("cg", SHIFT, loss="cross_entropy", curvature="ggn", process_group=group_of(size))
    own.fit(net, (X, y) if size == 1 else share("ragged", rank, size, X, y))
    forms = own.quadratic(B)
    return forms.values, forms.bounds


def differentiated(rank, size):
    """The gradient of a solution by its right-hand side: a solve of all ranks too."""
    b = torch.from_numpy(B).requires_grad_(True)
    own = of_one("cg", curvature="ggn") if size == 1 else fitted(rank, size, "cg", curvature="ggn")
    own.transform(b).sum().backward()
    return b.grad.numpy()


def talkative(rank, size):
    """One rank says what it does."""
    own = fitted(rank, size, "auto", verbose=1 - rank, hessian_perturbation="1 rel", curvature="ggn")
    return own.transform(B)


def unequal_memory(rank, size):
    """What ``auto`` chooses where one rank has no room for a matrix."""
    with patch("skinvert.curvature.sharded.available_memory", lambda device: 2**10 if rank else 2**40):
        return repr(fitted(rank, size, "auto", curvature="ggn").method_)


def wide_trace(rank, size):
    """The trace of a Hessian whose diagonal is dear: by random rows, the same ones."""
    torch.manual_seed(0)
    net, X = nn.Sequential(nn.Linear(40, 26), nn.Tanh(), nn.Linear(26, 2)).double(), torch.randn(12, 40).double()
    data = (X, X[:, :2])
    own = HessianInverter("diagonal", "1 rel", loss="mse", weight_decay=2.0, process_group=group_of(size))
    return own.fit(net, data if size == 1 else share("ragged", rank, size, *data)).hessian_perturbation_


def pickled(rank, size):
    """Solutions of pickles: a factorisation serves alone, what iterates finds the group again."""
    found = []
    for method in ("direct", "cg"):
        own = fitted(rank, size, method)
        found.append(pickle.loads(pickle.dumps(own)).transform(B))
        found.append(copy.deepcopy(own).transform(B))
        assert clone(own).process_group == "world"
    return found


def subgroup(rank, size):
    """A fit by a group that is given as it is, and what pickles and clones make of it."""
    group = dist.new_group(list(range(size)))
    own = fitted(rank, size, "direct", process_group=group)
    assert clone(own).process_group is group
    again = pickle.loads(pickle.dumps(own))
    return own.transform(B), again.transform(B), repr(again.process_group)


def not_a_member(rank, size):
    group = dist.new_group([size - 1])
    return fitted(rank, size, process_group=group) if rank == 0 else None


# -- models ----------------------------------------------------------------------------------------------------------


def in_ddp(rank, size):
    """A model as it is trained by several processes."""
    wrapped = DistributedDataParallel(copy.deepcopy(CASE.module))
    X, y, weights = share("ragged", rank, size, CASE.X, CASE.y, CASE.sample_weight)
    own = inverter("ekfac", curvature="ggn").fit(wrapped, (X, y), weights)
    return own.transform(B), own.parameter_names_


def scikit(rank, size, kind):
    """Models whose objective depends on the totals of the fit."""
    X, y = CASE.X.numpy(), CASE.y.numpy()
    models = [
        LogisticRegression(class_weight="balanced", max_iter=500).fit(X, y, CASE.sample_weight),
        Ridge(alpha=2.0).fit(X, y, CASE.sample_weight),
    ]
    found = []
    for model in models:
        own = HessianInverter("direct", 0.1, process_group=group_of(size))
        parts = (X, y, CASE.sample_weight) if size == 1 else share(kind, rank, size, X, y, CASE.sample_weight)
        found.append(own.fit(model, parts[:2], sample_weight=parts[2]).curvature_.to_dense())
    return found


def plain_rows(rank, size, method, kind):
    rows = np.random.default_rng(0).standard_normal((23, 5))
    own = HessianInverter(method, 0.1, process_group=group_of(size))
    parts = (rows, CASE.sample_weight) if size == 1 else share(kind, rank, size, rows, CASE.sample_weight)
    own.fit(parts[0], sample_weight=parts[1])
    return own.transform(rows[:3]), own.n_samples_, own.curvature_.to_dense()


class Abstract(TwiceDifferentiable):
    """Of its abstract members alone."""

    def __init__(self):
        self.inner = TorchTwiceDifferentiable(CASE.module, "cross_entropy")

    num_params = property(lambda self: self.inner.num_params)
    parameters = property(lambda self: self.inner.parameters)

    def grad(self, x, y, create_graph=False):
        return self.inner.grad(x, y, create_graph)

    def hessian(self, x, y):
        return self.inner.hessian(x, y)

    mvp = staticmethod(TorchTwiceDifferentiable.mvp)
    tensor_type = classmethod(lambda cls: torch.Tensor)


class OwnLoss(nn.Module):
    """Gives its own loss of labels, as Hugging Face's models do: which one, the data tell."""

    def __init__(self):
        super().__init__()
        self.inner = copy.deepcopy(CASE.module)

    def forward(self, x, labels=None):
        logits = self.inner(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def own_loss(rank, size):
    ends = bounds("empty", size, 8) if size > 1 else [0, 8]
    batches = [{"x": CASE.X[i : i + 2], "labels": CASE.y[i : i + 2]} for i in range(ends[rank], ends[rank + 1], 2)]
    own = HessianInverter("kfac", SHIFT, process_group=group_of(size))
    return known(own.fit(OwnLoss(), batches), B)


def abstract(rank, size, kind="empty"):
    own = HessianInverter("cg", SHIFT, process_group=group_of(size))
    data = CASE.data if size == 1 else share(kind, rank, size, *CASE.data)
    return known(own.fit(Abstract(), data), B)


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.out(self.table(tokens).sum(1).tanh())


def one_token_each(rank, size):
    """Kronecker factors of an Embedding, which are a diagonal where each row has one token: on rank 0 alone."""
    torch.manual_seed(0)
    net, tokens, y = Sequences().double(), torch.randint(5, (8, 3)), torch.arange(8) % 2
    batches = [(tokens[:3, :1], y[:3]), (tokens[3:], y[3:])]
    own = HessianInverter(KFAC(approx="reduce"), SHIFT, loss="cross_entropy", process_group=group_of(size))
    return own.fit(net, batches if size == 1 else batches[rank : rank + 1]).transform(np.eye(23))


class Branching(nn.Module):
    """Uses a layer's weights behind its back where a batch says so."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.first(x).tanh()
        odd = x[:, :1] > 50
        return self.out(torch.where(odd, hidden @ self.first.weight, hidden))


def layers_that_differ(rank, size):
    torch.manual_seed(0)
    net, X = Branching().double(), CASE.X.clone()
    if rank == 1:
        X[-1, 0] = 100.0
    method = EKFAC(unsupported="diagonal")
    own = HessianInverter(method, SHIFT, loss="cross_entropy", batch_size=4, process_group="world")
    return own.fit(net, share("ragged", rank, size, X, CASE.y))


# -- data ------------------------------------------------------------------------------------------------------------


def loader(data, size, rank, **settings):
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, size, rank, **settings))


def little_memory(rank, size, method):
    """A fit that keeps neither data nor graphs."""
    with sklearn.config_context(working_memory=1e-3):
        return known(fitted(rank, size, method, batch_size=3), B)


def other_memory(rank, size):
    with sklearn.config_context(working_memory=512 * (1 + rank)):
        return fitted(rank, size, "cg")


def all_the_data(rank, size):
    return inverter().fit(CASE.module, CASE.data).n_samples_


def sampler_alone(rank, size):
    return inverter(process_group=None).fit(CASE.module, loader(TensorDataset(*CASE.data), size, rank))


def sampler_of_another(rank, size):
    return inverter().fit(CASE.module, loader(TensorDataset(*CASE.data), size, 0))


def sampler_of_more(rank, size):
    return inverter().fit(CASE.module, loader(TensorDataset(*CASE.data), size + 1, rank))


class Own(DistributedSampler):
    pass


def sampler_of_ones_own(rank, size):
    data = TensorDataset(*CASE.data)
    return inverter().fit(CASE.module, DataLoader(data, batch_size=4, sampler=Own(data, size, rank)))


def sampler_of_batches(rank, size):
    data = TensorDataset(*CASE.data)
    return inverter().fit(CASE.module, DataLoader(data, batch_size=None, sampler=DistributedSampler(data, size, rank)))


def sampler_and_weights(rank, size):
    data = TensorDataset(*CASE.data)
    return inverter().fit(CASE.module, loader(data, size, rank), sample_weight=np.ones(12 - rank))


def data_sets_that_differ(rank, size):
    return inverter().fit(CASE.module, loader(TensorDataset(*(part[rank:] for part in CASE.data)), size, rank))


def mixed_forms(rank, size):
    data = loader(TensorDataset(*CASE.data), size, rank) if rank == 0 else CASE.data
    return inverter().fit(CASE.module, data)


# -- faults ----------------------------------------------------------------------------------------------------------


def no_rows(rank, size):
    return inverter().fit(CASE.module, (CASE.X[:0], CASE.y[:0]))


def no_weights(rank, size):
    X, y = share("ragged", rank, size, *CASE.data)
    return inverter().fit(CASE.module, (X, y), np.zeros(len(X)))


def with_nan(rank, size):
    X = CASE.X.clone()
    X[-1, 0] = torch.nan
    return inverter("cg").fit(CASE.module, share("ragged", rank, size, X, CASE.y))


def without_data(rank, size):
    return inverter().fit(CASE.module, CASE.data if rank else None)


def no_model(rank, size):
    return inverter("direct" if rank else "no_such_method").fit(CASE.module, CASE.data)


class Failing(Dataset):
    def __init__(self, rank, act):
        self.rank, self.act = rank, act

    def __len__(self):
        return 6 + self.rank

    def __getitem__(self, index):
        if self.rank == 1 and index == 3:
            self.act()
        return CASE.X[index], CASE.y[index]


def _missing():
    raise KeyError("a file of row 3")


def failing_data(rank, size):
    return inverter("direct").fit(CASE.module, Failing(rank, _missing))


def failing_assembly(rank, size):
    """No memory for a matrix on rank 0, found out within the sum of matrices."""
    own = fitted(rank, size, "cg")
    if rank == 0:
        own.curvature_.local.to_dense = _no_memory
    return own.curvature_.to_dense()


def _no_memory(verbose=0):
    raise MemoryError("no room for p × p")


def too_little_for_lissa(rank, size):
    """Draws from data that are too many on rank 0 alone."""
    rows = slice(0, 2) if rank else slice(2, None)
    with sklearn.config_context(working_memory=2e-4):
        return inverter(LiSSA(batch_size=4), batch_size=3).fit(CASE.module, (CASE.X[rows], CASE.y[rows]))


class Late(Direct):
    """Fails on rank 1 once all that is shared is done."""

    def invert(self, A, hessian_perturbation, verbose=0):
        inverse = super().invert(A, hessian_perturbation, verbose)
        if dist.get_rank() == 1:
            raise ArithmeticError("too late")
        return inverse


def failing_late(rank, size):
    return fitted(rank, size, Late())


def other_products(rank, size):
    return fitted(rank, size, "cg").curvature_.apply(torch.from_numpy(B + rank))


def other_rows(rank, size, method):
    return fitted(rank, size, method).transform(B + rank)


def other_path(rank, size):
    return fitted(rank, size, "cg").path(B, [1.0 + rank])


def other_shape(rank, size):
    return fitted(rank, size, "cg").transform(B[: 2 + rank])


def wrong_shape(rank, size):
    return fitted(rank, size, "cg").transform(B if rank else B[:, :-1])


def another_call(rank, size):
    own = fitted(rank, size, "cg")
    return own.transform(B) if rank else own.path(B, [1.0])


def one_alone(rank, size):
    """Factorisations are on every rank: each solves for rows of its own, or not at all."""
    alone = [fitted(rank, size, "direct"), fitted(rank, size, "kfac", curvature="ggn", check_residual=False)]
    return [own.transform(B) for own in alone] if rank == 0 else []


def other_parameter(rank, size):
    net = copy.deepcopy(CASE.module)
    with torch.no_grad():
        net[2].weight[0, 0] += rank * 1e-12
    return inverter().fit(net, share("ragged", rank, size, *CASE.data))


def other_buffer(rank, size):
    net = nn.Sequential(copy.deepcopy(CASE.module), nn.BatchNorm1d(3).double())
    net[1].running_mean += rank
    return inverter(params="0.*").fit(net, share("ragged", rank, size, *CASE.data))


def other_shift(rank, size):
    return fitted(rank, size, hessian_perturbation=1.0 + rank)


def other_method(rank, size):
    return fitted(rank, size, ["direct", "cg"][rank % 2])


def other_curvature(rank, size):
    return fitted(rank, size, curvature=["ggn", "hessian"][rank % 2])


def influence(rank, size):
    return InfluenceFunction(inverter()).fit(CASE.module, share("ragged", rank, size, *CASE.data))


def function(rank, size):
    """A method that is a function is given the data itself: those of one rank."""
    InversionRegistry.register(TwiceDifferentiable, "of_a_rank")(a_function)
    try:
        return fitted(rank, size, "of_a_rank")
    finally:
        del InversionRegistry.registry[TwiceDifferentiable, "of_a_rank"]


def a_function(model, training_data, b, hessian_perturbation=0.0):
    return b


def sharded_model(rank, size):
    # Whose import takes a second, in the test's own process too.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(copy.deepcopy(CASE.module), mesh=init_device_mesh("cpu", (size,)))
    return inverter().fit(net, share("ragged", rank, size, *CASE.data))


def wrapped_in_shards(rank, size):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(copy.deepcopy(CASE.module), device_id=torch.device("cpu"))
    return inverter().fit(net, share("ragged", rank, size, *CASE.data))


def one_does_not_come(rank, size):
    """A group with a short timeout, and a rank that is elsewhere."""
    group = dist.new_group(list(range(size)), timeout=timedelta(seconds=2))
    start = time.monotonic()
    if rank == 1:
        time.sleep(5)
        return None
    try:
        return fitted(rank, size, process_group=group)
    except RuntimeError as error:
        message = f"{error} after {time.monotonic() - start:.0f} seconds"
        raise RuntimeError(message) from error


def one_dies(rank, size):
    return inverter("direct").fit(CASE.module, Failing(rank, lambda: os._exit(3)))


# -- all of them, the last one last ----------------------------------------------------------------------------------

ANSWERS = [("direct", "ggn"), ("cg", "ggn"), ("ekfac", "ggn"), ("arnoldi", "ggn"), ("minres", "hessian")]
FAULTS = {
    call.__name__: call
    for call in (
        *(not_a_member, sampler_alone, sampler_of_another, sampler_of_more, sampler_of_ones_own, sampler_of_batches),
        *(sampler_and_weights, data_sets_that_differ, mixed_forms, no_rows, no_weights, with_nan, without_data),
        *(no_model, failing_data, failing_assembly, too_little_for_lissa, other_path, other_shape, wrong_shape),
        *(another_call, other_parameter, other_buffer, other_shift, other_method, other_curvature, other_memory),
        *(failing_late, other_products, influence, function, sharded_model, wrapped_in_shards, layers_that_differ),
    )
} | {f"other_rows-{method}": partial(other_rows, method=method) for method in ("cg", "kfac")}
CALLS = {
    **{f"answers-{m}-{c}": partial(answers_of, method=m, curvature=c) for m, c in ANSWERS},
    **{f"posterior-{c}": partial(posterior_of, curvature=c) for c in ("ggn", "sampled_fisher")},
    **{f"scikit-{kind}": partial(scikit, kind=kind) for kind in ("ragged", "empty")},
    **{f"rows-{m}-{k}": partial(plain_rows, method=m, kind=k) for m, k in (("direct", "empty"), ("lissa", "ragged"))},
    **{f"little_memory-{m}": partial(little_memory, method=m) for m in ("direct", "cg", "ekfac")},
    **{f"abstract-{kind}": partial(abstract, kind=kind) for kind in ("ragged", "empty")},
    **{call.__name__: call for call in (in_float32, wide_trace, pickled, subgroup, in_ddp, one_token_each)},
    **{call.__name__: call for call in (all_the_data, one_alone, own_loss, differentiated, talkative)},
    "unequal_memory": unequal_memory,
    "own_rows": partial(other_rows, method="direct"),
    **FAULTS,
    "after_the_faults": partial(plain_rows, method="cg", kind="ragged"),
    "one_does_not_come": one_does_not_come,
    "one_dies": one_dies,
}
