"""What several processes call together, and what goes wrong on one of them: functions of (rank, size)."""

import copy
import pickle
import re
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas
import polars
import scipy.sparse
import sklearn
import torch
import torch.distributed as dist
from problems import problem
from shared_fits import PROBLEM, SHIFT, bounds, known, share, short_sampler
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from skinvert import (
    HessianInverter,
    TorchTwiceDifferentiable,
    TwiceDifferentiable,
)
from skinvert._distributed import Ranks
from skinvert.methods import KFAC

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


def on_gpu(rank, size, method):
    """A fit on a GPU: gloo takes what is summed from the CPU."""
    net, (X, y) = copy.deepcopy(CASE.module).cuda(), (CASE.X.cuda(), CASE.y.cuda())
    own = inverter(method, curvature="ggn").fit(net, share("ragged", rank, size, X, y))
    return own.transform(B)


def by_hand(rank, size, device="cpu"):
    """What the ranks say to each other, of tensors of a device and of the CPU."""
    ranks = Ranks(dist.group.WORLD, rank, size, True)
    one = torch.ones(3, 2, dtype=torch.float64, device=device)
    sums = ranks.summed("a sum", lambda: [one + rank, torch.arange(2) + rank])
    rows = ranks.joined("rows", lambda: [rank * one[: 1 + rank], one[:0]])
    assert [part.device for part in (*sums, *rows)] == [one.device, torch.device("cpu"), one.device, one.device]
    told = ranks.gathered({"rank": rank}, "words")
    return [*(part.cpu().tolist() for part in (*sums, *rows)), told, ranks.least(5 + rank, "a number")]


def counted_rows(rank, size):
    """Return how many rows there are of what is joined, where one rank has none."""
    A = fitted(rank, size, "cg", kind="empty", curvature="empirical_fisher").curvature_
    rows, shares = A.gradient_rows()
    return A.factor_shape, tuple(A.factor().shape), tuple(rows.shape), len(shares), A.n_samples


def traffic(rank, size):
    """Return the bytes of each sum over the ranks: in a product, in fits, and in a solve of a factorisation."""
    sent, found, own = [], {}, dist.all_reduce

    def counted(tensor, *args):
        sent.append(tensor.nbytes)
        return own(tensor, *args)

    def taken():
        now, sent[:] = list(sent), []
        return now

    with patch("torch.distributed.all_reduce", counted):
        inverters = {name: fitted(rank, size, name, curvature="ggn") for name in ("cg", "direct")}
        taken()
        inverters["cg"].curvature_.apply(torch.from_numpy(B))
        found["product"] = taken()
        inverters["direct"].transform(B)
        found["solve"] = taken()
        for name in ("direct", "kfac", "diagonal"):
            fitted(rank, size, name, curvature="ggn")
            found[name] = taken()
    return found


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


# -- models ----------------------------------------------------------------------------------------------------------


def in_ddp(rank, size):
    """A model as it is trained by several processes."""
    wrapped = DistributedDataParallel(copy.deepcopy(CASE.module))
    X, y, weights = share("ragged", rank, size, CASE.X, CASE.y, CASE.sample_weight)
    own = inverter("ekfac", curvature="ggn").fit(wrapped, (X, y), weights)
    return own.transform(B), own.parameter_names_


class Holding(nn.Module):
    """A model one part of which is in DistributedDataParallel, with buffers that its forward pass would broadcast."""

    def __init__(self, wrap):
        super().__init__()
        self.body = wrap(nn.Sequential(copy.deepcopy(CASE.module), nn.BatchNorm1d(3).double()))

    def forward(self, x):
        return self.body(x)


def part_in_ddp(rank, size):
    """A part that waits for no other rank: they have batches of another number, and one fits alone."""
    X, y = CASE.data if size == 1 else share("ragged", rank, size, *CASE.data)
    net = Holding((lambda net: net) if size == 1 else DistributedDataParallel)
    own = inverter("cg", curvature="ggn", batch_size=2, process_group=group_of(size)).fit(net, (X, y))
    alone = None if rank else inverter("direct", curvature="ggn", process_group=None).fit(net, CASE.data)
    return own.solve(np.eye(49)[:2]).x, None if alone is None else alone.n_samples_


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


def empty_forms(rank, size):
    """One rank without rows, in each form that a model of scikit-learn reads, and plain ones beside a frame."""
    model, y = Ridge(alpha=2.0).fit(CASE.X, CASE.y), CASE.y.numpy()
    forms = (pandas.DataFrame(CASE.X.numpy()), scipy.sparse.csr_array(CASE.X.numpy()))
    pairs = [(X, y) for X in forms] + [(polars.DataFrame(CASE.X.numpy()), y.tolist())]
    found = []
    for X, targets in pairs:
        mine = slice(0 if rank else len(y), None) if size > 1 else slice(None)
        own = HessianInverter("direct", 0.1, process_group=group_of(size)).fit(model, (X[mine], targets[mine]))
        found.append(own.curvature_.to_dense())
    frame = pandas.DataFrame(CASE.X.numpy(), columns=list("abcd"))
    rows = frame if size == 1 or rank else np.zeros((0, 4))
    return [*found, HessianInverter("direct", 0.1, process_group=group_of(size)).fit(rows).curvature_.to_dense()]


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


# -- data and memory ---------------------------------------------------------------------------------------------------


def little_memory(rank, size, method):
    """A fit that keeps neither data nor graphs."""
    with sklearn.config_context(working_memory=1e-3):
        return known(fitted(rank, size, method, batch_size=3), B)


def weightless(rank, size, ignored):
    """A fit where the rows of the last rank weigh nothing, in several batches that would be joined."""
    y, weights = CASE.y.clone(), CASE.sample_weight.copy()
    last = slice(bounds("ragged", size, len(y))[-2], None) if size > 1 else slice(bounds("ragged", 2, len(y))[1], None)
    if ignored:
        y[last] = 1  # the one that the loss ignores
    else:
        weights[last] = 0.0
    own = inverter("ekfac", curvature="ggn", batch_size=None, process_group=group_of(size))
    X, y, weights = (CASE.X, y, weights) if size == 1 else share("ragged", rank, size, CASE.X, y, weights)
    return known(own.fit(CASE.module, DataLoader(TensorDataset(X, y), batch_size=3), weights), B)


def in_autocast(rank, size, method):
    """A fit whose passes are in bfloat16, and whose sums over ranks are not."""
    settings = {"dtype": torch.float32, "autocast": "bfloat16", "curvature": "ggn"}
    return fitted(rank, size, method, **settings).transform(B)


def all_the_data(rank, size):
    return inverter().fit(CASE.module, CASE.data).n_samples_


def one_alone(rank, size):
    """Factorisations are on every rank: each solves for rows of its own, or not at all."""
    alone = [fitted(rank, size, "direct"), fitted(rank, size, "kfac", curvature="ggn", check_residual=False)]
    return [[own.transform(B), own.inverse_transform(B)] for own in alone] if rank == 0 else []


# -- all of them ------------------------------------------------------------------------------------------------------

ANSWERS = [("direct", "ggn"), ("cg", "ggn"), ("ekfac", "ggn"), ("arnoldi", "ggn"), ("minres", "hessian")]
CALLS = {
    **{f"answers-{m}-{c}": partial(answers_of, method=m, curvature=c) for m, c in ANSWERS},
    **{f"posterior-{c}": partial(posterior_of, curvature=c) for c in ("ggn", "sampled_fisher")},
    **{f"scikit-{kind}": partial(scikit, kind=kind) for kind in ("ragged", "empty")},
    **{f"rows-{m}-{k}": partial(plain_rows, method=m, kind=k) for m, k in (("direct", "empty"), ("lissa", "ragged"))},
    **{f"little_memory-{m}": partial(little_memory, method=m) for m in ("direct", "cg", "ekfac")},
    **{f"in_autocast-{m}": partial(in_autocast, method=m) for m in ("cg", "direct", "ekfac")},
    **{f"weightless-{ignored}": partial(weightless, ignored=ignored) for ignored in (True, False)},
    **{f"abstract-{kind}": partial(abstract, kind=kind) for kind in ("ragged", "empty")},
    **{
        call.__name__: call
        for call in (
            *(in_float32, wide_trace, pickled, subgroup, in_ddp, part_in_ddp, one_token_each, all_the_data, one_alone),
            *(own_loss, differentiated, talkative, traffic, by_hand, counted_rows, unequal_memory, short_sampler),
            empty_forms,
        )
    },
}
