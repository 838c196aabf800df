"""The ways in which each case is run: a state, other batches, or what more is asked of it."""

from dataclasses import replace

import torch
from fuzz import around, asked, draws, interrupted, runner, scores, together
from fuzz.cases import choice


def _of(change):
    return lambda case, shared: runner.run(change(case), shared)


def _without_gradients(case):
    return replace(case, ambient="inference" if case.seed % 2 else "no_grad")


def _in_bfloat16(case):
    return replace(case, dtype=torch.float32, autocast="bfloat16")


# By name: what runs a case, and keeps in a dict what the other ways need too.
VARIANTS = {
    "plain": runner.run,
    "no_grad": _of(_without_gradients),
    "thread": _of(lambda case: replace(case, ambient="thread")),
    "by_outputs": _of(lambda case: replace(case, batch_size=case.outputs)),
    "scores": scores.run,
    "around": around.run,
    "draws": draws.run,
    "together": together.run,
    "interrupted": interrupted.run,
    "asked": asked.run,
    "rough": _of(_in_bfloat16),
}
# What costs more is run on one case in so many, so that the sweep takes no more than half as long again.
SHARES = {"around": 3, "draws": 3, "interrupted": 4, "asked": 3, "rough": 3}


def is_run(name, case):
    """Whether a sweep runs a case in this way."""
    return choice(case, name, SHARES.get(name, 1)) == 0
