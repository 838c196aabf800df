"""scikit-learn's callbacks follow a fit, where its version has them; without them nothing changes."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skinvert import HessianInverter, HessianInverterCV, InfluenceFunction, PerSampleGradient, load
from skinvert._progress import Task, progress, telling

callback = pytest.importorskip("sklearn.callback", reason="scikit-learn has callbacks from 1.9 on")

ROWS = np.random.default_rng(0).standard_normal((20, 3))


class Heard:
    """Writes down what it is told: begin and end of each task, by its path of names."""

    def __init__(self):
        self.told, self.data = [], []

    def setup(self, estimator, context):
        self.told.append("setup")

    def teardown(self, estimator, context):
        self.told.append("teardown")

    def on_fit_task_begin(self, estimator, context, *, X=None, y=None, metadata=None):
        self.data.append((X, y, metadata))
        self.told.append(("begin", path(context), context.max_subtasks))

    def on_fit_task_end(self, estimator, context):
        self.told.append(("end", path(context)))
        return True  # asks for an early end, which no curvature allows

    def tasks(self):
        """The tasks with their number of steps, each once, and how many steps were told."""
        begun = [entry[1:] for entry in self.told if entry[0] == "begin"]
        return {names: (total, sum(one == (*names, "step") for one, _ in begun)) for names, total in begun}


class Propagated(Heard):
    max_propagation_depth = None


def path(context):
    return (() if context.parent is None else path(context.parent)) + (context.task_name,)


def problem():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    return net, torch.randn(30, 3), torch.randint(0, 2, (30,))


def inverter(method="direct", **settings):
    given = {"hessian_perturbation": 0.5, "curvature": "ggn", "loss": "cross_entropy", "batch_size": 10, **settings}
    return HessianInverter(method, **given)


def test_a_fit_is_followed_pass_by_pass_and_step_by_step():
    net, X, y = problem()
    heard, plain = Heard(), inverter("ekfac").fit(net, (X, y))
    weights = np.ones(30)
    fitted = inverter("ekfac").set_callbacks(heard).fit(net, (X, y), weights)
    tasks = heard.tasks()
    assert tasks[("fit", "loss and gradient")] == (3, 3)
    assert tasks[("fit", "layers")] == (3, 3)
    assert heard.told[0] == "setup"
    assert heard.told[-2:] == [("end", ("fit",)), "teardown"]
    # As many ends as beginnings, each after its own.
    opened = []
    for entry in heard.told[1:-1]:
        if entry[0] == "begin":
            opened.append(entry[1])
        else:
            assert opened.pop() == entry[1]
    assert not opened
    assert heard.data[0][0] is net
    assert heard.data[0][2]["sample_weight"] is weights
    # And the answers are as without; nothing of the hearing stays behind.
    b = np.random.default_rng(1).standard_normal((2, 26)).astype("f4")
    np.testing.assert_array_equal(fitted.transform(b), plain.transform(b))
    assert {name for name in vars(fitted) if "callback" in name} == {"_skl_callbacks"}


def test_other_estimators_are_followed_too():
    net, X, y = problem()
    heard = Heard()
    PerSampleGradient(net, loss="cross_entropy", batch_size=10).set_callbacks(heard).fit(X, y)
    assert heard.tasks()[("fit", "loss and gradient")] == (3, 3)
    heard = Heard()
    InfluenceFunction(inverter()).set_callbacks(heard).fit(net, (X, y))
    assert heard.tasks()[("fit", "loss and gradient")] == (3, 3)
    heard = Heard()
    search = HessianInverterCV([0.1, 1.0], cv=GroupKFold(4)).set_callbacks(heard)
    groups = np.repeat(np.arange(5), 4)
    search.fit(ROWS, None, np.ones(20), groups)
    assert heard.tasks()[("fit", "folds")] == (4, 4)
    assert heard.data[0][2]["groups"] is groups


def test_a_solver_that_ends_early_ends_its_task():
    heard = Heard()
    HessianInverter("arnoldi", 0.1).set_callbacks(heard).fit(np.random.default_rng(0).standard_normal((400, 300)))
    (total, steps) = heard.tasks()[("fit", "Lanczos")]
    assert 0 < steps < total
    assert ("end", ("fit", "Lanczos")) in heard.told


@pytest.mark.parametrize("inside", [False, True])
def test_a_fit_that_fails_ends_with_the_teardown(inside):
    net, X, y = problem()
    heard = Heard()
    bad = X.clone()
    bad[25] = torch.nan
    fitted = inverter("ekfac").set_callbacks(heard)
    with pytest.raises(ValueError, match="finite|NaN|same length"):
        fitted.fit(net, (bad, y) if inside else (X, y[:3]))
    assert heard.told[-1] == "teardown"
    assert ("end", ("fit",)) not in heard.told
    # The next fit is followed from its own beginning.
    heard.told.clear()
    fitted.fit(net, (X, y))
    assert heard.told[0] == "setup"
    assert heard.told[-1] == "teardown"


def test_a_pipeline_and_a_search_hand_theirs_on():
    heard = Propagated()
    pipe = make_pipeline(StandardScaler(), HessianInverter("direct", 0.1)).set_callbacks(heard)
    pipe.fit(ROWS)
    # The inverter's own root stands where the pipeline's last task was.
    assert any(names[-2:] == ("fit", "step") or names[-1] == "fit" for names in heard.tasks())
    assert "_skl_callbacks" not in vars(pipe[-1])
    own = Heard()
    GridSearchCV(HessianInverter("direct").set_callbacks(own), {"hessian_perturbation": [0.1, 1.0]}, cv=2).fit(ROWS)
    # The user's own object: of each candidate, of each fold, and of the refit.
    assert own.told.count("setup") == 5


def test_clones_share_callbacks_and_files_leave_them_out(tmp_path):
    heard = Heard()
    fitted = HessianInverter("direct", 0.1).set_callbacks(heard)
    assert vars(clone(fitted))["_skl_callbacks"][0] is heard
    fitted.fit(ROWS).save(tmp_path / "inverter")
    assert not vars(load(tmp_path / "inverter")).get("_skl_callbacks")
    assert isinstance(vars(pickle.loads(pickle.dumps(fitted)))["_skl_callbacks"][0], Heard)


def test_scikit_learns_own_monitor_finds_nothing_to_score():
    # It wants an estimator that can score, and a target; no error, and no entry.
    monitor = callback.ScoringMonitor(scoring=None)
    HessianInverter("direct", 0.1).set_callbacks(monitor).fit(ROWS)
    with pytest.raises(ValueError, match="No logs to retrieve"):
        monitor.get_logs()


def test_what_goes_on_within_a_step_is_no_task():
    net, X, y = problem()
    heard = Heard()
    settings = {"curvature": "ggn", "loss": "cross_entropy", "batch_size": 10}
    HessianInverterCV([0.1, 1.0], cv=2, **settings).set_callbacks(heard).fit(net, (X, y))
    begun = [entry[1] for entry in heard.told if entry[0] == "begin"]
    # Of the refit alone, and of neither fold's fit.
    assert begun.count(("fit", "loss and gradient")) == 1
    assert begun.count(("fit", "folds")) == 1
    assert max(map(len, begun)) == 3


def test_a_loop_that_outlives_its_fit_tells_no_more():
    heard = Heard()
    owner = HessianInverter().set_callbacks(heard)
    context = owner._init_callback_context(max_subtasks=None)
    with telling(Task(owner, context)):
        loop = progress(range(3), "loop", 0)
        next(loop)
    told = list(heard.told)
    loop.close()
    assert heard.told == told
    assert list(progress(range(2), "loop", 0)) == [0, 1]
    assert heard.told == told
