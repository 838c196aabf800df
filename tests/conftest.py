"""What every test starts from: fixed seeds, one thread a worker, no display; no GPU, no cuda test."""

import os
from zlib import crc32

import numpy as np
import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seeds():
    np.random.seed(0)
    torch.manual_seed(0)


# Before pytest looks at which items are slow.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        # Of a long table one case in so many, the same ones each time: `make test-slow` runs the others.
        if (share := item.get_closest_marker("one_in")) and crc32(item.name.encode()) % share.args[0]:
            item.add_marker("slow")
        # A problem of the table with a layer that no loss reaches: its warning has a test of its own.
        if "frozen_and_dead" in item.nodeid:
            item.add_marker(pytest.mark.filterwarnings("ignore:The selected parameters must be reached:UserWarning"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
