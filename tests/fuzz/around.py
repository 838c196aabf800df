"""Cases with something around the model, and arrays that lie otherwise in memory."""

from dataclasses import replace

from fuzz import runner
from fuzz.cases import choice
from fuzz.wrappers import IN_NUMPY, LAYOUTS, WRAPPERS


def wrapped_case(case):
    """Return a case in a wrapper and a layout that its seed says."""
    wrapper = WRAPPERS[1 + choice(case, "wrapper", len(WRAPPERS) - 1)]
    layout = LAYOUTS[choice(case, "layout", len(LAYOUTS))]
    form = case.form
    if layout in IN_NUMPY:
        # torch makes no tensors of negative strides; weights go with arrays.
        form = "weighted" if form == "weighted" else "arrays"
    return replace(case, wrapper=wrapper, layout=layout, form=form)


def run(case, shared):
    """Return what became of a case."""
    return runner.run(wrapped_case(case), shared)
