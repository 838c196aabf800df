"""Each place in skinvert that warns, provoked as a user would, points at the line that asked. A new one fails here."""

import ast
import inspect
import sys
import threading
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from problems import tanh_with
from sklearn.linear_model import LogisticRegression
from skorch import NeuralNetClassifier
from torch import nn

import skinvert
from skinvert import HessianInverter, InfluenceFunction, InversionRegistry, TwiceDifferentiable
from skinvert._distributed import Ranks
from skinvert.methods import CG, Arnoldi, Direct
from skinvert.metrics import leave_one_out
from skinvert.operators import LowRank

PACKAGE = Path(skinvert.__file__).parent
SHORT = CG(maxiter=1, rtol=1e-12)


def rows(n=20, p=6):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, p)) * np.logspace(0, 2, p), rng.standard_normal((3, p))


def data(n=20):
    torch.manual_seed(0)
    return torch.randn(n, 3), torch.randint(0, 2, (n,))


class Net(nn.Module):
    """A network with one function inside."""

    def __init__(self, function=torch.tanh):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.function = nn.Linear(3, 4), nn.Linear(4, 2), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def inverter(method="direct", shift=0.1, curvature="ggn", **settings):
    return HessianInverter(method, shift, curvature=curvature, loss="cross_entropy", **settings)


class Mirrored(Ranks):
    """Two ranks, of which the other one does what this one does."""

    def __init__(self):
        super().__init__(None, 0, 2, of_world=False)

    def meet(self, step, facts=None, *, error=None, hint=""):
        if error is not None:
            raise error

    def gathered(self, value, step):
        return [value, value]

    def _sum(self, part, step):
        return 2 * part


# -- the places ----------------------------------------------------------------------------------------------------


def taken_name():
    InversionRegistry.register(TwiceDifferentiable, "cg")(lambda model, training_data, b, hessian_perturbation: b)


def not_converged():
    X, b = rows()
    HessianInverter(SHORT).fit(X).transform(b)


def worse_than_zero():
    inverter("kfac", 1e-6).fit(Net(), data()).transform(np.ones((2, 26), dtype="f4"))


def overflowing():
    # 1e30 / 1e-12 is beyond float32.
    X = (np.random.default_rng(0).standard_normal((20, 3)) * 1e-6).astype("f4")
    HessianInverter("cg", 1e-12).fit(X).inverse_.solve(torch.tensor([[1.0], [1e30]]).expand(2, 3))


def too_small_a_solution():
    X = (np.random.default_rng(0).standard_normal((20, 3)) * 1e3).astype("f4")
    HessianInverter("cg", 1e6).fit(X).inverse_.solve(torch.full((1, 3), 1e-35))


def too_small_for_the_dtype_of_b():
    X = (np.random.default_rng(0).standard_normal((20, 3)) * 1e3).astype("f4")
    HessianInverter("direct", 1e6).fit(X).transform(np.full((1, 3), 1e-35, dtype="f4"))


def negative_curvature():
    inverter("cg", 0.0, "hessian").fit(Net(), data()).transform(np.ones((2, 26), dtype="f4"))


def an_indefinite_matrix():
    inverter("direct", 0.0, "hessian").fit(Net(), data())


def a_singular_matrix():
    HessianInverter("direct").fit(np.eye(3)[:2].repeat(3, axis=0)).transform(np.ones((2, 3)))


def a_direction_in_other_units():
    X = np.random.default_rng(0).standard_normal((5, 2)) * [1e9, 1.0]
    HessianInverter("direct").fit(np.c_[X, X[:, 1:]])


def a_ggn_of_log_probabilities():
    HessianInverter("direct", 0.1, curvature="ggn", loss="nll").fit(nn.Sequential(Net(), nn.LogSoftmax(1)), data())


class Switched(Net):
    """Whose own ``train`` does more than set flags."""

    def train(self, mode=True):
        self.function = torch.tanh if mode else torch.sin
        return super().train(mode)


def a_model_that_cannot_be_copied():
    net = Switched().train()
    net.lock = threading.Lock()
    inverter().fit(net, data())


def a_model_that_cannot_be_compared():
    net = Switched().train()
    net.register_forward_hook(lambda module, args, output: 1 / 0 if module.function is torch.sin else None)
    inverter().fit(net, data())


THE_NET = None


class Known(Net):
    """Known by a global."""

    def forward(self, x):
        return super().forward(x) * (2.0 if self is THE_NET else 1.0)


def a_module_known_by_a_global():
    globals()["THE_NET"] = Known()
    inverter().fit(THE_NET, data())


def few_restarts():
    HessianInverter(Arnoldi(rank=20, krylov_dimension=24, maxiter=2), 0.1).fit(
        np.random.default_rng(0).standard_normal((400, 300))
    )


def an_inexact_factor():
    class Off(LowRank):
        def factor(self, verbose=0):
            return 1.003 * super().factor(verbose)

    Direct().invert(Off(torch.randn(2, 9, dtype=torch.float64)), 1.0)


def no_bound():
    X, y = data()
    influence = InfluenceFunction(inverter("cg", 0.1, "hessian"), score_rtol=1e-3)
    influence.fit(Net(), (X, y)).transform((X, y))


def a_bound_that_rounding_does_not_reach():
    X, y = data()
    InfluenceFunction(inverter("direct"), score_rtol=1e-300).fit(Net(), (X, y)).transform((X, y))


def an_indefinite_score():
    X, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = inverter("direct", 0.0, "hessian").fit(Net(), (X, y))
    fitted.score((X, y))


def an_indefinite_score_among_others():
    X, y = data()
    skinvert.HessianInverterCV([1e-9, 10.0], cv=2, method="direct", curvature="hessian", loss="cross_entropy").fit(
        Net(), (X, y)
    )


def a_derivative_that_is_wrong():
    inverter("direct", 5.0, "hessian").fit(Net(tanh_with(1.0)), data())


def a_layer_that_no_loss_reaches():
    class Detached(Net):
        def forward(self, x):
            return self.last(self.first(x).detach())

    X, y = data()
    skinvert.PerSampleGradient(Detached(), loss="cross_entropy").fit(X, y)


def a_row_at_a_jump():
    class Jump(Net):
        def forward(self, x):
            # As rounding may: one row goes the other way in a batch of its own size.
            return super().forward(x) + (x[:, :1] > 5) * (len(x) != 6)

    X, y = data(12)
    X[9, 0] = 9.0
    inverter("cg", 5.0, batch_size=6).fit(Jump(), (X, y))


def a_cast_inside():
    def narrow(h):
        return h.float().tanh().double()

    inverter("direct", 30.0).fit(Net(narrow).double(), data())


def a_loss_that_does_not_shift():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

        def forward(self, input_ids, labels=None):
            logits = self.head(self.words(input_ids))
            loss = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
            return {"loss": loss, "logits": logits}

    torch.manual_seed(0)
    ids = torch.randint(5, (8, 6))
    inverter("direct", 1.0).fit(Causal(), [{"input_ids": ids, "labels": ids}])


def a_decoupled_weight_decay():
    X, y = data()
    net = NeuralNetClassifier(
        Net, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, max_epochs=1, train_split=None, verbose=0
    ).fit(X.numpy(), y.numpy())
    HessianInverter("direct", 5.0, curvature="ggn").fit(net, (X.numpy(), y.numpy()))


def all_the_data_on_each_rank():
    with patch("skinvert.inverter.ranks_of", lambda group: Mirrored()):
        inverter(process_group="world").fit(Net(), data())


def a_checkpoint_that_cannot_be_written():
    with TemporaryDirectory() as folder:
        original, calls = skinvert.checkpoint.save_state, []

        def saved(*args):
            calls.append(1)
            if len(calls) > 2:
                raise OSError(28, "No space left on device")
            original(*args)

        with patch.multiple("skinvert.checkpoint", save_state=saved, EVERY=0.0, SHARE=1.0):
            inverter("ekfac", checkpoint=f"{folder}/fit").fit(Net(), data())


def a_checkpoint_that_cannot_be_removed():
    def refused(path, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    class Kept(type(Path())):
        unlink = refused

    with TemporaryDirectory() as folder, patch.object(skinvert.checkpoint, "Path", Kept):
        inverter("ekfac", checkpoint=f"{folder}/fit").fit(Net(), data())


def retraining_that_ends_where_it_began():
    X, y = data()
    X, y = X.numpy(), y.numpy()
    leave_one_out(LogisticRegression(tol=10.0, max_iter=5), X, y, X[:3], y[:3], rows=[0, 1])


# What provokes it, and which function of which file warns.
PLACES = [
    (taken_name, "_naming.py:may_take"),
    (not_converged, "methods/base.py:warn_not_converged"),
    (worse_than_zero, "methods/base.py:warn_worse_than_zero"),
    (overflowing, "methods/base.py:warn_of_overflow"),
    (too_small_a_solution, "solvers/krylov.py:warn_of_lost"),
    (too_small_for_the_dtype_of_b, "_rows.py:_warn"),
    (negative_curvature, "methods/cg.py:_warn"),
    (an_indefinite_matrix, "methods/spectral_inverse.py:_warn_of_negative"),
    (a_singular_matrix, "methods/spectral_inverse.py:_warn_of_outside"),
    (a_direction_in_other_units, "methods/spectral_inverse.py:_warn_of_units"),
    (a_ggn_of_log_probabilities, "system.py:_warn_of_probabilities"),
    (a_model_that_cannot_be_copied, "models/own_eval.py:of"),
    (a_model_that_cannot_be_compared, "models/own_eval.py:check"),
    (a_module_known_by_a_global, "models/leaks.py:warn_of_globals"),
    (few_restarts, "methods/arnoldi.py:_warn"),
    (an_inexact_factor, "methods/assembly.py:_judge"),
    (no_bound, "influence/certified.py:_warn_of_more"),
    (a_bound_that_rounding_does_not_reach, "influence/certified.py:_warn_of_more"),
    (an_indefinite_score, "scores.py:_warn"),
    (an_indefinite_score_among_others, "scores.py:_warn"),
    (a_derivative_that_is_wrong, "curvature/hessian.py:__init__"),
    (a_layer_that_no_loss_reaches, "curvature/first_pass.py:warn_of_unreached"),
    (a_row_at_a_jump, "curvature/checks.py:check_rows_without_others"),
    (a_cast_inside, "models/leaks.py:warn_of_casts"),
    (a_loss_that_does_not_shift, "models/labelled.py:_warn_of_a_shift"),
    (a_decoupled_weight_decay, "models/skorch.py:_decay_of"),
    (all_the_data_on_each_rank, "data/shards.py:shared_out"),
    (a_checkpoint_that_cannot_be_written, "checkpoint.py:_write_when_due"),
    (a_checkpoint_that_cannot_be_removed, "checkpoint.py:remove"),
    (retraining_that_ends_where_it_began, "metrics/trainers.py:warn_of_no_change"),
]


@pytest.fixture
def told(monkeypatch):
    """Which place warned, and where the warning points."""
    found = []

    def listening(message, category, stacklevel):
        site = sys._getframe(2).f_code
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.warn(message, category, stacklevel=stacklevel + 1)
        name = Path(site.co_filename).relative_to(PACKAGE).as_posix()
        found.append((f"{name}:{site.co_name}", caught[0].filename, caught[0].lineno))

    monkeypatch.setattr("skinvert._telling.warnings", SimpleNamespace(warn=listening))
    return found


@pytest.mark.parametrize(("call", "place"), PLACES, ids=lambda value: getattr(value, "__name__", None))
def test_the_warning_points_here(call, place, told):
    call()
    assert place in {site for site, _, _ in told}
    lines, first = inspect.getsourcelines(call)
    for _, filename, line in told:
        assert filename == __file__
        assert first < line < first + len(lines)


def test_every_place_is_in_the_table():
    assert set(places()) == {place for _, place in PLACES}


def test_nothing_warns_by_itself():
    for path in PACKAGE.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        if path.name != "_telling.py":
            assert not [call for call in calls if ast.unparse(call.func) == "warnings.warn"], path


def places():
    """Yield the functions that call ``warn``, as file:function."""
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and name != "_telling.py":
                calls = [inner for inner in ast.walk(node) if isinstance(inner, ast.Call)]
                if any(isinstance(call.func, ast.Name) and call.func.id == "warn" for call in calls):
                    yield f"{name}:{node.name}"
