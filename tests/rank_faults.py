"""What goes wrong where several processes fit together: functions of (rank, size)."""

import copy
import os
import time
from datetime import timedelta
from functools import partial

import dask.array
import numpy as np
import pandas
import sklearn
import torch
import torch.distributed as dist
from rank_calls import CASE, Abstract, B, fitted, inverter, plain_rows
from shared_fits import SHIFT, share
from sklearn.linear_model import Ridge
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from skinvert import HessianInverter, InfluenceFunction, InversionRegistry, TwiceDifferentiable
from skinvert.methods import EKFAC, Direct, LiSSA

# -- data ------------------------------------------------------------------------------------------------------------


def loader(data, size, rank, **settings):
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, size, rank, **settings))


def other_memory(rank, size):
    with sklearn.config_context(working_memory=512 * (1 + rank)):
        return fitted(rank, size, "cg")


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


# -- models -----------------------------------------------------------------------------------------------------------


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


# -- faults ----------------------------------------------------------------------------------------------------------


def not_a_member(rank, size):
    group = dist.new_group([size - 1])
    return fitted(rank, size, process_group=group) if rank == 0 else None


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


def classes_apart(rank, size):
    """A mean of weighted classes, and each rank has rows of one: on those it is a plain mean."""
    torch.manual_seed(rank)
    net = nn.Linear(3, 2).double()
    nn.init.normal_(net.weight, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(net.bias)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    X, y = torch.randn(5, 3, dtype=torch.float64), torch.full((5,), rank % 2)

    def loss(f, y):
        return nn.functional.cross_entropy(f, y, weight=weights)

    return HessianInverter("direct", 1.0, loss=loss, process_group="world").fit(net, (X, y))


def lazy_rows(rank, size):
    own = fitted(rank, size, "cg")
    return own.transform(dask.array.from_array(B, chunks=(1, -1)))


def other_products(rank, size):
    return fitted(rank, size, "cg").curvature_.apply(torch.from_numpy(B + rank))


def other_rows(rank, size, method):
    return fitted(rank, size, method).transform(B + rank)


def other_path(rank, size):
    return fitted(rank, size, "cg").path(B, [1.0 + rank])


def other_rows_back(rank, size):
    return fitted(rank, size, "cg").inverse_transform(B + rank)


def wrong_shape_back(rank, size):
    return fitted(rank, size, "minres").inverse_transform(B if rank else B[:, :-1])


def other_judgement(rank, size):
    return fitted(rank, size, "kfac", check_residual=rank == 0)


def other_shape(rank, size):
    return fitted(rank, size, "cg").transform(B[: 2 + rank])


def wrong_shape(rank, size):
    return fitted(rank, size, "cg").transform(B if rank else B[:, :-1])


def another_call(rank, size):
    own = fitted(rank, size, "cg")
    return own.transform(B) if rank else own.path(B, [1.0])


def other_parameter(rank, size):
    net = copy.deepcopy(CASE.module)
    with torch.no_grad():
        net[2].weight[0, 0] += rank * 1e-12
    return inverter().fit(net, share("ragged", rank, size, *CASE.data))


def other_buffer(rank, size):
    net = nn.Sequential(copy.deepcopy(CASE.module), nn.BatchNorm1d(3).double())
    net[1].running_mean += rank
    return inverter(params="0.*").fit(net, share("ragged", rank, size, *CASE.data))


def destroyed_group(rank, size):
    group = dist.new_group(list(range(size)))
    own = fitted(rank, size, "cg", process_group=group)
    dist.destroy_process_group(group)
    return own.transform(B)


def other_shift(rank, size):
    return fitted(rank, size, hessian_perturbation=1.0 + rank)


def other_autocast(rank, size):
    return fitted(rank, size, dtype=torch.float32, autocast="bfloat16" if rank else None)


def other_method(rank, size):
    return fitted(rank, size, ["direct", "cg"][rank % 2])


def other_curvature(rank, size):
    return fitted(rank, size, curvature=["ggn", "hessian"][rank % 2])


def of_own_labels(y):
    """Return class weights as they are often made, of the labels of this rank."""
    return len(y) / (3 * torch.bincount(y, minlength=3).double())


def other_weights(rank, size):
    X, y = share("ragged", rank, size, *CASE.data)
    return inverter(loss=nn.CrossEntropyLoss(weight=of_own_labels(y))).fit(CASE.module, (X, y))


def other_setting(rank, size):
    loss = nn.CrossEntropyLoss(label_smoothing=0.5) if rank else "cross_entropy"
    return inverter(loss=loss).fit(CASE.module, share("ragged", rank, size, *CASE.data))


def other_kind(rank, size):
    return fitted(rank, size, loss=nn.functional.cross_entropy if rank else "cross_entropy")


def other_function(rank, size, kind="ragged", **settings):
    """A loss of the rank's own labels, behind a function: losses of rows, that no name tells apart."""
    X, y = share(kind, rank, size, CASE.X, CASE.y)
    weights = of_own_labels(CASE.y[: 8 + rank])

    def loss(f, y):
        return nn.functional.cross_entropy(f, y, weight=weights, reduction="none")

    return inverter(loss=loss, **settings).fit(CASE.module, (X, y))


def function_in_little_memory(rank, size):
    with sklearn.config_context(working_memory=1e-3):
        return other_function(rank, size, "empty", batch_size=3)


def other_activation(rank, size):
    net = nn.Sequential(CASE.module[0], nn.ReLU() if rank else nn.Tanh(), CASE.module[2])
    return inverter().fit(net, share("ragged", rank, size, *CASE.data))


class OtherGradient(Abstract):
    def grad(self, x, y, create_graph=False):
        return (1 + dist.get_rank()) * super().grad(x, y, create_graph)


def other_gradient(rank, size):
    own = HessianInverter("cg", SHIFT, process_group="world")
    return own.fit(OtherGradient(), share("ragged", rank, size, *CASE.data))


def other_penalty(rank, size):
    model = Ridge(alpha=2.0).fit(CASE.X, CASE.y)
    model.alpha += rank
    own = HessianInverter("direct", SHIFT, process_group="world")
    return own.fit(model, share("ragged", rank, size, CASE.X.numpy(), CASE.y.numpy()))


def frames(rank, size, kind="ragged"):
    """Return the data of CASE, whose inputs have columns in another order on rank 1."""
    X, y = share(kind, rank, size, *CASE.data)
    frame = pandas.DataFrame(X.numpy(), columns=list("abcd"))
    return frame[list("abdc")] if rank else frame, y.numpy()


def other_columns(rank, size):
    return inverter().fit(CASE.module, frames(rank, size))


def other_columns_of_rows(rank, size):
    return HessianInverter("direct", 1.0, process_group="world").fit(frames(rank, size)[0])


def columns_on_one(rank, size):
    X, y = frames(rank, size)
    return inverter().fit(CASE.module, (X.to_numpy() if rank else X, y))


def other_method_of_rows(rank, size):
    return HessianInverter(["direct", "cg"][rank % 2], 1.0, process_group="world").fit(frames(0, size)[0])


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


def offloaded(rank, size):
    return inverter(EKFAC(offload="cpu")).fit(CASE.module, share("ragged", rank, size, CASE.X, CASE.y))


# -- all of them, the last one last -----------------------------------------------------------------------------------

FAULTS = {
    call.__name__: call
    for call in (
        *(not_a_member, sampler_alone, sampler_of_another, sampler_of_more, sampler_of_ones_own, sampler_of_batches),
        *(sampler_and_weights, data_sets_that_differ, mixed_forms, no_rows, no_weights, with_nan, without_data),
        *(no_model, failing_data, failing_assembly, too_little_for_lissa, other_path, other_shape, wrong_shape),
        *(another_call, other_parameter, other_buffer, other_shift, other_method, other_curvature, other_memory),
        other_autocast,
        *(other_weights, other_setting, other_kind, other_function, function_in_little_memory, other_activation),
        *(other_gradient, other_penalty, other_columns, other_columns_of_rows, columns_on_one, other_method_of_rows),
        *(other_rows_back, wrong_shape_back, other_judgement, destroyed_group),
        *(
            failing_late,
            classes_apart,
            other_products,
            lazy_rows,
            influence,
            function,
            sharded_model,
            wrapped_in_shards,
            layers_that_differ,
            offloaded,
        ),
    )
} | {f"other_rows-{method}": partial(other_rows, method=method) for method in ("cg", "kfac")}
# After those of `rank_calls`.
CALLS = {
    "own_rows": partial(other_rows, method="direct"),
    **FAULTS,
    "after_the_faults": partial(plain_rows, method="cg", kind="ragged"),
    "one_does_not_come": one_does_not_come,
    "one_dies": one_dies,
}
