"""Scores with a checkpoint: stopped after any write they go on to the same bits, and take no other job's for theirs."""

import copy
import os
import pickle

import numpy as np
import pytest
import safetensors
import sklearn
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV
from stopping import FAILURES, StoppedError, always_due, entries, failing, rewritten, set_entry, stopping
from torch import nn

import skinvert
from skinvert import HessianInverter, InfluenceFunction, SampledGGN, checkpoint, persistence
from skinvert.identity import Job
from skinvert.influence import course
from skinvert.methods import CG
from skinvert.persistence import HEADER_BYTES

pytestmark = pytest.mark.filterwarnings("ignore:.*worse than x = 0", "ignore:The scores of")

N, P = 20, 67


@pytest.fixture(autouse=True)
def _always_due(monkeypatch):
    always_due(monkeypatch)
    # No power fails here.
    monkeypatch.setattr(persistence.os, "fsync", lambda file: None)


@pytest.fixture
def stop(monkeypatch):
    return stopping(monkeypatch)


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def rows(n=N, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, dtype=dtype, generator=generator), torch.randint(3, (n,), generator=generator)


def inverter(method="kfac", shift=0.1, **settings):
    return HessianInverter(method, shift, **{"loss": "cross_entropy", "batch_size": 7, **settings})


def influence(path=None, own=None, **settings):
    """Several test batches, and some six solutions at a time."""
    settings = {"batch_size": 3, "memory": 4 * 4 * P * 6, **settings}
    return InfluenceFunction(inverter() if own is None else own, checkpoint=path, **settings)


def fitted(path=None, own=None, dtype=torch.float32, **settings):
    return influence(path, own, **settings).fit(network(dtype), rows(dtype=dtype))


def alike(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# -- the same bits -----------------------------------------------------------------------------------------------------


def numbers(outputs, targets):
    return outputs.logsumexp(1).sum()


FEW, MANY = rows(8, seed=2), rows(N + 4, seed=2)
CALLS = {
    "transform": lambda found, test: [found.transform(test)],
    "top": lambda found, test: [*found.top(test, k=4, harmful=True)],
    "self_influence": lambda found, test: [torch.from_numpy(found.self_influence())],
    "group_effect": lambda found, test: [found.group_effect([[0, 1], [2, 5, 9], [4]], test)],
}
KINDS = {
    "first order": {},
    "newton": {"removal": "newton"},
    "cosine": {"normalize": "cosine"},
    "relatif": {"normalize": "relatif"},
    "certified": {"score_rtol": 0.1},
    "numbers": {"measurement": [numbers, lambda outputs, targets: outputs.square().sum()]},
    "margin": {"measurement": "margin"},
}
CASES = [
    *((kind, "transform", test) for kind in KINDS for test in ("few", "many")),
    *((kind, "top", test) for kind in ("first order", "newton", "certified") for test in ("few", "many")),
    *((kind, call, "few") for kind in ("first order", "newton") for call in ("self_influence", "group_effect")),
    ("first order", "group_effect", "many"),
]
# One of each way through the code; the rest takes minutes.
QUICK = [
    *((kind, "transform", "few") for kind in ("first order", "newton", "certified")),
    ("first order", "top", "few"),
    ("newton", "self_influence", "few"),
    ("first order", "group_effect", "few"),
]
STOPPED = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]


def check_every_stop(stop, run, path, every=False):
    """Stop a run after its writes, and hold what the next one returns to ``run(None)``."""
    expected = run(None)
    written = stop(None)
    assert alike(run(path), expected)
    assert not path.exists()
    total = len(written)
    assert total > 2
    for count in range(1, total + 1) if every else sorted({total // 2, total}):
        stop(count)
        with pytest.raises(StoppedError):
            run(path)
        assert path.exists()
        written = stop(None)
        assert alike(run(path), expected), count
        assert os.listdir(path.parent) == []
        # Only what was left: the first write has nothing in it yet.
        assert len(written) <= total - count + 1, count


@pytest.mark.parametrize(("kind", "call", "test"), STOPPED)
def test_stopped_after_any_write_it_goes_on_to_the_same_bits(kind, call, test, tmp_path, stop):
    data = FEW if test == "few" else MANY

    def run(path):
        return CALLS[call](fitted(path, **KINDS[kind]), data)

    check_every_stop(stop, run, tmp_path / "scores")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["cg", "direct", "lissa", "arnoldi", "ekfac"])
@pytest.mark.parametrize("removal", ["first_order", "newton"])
def test_every_stop_of_every_kind_of_method(removal, method, dtype, tmp_path, stop):
    own, test = inverter(method, 0.1, curvature="ggn"), rows(8, seed=2, dtype=dtype)

    def run(path):
        return [fitted(path, own, dtype, removal=removal).transform(test)]

    check_every_stop(stop, run, tmp_path / "scores", every=True)


@pytest.mark.parametrize("call", ["transform", "top", "self_influence"])
def test_an_ensemble_goes_on_in_the_model_where_it_was(call, tmp_path, stop):
    nets = [network(seed=seed) for seed in (0, 1, 2)]
    check_every_stop(stop, lambda path: CALLS[call](influence(path).fit(nets, rows()), FEW), tmp_path / "scores")


def test_bounds_are_known_of_what_an_earlier_run_did(tmp_path, stop):
    def run(path):
        found = fitted(path, score_rtol=0.1)
        return [found.transform(FEW), torch.from_numpy(found.score_error_)]

    assert bool(run(None)[1].isfinite().all())
    check_every_stop(stop, run, tmp_path / "scores")


def test_rows_in_forward_mode_are_passed_over(tmp_path, stop, monkeypatch):
    """What the solutions have met already is read, not computed; nor are they solved again."""
    test = rows(2, seed=2)
    expected = fitted().transform(test)
    written = stop(None)
    fitted(tmp_path / "scores").transform(test)
    stop(len(written) - 1)
    with pytest.raises(StoppedError):
        fitted(tmp_path / "scores").transform(test)
    stop(None)
    again = fitted(tmp_path / "scores")
    solved, met, meet = [], [], course.Course.meet
    monkeypatch.setattr(HessianInverter, "solve", lambda *args, **kwargs: solved.append(args))
    monkeypatch.setattr(course.Course, "meet", lambda self, stop: met.append(stop) or meet(self, stop))
    assert torch.equal(again.transform(test), expected)
    assert (solved, met) == ([], [])


def test_forward_mode_that_was_left_is_not_taken_up_again(tmp_path, stop, monkeypatch):
    """A batch that it does not serve decides for those after it, whoever meets them."""
    from skinvert.influence import sides

    test, derivatives = rows(2, seed=2), sides.derivatives_along

    def but_for_the_second(model, batch, values, V):
        return None if torch.equal(batch[0], rows()[0][7:14]) else derivatives(model, batch, values, V)

    monkeypatch.setattr(sides, "derivatives_along", but_for_the_second)
    check_every_stop(stop, lambda path: [fitted(path).transform(test)], tmp_path / "scores", every=True)
    stop(4)
    with pytest.raises(StoppedError):
        fitted(tmp_path / "scores").transform(test)
    stop(None)
    monkeypatch.setattr(sides, "derivatives_along", lambda *args: pytest.fail("was taken up again"))
    fitted(tmp_path / "scores").transform(test)


def test_arrays_frames_and_labels_are_as_ever(tmp_path):
    pd = pytest.importorskip("pandas")
    X, y = (part.numpy() for part in FEW)
    plain, kept = (fitted(path).set_output(transform="pandas") for path in (None, tmp_path / "scores"))
    pd.testing.assert_frame_equal(kept.transform(X, y), plain.transform(X, y))
    for one, other in zip(kept.top(X, y, k=3), plain.top(X, y, k=3), strict=True):
        pd.testing.assert_frame_equal(one, other)
    assert os.listdir(tmp_path) == []


def test_what_is_gone_on_with_is_said(tmp_path, stop, capsys):
    path = interrupted(tmp_path, stop)
    fitted(path, verbose=1).transform(FEW)
    assert f"skinvert: checkpoint: goes on with {str(path)!r}, scores" in capsys.readouterr().err


# -- never mixed -------------------------------------------------------------------------------------------------------


def interrupted(tmp_path, stop, count=4, call="transform", **settings):
    """Return the path of interrupted scores."""
    path = tmp_path / "scores"
    stop(count)
    with pytest.raises(StoppedError):
        CALLS[call](fitted(path, **settings), FEW)
    stop(None)
    return path


def nudged():
    net = network()
    with torch.no_grad():
        net[0].bias[0] += 1e-6
    return net


def swapped(data):
    X, y = data
    order = [1, 0, *range(2, len(X))]
    return X[order], y[order]


def relabelled():
    X, y = FEW
    return X, (y + 1) % 3


OTHERS = {
    "θ": (lambda path: influence(path).fit(nudged(), rows()).transform(FEW), "another parameters"),
    "training rows": (lambda path: influence(path).fit(network(), rows(19)).transform(FEW), "another data"),
    "order": (lambda path: influence(path).fit(network(), swapped(rows())).transform(FEW), "another data"),
    "weights": (
        lambda path: influence(path).fit(network(), rows(), np.arange(N)).transform(FEW),
        "another data",
    ),
    "test rows": (lambda path: fitted(path).transform(rows(8, seed=3)), "another test data"),
    "fewer test rows": (lambda path: fitted(path).transform(rows(7, seed=2)), "another test data"),
    "order of test rows": (lambda path: fitted(path).transform(swapped(FEW)), "another test data"),
    "labels": (lambda path: fitted(path).transform(relabelled()), "another test data"),
    "λ": (lambda path: fitted(path, inverter(shift=0.2)).transform(FEW), "another hessian_perturbation"),
    "method": (lambda path: fitted(path, inverter("ekfac")).transform(FEW), "another method"),
    "curvature": (lambda path: fitted(path, inverter(curvature="hessian")).transform(FEW), "another curvature"),
    "draws": (
        lambda path: fitted(path, inverter(curvature=SampledGGN(1, random_state=0))).transform(FEW),
        "another curvature setting",
    ),
    "loss": (
        lambda path: fitted(path, inverter(loss=nn.CrossEntropyLoss())).transform(FEW),
        "another loss",
    ),
    "penalty": (lambda path: fitted(path, inverter(weight_decay=0.1)).transform(FEW), "another parameters"),
    "blocks": (lambda path: fitted(path, inverter(blocks="layer")).transform(FEW), "another blocks"),
    "batches": (lambda path: fitted(path, inverter(batch_size=8)).transform(FEW), "another data"),
    "batches of test rows": (lambda path: fitted(path, batch_size=4).transform(FEW), "another batch_size of test rows"),
    "memory": (lambda path: fitted(path, memory=10**6).transform(FEW), "another memory"),
    "removal": (lambda path: fitted(path, removal="newton").transform(FEW), "another removal"),
    "normalize": (lambda path: fitted(path, normalize="relatif").transform(FEW), "another normalize"),
    "score_rtol": (lambda path: fitted(path, score_rtol=0.1).transform(FEW), "another score_rtol"),
    "measurement": (lambda path: fitted(path, measurement="margin").transform(FEW), "another measurement"),
    "call": (lambda path: fitted(path).top(FEW), "another kind of result"),
    "rows alone": (lambda path: fitted(path).self_influence(), "another test data, another kind of result"),
    "an ensemble": (lambda path: influence(path).fit([network()] * 2, rows()).transform(FEW), "another"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_checkpoint_of_another_job_is_refused_and_left(case, tmp_path, stop):
    path, (run, message) = interrupted(tmp_path, stop), OTHERS[case]
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"must be a file of this job.*{message}.*Delete the file to begin anew"):
        run(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("settings", "message"), [({"k": 3}, "another k"), ({"harmful": True}, "another harmful")])
def test_top_of_another_k_or_sign_is_refused(settings, message, tmp_path, stop):
    path = tmp_path / "scores"
    stop(3)
    with pytest.raises(StoppedError):
        fitted(path).top(FEW)
    stop(None)
    with pytest.raises(ValueError, match=message):
        fitted(path).top(FEW, **settings)


def test_other_groups_are_refused(tmp_path, stop):
    path = interrupted(tmp_path, stop, call="group_effect")
    with pytest.raises(ValueError, match="another groups"):
        fitted(path).group_effect([[0, 1], [2, 5, 8], [4]], FEW)


@pytest.mark.parametrize("package", ["skinvert", "torch"])
def test_another_version_is_refused(package, tmp_path, stop, monkeypatch):
    path = interrupted(tmp_path, stop)
    monkeypatch.setattr({"skinvert": skinvert, "torch": torch}[package], "__version__", "99.0")
    with pytest.raises(ValueError, match=f"another version of {package}"):
        fitted(path).transform(FEW)


def test_another_working_memory_is_refused(tmp_path, stop):
    path = interrupted(tmp_path, stop)
    with sklearn.config_context(working_memory=0.5), pytest.raises(ValueError, match="another working_memory"):
        fitted(path).transform(FEW)


class Edited:
    """A measurement whose code is another after ``factor`` is set."""

    factor = 1.0

    def __call__(self, outputs, targets):
        return Edited.factor * outputs.logsumexp(1)


def test_a_measurement_that_was_edited_in_between_is_refused(tmp_path, stop, monkeypatch):
    path = interrupted(tmp_path, stop, measurement=Edited())
    monkeypatch.setattr(Edited, "factor", 1.1)
    with pytest.raises(ValueError, match="another code of the measurement"):
        fitted(path, measurement=Edited()).transform(FEW)


def margin(outputs, targets):
    return outputs.gather(1, targets[:, None])[:, 0]


class Smoothed:
    """A cross-entropy whose GGN is the same after ``smoothing`` is set, and whose gradients are others."""

    smoothing = 0.0

    def __call__(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, label_smoothing=Smoothed.smoothing)


@pytest.mark.parametrize("own", ["kfac", "direct", "cg"])
def test_a_training_loss_of_the_same_curvature_is_refused(own, tmp_path, stop, monkeypatch):
    one, other = (nn.CrossEntropyLoss(label_smoothing=part) for part in (0.0, 0.3))
    # Edited code of one name, and a module that says so.
    for first, then, message in [
        (Smoothed(), Smoothed(), "code of the model or its loss"),
        (one, other, "another loss"),
    ]:
        path = interrupted(tmp_path, stop, own=inverter(own, curvature="ggn", loss=first), measurement=margin)
        monkeypatch.setattr(Smoothed, "smoothing", 0.3)
        found = fitted(path, inverter(own, curvature="ggn", loss=then), measurement=margin)
        with pytest.raises(ValueError, match=message):
            found.transform(FEW)
        path.unlink()
        monkeypatch.setattr(Smoothed, "smoothing", 0.0)


def test_a_measurement_of_the_same_values_and_other_gradients_is_refused(tmp_path, stop):
    def measured(outputs, targets):
        kept = outputs if measured.whole else outputs * 0.5 + outputs.detach() * 0.5
        return margin(kept, targets)

    measured.whole = True
    path = interrupted(tmp_path, stop, measurement=measured)
    measured.whole = False
    with pytest.raises(ValueError, match="another code of the measurement"):
        fitted(path, measurement=measured).transform(FEW)
    measured.whole = True
    assert torch.equal(fitted(path, measurement=measured).transform(FEW), fitted(measurement=measured).transform(FEW))


def test_another_factorisation_of_the_same_settings_is_refused(tmp_path, stop):
    path = interrupted(tmp_path, stop)
    found = fitted(path)
    found.inverter_.inverse_ = found.inverter_.inverse_.at(0.101)
    with pytest.raises(ValueError, match="another inverse"):
        found.transform(FEW)


@pytest.mark.parametrize("kind", ["text", "inverter", "a fit's", "empty", "truncated", "flipped"])
def test_a_file_that_is_no_checkpoint_is_refused_and_left(kind, tmp_path, stop):
    path = interrupted(tmp_path, stop)
    whole, flipped = path.read_bytes(), bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    if kind == "inverter":
        inverter("direct", curvature="ggn").fit(network(), rows()).save(path)
    elif kind == "a fit's":
        path.unlink()
        stop(2)
        with pytest.raises(StoppedError):
            inverter("ekfac", checkpoint=path).fit(network(), rows())
        stop(None)
    else:
        path.write_bytes({"text": b"mine", "empty": b"", "truncated": whole[:-9], "flipped": bytes(flipped)}[kind])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="must be a file of this job.*Delete the file to begin anew"):
        fitted(path).transform(FEW)
    assert path.read_bytes() == before


# -- from a stranger ---------------------------------------------------------------------------------------------------


def put(name, value):
    return lambda stages, arrays: set_entry(stages, "scores", name, value)


CRAFTED = {
    "a function": put("done", ["packed", "dtype", "save", []]),
    "a negative count": put("done", -1),
    "more than all": put("done", N + 1),
    "a word": put("met", "8"),
    "more than it could meet": put("met", N + 1),
    "no mode": put("forward", 1),
    "no solutions": put("X", None),
    "scores as solutions": lambda stages, arrays: set_entry(
        stages, "scores", "X", dict(map(tuple, entries(stages, "scores")))["scores"]
    ),
    "no scores": put("scores", None),
    "one entry more": lambda stages, arrays: entries(stages, "scores").append(["__class__", "os.system"]),
    "one entry less": lambda stages, arrays: entries(stages, "scores").pop(),
    "another dtype": lambda stages, arrays: arrays.update({k: v.astype("f8") for k, v in arrays.items()}),
    "a stage that is none": lambda stages, arrays: stages.append(["sizes", "../../outside"]),
    "rows out of step": put("done", 1),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_state_that_no_run_left_is_refused(case, tmp_path, stop):
    path = interrupted(tmp_path, stop)
    rewritten(path, CRAFTED[case])
    with pytest.raises(ValueError, match="checkpoint .*must be"):
        fitted(path).transform(FEW)


@pytest.mark.parametrize(
    ("name", "value"),
    [("places", N), ("places", -2)],
)
def test_places_that_are_none_are_refused(name, value, tmp_path, stop):
    path = tmp_path / "scores"
    stop(4)
    with pytest.raises(StoppedError):
        fitted(path).top(FEW, k=4)
    stop(None)

    def change(stages, arrays):
        key = dict(map(tuple, entries(stages, "scores")))[name][2][1]
        arrays[key][0, 0] = value

    rewritten(path, change)
    with pytest.raises(ValueError, match="The largest of a checkpoint must be"):
        fitted(path).top(FEW, k=4)


@pytest.mark.parametrize("length", [HEADER_BYTES + 1, 2**40, 2**64 - 1])
def test_a_header_is_bounded_before_anything_is_allocated(length, tmp_path, stop, monkeypatch):
    path = interrupted(tmp_path, stop)
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    found = fitted(path)
    monkeypatch.setattr(safetensors, "safe_open", lambda *args, **kwargs: pytest.fail("was read"))
    with pytest.raises(ValueError, match="another file, or a damaged one"):
        found.transform(FEW)


def test_nothing_is_unpickled(tmp_path, stop, monkeypatch):
    path = interrupted(tmp_path, stop)
    for module, name in [(pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("was unpickled"))
    fitted(path).transform(FEW)


# -- the setting -------------------------------------------------------------------------------------------------------


def test_a_path_is_a_string_or_a_path():
    with pytest.raises(TypeError, match="checkpoint must be None or a path. Got int"):
        fitted(3)
    with pytest.raises(TypeError, match="checkpoint must be None or a path. Got int"):
        fitted().set_params(checkpoint=3).transform(FEW)


def test_a_folder_that_is_not_there_is_told_before_the_work(tmp_path, monkeypatch):
    found = fitted(tmp_path / "none" / "scores")
    monkeypatch.setattr(HessianInverter, "solve", lambda *args, **kwargs: pytest.fail("was solved"))
    with pytest.raises(FileNotFoundError, match="The folder of path must be one that exists"):
        found.transform(FEW)


def test_it_is_cloned_and_pickled_and_a_pickle_goes_on(tmp_path, stop):
    path = tmp_path / "scores"
    found = fitted(path)
    loaded = pickle.loads(pickle.dumps(found))
    for other in (clone(found), loaded, copy.deepcopy(found)):
        assert other.checkpoint == path
        assert other.get_params()["checkpoint"] == path
    expected, written = fitted().transform(FEW), stop(None)
    found.transform(FEW)
    total = len(written)
    stop(total - 2)
    with pytest.raises(StoppedError):
        found.transform(FEW)
    written = stop(None)
    assert torch.equal(loaded.transform(FEW), expected)
    assert len(written) == 2
    assert not path.exists()


def test_a_frozen_inverter_goes_on_too(tmp_path, stop):
    own = FrozenEstimator(inverter("cg", curvature="ggn").fit(network(), rows()))
    check_every_stop(stop, lambda path: [fitted(path, own).transform(FEW)], tmp_path / "scores")


def test_a_file_of_scores_is_its_own_checkpoint(tmp_path, stop):
    found, target = fitted(tmp_path / "checkpoint"), tmp_path / "scores.npy"
    written = stop(None)
    np.testing.assert_array_equal(found.transform(FEW, out=target), fitted().transform(FEW))
    assert written == []
    with pytest.raises(ValueError, match="out beside a checkpoint must be None or a path. Got ndarray"):
        found.transform(FEW, out=np.empty((8, N), np.float32))
    # Of an ensemble the mean alone goes there.
    nets = [network(seed=seed) for seed in (0, 1)]
    array = np.empty((8, N), np.float32)
    influence(tmp_path / "checkpoint").fit(nets, rows()).transform(FEW, out=array)
    assert written
    np.testing.assert_array_equal(array, influence().fit(nets, rows()).transform(FEW))


def test_dask_arrays_take_a_folder(tmp_path):
    da = pytest.importorskip("dask.array")
    test = tuple(da.from_array(part.numpy(), chunks=(4, *part.shape[1:])) for part in FEW)
    with pytest.raises(ValueError, match="checkpoint for Dask arrays must be None or a folder"):
        fitted(tmp_path / "scores").transform(test)
    found = fitted(tmp_path).transform(test).compute()
    np.testing.assert_allclose(found, fitted().transform(FEW), rtol=1e-5, atol=1e-7)
    assert os.listdir(tmp_path) == []


# -- a folder ----------------------------------------------------------------------------------------------------------


def test_jobs_in_one_folder_have_a_file_each(tmp_path, stop):
    # Whose fit has no checkpoint.
    own = inverter("direct", curvature="ggn")
    for test in (FEW, MANY):
        stop(4)
        with pytest.raises(StoppedError):
            fitted(tmp_path, own).transform(test)
    left = list(tmp_path.iterdir())
    assert len(left) == 2
    assert all(set(path.stem) <= set("0123456789abcdef") for path in left)
    stop(None)
    for test in (MANY, FEW):
        assert torch.equal(fitted(tmp_path, own).transform(test), fitted(None, own).transform(test))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("own", ["ekfac", "cg", CG()], ids=["ekfac", "cg", "an instance"])
def test_a_folder_serves_the_fit_too_where_the_method_has_checkpoints(own, tmp_path, stop):
    written = stop(None)
    found = fitted(tmp_path, inverter(own))
    assert bool(written) == (own == "ekfac")
    assert found.inverter_.checkpoint is None
    assert found.inverter.checkpoint is None
    if own == "ekfac":
        stop(len(written) // 2)
        with pytest.raises(StoppedError):
            fitted(tmp_path, inverter(own))
        assert len(os.listdir(tmp_path)) == 1
        stop(None)
        assert torch.equal(fitted(tmp_path, inverter(own)).transform(FEW), fitted(None, inverter(own)).transform(FEW))
    assert os.listdir(tmp_path) == []


def test_a_file_is_that_of_the_scores_alone_and_an_inverter_keeps_its_own(tmp_path, stop):
    written = stop(None)
    fitted(tmp_path / "scores", inverter("ekfac"))
    assert written == []
    (tmp_path / "folder").mkdir()
    stop(2)
    with pytest.raises(StoppedError):
        fitted(tmp_path / "folder", inverter("ekfac", checkpoint=tmp_path / "own"))
    assert sorted(os.listdir(tmp_path)) == ["folder", "own"]
    assert os.listdir(tmp_path / "folder") == []
    stop(None)
    assert fitted(tmp_path / "folder", inverter("ekfac", checkpoint=tmp_path / "own")).inverter_.checkpoint


def test_a_search_over_one_folder_mixes_nothing_and_goes_on(tmp_path, stop):
    X, y = (part.numpy() for part in rows())

    def search(path):
        own = influence(path, inverter("ekfac", model=network()))
        return GridSearchCV(own, {"inverter__hessian_perturbation": [0.1, 1.0]}, cv=2, error_score="raise").fit(X, y)

    expected = search(None).cv_results_["mean_test_score"]
    written = stop(None)
    assert np.array_equal(search(tmp_path).cv_results_["mean_test_score"], expected)
    assert os.listdir(tmp_path) == []
    stop(len(written) // 2)
    with pytest.raises(StoppedError):
        search(tmp_path)
    assert len(os.listdir(tmp_path)) == 1
    stop(None)
    assert np.array_equal(search(tmp_path).cv_results_["mean_test_score"], expected)
    assert os.listdir(tmp_path) == []


# -- where it cannot be written ----------------------------------------------------------------------------------------


class Full:
    free = 0


def test_a_disk_that_is_full_at_the_start_is_told_before_the_work(tmp_path, monkeypatch):
    found = fitted(tmp_path / "scores")
    monkeypatch.setattr(persistence.shutil, "disk_usage", lambda path: Full())
    monkeypatch.setattr(HessianInverter, "solve", lambda *args, **kwargs: pytest.fail("was solved"))
    with pytest.raises(OSError, match="The disk of .* must be one with .* bytes free"):
        found.transform(FEW)


@pytest.mark.parametrize("error", FAILURES)
def test_a_write_that_fails_later_costs_the_checkpoint_not_the_scores(error, tmp_path, monkeypatch):
    expected, calls = fitted().transform(FEW), failing(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match="The checkpoint was not written, and the job goes on without") as told:
        received = fitted(tmp_path / "scores").transform(FEW)
    assert torch.equal(received, expected)
    assert len(told) == 1
    assert len(calls) == 3


def test_a_file_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    def refused(path, missing_ok=False):
        raise PermissionError(13, "no")

    file = checkpoint.CheckpointFile(tmp_path / "scores", Job())
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "unlink", refused)
        with pytest.warns(RuntimeWarning, match="The checkpoint was not removed"):
            file.remove()


def test_a_job_that_fails_leaves_its_checkpoint(tmp_path, monkeypatch):
    path, write, calls = tmp_path / "scores", course.Course.meet, []

    def failing(self, stop):
        calls.append(stop)
        if len(calls) == 3:
            message = "out of luck"
            raise RuntimeError(message)
        write(self, stop)

    with monkeypatch.context() as patch:
        patch.setattr(course.Course, "meet", failing)
        with pytest.raises(RuntimeError, match="out of luck"):
            fitted(path).transform(FEW)
    assert path.exists()
    assert torch.equal(fitted(path).transform(FEW), fitted().transform(FEW))
    assert not path.exists()
