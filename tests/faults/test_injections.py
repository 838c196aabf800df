"""One row a fault: what is done, and what the user reads of it. Whatever happens, an earlier fit is as it was."""

import errno
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import sklearn
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from skinvert import HessianInverter, InfluenceFunction, Loss, _memory, checkpoint, load, persistence

N = 24


class Net(nn.Module):
    """Two layers; a fault may be put in its forward pass."""

    def __init__(self, dtype=torch.float64, frozen=0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.frozen = nn.Linear(frozen, frozen).requires_grad_(False) if frozen else None
        self.to(dtype)

    def forward(self, x):
        if Net.fault is not None:
            Net.fault(x)
        h = torch.tanh(self.first(x))
        return self.second(h if self.frozen is None else h + 0 * self.frozen.weight.sum())

    fault: Any = None


class Rows(Dataset):
    """Rows of which one may be read with a fault, from some pass on."""

    def __init__(self, dtype=torch.float64, fault=None, passes=0):
        generator = torch.Generator().manual_seed(0)
        self.X, self.y = torch.randn(N, 4, generator=generator, dtype=dtype), torch.arange(N) % 3
        self.fault, self.passes, self.read = fault, passes, 0

    def __len__(self):
        return N

    def __getitem__(self, index):
        self.read += 1
        x = self.X[index].clone()
        if index == 13 and self.fault is not None and self.read > self.passes * N:
            x = self.fault(x)
        return x, self.y[index]


def loader(**settings):
    return DataLoader(Rows(**settings), 5)


def broken(error):
    """Return what raises ``error``, whatever it is called with."""

    def fault(*args, **kwargs):
        raise error

    return fault


@pytest.fixture(autouse=True)
def _no_fault(monkeypatch):
    monkeypatch.setattr(Net, "fault", None)


def inverter(method="ekfac", **settings):
    settings = {"curvature": "ggn", "loss": "cross_entropy", **settings}
    return HessianInverter(method, 0.5, **settings)


class NaNAbove(Loss):
    """Squared error that is NaN where an output is above one."""

    def per_sample(self, output, target):
        squares = (output - nn.functional.one_hot(target, 3)).square().sum(1)
        return torch.where(output[:, 0] > NaNAbove.limit, torch.nan, squares)

    limit = 0.6


@dataclass
class Fault:
    """What is done to what ``fit`` or the call ``then`` works with, and what is read of it."""

    read: str
    error: type[BaseException]
    fit: Any = None
    then: Any = None
    patch: list[tuple[Any, str, Any]] = field(default_factory=list)
    memory: float = 64


def image(x):
    message = "cannot identify image file 'cat.png'"
    raise OSError(message)


def nan(x):
    return x * torch.nan


def huge(x):
    return x * 1e25


def saved(path):
    return lambda fitted: fitted.save(path)


def scores(fitted):
    return InfluenceFunction(inverter("kfac")).fit(Net(), loader()).transform(loader(), out="scores.npy")


def moved_weights(fitted):
    with torch.no_grad():
        fitted._users_model.frozen.weight.add_(1.0)
    return fitted.transform(np.ones((1, 43)))


def no_space(*args, **kwargs):
    raise safetensors.SafetensorError("Error while serializing: No space left on device (os error 28)")


ENOSPC = OSError(errno.ENOSPC, "No space left on device")
ALLOCATE = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ...")


class Full:
    free = 0


FAULTS = {
    # -- data
    "a loader that raises in the first pass": Fault(
        "^cannot identify image file 'cat.png'$", OSError, lambda: inverter().fit(Net(), loader(fault=image))
    ),
    "a loader that raises in a later pass": Fault(
        "^cannot identify image file 'cat.png'$",
        OSError,
        lambda: inverter().fit(Net(), loader(fault=image, passes=2)),
        memory=0.0005,
    ),
    "NaN in one row": Fault(
        r"^data must be finite. Got NaN in row 13 instead. Try to impute or drop such rows.$",
        ValueError,
        lambda: inverter().fit(Net(), loader(fault=nan)),
    ),
    "infinity in one row": Fault(
        r"^data must be finite. Got infinity in row 13 instead",
        ValueError,
        lambda: inverter().fit(Net(), loader(fault=lambda x: x / 0)),
    ),
    "NaN in a later pass": Fault(
        r"^The data must be the same data in every pass.*Got another batch 2 instead",
        ValueError,
        lambda: inverter().fit(Net(), loader(fault=nan, passes=2)),
        memory=0.0005,
    ),
    # -- model and loss
    "a loss that is NaN for one row": Fault(
        r"^The loss must be finite. Got NaN or infinity in batch 2 \(rows 10 to 14\): that of row 13 instead",
        ValueError,
        lambda: inverter(loss=NaNAbove()).fit(Net(), loader(fault=lambda x: torch.full((4,), 5.0).double())),
    ),
    "a forward pass that raises": Fault(
        r"^The data must be what the model takes. Got a batch of \(5, 4\) torch.float64, .* instead. no luck$",
        ValueError,
        lambda: inverter().fit(Net(), loader()),
        patch=[(Net, "fault", staticmethod(broken(RuntimeError("no luck"))))],
    ),
    "factors that overflow": Fault(
        r"^The Kronecker factors of first must be finite. Got NaN or infinity in batch 2 \(rows 10 to 14\) instead. "
        r"Try dtype=torch.float64, or look at these rows.$",
        ValueError,
        lambda: inverter("kfac", batch_size=5).fit(Net(torch.float32), loader(dtype=torch.float32, fault=huge)),
    ),
    "eigenvalues that overflow": Fault(
        r"^The eigenvalues of first must be finite. Got NaN or infinity in batch 2 \(rows 10 to 14\) instead",
        ValueError,
        lambda: inverter("ekfac", batch_size=5).fit(Net(torch.float32), loader(dtype=torch.float32)),
        patch=[("refit", "", "")],
    ),
    "a frozen weight that is changed after fit": Fault(
        r"^The frozen parameters must be those of fit. Got others in \['frozen.weight'\] instead.*Call `fit` again",
        ValueError,
        then=moved_weights,
        memory=0.0005,
    ),
    # -- memory
    "no memory for the forward pass": Fault(
        r"^The forward pass ran out of memory. Try a smaller batch_size.$",
        MemoryError,
        lambda: inverter().fit(Net(), loader()),
        patch=[(Net, "fault", staticmethod(broken(ALLOCATE)))],
    ),
    "no memory for the forward pass on a device": Fault(
        r"^The forward pass ran out of memory. Try a smaller batch_size.$",
        MemoryError,
        lambda: inverter().fit(Net(), loader()),
        patch=[(Net, "fault", staticmethod(broken(torch.OutOfMemoryError("CUDA out of memory"))))],
    ),
    "no memory for an eigenbasis": Fault(
        r"^The eigenbasis of first ran out of memory. Try `params` with fewer parameters.$",
        MemoryError,
        lambda: inverter().fit(Net(), loader()),
        patch=[(torch.linalg, "eigh", broken(ALLOCATE))],
    ),
    "no memory for the factors, before any of them is made": Fault(
        r"^The Kronecker factors of the layers needs about .* but .* are available on cpu. Try offload .* or `params`",
        MemoryError,
        lambda: inverter().fit(Net(), loader()),
        patch=[(_memory, "available_memory", lambda device: 100)],
    ),
    "no memory for a Krylov space, before any product": Fault(
        r"^A Krylov space of 13 rows of p = 43 parameters needs about .* Try a smaller rank or krylov_dimension.$",
        MemoryError,
        lambda: inverter(_arnoldi()).fit(Net(), loader()),
        patch=[(_memory, "available_memory", lambda device: 100)],
    ),
    # -- disks
    "a full disk on save": Fault(
        r"The disk of '.*inverse' must be one with [\d,]+ bytes free. Got 0 instead.$",
        OSError,
        then=saved("inverse"),
        patch=[(persistence.shutil, "disk_usage", lambda path: Full())],
    ),
    "a disk that is full in the middle of a save": Fault(
        r"'inverse' could not be written: .*No space left on device",
        OSError,
        then=saved("inverse"),
        patch=[(safetensors.numpy, "save_file", no_space)],
    ),
    "a disk that is full when the file is flushed": Fault(
        "No space left on device", OSError, then=saved("inverse"), patch=[(os, "fsync", broken(ENOSPC))]
    ),
    "no permission on save": Fault(
        r"The folder of path must be one that can be written to. Got '.*' instead.$",
        PermissionError,
        then=saved("inverse"),
        patch=[(persistence.Path, "touch", broken(PermissionError(errno.EACCES, "Permission denied")))],
    ),
    "a folder that is none": Fault(
        r"^The folder of path must be one that exists. Got '.*none' instead.$",
        FileNotFoundError,
        then=saved("none/inverse"),
    ),
    "no permission for a checkpoint": Fault(
        r"The folder of path must be one that can be written to. Got '.*' instead.$",
        PermissionError,
        lambda: inverter(checkpoint="fit").fit(Net(), loader()),
        patch=[(persistence.Path, "touch", broken(PermissionError(errno.EACCES, "Permission denied")))],
    ),
    "a full disk for a checkpoint": Fault(
        r"The disk of '.*fit' must be one with [\d,]+ bytes free. Got 0 instead.$",
        OSError,
        lambda: inverter(checkpoint="fit").fit(Net(), loader()),
        patch=[(persistence.shutil, "disk_usage", lambda path: Full())],
    ),
    "a full disk in the middle of a fit": Fault(
        r"^The checkpoint was not written, and the fit goes on without: .*No space left on device",
        RuntimeWarning,
        lambda: inverter(checkpoint="fit").fit(Net(), loader()),
        patch=[("late", "", ENOSPC)],
    ),
    "a full disk for scores": Fault(
        r"The disk of '.*scores.npy.*' must be one with [\d,]+ bytes free. Got 0 instead.$",
        OSError,
        then=scores,
        patch=[(persistence.shutil, "disk_usage", lambda path: Full())],
    ),
}


def _arnoldi():
    from skinvert.methods import Arnoldi

    return Arnoldi(rank=6, krylov_dimension=13)


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_read_of_a_fault(case, tmp_path, monkeypatch):
    fault = FAULTS[case]
    monkeypatch.chdir(tmp_path)
    with sklearn.config_context(working_memory=fault.memory):
        model = Net(frozen=40 if fault.then is moved_weights else 0)
        fitted = inverter("cg" if fault.then is moved_weights else "direct", params=["first.*", "second.*"])
        fitted.fit(model, loader())
        b = np.ones((1, fitted.n_features_in_))
        expected = fitted.transform(b)
        if fault.then is moved_weights:
            fitted._users_model = model
        for target, name, value in fault.patch:
            _inject(monkeypatch, target, name, value)
        expects = pytest.warns if issubclass(fault.error, Warning) else pytest.raises
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with expects(fault.error, match=fault.read):
                fault.fit() if fault.then is None else fault.then(fitted)
        monkeypatch.undo()
        # Nothing that is half there, and no part of it.
        assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp") or name == "inverse"] == []
        if fault.then is not moved_weights:
            np.testing.assert_array_equal(fitted.transform(b), expected)


def _inject(monkeypatch, target, name, value):
    if target == "late":
        save, calls = checkpoint.save_state, []

        def saved_at_first(*args):
            calls.append(1)
            return save(*args) if len(calls) == 1 else broken(value)()

        monkeypatch.setattr(checkpoint, "save_state", saved_at_first)
        monkeypatch.setattr(checkpoint, "EVERY", 0.0)
        monkeypatch.setattr(checkpoint, "SHARE", 1.0)
    elif target == "refit":
        from skinvert.curvature.layers import squares

        gram, calls = squares.gram, []

        def overflowing(*args):
            calls.append(1)
            # Two layers a chunk: the first one's sum of the third chunk.
            return gram(*args) * (torch.inf if len(calls) == 5 else 1)

        monkeypatch.setattr(squares, "gram", overflowing)
    else:
        monkeypatch.setattr(target, name, value)


def test_a_file_before_a_failed_save_is_as_it_was(tmp_path, monkeypatch):
    fitted, b = inverter("direct").fit(Net(), loader()), np.ones((1, 43))
    fitted.save(tmp_path / "inverse")
    other = inverter("direct", weight_decay=1.0).fit(Net(), loader())
    for target, name, value in [(os, "fsync", broken(ENOSPC)), (os, "replace", broken(ENOSPC))]:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(target, name, value)
            other.save(tmp_path / "inverse")
    np.testing.assert_array_equal(load(tmp_path / "inverse").transform(b), fitted.transform(b))
    assert os.listdir(tmp_path) == ["inverse"]


# -- arrays as they come -----------------------------------------------------------------------------------------------


def arrays(kind, array, folder):
    """Return the same numbers, held in another way."""
    if kind == "read-only map":
        np.save(folder / f"{len(os.listdir(folder))}.npy", array)
        return np.load(folder / f"{len(os.listdir(folder)) - 1}.npy", mmap_mode="r")
    if kind == "read-only":
        copied = array.copy()
        copied.flags.writeable = False
        return copied
    if kind == "negative strides":
        return array[::-1].copy()[::-1]
    if kind == "every second row":
        return np.repeat(array, 2, axis=0)[::2]
    return {"by columns": np.asfortranarray, "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">"))}[kind](array)


KINDS = ["read-only map", "read-only", "negative strides", "every second row", "by columns", "big-endian"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["direct", "cg", "ekfac"])
def test_arrays_in_any_memory_give_the_same_bits(kind, method, tmp_path):
    X, y = Rows().X.numpy(), Rows().y.numpy()
    b = np.random.default_rng(0).standard_normal((3, 43))
    expected = inverter(method).fit(Net(), (X, y)).transform(b)
    held = [arrays(kind, array, tmp_path) for array in (X, y, b)]
    before = [array.tobytes() for array in held]
    fitted = inverter(method).fit(Net(), (held[0], held[1]))
    np.testing.assert_array_equal(fitted.transform(held[2]), expected)
    assert [array.tobytes() for array in held] == before


@pytest.mark.parametrize("kind", KINDS)
def test_plain_rows_in_any_memory_give_the_same_bits(kind, tmp_path):
    X = np.random.default_rng(0).standard_normal((20, 6))
    expected = HessianInverter("direct", 0.1).fit(X).transform(X)
    held = arrays(kind, X, tmp_path)
    np.testing.assert_array_equal(HessianInverter("direct", 0.1).fit(held).transform(held), expected)


def test_selected_parameters_that_are_changed_after_fit_change_nothing():
    model, b = Net(), np.ones((1, 43))
    for method in ("cg", "direct", "ekfac"):
        fitted = inverter(method).fit(model, loader())
        expected = fitted.transform(b)
        with torch.no_grad():
            model.first.weight.mul_(3.0)
        np.testing.assert_array_equal(fitted.transform(b), expected)
