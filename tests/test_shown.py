"""What a notebook shows, and what verbose says: that which was fitted."""

import html
import re

import numpy as np
import pytest
import sklearn
import torch
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_html_repr

from skinvert import HessianInverter, HessianInverterCV, InfluenceFunction, PerSampleGradient
from skinvert.methods import CG

ROW = re.compile(r"<th[^>]*>([^<]*)</th><td[^>]*>([^<]*)</td>")


def problem():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    return net, torch.randn(30, 3), torch.randint(0, 2, (30,))


def inverter(**settings):
    return HessianInverter(**{"hessian_perturbation": 0.5, "curvature": "ggn", "loss": "cross_entropy", **settings})


def facts(estimator):
    """The names and values of the table above scikit-learn's diagram, in both of the protocol's forms."""
    page = estimator._repr_html_()
    assert re.sub("sk-[a-z]*-id-[0-9]*", "", estimator._repr_mimebundle_()["text/html"]) == re.sub(
        "sk-[a-z]*-id-[0-9]*", "", page
    )
    table = page[: page.index("<style>")]
    return {html.unescape(name): html.unescape(value) for name, value in ROW.findall(table)}


# -- a notebook ----------------------------------------------------------------------------------------------------


def test_an_inverter():
    net, X, y = problem()
    fitted = inverter().fit(net, (X, y))
    assert facts(fitted) == {
        "parameters p": "26",
        "rows n": "30",
        "curvature H": "ggn",
        "λ": "0.5",
        "method": "Direct(), chosen by auto",
        "inverts": "H + λI itself",
        "solved up to a relative residual of": "0.001",
        "numbers": "float32 on cpu",
        "‖∇L(θ)‖": f"{fitted.gradient_norm_:.3g}",
    }


@pytest.mark.parametrize(
    ("settings", "name", "expected"),
    [
        ({"method": CG(rtol=1e-5)}, "method", "CG(rtol=1e-05)"),
        ({"method": CG(rtol=1e-5)}, "solved up to a relative residual of", "1e-05"),
        ({"method": "kfac"}, "inverts", "an approximation of H + λI"),
        ({"blocks": "layer"}, "method", "chosen by auto in each of 2 blocks"),
        ({"blocks": "layer", "method": "cg"}, "method", "CG() in each of 2 blocks"),
    ],
)
def test_settings_are_told_as_they_were_chosen(settings, name, expected):
    net, X, y = problem()
    assert facts(inverter(**settings).fit(net, (X, y)))[name] == expected


def test_a_share_of_the_mean_eigenvalue():
    # H = 4I.
    X = np.array([[2.0, 0.0], [0.0, 2.0]]) * np.sqrt(2)
    assert facts(HessianInverter("direct", "1e-1 rel").fit(X))["λ"] == "0.4, of '1e-1 rel'"


def test_a_search():
    net, X, y = problem()
    fitted = HessianInverterCV([0.1, 1e3], cv=3, curvature="ggn", loss="cross_entropy").fit(net, (X, y))
    found = facts(fitted)
    assert found["λ"] == f"{fitted.hessian_perturbation_:.4g}"
    assert found["λ chosen from"] == f"2 values by 3 folds, score {fitted.best_score_:.4g}"


def test_gradients():
    net, X, y = problem()
    found = facts(PerSampleGradient(net, loss="cross_entropy").fit(X, y))
    assert found == {"parameters p": "26", "rows are gradients of": "losses", "scale κ of the training loss": "1"}


@pytest.mark.parametrize("models", [1, 2])
def test_influence(models):
    net, X, y = problem()
    found = facts(InfluenceFunction(inverter()).fit([net] * models if models > 1 else net, (X, y)))
    assert (found["rows n"], found["removal"], found["models"]) == ("30", "first_order", str(models))


@pytest.mark.parametrize("kind", [HessianInverter, HessianInverterCV, PerSampleGradient, InfluenceFunction])
def test_before_a_fit_there_is_the_diagram_alone(kind):
    assert kind()._repr_html_().startswith("<style>")
    # The diagram of what holds it, and a notebook's completion, look at each name: none may raise.
    assert "fit" in dir(kind())
    with sklearn.config_context(display="text"):
        assert not hasattr(kind(), "_repr_html_")
        assert kind()._repr_mimebundle_() == {"text/plain": repr(kind())}


def test_what_users_wrote_is_escaped():
    def less(outputs, targets):
        return outputs[:, 0]

    less.__qualname__ = "<b>less</b>"
    net, X, y = problem()
    page = InfluenceFunction(inverter(), measurement=less).fit(net, (X, y))._repr_html_()
    assert "<b>less" not in page


def test_scikit_learns_own_diagram_of_fitted_steps():
    # Its names of features must be strings, as those of training rows without labels are not by themselves.
    X, y = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20.0)
    influence = InfluenceFunction().fit(LinearRegression().fit(X, y), (X, y))
    assert "InfluenceFunction" in estimator_html_repr(influence)
    assert "InfluenceFunction" in estimator_html_repr(make_pipeline("passthrough", influence))


# -- verbose -------------------------------------------------------------------------------------------------------


def said(capfd):
    shown = capfd.readouterr()
    assert shown.out == ""
    return [line for line in re.split(r"[\r\n]", shown.err) if line.startswith("skinvert: ")]


def test_a_fit_says_what_was_chosen_and_why(capfd):
    net, X, y = problem()
    inverter(verbose=1).fit(net, (X, y))
    curvature, shift, method, memory = said(capfd)
    assert curvature == "skinvert: curvature ggn: 26 parameters, 30 rows (batches: 1), float32 on cpu"
    assert shift == "skinvert: λ = 0.5"
    # 4 · 26² · 4 bytes.
    assert method == "skinvert: method direct: p = 26 is at most 5,000, and there is 10.6 KiB for 4 p² numbers"
    assert memory.startswith("skinvert: memory: the inverse holds ")
    assert "and serves alone; " in memory


@pytest.mark.parametrize(
    ("curvature", "shift", "expected"),
    [
        ("ggn", 0.5, "method direct: λ > 0, and H has a factor of few rows beside p = 26"),
        ("ggn", 0.0, "method cg: p = 26 is above 20, and H is positive semi-definite by construction"),
        ("hessian", 0.5, "method minres: p = 26 is above 20, and H may be indefinite"),
    ],
)
def test_auto_says_which_row_of_its_table_it_took(curvature, shift, expected, capfd, monkeypatch):
    monkeypatch.setattr("skinvert.methods.auto.SIDE", 20)
    net, X, y = problem()
    fitted = inverter(verbose=1, curvature=curvature, hessian_perturbation=shift).fit(net, (X[:5], y[:5]))
    (line,) = [line for line in said(capfd) if "method" in line]
    assert line == f"skinvert: {expected}"
    assert fitted.method_.name == line.split()[2].rstrip(":")


def test_blocks_say_each_their_own(capfd):
    net, X, y = problem()
    inverter(verbose=1, blocks="layer", method="cg").fit(net, (X, y))
    lines = [line for line in said(capfd) if "block" in line]
    assert lines == [
        "skinvert: block 1 of 2, 16 parameters: method cg, as asked",
        "skinvert: block 2 of 2, 10 parameters: method cg, as asked",
    ]


def test_a_search_says_what_won(capfd):
    X = np.random.default_rng(0).standard_normal((40, 10))
    HessianInverterCV([1e-3, 1e-1, 1e3], verbose=1).fit(X)
    assert any(line.startswith("skinvert: λ = 0.1 of 3: the highest mean score, ") for line in said(capfd))


def test_scores_say_what_is_solved_at_once(capfd):
    net, X, y = problem()
    influence = InfluenceFunction(inverter(), verbose=1).fit(net, (X, y))
    said(capfd)
    influence.transform((X[:3], y[:3]))
    assert said(capfd) == ["skinvert: scores: 3 × 30, 360 bytes; 3 test rows are solved at once"]


@pytest.mark.parametrize("verbose", [0])
def test_silent_without(verbose, capfd):
    net, X, y = problem()
    InfluenceFunction(inverter(verbose=verbose), verbose=verbose).fit(net, (X, y)).transform((X, y))
    assert capfd.readouterr() == ("", "")
