"""Checkpoints: a fit that was stopped after any write goes on to the same bits, and takes no other work for its own."""

import copy
import os
import pickle

import numpy as np
import pytest
import safetensors
import sklearn
import torch
from facts import EVERY, RESUMING, TIGHT
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from stopping import FAILURES, StoppedError, always_due, entries, failing, rewritten, set_entry, stopping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import skinvert
from skinvert import HessianInverter, InfluenceFunction, SampledFisher, SampledGGN, checkpoint, persistence
from skinvert.checkpoint import CheckpointFile
from skinvert.curvature import Objective
from skinvert.curvature.layers import passes
from skinvert.curvature.layers.probe import probe
from skinvert.identity import Job
from skinvert.methods import EKFAC, KFAC, Arnoldi, Nystroem
from skinvert.persistence import HEADER_BYTES

pytestmark = pytest.mark.filterwarnings("ignore:.*worse than x = 0", "ignore:A = H . λI as arnoldi")


@pytest.fixture(autouse=True)
def _always_due(monkeypatch):
    always_due(monkeypatch)


@pytest.fixture
def stop(monkeypatch):
    return stopping(monkeypatch)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 30), nn.Tanh(), nn.LayerNorm(30), nn.Linear(30, 10), nn.Tanh(), nn.Linear(10, 3)]
    return nn.Sequential(*layers).to(dtype)


def rows(dtype=torch.float64, n=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, dtype=dtype, generator=generator), torch.randint(3, (n,), generator=generator)


def inverter(method="ekfac", path=None, shift=0.1, **settings):
    settings = {"curvature": "ggn", "loss": "cross_entropy", "batch_size": 8, **settings}
    return HessianInverter(method, shift, checkpoint=path, **settings)


def solution(fitted, dtype=torch.float64):
    b = torch.randn(2, fitted.n_features_in_, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return fitted.transform(b)


# -- the same bits -----------------------------------------------------------------------------------------------------

CASES = {
    "kfac": (KFAC(), {}),
    "ekfac": (EKFAC(), {}),
    "ekfac reduce float32": (EKFAC(approx="reduce"), {"dtype": torch.float32}),
    "ekfac hessian": (EKFAC(), {"curvature": "hessian"}),
    "ekfac sampled": (EKFAC(), {"curvature": SampledFisher(2, random_state=3)}),
    "ekfac signs": (EKFAC(), {"curvature": SampledGGN(2, random_state=3)}),
    "ekfac blocks": (EKFAC(), {"blocks": "layer"}),
    "ekfac diagonal": (EKFAC(unsupported="diagonal"), {}),
    "arnoldi": (Arnoldi(rank=6, krylov_dimension=12), {}),
    "arnoldi hessian float32": (Arnoldi(rank=6), {"curvature": "hessian", "dtype": torch.float32}),
    "arnoldi blocks": (Arnoldi(rank=2, krylov_dimension=6), {"blocks": "layer", "params": ["2.*", "5.*"]}),
    "arnoldi as a matrix": (Arnoldi(rank=490), {}),
    "nystroem": (Nystroem(rank=200), {}),
    "nystroem adaptive": (Nystroem(tol=1e-3), {}),
}
# Those that write often.
LONG = ("ekfac blocks", "arnoldi blocks", "arnoldi hessian float32", "arnoldi as a matrix")


def test_every_method_that_resumes_is_tried():
    assert {method.name for method, _ in CASES.values()} == set(RESUMING)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in LONG else case for case in CASES]
)
def test_a_fit_stopped_after_any_write_goes_on_to_the_same_bits(case, tmp_path, stop):
    method, settings = CASES[case]
    net, data, path = network(), rows(), tmp_path / "fit"
    if "diagonal" in case:
        net[3] = nn.utils.parametrizations.weight_norm(net[3])
    expected = solution(inverter(method, **settings).fit(net, data))
    written = stop(None)
    assert torch.equal(solution(inverter(method, path, **settings).fit(net, data)), expected)
    assert not path.exists()
    total = len(written)
    assert total > 1
    for count in sorted({2, total // 2, total}):
        stop(count)
        with pytest.raises(StoppedError):
            inverter(method, path, **settings).fit(net, data)
        assert path.exists()
        written = stop(None)
        assert torch.equal(solution(inverter(method, path, **settings).fit(net, data)), expected), count
        assert os.listdir(tmp_path) == []
        # Only what was left: the first write has nothing in it yet.
        assert len(written) <= total - count + 1, count


def test_another_working_memory_or_number_of_threads_is_no_other_result(tmp_path, stop):
    # What the first pass saw is kept for the second where it fits.
    net, data = network(), rows()
    with sklearn.config_context(working_memory=0.001):
        streamed = solution(inverter("ekfac").fit(net, data))
    np.testing.assert_allclose(solution(inverter("ekfac", tmp_path / "fit").fit(net, data)), streamed, rtol=1e-10)


@pytest.mark.parametrize("method", ["ekfac", "arnoldi"])
def test_a_loader_is_read_again_and_its_order_is_that_of_the_data_set(method, tmp_path, stop):
    net, data, path = network(), rows(), tmp_path / "fit"
    loaders = [DataLoader(TensorDataset(*data), 5, shuffle=True), DataLoader(TensorDataset(*data), 5)]
    settings = {"batch_size": None}
    with sklearn.config_context(working_memory=0.002):
        expected = solution(inverter(method, **settings).fit(net, loaders[0]))
        stop(4)
        with pytest.raises(StoppedError):
            inverter(method, path, **settings).fit(net, loaders[0])
        stop(None)
        assert torch.equal(solution(inverter(method, path, **settings).fit(net, loaders[1])), expected)


class Late(nn.Module):
    """From some row on it uses a weight outside its layer too."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.a(x)
        late = (x[:, :1] > 50) * torch.arange(3)
        return self.c(torch.tanh(h)) + (late * self.a.weight.sum() if late.any() else 0)


def test_layers_that_were_left_out_late_stay_out(tmp_path, stop):
    torch.manual_seed(0)
    net, (X, y), path = Late().double(), rows(), tmp_path / "fit"
    X[20, 0] = 51.0
    method = EKFAC(unsupported="diagonal")
    expected = solution(inverter(method).fit(net, (X, y)))
    written = stop(None)
    inverter(method, path).fit(net, (X, y))
    total, late = len(written), next(i for i, stages in enumerate(written) if "layers left out" in stages)
    assert late > 1
    for count in (late + 1, total):
        stop(count)
        with pytest.raises(StoppedError):
            inverter(method, path).fit(net, (X, y))
        written = stop(None)
        assert torch.equal(solution(inverter(method, path).fit(net, (X, y))), expected)
        assert len(written) <= total - count + 1 + (late if count <= late else 0)


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_eigenbases_are_kept_not_made_again(method, tmp_path, stop, monkeypatch):
    # Another basis of the same eigenspace may come out: sums in the first one would be of no use.
    net, data, path = network(), rows(), tmp_path / "fit"
    written = stop(None)
    expected = solution(inverter(method, path).fit(net, data))
    last = next(i for i, stages in enumerate(written, start=1) if "eigenbasis 2" in stages)
    stop(last + (method == "ekfac"))
    with pytest.raises(StoppedError):
        inverter(method, path).fit(net, data)
    stop(None)
    monkeypatch.setattr(torch.linalg, "eigh", lambda *args: pytest.fail("was made again"))
    assert torch.equal(solution(inverter(method, path).fit(net, data)), expected)


def test_chunks_that_are_passed_over_count(monkeypatch):
    # By their number the direction is chosen that is held against the derivative by the weights.
    A = inverter("ekfac").fit(network(), rows()).curvature_
    found, row_bytes = probe(A)
    monkeypatch.setattr(passes, "rows_within", lambda row_bytes: 3)
    for done in (0, 3, 8, 11, 32):
        over = passes.Passes(A, found, row_bytes, 0)
        seen = [(over.chunks, over.rows.start, over.rows.stop) for _ in over.over(found.layers, done)]
        stops = [8 * batch + stop for batch in range(4) for stop in (3, 6, 8)]
        whole = [(k, start, stop) for k, (start, stop) in enumerate(zip([0, *stops], stops, strict=False))]
        assert seen == [one for one in whole if one[1] >= done]


def test_rows_without_a_model(tmp_path, stop):
    X, path = np.random.default_rng(0).standard_normal((60, 40)), tmp_path / "fit"
    expected = HessianInverter(Nystroem(), 1e-3).fit(X).transform(X[:2])
    stop(2)
    with pytest.raises(StoppedError):
        HessianInverter(Nystroem(), 1e-3, checkpoint=path).fit(X)
    stop(None)
    with pytest.raises(ValueError, match="another data"):
        HessianInverter(Nystroem(), 1e-3, checkpoint=path).fit(X[::-1])
    again = HessianInverter(Nystroem(), 1e-3, checkpoint=path).fit(X)
    np.testing.assert_array_equal(again.transform(X[:2]), expected)


def test_what_is_gone_on_with_is_said(tmp_path, stop, capsys):
    path = tmp_path / "fit"
    stop(4)
    with pytest.raises(StoppedError):
        inverter("ekfac", path).fit(Edited(), rows())
    stop(None)
    inverter("ekfac", path, verbose=1).fit(Edited(), rows())
    assert f"skinvert: checkpoint: goes on with {str(path)!r}, Kronecker factors" in capsys.readouterr().err


def test_a_link_is_followed(tmp_path, stop):
    os.symlink(tmp_path / "fit", tmp_path / "link")
    stop(3)
    with pytest.raises(StoppedError):
        inverter("ekfac", tmp_path / "link").fit(Edited(), rows())
    assert (tmp_path / "fit").is_file()
    stop(None)
    inverter("ekfac", tmp_path / "link").fit(Edited(), rows())
    assert not (tmp_path / "fit").exists()


# -- never mixed -------------------------------------------------------------------------------------------------------


class Edited(nn.Module):
    """A model whose code is another after ``edited`` is set."""

    edited = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.fc(x.cos() if Edited.edited else x)


@pytest.fixture
def stopped(tmp_path, stop):
    """Return the path of an interrupted fit."""
    path = tmp_path / "fit"
    stop(3)
    with pytest.raises(StoppedError):
        inverter("ekfac", path).fit(Edited(), rows())
    stop(None)
    return path


def other_weights():
    net = Edited()
    with torch.no_grad():
        net.fc.bias[0] += 1e-12
    return net


def swapped():
    X, y = rows()
    order = [1, 0, *range(2, 32)]
    return X[order], y[order]


OTHERS = {
    "θ": (lambda path: inverter("ekfac", path).fit(other_weights(), rows()), "another parameters"),
    "rows": (lambda path: inverter("ekfac", path).fit(Edited(), rows(n=31)), "another data"),
    "order": (lambda path: inverter("ekfac", path).fit(Edited(), swapped()), "another data"),
    "weights": (lambda path: inverter("ekfac", path).fit(Edited(), rows(), np.arange(32)), "another data"),
    "λ": (lambda path: inverter("ekfac", path, 0.2).fit(Edited(), rows()), "another hessian_perturbation"),
    "method": (lambda path: inverter("kfac", path).fit(Edited(), rows()), "another method"),
    "setting": (lambda path: inverter(EKFAC(approx="reduce"), path).fit(Edited(), rows()), "another method"),
    "curvature": (
        lambda path: inverter("ekfac", path, curvature="hessian").fit(Edited(), rows()),
        "another curvature",
    ),
    "loss": (
        lambda path: inverter("ekfac", path, loss=nn.CrossEntropyLoss(label_smoothing=0.1)).fit(Edited(), rows()),
        "another loss",
    ),
    "batches": (lambda path: inverter("ekfac", path, batch_size=4).fit(Edited(), rows()), "another data"),
    "penalty": (lambda path: inverter("ekfac", path, weight_decay=0.1).fit(Edited(), rows()), "another parameters"),
    "blocks": (lambda path: inverter("ekfac", path, blocks="layer").fit(Edited(), rows()), "another blocks"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_checkpoint_of_another_fit_is_refused_and_left(case, stopped):
    fit, message = OTHERS[case]
    before = stopped.read_bytes()
    with pytest.raises(ValueError, match=rf"must be a file of this fit.*{message}.*Delete the file to begin anew"):
        fit(stopped)
    assert stopped.read_bytes() == before
    inverter("ekfac", stopped).fit(Edited(), rows())
    assert not stopped.exists()


def test_code_that_was_edited_in_between_is_refused(stopped, monkeypatch):
    monkeypatch.setattr(Edited, "edited", True)
    with pytest.raises(ValueError, match="another code of the model or its loss"):
        inverter("ekfac", stopped).fit(Edited(), rows())


class Unequal(nn.Module):
    """Two outputs, of which one has large inputs, and the code of the other is another after ``factor`` is set."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.large, self.small = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x):
        return torch.cat([self.large(100 * x[:, :2]), Unequal.factor * self.small(x[:, 2:])], 1)


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_code_that_was_edited_is_refused_where_little_depends_on_it(method, tmp_path, stop, monkeypatch):
    X = rows(torch.float32)[0]
    data, path = (X, X[:, 1:3].contiguous()), tmp_path / "fit"
    stop(3)
    with pytest.raises(StoppedError):
        inverter(method, path, loss="mse").fit(Unequal(), data)
    stop(None)
    monkeypatch.setattr(Unequal, "factor", 1.1)
    with pytest.raises(ValueError, match="another code of the model or its loss"):
        inverter(method, path, loss="mse").fit(Unequal(), data)
    monkeypatch.setattr(Unequal, "factor", 1.0)
    expected = solution(inverter(method, loss="mse").fit(Unequal(), data), torch.float32)
    assert torch.equal(solution(inverter(method, path, loss="mse").fit(Unequal(), data), torch.float32), expected)


def weighted(*factors):
    """Return a loss with a factor for each class."""
    factors = torch.tensor(factors, dtype=torch.float64)
    return lambda outputs, targets: factors[targets] * nn.functional.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("method", ["kfac", "ekfac", "arnoldi", "nystroem"])
def test_a_loss_that_was_edited_for_later_rows_alone_is_refused(method, tmp_path, stop):
    (X, _), path, y = rows(), tmp_path / "fit", torch.arange(32) // 11

    def fit(loss, path=None):
        return inverter(method, path, loss=loss).fit(Edited(), (X, y))

    stop(2)
    with pytest.raises(StoppedError):
        fit(weighted(1, 1, 1), path)
    stop(None)
    with pytest.raises(ValueError, match="another code of the model or its loss"):
        fit(weighted(1, 1, 1.01), path)
    assert torch.equal(solution(fit(weighted(1, 1, 1), path)), solution(fit(weighted(1, 1, 1))))


def sure():
    """Return a net whose losses, of 1e-6, have one digit in float32."""
    torch.manual_seed(0)
    net, X = nn.Linear(4, 3, bias=False), torch.randn(32, 4)
    best = net(X).topk(2).values
    with torch.no_grad():
        X *= (14 / (best[:, 0] - best[:, 1]))[:, None]
    return net, (X, net(X).argmax(1)), "cross_entropy"


def at_its_minimum():
    """Return a net whose gradient has no digit in float32."""
    torch.manual_seed(0)
    net, X, Y = nn.Linear(4, 3, bias=False), torch.randn(32, 4), torch.randn(32, 3)
    with torch.no_grad():
        net.weight.copy_(torch.linalg.lstsq(X.double(), Y.double()).solution.mT)
    return net, (X, Y), "mse"


@pytest.mark.parametrize("problem", [sure, at_its_minimum])
def test_what_rounding_makes_of_losses_and_gradient_is_no_other_code(problem, tmp_path, stop, monkeypatch):
    (net, data, loss), path, add = problem(), tmp_path / "fit", Objective._add
    stop(2)
    with pytest.raises(StoppedError):
        inverter("ekfac", path, loss=loss).fit(net, data)
    stop(None)

    def otherwise(self, batch, weights, index, rows):
        # As sums in another order.
        found, eps = add(self, batch, weights, index, rows), torch.finfo(torch.float32).eps
        self.gradient += eps * torch.randn_like(self.gradient)
        return found + eps * torch.randn(())

    monkeypatch.setattr(Objective, "_add", otherwise)
    inverter("ekfac", path, loss=loss).fit(net, data)
    assert not path.exists()


@pytest.mark.parametrize("package", ["skinvert", "torch"])
def test_another_version_is_refused(package, stopped, monkeypatch):
    monkeypatch.setattr({"skinvert": skinvert, "torch": torch}[package], "__version__", "99.0")
    with pytest.raises(ValueError, match=f"another version of {package}"):
        inverter("ekfac", stopped).fit(Edited(), rows())


def test_another_working_memory_is_refused(stopped):
    with sklearn.config_context(working_memory=0.5), pytest.raises(ValueError, match="another working_memory"):
        inverter("ekfac", stopped).fit(Edited(), rows())


@pytest.mark.parametrize("kind", ["text", "inverter", "empty", "truncated", "flipped"])
def test_a_file_that_is_no_checkpoint_is_refused_and_left(kind, stopped):
    content = bytearray(stopped.read_bytes())
    content[len(content) // 2] ^= 1
    if kind == "inverter":
        inverter("direct").fit(Edited(), rows()).save(stopped)
    else:
        whole = stopped.read_bytes()
        stopped.write_bytes({"text": b"mine", "empty": b"", "truncated": whole[:-9], "flipped": bytes(content)}[kind])
    before = stopped.read_bytes()
    with pytest.raises(ValueError, match="must be a file of this fit.*Delete the file to begin anew"):
        inverter("ekfac", stopped).fit(Edited(), rows())
    assert stopped.read_bytes() == before


# -- from a stranger ---------------------------------------------------------------------------------------------------


CRAFTED = {
    "a function": lambda stages, arrays: set_entry(
        stages, "Kronecker factors", "rows", ["packed", "dtype", "save", []]
    ),
    "a negative count": lambda stages, arrays: set_entry(stages, "Kronecker factors", "rows", -1),
    "a word": lambda stages, arrays: set_entry(stages, "Kronecker factors", "rows", "8"),
    "no tensor": lambda stages, arrays: set_entry(stages, "Kronecker factors", "0 left", None),
    "another tensor": lambda stages, arrays: set_entry(
        stages, "Kronecker factors", "0 left", entries(stages, "Kronecker factors")[-1][1]
    ),
    "one entry more": lambda stages, arrays: entries(stages, "Kronecker factors").append(["__class__", "os.system"]),
    "one entry less": lambda stages, arrays: entries(stages, "Kronecker factors").pop(),
    "a stage that is none": lambda stages, arrays: stages.append(["eigenvalues", "../../outside"]),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_state_that_no_fit_left_is_refused(case, stopped):
    rewritten(stopped, CRAFTED[case])
    with pytest.raises(ValueError, match="must be a file of this fit"):
        inverter("ekfac", stopped).fit(Edited(), rows())


def test_a_krylov_space_that_no_fit_left_is_refused(tmp_path, stop):
    path, method = tmp_path / "fit", Arnoldi(rank=6, krylov_dimension=12)
    for name, value in [("done", 10**6), ("depth", -1), ("generator", None), ("found", ["list", []])]:
        stop(3)
        with pytest.raises(StoppedError):
            inverter(method, path).fit(network(), rows())
        stop(None)
        rewritten(path, lambda stages, arrays, name=name, value=value: set_entry(stages, "Krylov space", name, value))
        with pytest.raises(ValueError, match="checkpoint"):
            inverter(method, path).fit(network(), rows())
        path.unlink()


def test_names_in_a_checkpoint_are_no_paths(stopped, tmp_path):
    names = ["../outside", "/outside", "a/../../b", "C:\\x", "\0"]
    rewritten(stopped, lambda stages, arrays: stages.extend([name, ["dict", []]] for name in names))
    before = {path for path in tmp_path.parent.rglob("*") if path != stopped}
    inverter("ekfac", stopped).fit(Edited(), rows())
    assert {path for path in tmp_path.parent.rglob("*") if path != stopped} == before


@pytest.mark.parametrize("length", [HEADER_BYTES + 1, 2**40, 2**64 - 1])
def test_a_header_is_bounded_before_anything_is_allocated(length, stopped, monkeypatch):
    stopped.write_bytes(length.to_bytes(8, "little") + stopped.read_bytes()[8:])
    monkeypatch.setattr(safetensors, "safe_open", lambda *args, **kwargs: pytest.fail("was read"))
    with pytest.raises(ValueError, match="another file, or a damaged one") as told:
        inverter("ekfac", stopped).fit(Edited(), rows())
    assert f"a header of {length:,} bytes" in str(told.value.__cause__)


def test_nothing_is_unpickled(stopped, monkeypatch):
    for module, name in [(pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("was unpickled"))
    inverter("ekfac", stopped).fit(Edited(), rows())


# -- the setting -------------------------------------------------------------------------------------------------------


class Unread:
    def __iter__(self):
        pytest.fail("was read")


@pytest.mark.parametrize("name", sorted(set(EVERY) - set(RESUMING)))
def test_a_method_without_checkpoints_says_so_before_the_data_are_read(name, tmp_path):
    with pytest.raises(ValueError, match=rf"must be one of \['arnoldi', .*'nystroem'.*Got '{name}'"):
        HessianInverter(TIGHT[name], 0.1, loss="mse", checkpoint=tmp_path / "fit").fit(nn.Linear(2, 1), Unread())
    assert os.listdir(tmp_path) == []


def test_processes_together_have_none(tmp_path):
    with pytest.raises(ValueError, match="checkpoint must be None for a fit with process_group"):
        checkpoint.check_checkpoint(tmp_path / "fit", EKFAC(), together=True)


def test_a_path_is_a_string_or_a_path():
    with pytest.raises(TypeError, match="checkpoint must be None or a path. Got int"):
        inverter("ekfac", 3).fit(nn.Linear(2, 1), Unread())


@pytest.mark.parametrize(
    ("path", "kind"), [("", ValueError), ("a\0b", ValueError), ("a" * 300, OSError), ("b/" * 5000, OSError)]
)
def test_a_path_that_no_file_can_have_is_told_before_the_data_are_read(path, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match="checkpoint must be"):
        inverter("ekfac", path).fit(nn.Linear(2, 1), Unread())
    with pytest.raises(kind, match="checkpoint must be"):
        InfluenceFunction(inverter("ekfac"), checkpoint=path).fit(nn.Linear(2, 1), Unread())
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there_is_told_before_the_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="The folder of path must be one that exists"):
        inverter("ekfac", tmp_path / "none" / "fit").fit(Edited(), rows())


def test_the_setting_is_cloned_and_pickled_and_in_no_saved_file(tmp_path):
    fitted = inverter("ekfac", tmp_path / "fit").fit(Edited(), rows())
    for other in (clone(fitted), pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        assert other.checkpoint == tmp_path / "fit"
    fitted.save(tmp_path / "inverse")
    loaded = skinvert.load(tmp_path / "inverse")
    assert loaded.checkpoint is None
    assert torch.equal(solution(loaded), solution(fitted))
    assert str(tmp_path).encode() not in (tmp_path / "inverse").read_bytes()


def test_a_search_over_one_folder_mixes_nothing_and_goes_on(tmp_path, stop):
    X, y = rows()
    folder = tmp_path / "fits"
    folder.mkdir()

    def search(path):
        grid = {"hessian_perturbation": [0.1, 1.0], "method__approx": ["expand", "reduce"]}
        return GridSearchCV(inverter(EKFAC(), path, model=Edited()), grid, cv=2, error_score="raise").fit(X, y)

    expected = search(None).cv_results_["mean_test_score"]
    written = stop(None)
    assert np.array_equal(search(folder).cv_results_["mean_test_score"], expected)
    assert os.listdir(folder) == []
    stop(len(written) // 2)
    with pytest.raises(StoppedError):
        search(folder)
    (left,) = folder.iterdir()
    assert set(left.stem) <= set("0123456789abcdef")
    stop(None)
    assert np.array_equal(search(folder).cv_results_["mean_test_score"], expected)
    assert os.listdir(folder) == []
    # One file for all is refused once a fit was interrupted, never mixed.
    stop(len(written) // 2)
    with pytest.raises(StoppedError):
        search(tmp_path / "one")
    stop(None)
    with pytest.raises(ValueError, match="in a folder that exists each fit has its own file"):
        search(tmp_path / "one")


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_writes_take_a_twentieth_of_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 1.0)
    monkeypatch.setattr(checkpoint, "SHARE", 0.05)
    now, spent = [0.0], [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])

    def save(*args):
        now[0] += 2.0
        spent[0] += 2.0

    monkeypatch.setattr(checkpoint, "save_state", save)
    file = CheckpointFile(tmp_path / "fit", Job())
    for _ in range(10_000):
        now[0] += 0.1
        file.keep("stage", dict)
    assert 0.04 < spent[0] / now[0] <= 0.052
    # Where a write costs nothing, one a second.
    monkeypatch.setattr(checkpoint, "save_state", lambda *args: spent.append(now[0]))
    spent.clear()
    for _ in range(2_000):
        now[0] += 0.1
        file.keep("stage", dict)
    assert 150 < len(spent) <= 201


# -- where it cannot be written ----------------------------------------------------------------------------------------


def test_a_disk_that_is_full_at_the_start_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(persistence.shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and _Usage())
    with pytest.raises(OSError, match="The disk of .* must be one with .* bytes free"):
        inverter("ekfac", tmp_path / "fit").fit(Edited(), rows())


class _Usage:
    free = 0


@pytest.mark.parametrize("error", FAILURES)
def test_a_write_that_fails_later_costs_the_checkpoint_not_the_fit(error, tmp_path, monkeypatch):
    net, data, path = Edited(), rows(), tmp_path / "fit"
    expected, calls = solution(inverter("ekfac").fit(net, data)), failing(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match="The checkpoint was not written, and the fit goes on without") as told:
        fitted = inverter("ekfac", path).fit(net, data)
    assert torch.equal(solution(fitted), expected)
    # Told once, and tried again a minute later.
    assert len(told) == 1
    assert len(calls) == 3


def test_a_fit_that_fails_leaves_its_checkpoint(tmp_path, monkeypatch):
    net, data, path = network(), rows(), tmp_path / "fit"
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *args: (_ for _ in ()).throw(RuntimeError("out of luck")))
    with pytest.raises(RuntimeError, match="out of luck"):
        inverter("ekfac", path).fit(net, data)
    assert path.exists()
    monkeypatch.setattr(torch.linalg, "eigh", original)
    inverter("ekfac", path).fit(net, data)
    assert not path.exists()


# -- files of scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["before the file", "before the note"])
def test_scores_that_were_stopped_while_their_file_was_made_are_not_zeros(where, tmp_path, monkeypatch):
    net, data, path = Edited(), rows(), tmp_path / "scores.npy"
    influence = InfluenceFunction(inverter("kfac")).fit(net, data)
    expected, replace = influence.transform(data), os.replace

    def stopped(source, target):
        if str(target).endswith(".npy" if where == "before the file" else ".json"):
            raise StoppedError
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(persistence.os, "replace", stopped)
        with pytest.raises(StoppedError):
            influence.transform(data, out=path)
    assert not path.exists()
    torch.testing.assert_close(torch.from_numpy(np.array(influence.transform(data, out=path))), expected)


def test_scores_whose_note_was_torn_are_refused(tmp_path):
    data, path = rows(), tmp_path / "scores.npy"
    influence = InfluenceFunction(inverter("kfac")).fit(Edited(), data)
    influence.transform(data, out=path)
    note = tmp_path / "scores.npy.json"
    note.write_bytes(note.read_bytes()[:10])
    with pytest.raises(ValueError, match="out must be a new file, or one of the same scores"):
        influence.transform(data, out=path)
