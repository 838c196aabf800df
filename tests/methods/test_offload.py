"""Offloaded factors: the same numbers, in another place, of which nothing is left behind."""

import copy
import errno
import gc
import mmap
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch import nn
from torch.utils.data import DataLoader, Dataset
from two_devices import ELSEWHERE, Parked, TwoDevices

import skinvert
from skinvert import HessianInverter, HessianInverterCV, TorchTwiceDifferentiable, _memory, _storage, solve_hvp
from skinvert._storage import InCPUMemory, InFiles
from skinvert.methods import EKFAC, KFAC

pytestmark = pytest.mark.filterwarnings("ignore:e?kfac is worse than x = 0")
METHODS = {"kfac": KFAC, "ekfac": EKFAC}
# For tests of many seconds.
LONG = [pytest.param("kfac", marks=pytest.mark.slow), "ekfac"]
N = 20
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(4, 6, 2, groups=2), nn.GroupNorm(3, 6), nn.Tanh(), nn.Flatten(), nn.Linear(18, 7), nn.Linear(7, 3)
    ).to(dtype)


def data(dtype=torch.float64, n=N):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, 4, dtype=dtype, generator=generator), torch.randint(3, (n,), generator=generator)


def fitted(method, offload=None, net=None, rows=None, **settings):
    own = {name: settings.pop(name) for name in ("approx", "unsupported") if name in settings}
    settings = {"loss": "cross_entropy", "batch_size": 6, **settings}
    inverter = HessianInverter(METHODS[method](offload=offload, **own), 0.1, **settings)
    return inverter.fit(network() if net is None else net, data() if rows is None else rows)


def right_hand_sides(inverter, k=5):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(k, inverter.n_features_in_, dtype=inverter.inverse_.dtype, generator=generator)


def answers(inverter):
    """All that an inverter says of a few rows, by name."""
    b, inverse = right_hand_sides(inverter), inverter.inverse_
    x, info = inverter.solve(b)
    return {
        "x": x,
        **{name: value for name, value in info.items() if isinstance(value, torch.Tensor)},
        "image": inverter.inverse_transform(b),
        "path": inverter.path(b, [0.1, 2.0]),
        "log_det": torch.tensor(inverse.log_det()),
        "root": inverse.root(b),
        "precondition": inverse.precondition(b),
        "diagonal": inverse.operator.diagonal(),
        "matrix": inverse.operator.to_dense(),
        "eigenvalues": inverse.own_eigenvalues,
    }


def assert_same(received, expected):
    assert received.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(received[name]), torch.as_tensor(value)), name


def mapped(folder):
    """How many files in ``folder`` this process has mapped."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


class Uneven(TorchTwiceDifferentiable):
    """Another penalty of each parameter, which enters by its diagonal in the eigenbasis."""

    def penalty_diagonal(self):
        return torch.linspace(0, 1, self.num_params, dtype=self.dtype)


# -- the same numbers --------------------------------------------------------------------------------------------------

SETTINGS = {
    "plain": {},
    "float32": {"dtype": torch.float32},
    "reduce": {"approx": "reduce"},
    "penalty": {"weight_decay": 0.3},
    "some parameters": {"params": ["0.*", "4.weight"]},
    "fisher": {"curvature": "fisher"},
    "empirical fisher": {"curvature": "empirical_fisher"},
    "hessian": {"curvature": "hessian"},
    "sampled": {"curvature": "sampled_ggn", "random_state": 0},
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_every_answer_is_the_same_to_the_last_bit(method, settings, tmp_path):
    expected = answers(fitted(method, **settings))
    assert_same(answers(fitted(method, "cpu", **settings)), expected)
    assert_same(answers(fitted(method, tmp_path, **settings)), expected)
    assert_same(answers(fitted(method, str(tmp_path), **settings)), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_penalty_that_differs_between_parameters(method, tmp_path):
    model = Uneven(network(), "cross_entropy")
    expected = answers(fitted(method, net=model, loss=None))
    assert_same(answers(fitted(method, tmp_path, net=model, loss=None)), expected)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_without_factors(method, tmp_path):
    net = network()
    net[4] = nn.utils.parametrizations.weight_norm(net[4])
    with pytest.raises(ValueError, match="ParametrizedLinear"):
        fitted(method, tmp_path, net)
    expected = answers(fitted(method, net=net, unsupported="diagonal"))
    assert_same(answers(fitted(method, tmp_path, net, unsupported="diagonal")), expected)
    assert_same(
        answers(fitted(method, tmp_path, net, unsupported="diagonal", params="4.*")),
        answers(fitted(method, None, net, unsupported="diagonal", params="4.*")),
    )


class Late(nn.Module):
    """From some row on it uses a weight outside its layer too."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        late = (x[:, :1] > 50) * torch.arange(3)
        return self.c(torch.tanh(self.a(x))) + (late * self.a.weight.sum() if late.any() else 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_is_left_out_late_takes_no_second_room(method, tmp_path):
    torch.manual_seed(0)
    net, X = Late().double(), torch.randn(20, 4, dtype=torch.float64)
    X[15, 0] = 51.0
    rows = (X, torch.arange(20) % 3)
    expected = answers(fitted(method, None, net, rows, unsupported="diagonal"))
    assert_same(answers(fitted(method, tmp_path, net, rows, unsupported="diagonal")), expected)


@pytest.mark.parametrize("method", METHODS)
def test_blocks(method, tmp_path):
    b = right_hand_sides(fitted(method))
    expected = fitted(method, blocks="layer").solve(b)
    assert torch.equal(fitted(method, tmp_path, blocks="layer").solve(b).x, expected.x)


@pytest.mark.parametrize("method", METHODS)
def test_searches_and_the_functional_face(method, tmp_path):
    net, (X, y) = network(), data()
    found = [
        HessianInverterCV([0.1, 1.0], cv=2, method=METHODS[method](offload=offload), loss="cross_entropy").fit(
            net, (X, y)
        )
        for offload in (None, tmp_path)
    ]
    assert found[0].hessian_perturbation_ == found[1].hessian_perturbation_
    b = right_hand_sides(fitted(method))
    assert torch.equal(found[1].transform(b), found[0].transform(b))
    model = TorchTwiceDifferentiable(net, "cross_entropy")
    x, _ = solve_hvp(method, model, (X, y), b, hessian_perturbation=0.1, offload=str(tmp_path))
    assert torch.equal(x, solve_hvp(method, model, (X, y), b, hessian_perturbation=0.1).x)
    one = HessianInverter(METHODS[method](), 0.1, model=net, loss="cross_entropy")
    grid = GridSearchCV(one, {"method__offload": [None, "cpu", tmp_path]}, cv=2).fit(X.numpy(), y.numpy())
    assert len(set(grid.cv_results_["mean_test_score"])) == 1


def test_an_operator_of_ones_own_is_asked_where_offload_is_set(tmp_path):
    known = fitted("ekfac").curvature_

    class Own(type(known)):
        def kronecker_factors(self, approx, unsupported, verbose=0):
            return super().kronecker_factors(approx, unsupported, verbose)

    own = Own(known.objective)
    b = torch.ones(1, own.size, dtype=torch.float64)
    assert torch.equal(EKFAC().invert(own, 0.1).solve(b).x, EKFAC().invert(known, 0.1).solve(b).x)
    with pytest.raises(TypeError, match="storage"):
        EKFAC(offload=tmp_path).invert(own, 0.1)


# -- another device ----------------------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_moved_to_the_device_that_computes(method, settings, monkeypatch):
    """The CPU stands for a GPU, and another device for the CPU's memory: what is not moved is an error."""
    expected = answers(fitted(method, **settings))
    monkeypatch.setattr(InCPUMemory, "home", ELSEWHERE)
    with TwoDevices() as devices:
        inverter = fitted(method, "cpu", **settings)
        inverse = inverter.inverse_
        sides = [side for basis in inverse.basis.bases for side in (vars(basis).get("left"), vars(basis).get("right"))]
        kept = [side for side in sides if side is not None] + [inverse.spectrum, inverse.basis.order]
        kept += [inverse.inverted.inverse, inverse.inverted.values]
        assert all(isinstance(tensor, Parked) for tensor in kept)
        assert inverse.device.type == inverse.operator.device.type == "cpu"
        assert_same(answers(inverter), expected)
    assert devices.moved["there"] and devices.moved["back"]
    assert devices.heavy == []


@pytest.mark.parametrize("method", METHODS)
def test_an_uneven_penalty_on_another_device(method, monkeypatch):
    model = Uneven(network(), "cross_entropy")
    expected = answers(fitted(method, net=model, loss=None))
    monkeypatch.setattr(InCPUMemory, "home", ELSEWHERE)
    with TwoDevices() as devices:
        assert_same(answers(fitted(method, "cpu", net=model, loss=None)), expected)
    assert devices.heavy == []


def test_two_devices_refuse_what_torch_does():
    with TwoDevices():
        parked, plain = torch.ones(2, device=ELSEWHERE), torch.ones(2)
        assert parked.device == ELSEWHERE and (parked * 2).device == ELSEWHERE
        with pytest.raises(RuntimeError, match="same device"):
            parked + plain
        with pytest.raises(RuntimeError, match="same device"):
            parked += plain
        assert torch.equal(parked.to("cpu") + plain, 2 * torch.ones(2))


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(method, tmp_path):
    expected = answers(fitted(method))
    b = right_hand_sides(fitted(method)).cuda()
    for offload in ("cpu", tmp_path):
        inverter = fitted(method, offload, device="cuda")
        received, inverse = inverter.solve(b), inverter.inverse_
        assert received.x.is_cuda and inverse.device.type == "cuda"
        assert not inverse.spectrum.is_cuda and not inverse.basis.order.is_cuda
        assert not any(basis.left.is_cuda for basis in inverse.basis.bases if hasattr(basis, "left"))
        torch.testing.assert_close(received.x.cpu(), expected["x"], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(inverter.path(b, [0.1, 2.0]).cpu(), expected["path"], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(inverse.log_det(), expected["log_det"], rtol=1e-10)
        loaded = pickle.loads(pickle.dumps(inverse))
        torch.testing.assert_close(loaded.solve(b.cpu()).x, expected["x"], rtol=1e-8, atol=1e-10)


# -- nothing is left ---------------------------------------------------------------------------------------------------


class Watched(Dataset):
    """Rows that note what is in a folder while they are read, and may raise at one of them."""

    def __init__(self, folder, last=None, error=None):
        self.X, self.y = data()
        self.folder, self.last, self.error, self.read, self.seen, self.mapped = folder, last, error, 0, set(), 0

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        self.read += 1
        self.seen |= set(os.listdir(self.folder))
        self.mapped = max(self.mapped, mapped(self.folder))
        if self.read == self.last:
            raise self.error
        return self.X[index], self.y[index]


@LINUX
@pytest.mark.parametrize("method", METHODS)
def test_files_have_no_name_and_go_with_the_inverse(method, tmp_path):
    rows = Watched(tmp_path)
    with sklearn.config_context(working_memory=0.001):
        inverter = fitted(method, tmp_path, rows=DataLoader(rows, 5), batch_size=None)
    assert rows.mapped >= 4 and rows.seen == set()
    held = mapped(tmp_path)
    # The factors themselves are those of kfac alone; the numbers of parameters and the sums are nobody's.
    assert held == {"kfac": 3, "ekfac": 2}[method]
    moved = inverter.inverse_.at(3.0)
    assert mapped(tmp_path) == held + 1
    inverter.path(right_hand_sides(inverter), [0.1, 1.0, 10.0])
    assert mapped(tmp_path) == held + 1 and os.listdir(tmp_path) == []
    del moved
    assert mapped(tmp_path) == held
    del inverter
    gc.collect()
    assert mapped(tmp_path) == 0


@LINUX
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_fit_that_ends_early_leaves_nothing(error, tmp_path):
    with sklearn.config_context(working_memory=0.001):
        whole = Watched(tmp_path)
        fitted("ekfac", tmp_path, rows=DataLoader(whole, 5), batch_size=None)
        gc.collect()
        # In the pass of the factors, and in that of the eigenvalues.
        for last in (whole.read - N - 12, whole.read - 12, whole.read - 1):
            rows = Watched(tmp_path, last, error)
            with pytest.raises(error):
                fitted("ekfac", tmp_path, rows=DataLoader(rows, 5), batch_size=None)
            assert rows.mapped and rows.seen == set()
            gc.collect()
            assert mapped(tmp_path) == 0


@LINUX
def test_a_decomposition_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fitted("kfac", tmp_path)
    gc.collect()
    assert mapped(tmp_path) == 0 and os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys, torch
from skinvert import HessianInverter
from skinvert.methods import EKFAC
net, data = torch.nn.Linear(5, 3), (torch.randn(9, 5), torch.arange(9) % 3)
inverter = HessianInverter(EKFAC(offload=sys.argv[1]), 0.1, loss="cross_entropy").fit(net, data)
print(sum(sys.argv[1] in line for line in open("/proc/self/maps")), flush=True)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@LINUX
@pytest.mark.parametrize("how", [pytest.param("exit", marks=pytest.mark.slow), "kill"])
def test_a_process_that_ends_leaves_nothing(how, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), how], capture_output=True, text=True)
    assert done.returncode == (-9 if how == "kill" else 0) and done.stderr == ""
    assert int(done.stdout) == 2 and os.listdir(tmp_path) == []


@LINUX
def test_a_file_system_without_nameless_files(tmp_path, monkeypatch):
    # Where the system makes none, the name is gone before anything is written.
    monkeypatch.delattr(os, "O_TMPFILE")
    monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False)
    rows = Watched(tmp_path)
    with sklearn.config_context(working_memory=0.001):
        received = fitted("ekfac", tmp_path, rows=DataLoader(rows, 5), batch_size=None)
        assert rows.seen == set() and mapped(tmp_path) == 2
        assert_same(answers(received), answers(fitted("ekfac", batch_size=5)))


def test_many_layers_take_few_files(tmp_path):
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(40)]).double()
    rows = (torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 3)
    inverter = fitted("kfac", tmp_path, net, rows)
    if open_before:
        assert len(os.listdir("/proc/self/fd")) <= open_before + 3
    assert torch.equal(answers(inverter)["x"], answers(fitted("kfac", None, net, rows))["x"])


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LONG)
def test_copies_and_files_serve_without_the_folder(method, tmp_path):
    pytest.importorskip("safetensors")
    folder = tmp_path / "factors"
    folder.mkdir()
    inverter = fitted(method, folder)
    b, expected = right_hand_sides(inverter), own_answers(inverter)
    inverter.save(tmp_path / "file")
    joblib.dump(inverter, tmp_path / "joblib")
    copies = [pickle.dumps(inverter), copy.deepcopy(inverter)]
    assert clone(inverter).method.offload == folder and not hasattr(clone(inverter), "inverse_")
    parallel = joblib.Parallel(2)(joblib.delayed(solved)(inverter, rows) for rows in (b[:2], b[2:]))
    assert [len(rows) for rows in parallel] == [2, 3]
    del inverter
    gc.collect()
    shutil.rmtree(folder)
    for loaded in (
        pickle.loads(copies[0]),
        copies[1],
        joblib.load(tmp_path / "joblib"),
        joblib.load(tmp_path / "joblib", mmap_mode="r"),
    ):
        assert_same(own_answers(loaded), expected)
        assert torch.equal(loaded.inverse_.at(0.7).solve(b).x, fitted(method).inverse_.at(0.7).solve(b).x)
    loaded = skinvert.load(tmp_path / "file")
    assert loaded.method.offload == str(folder)
    assert torch.equal(loaded.transform(b), expected["x"])


def own_answers(inverter):
    """Those that need no data."""
    return {name: value for name, value in answers(inverter).items() if name not in ("residual", "converged", "reason")}


def solved(inverter, rows):
    return inverter.transform(rows)


@LINUX
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_solves_with_the_same_files(tmp_path):
    inverter = fitted("kfac", tmp_path)
    b, expected = right_hand_sides(inverter), answers(inverter)
    out = tmp_path / "out.npy"

    def child():
        assert mapped(tmp_path) == 3
        np.save(out, inverter.transform(b).numpy())
        inverter.inverse_.at(5.0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    np.testing.assert_array_equal(np.load(out), expected["x"])
    # What the child has let go of is still here.
    assert_same(answers(inverter), expected)


def test_threads_that_solve_at_other_perturbations_take_no_room_of_each_other(tmp_path):
    inverter, plain = fitted("ekfac", tmp_path), fitted("ekfac")
    b, shifts = right_hand_sides(inverter), np.logspace(-2, 2, 40)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda shift: inverter.inverse_.at(shift), shifts))
    for shift, inverse in zip(shifts, found, strict=True):
        assert torch.equal(inverse.solve(b).x, plain.inverse_.at(shift).solve(b).x)


@pytest.mark.parametrize("method", LONG)
def test_a_checkpoint_goes_on_in_another_folder(method, tmp_path):
    pytest.importorskip("safetensors")
    with sklearn.config_context(working_memory=0.001):
        expected = answers(fitted(method, batch_size=5))
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    # In the pass of the factors, and in the last one.
    for last in (3 * N + 2, 4 * N + 6 if method == "ekfac" else 3 * N + 14):
        with sklearn.config_context(working_memory=0.001), pytest.MonkeyPatch.context() as patch:
            patch.setattr("skinvert.checkpoint.EVERY", 0.0)
            patch.setattr("skinvert.checkpoint.SHARE", 1.0)
            rows = Watched(tmp_path, last, KeyboardInterrupt)
            settings = {"batch_size": None, "checkpoint": tmp_path / "fit"}
            with pytest.raises(KeyboardInterrupt):
                fitted(method, tmp_path / "one", rows=DataLoader(rows, 5), **settings)
            assert (tmp_path / "fit").exists()
            rows = DataLoader(Watched(tmp_path), 5)
            again = fitted(method, tmp_path / "two", rows=rows, **settings)
            assert_same(answers(again), expected)


# -- what is refused ---------------------------------------------------------------------------------------------------


class Unread(Dataset):
    """Rows that must not be read."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        pytest.fail("was read")


@pytest.mark.parametrize("method", METHODS)
def test_a_place_that_is_none_is_told_before_any_row_is_read(method, tmp_path):
    (tmp_path / "file").touch()
    for offload, error, match in (
        (3, TypeError, 'offload must be None, "cpu" or the path of a folder that exists. Got 3'),
        (True, TypeError, "Got True"),
        ("gpu", FileNotFoundError, "Got 'gpu' instead. Try os.makedirs"),
        (tmp_path / "none", FileNotFoundError, "none' instead"),
        (tmp_path / "file", NotADirectoryError, "Got the file"),
    ):
        with pytest.raises(error, match=match):
            fitted(method, offload, rows=DataLoader(Unread(), 5), batch_size=None)


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_that_cannot_be_written_to(method, tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(PermissionError, match="a folder that files can be written to.*Permission denied"):
        fitted(method, tmp_path, rows=DataLoader(Unread(), 5), batch_size=None)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no room is asked for here")
def test_a_system_folder():
    with pytest.raises(OSError, match="a folder that files can be written to"):
        fitted("kfac", "/proc/self")


def test_a_full_disk_is_told_before_the_passes(tmp_path, monkeypatch):
    rows = Watched(tmp_path)
    with sklearn.config_context(working_memory=0.001):
        fitted("ekfac", tmp_path, rows=DataLoader(rows, 5), batch_size=None)
        whole = rows.read
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
        rows = Watched(tmp_path)
        with pytest.raises(OSError, match=r"on a disk with .* free. Got 9.77 KiB instead. Try a folder") as error:
            fitted("ekfac", tmp_path, rows=DataLoader(rows, 5), batch_size=None)
    assert error.value.errno == errno.ENOSPC
    # The gradient's pass and the probe's rows are read; those of the factors and of the eigenvalues are not.
    assert rows.read <= whole - 2 * N


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="written by zeros here")
def test_a_disk_that_gives_no_room_after_all(tmp_path, monkeypatch):
    calls, original = [], os.posix_fallocate

    def full(descriptor, offset, size):
        calls.append(size)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    match = "could not be made: No space left on device. Try a folder on another disk"
    with pytest.raises(OSError, match=match) as error:
        fitted("kfac", tmp_path)
    assert error.value.errno == errno.ENOSPC and len(calls) == 4
    gc.collect()
    assert os.listdir(tmp_path) == []


LIMITED = """
import resource, signal, sys, torch
from skinvert import HessianInverter
from skinvert.methods import KFAC
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
net, data = torch.nn.Linear(900, 3), (torch.randn(9, 900), torch.arange(9) % 3)
try:
    HessianInverter(KFAC(offload=sys.argv[1]), 0.1, loss="cross_entropy").fit(net, data)
except OSError as error:
    print(error)
"""


@LINUX
def test_a_file_larger_than_the_system_allows(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "could not be made: File too large. Try a folder" in done.stdout and os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="written by zeros here")
@pytest.mark.parametrize("native", [True, False])
def test_a_file_has_all_of_its_room_at_once(native, tmp_path, monkeypatch):
    if not native:
        monkeypatch.delattr(os, "posix_fallocate")
    found, original = [], mmap.mmap

    def noted(descriptor, size):
        found.append((os.fstat(descriptor).st_blocks * 512, size))
        return original(descriptor, size)

    monkeypatch.setattr(_storage.mmap, "mmap", noted)
    storage = InFiles(tmp_path, torch.device("cpu"))
    storage.reserve({"one": 3 * 2**20 + 5})
    assert len(found) == 1 and all(blocks >= size for blocks, size in found)
    assert not storage.zeros((100,), torch.float64, torch.device("cpu"), "one").any()
    assert len(found) == 1


def test_tensors_of_a_group_lie_beside_each_other_and_keep_their_strides(tmp_path):
    storage, cpu = InFiles(tmp_path, torch.device("cpu")), torch.device("cpu")
    storage.reserve({"one": 256})
    first = storage.keep(torch.arange(6.0).reshape(2, 3).mT, "one")
    second = storage.keep(torch.tensor([True, False]), "one")
    third = storage.zeros((3, 0), torch.float32, cpu, "one")
    assert first.stride() == (1, 3) and first.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert second.tolist() == [True, False] and third.shape == (3, 0)
    assert second.data_ptr() - first.data_ptr() == _storage.ALIGNMENT
    # What is too large for the rest of the file has another one.
    fourth = storage.empty((100,), torch.float64, cpu, "one").fill_(7)
    assert first.tolist() == [[0, 3], [1, 4], [2, 5]] and bool((fourth == 7).all())


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_counts_what_is_held_and_the_way_out_is_offload(method, tmp_path, monkeypatch):
    net = nn.Sequential(*[nn.Linear(40, 40) for _ in range(30)], nn.Linear(40, 3)).double()
    rows = (torch.randn(8, 40, dtype=torch.float64), torch.arange(8) % 3)
    factors = 8 * 30 * (40**2 + 41**2)
    # Too little for the factors and their eigenbases, and enough for the rows of one layer.
    monkeypatch.setattr(_memory, "available_memory", lambda _: 2 * factors)
    for offload in (None, "cpu"):
        with pytest.raises(MemoryError, match=r"The Kronecker factors of the layers needs.*Try .*offload.*`params`"):
            fitted(method, offload, net, rows)
    assert fitted(method, tmp_path, net, rows).inverse_.place == f"files in {str(tmp_path)!r}"
    monkeypatch.setattr(_memory, "available_memory", lambda _: 8 * 3 * 41**2)
    with pytest.raises(MemoryError, match="one at a time, needs"):
        fitted(method, tmp_path, net, rows)


def test_where_the_numbers_lie_is_said(tmp_path, capsys):
    fitted("ekfac", tmp_path, verbose=1)
    assert f"in files in {str(tmp_path)!r} and serves alone" in capsys.readouterr().err


PEAK = """
import sys, threading, torch
from torch import nn
from skinvert import HessianInverter
from skinvert.methods import EKFAC, KFAC

method, folder, wide, narrow, pairs = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

torch.manual_seed(0)
layers = [layer for _ in range(pairs) for layer in (nn.Linear(wide, narrow), nn.Tanh(), nn.Linear(narrow, wide))]
net, data = nn.Sequential(*layers, nn.Linear(wide, 2)), (torch.randn(8, wide), torch.arange(8) % 2)
peak, done = [0], threading.Event()
watching = threading.Thread(target=watch)
watching.start()
method = {"kfac": KFAC, "ekfac": EKFAC}[method](offload=folder or None)
inverter = HessianInverter(method, 0.1, loss="cross_entropy", check_residual=False).fit(net, data)
x = inverter.transform(torch.ones(1, inverter.n_features_in_))
done.set()
watching.join()
print(peak[0], float(x.double().norm()))
"""


def peaks(method, folder, wide, narrow, pairs):
    """Peaks of anonymous memory, of a fit and a solve, without and with a folder."""
    found = []
    for offload in ("", str(folder)):
        command = [sys.executable, "-W", "ignore", "-c", PEAK, method, offload, *map(str, (wide, narrow, pairs))]
        # As glibc does by itself with tensors above 32 MB, which real ones are: what is freed is given back.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    (without, x), (within, same) = found
    assert x == same
    return int(without), int(within)


@LINUX
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", METHODS)
def test_the_peak_of_memory_does_not_grow_with_the_layers(method, tmp_path):
    wide, narrow, pairs = 700, 30, 160
    # A and G alone: 2 × 160 sides of 2 MB.
    assert 4 * pairs * ((wide + 1) ** 2 + wide**2) >= 600e6
    without, within = peaks(method, tmp_path, wide, narrow, pairs)
    assert without >= 1.2e9
    assert within <= without / 2
