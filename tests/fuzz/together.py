"""Fits of several processes, each with a part of the rows: what one process of all of them says."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from fuzz import runner
from fuzz.cases import choice
from fuzz.pool import answers

from skinvert import Reason

# Of six cases so many are fitted by two processes, and one by a group of one, which is no group.
TWO = 4
CURVATURES = {"ggn": "sampled_ggn", "fisher": "sampled_fisher"}


def run(case, shared):
    """Return what became of a case; raise Silent where a group of processes has another result."""
    if choice(case, "draws", 3):
        # Draws go with the rows, whoever has them.
        case = replace(case, curvature=CURVATURES.get(case.curvature, case.curvature))
    one = runner.solved(case, shared)
    outcome = one.refusal or runner.judged(case, one)
    b = runner.right_hand_sides_of(case, one)
    group = choice(case, "group", 6)
    if group < TWO:
        found = answers(answer_of_rank, case, b)
        errors = [error for _, error in found if error]
        if errors:
            raise runner.Raw(f"{errors[0].splitlines()[-1]}\n{errors[0]}\n{case!r}")
        _compare(case, one, [answer for answer, _ in found])
    elif group == TWO:
        with group_of_one():
            _compare(case, one, [answer(case, b, slice(None))])
    return outcome


def share_of(case, rank):
    """Return the rows of a rank of two: ragged ones, or none at all."""
    end = 2 * case.n // 5 if choice(case, "empty", 2) else 0
    return slice(end, None) if rank else slice(0, end)


def answer_of_rank(rank, case, b):
    """Return what a rank of two says."""
    return answer(case, b, share_of(case, rank))


def answer(case, b, rows):
    """Return what a process with some of the rows says."""
    module, X, y, loss, weights, _ = runner.built(case, {})
    # torch shuffles no loader without rows.
    own = replace(case, form="tuple") if case.form == "shuffled" and not len(X[rows]) else case
    inverter = runner.inverter_of(case, loss, process_group="world")

    def solve():
        inverter.fit(module, runner.data_of(own, X[rows], y[rows]), None if weights is None else weights[rows])
        return inverter.solve(b)

    before = runner.state_of(module, X)
    result, told, refusal = runner.tried(case, solve)
    if not runner.same(before, runner.state_of(module, X)):
        raise runner.Changed(repr(case))
    if refusal:
        return {"refusal": refusal}
    facts = {"gradient": getattr(inverter, "gradient_norm_", None), "n": inverter.n_samples_}
    info = {name: np.asarray(result.info[name]) for name in ("residual", "converged")}
    return {"refusal": "", "x": result.x, "info": info, "told": told, **facts}


@contextmanager
def group_of_one():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _compare(case, one, received):
    """Hold what each rank said to what one process says."""
    refusals = [found["refusal"] for found in received]
    if [bool(refusal) for refusal in refusals] != [bool(one.refusal)] * len(received):
        raise runner.Silent(f"ranks refused {refusals}, one process {one.refusal!r}\n{case!r}")
    if one.refusal:
        return
    first = runner.as_float64(received[0]["x"])
    for found in received:
        if not np.array_equal(runner.as_float64(found["x"]), first, equal_nan=True):
            raise runner.Silent(f"ranks have other solutions than each other\n{case!r}")
        if found["n"] != one.inverter.n_samples_:
            raise runner.Silent(f"{found['n']} rows of {one.inverter.n_samples_}\n{case!r}")
        if one.oracle.mass() > 0:
            with torch.enable_grad():
                runner.hold_gradient(case, one.oracle, found["gradient"], found["told"])
    together = replace_answer(one, received[0])
    runner.judged(case, together)
    hold_alike(case, one, received[0]["x"], "of the ranks")


def replace_answer(one, found):
    """Return a case as it was solved by ranks."""
    return replace(one, x=found["x"], info=found["info"], told=found["told"])


def hold_alike(case, one, x, whose, shift=0.0):
    """Raise Silent unless x solves, at λ + shift, what the method inverts as well as the fit's own solutions do."""
    with torch.enable_grad():
        own, other = (_own_residual(one, solutions, by) for solutions, by in ((one.x, 0.0), (x, shift)))
    b = runner.as_float64(one.b)
    A = one.inverter.inverse_.operator.to_dense().double()
    floor = runner.floor_of(case, A, b, x)
    allowed = 10 * torch.clamp(own, min=10 * min(one.inverter.inverse_.tolerance, runner.LOOSEST)) + 10 * floor
    # What is told to be no solution, of a matrix that is indefinite or singular to rounding, is so to any size.
    stopped = runner.as_tensor(one.info["reason"] == int(Reason.NEGATIVE_CURVATURE)) | (own > 1)
    wrong = ~(other <= allowed) & ~(stopped & bool(one.told))
    if bool(wrong.any()):
        raise runner.Silent(
            f"solutions {whose} leave {other[wrong].max():.3g}, own {own[wrong].max():.3g}, allowed "
            f"{allowed[wrong].max():.3g}\n{case!r}"
        )


def _own_residual(one, x, shift):
    b, x64 = runner.as_float64(one.b), runner.as_float64(x)
    applied = runner.as_float64(one.inverter.inverse_transform(x64))
    return runner.relative(applied + shift * x64 - b, b)
