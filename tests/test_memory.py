"""What is left of memory: the least of what machine, address space and control groups allow; and running out of it."""

import subprocess
import sys

import psutil
import pytest
import torch

from skinvert import _memory
from skinvert._memory import available_memory, naming_memory

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A machine of its own: write(lines of /proc/self/cgroup, files under /sys/fs/cgroup)."""
    monkeypatch.setattr(_memory, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(_memory, "OWN_CGROUPS", tmp_path / "own")

    def write(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "groups" / name).write_text(text)

    return write


def test_a_container_of_version_2(groups):
    files = {
        "memory.max": f"{GIB}\n",
        "memory.current": f"{GIB // 2}\n",
        "memory.stat": f"anon 5\ninactive_file {GIB // 4}\n",
    }
    groups("0::/\n", files)
    assert available_memory(CPU) == GIB // 2 + GIB // 4


def test_a_container_of_version_1(groups):
    files = {"memory/memory.limit_in_bytes": f"{GIB}", "memory/memory.usage_in_bytes": f"{GIB // 4}"}
    groups("5:cpu:/\n4:memory:/docker/abc\n", files)
    assert available_memory(CPU) == GIB - GIB // 4


def test_the_least_of_a_group_and_those_above_it_holds(groups):
    files = {
        **{"a/memory.max": f"{GIB}", "a/memory.current": "0"},
        **{"a/b/memory.max": "max", "a/b/memory.current": f"{GIB // 4}"},
    }
    groups("0::/a/b\n", files)
    assert available_memory(CPU) == GIB
    groups("0::/a/b\n", {**files, "a/b/memory.max": f"{GIB // 2}"})
    assert available_memory(CPU) == GIB // 4


def test_more_used_than_allowed_is_nothing_left(groups):
    groups("0::/\n", {"memory.max": f"{GIB}", "memory.current": f"{2 * GIB}"})
    assert available_memory(CPU) == 0


@pytest.mark.parametrize("own", ["", "nonsense", "0::/\n"])
def test_no_limit_leaves_what_the_machine_has(own, groups):
    groups(own, {"memory.max": "max\n", "memory.current": "5\n"})
    assert available_memory(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.05)


LIMITED = """
import resource, psutil, torch
import numpy as np
from skinvert import HessianInverter
from skinvert._memory import available_memory
X = np.eye(5, 3000, dtype="f4")
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**26, -1))
assert available_memory(torch.device("cpu")) <= 2**26
try:
    HessianInverter("direct").fit(X)
except MemoryError as error:
    assert "needs about" in str(error) and "Try" in str(error), error
else:
    raise AssertionError("no MemoryError")
"""


@pytest.mark.skipif(not psutil.LINUX, reason="an address space is limited on Linux alone")
def test_a_limited_address_space_is_said_before_work_starts():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "error", [MemoryError("x"), torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory: 1")]
)
def test_running_out_of_memory_says_so(error):
    with (
        pytest.raises(MemoryError, match="The forward pass ran out of memory. Try less"),
        naming_memory("The forward pass", "Try less."),
    ):
        raise error


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="^shapes$"), naming_memory("The forward pass", "Try less."):
        raise RuntimeError("shapes")


GROWING = """
import resource, sklearn, torch
from torch import nn
from skinvert import PerSampleGradient

class Batches:
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        for _ in range(self.count):
            yield torch.randn(4, 1, 128, 128), torch.randint(21, (4, 128, 128))

def peak(count):
    PerSampleGradient(nn.Conv2d(1, 21, 1), loss="cross_entropy").fit(Batches(count))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

with sklearn.config_context(working_memory=1):
    print(-peak(4) + peak(60))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux counts resident memory")
def test_a_pass_over_more_batches_takes_no_more_memory():
    # A batch takes some 20 MiB. Small tensors that outlive each one would keep the memory of the large ones in pieces.
    done = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, timeout=120)
    assert float(done.stdout) < 40, done.stderr
