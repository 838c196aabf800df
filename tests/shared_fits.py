"""Fits that several processes share, as functions of (rank, size); and the same by one process of all the data."""

from functools import partial

import numpy as np
from problems import MODELS, problem
from sklearn.base import clone
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from skinvert import HessianInverter, SampledFisher, SampledGGN
from skinvert.curvature import faces_of
from skinvert.methods import CG, EKFAC, KFAC, LiSSA
from skinvert.testing import registered_methods

# Not by `facts`, which fits all of them where it is imported: here that is each process.
TIGHT = registered_methods()
N = 23
# Of ignored targets, class weights, sample weights and a penalty: each has a sum over all the data of its own.
PROBLEM = ("mlp", "ignore_index", 0.1, True, 7, N)
SHIFT = 1.5


def bounds(kind, size, n):
    """Return where each rank's rows end: ragged ones, or one rank without any."""
    if kind == "ragged":
        return {2: [0, 2 * n // 5, n], 3: [0, n // 5, 7 * n // 10, n]}[size]
    return {2: [0, 0, n], 3: [0, 7 * n // 10, 7 * n // 10, n]}[size]


def share(kind, rank, size, *arrays):
    ends = bounds(kind, size, len(arrays[0]))
    return tuple(array[ends[rank] : ends[rank + 1]] for array in arrays)


def known(inverter, b):
    """Return what a fit says, to be compared."""
    x, info = inverter.solve(b)
    return {
        "x": x,
        "residual": np.asarray(info["residual"]),
        "n": inverter.n_samples_,
        "gradient": inverter.gradient_norm_,
        "shift": inverter.hessian_perturbation_,
        "method": repr(inverter.method_),
    }


# -- the table of methods ------------------------------------------------------------------------------------------


def cases():
    """Return {name: (kind, arguments of ``problem``, settings)}: every method, and every curvature by one of them."""
    found = {}
    for name, method in TIGHT.items():
        served = set(method.requires) <= faces_of("hessian")
        curvature = "hessian" if served else method.default_curvature
        curvature = "ggn" if method.needs_psd else curvature
        if "minibatch" in method.requires:
            # Whole data where they are few: there is nothing to draw.
            method = LiSSA(batch_size=6, rtol=1e-2, maxiter=2000)
        for kind in ("ragged", "empty"):
            found[f"{name}-{curvature}-{kind}"] = (kind, PROBLEM, {"method": method, "curvature": curvature})
    sampled = (SampledFisher(2, random_state=3), SampledGGN(2, random_state=3))
    for curvature in ("ggn", "fisher", "empirical_fisher", *sampled):
        text = curvature if isinstance(curvature, str) else type(curvature).__name__
        for name in ("direct", "kfac"):
            found[f"{name}-{text}-all"] = ("ragged", PROBLEM, {"method": name, "curvature": curvature})
    # A factor of fewer rows than parameters is inverted in sample space.
    few = ("cnn2d", "mse", 0.0, False, 7, 5)
    for name in ("direct", "harmonic_mean", "cg"):
        settings = {"method": name, "curvature": "empirical_fisher"}
        found[f"{name}-few_rows"] = ("ragged", few, settings)
    for name in ("kfac", "ekfac"):
        method = clone(TIGHT[name]).set_params(approx="reduce")
        found[f"{name}-reduce"] = ("ragged", ("cnn2d", "cross_entropy", 0.1, True, 7, N), {"method": method})
    for start in ({"preconditioner": "nystroem"}, {"preconditioner": "ekfac"}, {"start": "kfac"}):
        settings = {"method": CG(rtol=1e-10, **start), "curvature": "hessian"}
        found[f"cg-{'-'.join(start.values())}"] = ("ragged", PROBLEM, settings)
    for name in ("direct", "cg"):
        settings = {"method": name, "curvature": "ggn", "blocks": "layer"}
        found[f"{name}-blocks"] = ("empty", PROBLEM, settings)
    some = {"method": "direct", "curvature": "ggn", "params": "2.*", "batch_size": 4}
    found["direct-params"] = ("ragged", PROBLEM, some)
    relative = {"method": "direct", "curvature": "ggn", "hessian_perturbation": "0.5 rel"}
    found["direct-relative"] = ("ragged", PROBLEM, relative)
    return found


def model_cases():
    """Return the cases of every model of the table of problems."""
    found = {}
    for name in MODELS:
        arguments = (name, "cross_entropy", 0.1, True, 7, N)
        for method in (EKFAC(unsupported="diagonal"), KFAC(approx="reduce", unsupported="diagonal"), "direct"):
            settings = {"method": method, "curvature": "ggn"}
            label = method if isinstance(method, str) else type(method).__name__
            found[f"{label}-{name}"] = ("empty", arguments, settings)
    return found


def inverter_of(arguments, settings, **more):
    own = {"hessian_perturbation": SHIFT, "random_state": 0, **settings, **more}
    return HessianInverter(**{**problem(*arguments).settings(), **own})


def of_one(arguments, settings):
    """Return what one process of all the data says."""
    case = problem(*arguments)
    inverter = inverter_of(arguments, settings).fit(case.module, case.data, case.sample_weight)
    return known(inverter, case.right_hand_sides(3)[:, : inverter.n_features_in_])


def of_ranks(kind, arguments, settings, rank, size):
    """Return what a rank says."""
    case = problem(*arguments)
    inverter = inverter_of(arguments, settings, process_group="world")
    weights = case.sample_weight
    own = share(kind, rank, size, case.X, case.y)
    weights = None if weights is None else share(kind, rank, size, weights)[0]
    inverter.fit(case.module, own, weights)
    return known(inverter, case.right_hand_sides(3)[:, : inverter.n_features_in_])


def table(cases):
    return {name: partial(of_ranks, *case) for name, case in cases.items()}


# -- samplers --------------------------------------------------------------------------------------------------------

UNWEIGHTED = ("mlp", "class_weights", 0.1, False, 7, N)


def sampled(rank, size, drop_last=False, epoch=0, method="direct", **settings):
    """Fit on a loader whose sampler shuffles, and pads or drops: 23 rows are no multiple of 2 or 3."""
    case = problem(*UNWEIGHTED)
    data = TensorDataset(*case.data)
    sampler = DistributedSampler(data, shuffle=True, seed=1, drop_last=drop_last)
    sampler.set_epoch(epoch + rank if drop_last else epoch)
    loader = DataLoader(data, batch_size=4, sampler=sampler, drop_last=drop_last)
    inverter = inverter_of(UNWEIGHTED, {"method": method, **settings}, process_group="world", batch_size=None)
    return known(inverter.fit(case.module, loader), case.right_hand_sides(3))


def short_sampler(rank, size):
    """Fit on a loader whose sampler deals out the first rows of its data set alone."""
    case = problem(*UNWEIGHTED)
    data = TensorDataset(*case.data)
    of_few = RandomSampler(range(9)) if size == 1 else DistributedSampler(range(9))
    inverter = inverter_of(UNWEIGHTED, {"method": "cg"}, process_group=None if size == 1 else "world", batch_size=None)
    inverter.fit(case.module, DataLoader(data, batch_size=4, sampler=of_few))
    return known(inverter, case.right_hand_sides(3))


SAMPLED = {
    "padded": partial(sampled),
    "another_epoch": partial(sampled, epoch=3),
    "dropped": partial(sampled, drop_last=True),
    "draws": partial(sampled, method="kfac", curvature=SampledFisher(2, random_state=3)),
    "signs": partial(sampled, method="ekfac", curvature=SampledGGN(2, random_state=3)),
    "minibatches": partial(sampled, method=LiSSA(batch_size=6, rtol=1e-2, maxiter=500)),
}
SAMPLED_SETTINGS = {
    "draws": {"method": "kfac", "curvature": SampledFisher(2, random_state=3)},
    "signs": {"method": "ekfac", "curvature": SampledGGN(2, random_state=3)},
    "minibatches": {"method": LiSSA(batch_size=6, rtol=1e-2, maxiter=500)},
}
