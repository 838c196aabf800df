"""HessianInverter: both ways of fit, every public call, dtype and device, memory, weights, warm starts."""

import re
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from skinvert import HessianInverter
from skinvert.methods import CG

METHODS = ["direct", "cg"]


def classification(dtype=torch.float64, n=20):
    """Return a softmax model with a hidden layer, and its data as tensors."""
    generator = torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    X = torch.randn(n, 3, generator=generator, dtype=dtype)
    return net, X, torch.randint(0, 2, (n,), generator=generator)


def fitted(method="direct", shift=0.1, **settings):
    net, X, y = classification()
    inverter = HessianInverter(method, shift, **{"loss": "cross_entropy", "curvature": "ggn", **settings})
    return inverter.fit(net, (X, y))


def right_sides(inverter, k=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(k, inverter.n_features_in_, generator=generator, dtype=torch.float64)


def least_squares():
    """Return a model, its data, and its Hessian 2 XᵀX / n in closed form."""
    X = torch.randn(15, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return nn.Linear(4, 1, bias=False).double(), (X, torch.ones(15, 1, dtype=torch.float64)), 2 * X.T @ X / 15


# -- fit ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "direct", "cg"])
def test_model_and_data_give_the_closed_form(method):
    net, data, hessian = least_squares()
    b = torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.inv(hessian + 0.5 * torch.eye(4, dtype=torch.float64))
    received = HessianInverter(method, 0.5, loss="mse").fit(net, data).transform(b)
    torch.testing.assert_close(received, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["tensors", "arrays", "loader", "data set", "batches"])
def test_every_way_of_fit_is_the_same(method, form):
    net, X, y = classification()
    settings = {"loss": "cross_entropy", "curvature": "ggn"}
    forms = {
        "tensors": (X, y),
        "arrays": (X.numpy(), y.numpy()),
        "loader": DataLoader(TensorDataset(X, y), batch_size=7, shuffle=True, drop_last=True),
        "data set": TensorDataset(X, y),
        "batches": [(X[:9], y[:9]), (X[9:], y[9:])],
    }
    by_search = HessianInverter(method, 0.1, model=net, **settings).fit(X, y)
    expected = by_search.transform(right_sides(by_search))
    received = HessianInverter(method, 0.1, **settings).fit(net, forms[form]).transform(right_sides(by_search))
    torch.testing.assert_close(received, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_plain_rows_have_the_curvature_of_least_squares(method):
    X = np.random.default_rng(0).standard_normal((20, 4))
    expected = np.linalg.solve(X.T @ X / 20 + 0.5 * np.eye(4), X.T).T
    received = HessianInverter(method, 0.5).fit(X).transform(X)
    np.testing.assert_allclose(received, expected, rtol=1e-6)


def test_fitted_attributes_of_a_model():
    inverter = fitted()
    assert inverter.n_features_in_ == 26
    assert inverter.n_samples_ == 20
    assert inverter.hessian_perturbation_ == 0.1
    assert inverter.curvature_name_ == "ggn"
    assert inverter.method_.name == "direct"
    assert inverter.parameter_names_ == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert inverter.curvature_.to_dense().shape == (26, 26)


def test_gradient_norm_is_that_of_the_loss():
    net, X, y = classification()
    loss = nn.functional.cross_entropy(net(X), y) + 0.05 * sum(p.square().sum() for p in net.parameters())
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, net.parameters())]).norm()
    inverter = HessianInverter("cg", loss="cross_entropy", weight_decay=0.1).fit(net, (X, y))
    assert inverter.gradient_norm_ == pytest.approx(float(expected), rel=1e-10)


def test_a_fit_on_rows_forgets_the_model():
    inverter = fitted().set_params(curvature="auto")
    inverter.fit(np.random.default_rng(0).standard_normal((10, 3)))
    assert inverter.n_features_in_ == 3
    assert not hasattr(inverter, "parameter_names_")
    assert not hasattr(inverter, "gradient_norm_")


def test_eigenvalues_where_a_spectrum_was_computed():
    X = np.random.default_rng(0).standard_normal((20, 3))
    X[:, 2] = X[:, 1]
    inverter = HessianInverter("direct").fit(X)
    np.testing.assert_allclose(inverter.eigenvalues_, np.linalg.eigvalsh(X.T @ X / 20), atol=1e-12)
    assert not hasattr(inverter.fit(X[:, :2]), "eigenvalues_")


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("0.*", ["0.weight", "0.bias"]),
        ("*.bias", ["0.bias", "2.bias"]),
        (["2.bias", "0.weight"], ["0.weight", "2.bias"]),
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
    ],
)
def test_params_select_by_glob_in_the_model_s_order(params, expected):
    assert fitted(params=params).parameter_names_ == expected


def test_params_take_the_rows_and_columns_of_the_whole():
    whole, part = fitted(), fitted(params="2.*")
    expected = whole.curvature_.to_dense()[16:, 16:]
    torch.testing.assert_close(part.curvature_.to_dense(), expected)


def test_params_reach_frozen_parameters():
    net, X, y = classification()
    net.requires_grad_(False)
    inverter = HessianInverter("direct", 0.1, loss="cross_entropy", params="2.*").fit(net, (X, y))
    assert inverter.get_feature_names_out()[0] == "2.weight[0,0]"
    assert not any(parameter.requires_grad for parameter in net.parameters())


# -- solve and its inverse ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_inverse_transform_undoes_transform(method):
    inverter = fitted(CG(rtol=1e-10) if method == "cg" else method)
    b = right_sides(inverter)
    torch.testing.assert_close(inverter.inverse_transform(inverter.transform(b)), b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_solve_returns_what_transform_returns(method):
    inverter = fitted(method)
    b = right_sides(inverter)
    x, _ = inverter.solve(b)
    assert torch.equal(x, inverter.transform(b))


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
@pytest.mark.parametrize("method", METHODS)
def test_info_tells_the_true_residual_of_each_row(method, kind):
    inverter = fitted(method)
    b = right_sides(inverter)
    A = inverter.curvature_.to_dense() + 0.1 * torch.eye(inverter.n_features_in_, dtype=torch.float64)
    x, info = inverter.solve(b if kind is torch.Tensor else b.numpy())
    expected = (torch.as_tensor(x) @ A - b).norm(dim=1) / b.norm(dim=1)
    assert all(isinstance(info[name], kind) for name in ("residual", "converged"))
    assert info["converged"].tolist() == [True] * 3
    np.testing.assert_allclose(info["residual"], expected, atol=1e-13)


def test_info_of_cg():
    inverter = fitted("cg")
    b = right_sides(inverter)
    b[1] = 0
    info = inverter.solve(b).info
    assert info["n_iter"][1] == 0 < info["n_iter"][0]
    assert info["stagnated"].tolist() == info["negative_curvature"].tolist() == [False] * 3


def test_no_rows_give_no_rows():
    inverter = fitted("cg")
    assert inverter.transform(torch.zeros(0, inverter.n_features_in_)).shape == (0, inverter.n_features_in_)


@pytest.mark.parametrize("method", METHODS)
def test_residual_judges_any_x(method):
    inverter = fitted(method)
    b = right_sides(inverter)
    torch.testing.assert_close(inverter.residual(b, torch.zeros_like(b)), torch.ones(3, dtype=torch.float64))
    assert isinstance(inverter.residual(b.numpy(), b.numpy()), np.ndarray)


def test_transform_writes_no_state():
    inverter = fitted("cg")
    before = {name: id(value) for name, value in vars(inverter).items()}
    inverter.transform(right_sides(inverter))
    assert {name: id(value) for name, value in vars(inverter).items()} == before


# -- score -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, np.array([1.0, 2.0, 0.5, 0.0, 1.0, 3.0])], ids=["unweighted", "weighted"])
def test_score_of_plain_rows_is_the_quadratic_that_leaves_a_row_out(weights):
    generator = np.random.default_rng(0)
    X, held_out = generator.standard_normal((20, 3)), generator.standard_normal((6, 3))
    inverter = HessianInverter("direct", 0.5).fit(X)
    w, Z = np.ones(6) if weights is None else weights, inverter.transform(held_out)

    terms = []
    for i, (g, z) in enumerate(zip(held_out, Z, strict=True)):
        others = w * (np.arange(6) != i)
        H = held_out.T @ (others[:, None] * held_out) / others.sum()
        terms.append(g @ z - 0.5 * z @ H @ z)
    expected = np.average(terms, weights=w)
    assert inverter.score(held_out, sample_weight=weights) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_score_of_a_model_is_the_quadratic_that_leaves_a_row_out(weight_decay):
    # mse over one output: gᵢ = 2rᵢxᵢ and hᵢ = 2xᵢxᵢᵀ.
    net, (X, y), _ = least_squares()
    inverter = HessianInverter("direct", 0.5, loss="mse", weight_decay=weight_decay).fit(net, (X, y))
    held_out, targets = X[:6] + 0.1, y[:6]
    G = 2 * (net(held_out) - targets).detach() * held_out
    Z = inverter.transform(G)

    terms = []
    for i, (g, z) in enumerate(zip(G, Z, strict=True)):
        rest = torch.cat([held_out[:i], held_out[i + 1 :]])
        terms.append(g @ z - 0.5 * z @ (2 * rest.T @ rest / 5) @ z - 0.5 * weight_decay * z @ z)
    expected = float(torch.stack(terms).mean())
    assert inverter.score((held_out, targets)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_score_of_an_indefinite_inverter_is_minus_infinity(method):
    net, X, y = classification()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)
        inverter = HessianInverter(method, loss="cross_entropy").fit(net, (X, y))
    with pytest.warns(ConvergenceWarning) as caught:
        assert inverter.score((X, y)) == -np.inf
    assert "not positive definite: the score is -inf" in str(caught[-1].message)


# -- names and faces ---------------------------------------------------------------------------------------------------


def test_feature_names_of_a_model():
    names = fitted(params="2.*").get_feature_names_out()
    expected = [f"2.weight[{i},{j}]" for i in range(2) for j in range(4)] + ["2.bias[0]", "2.bias[1]"]
    assert names.tolist() == expected
    assert names.dtype == object


def test_feature_names_of_plain_rows():
    inverter = HessianInverter("direct", 0.1).fit(np.eye(2))
    assert inverter.get_feature_names_out().tolist() == ["x0", "x1"]
    assert inverter.get_feature_names_out(["a", "b"]).tolist() == ["a", "b"]


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_flatten_undoes_unflatten(kind):
    inverter = fitted()
    x = right_sides(inverter) if kind == "tensor" else right_sides(inverter).numpy()
    named = inverter.unflatten(x)
    assert {name: tuple(value.shape) for name, value in named.items()} == {
        "0.weight": (3, 4, 3),
        "0.bias": (3, 4),
        "2.weight": (3, 2, 4),
        "2.bias": (3, 2),
    }
    assert (inverter.flatten(named) == x).all()


@pytest.mark.parametrize("outputs", [1, 2])
def test_flatten_takes_the_attributes_of_a_scikit_learn_model(outputs):
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((30, 4)), rng.standard_normal((30, outputs))
    model = Ridge().fit(X, Y[:, 0] if outputs == 1 else Y)
    inverter = HessianInverter("direct").fit(model, (X, Y[:, 0] if outputs == 1 else Y))
    # (4,) and a number of one target; (2, 4) and (2,) of two.
    row = inverter.flatten({"coef": model.coef_, "intercept": model.intercept_})
    assert row.tolist() == [[*model.coef_.ravel(), *np.ravel(model.intercept_)]]
    # Axes of length 1 are amiss, and nothing else may be.
    with pytest.raises(ValueError, match=rf"coef must be of shape \({outputs}, 4\).*Got shape \(3,\)"):
        inverter.flatten({"coef": model.coef_.ravel()[:3], "intercept": model.intercept_})
    if outputs == 2:
        with pytest.raises(ValueError, match=r"coef must be of shape \(2, 4\).*Got shape \(4, 2\)"):
            inverter.flatten({"coef": model.coef_.T, "intercept": model.intercept_})


def test_flatten_takes_gradients_as_they_come():
    net, X, y = classification()
    loss = nn.functional.cross_entropy(net(X), y)
    names = [name for name, _ in net.named_parameters()]
    gradients = dict(zip(names, torch.autograd.grad(loss, net.parameters()), strict=True))
    inverter = HessianInverter("cg", loss="cross_entropy").fit(net, (X, y))
    row = inverter.flatten(gradients)
    assert row.shape == (1, 26)
    assert float(row.norm()) == pytest.approx(inverter.gradient_norm_, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_aslinearoperator_is_the_inverse(method):
    inverter = fitted(CG(rtol=1e-10) if method == "cg" else method)
    b = right_sides(inverter).numpy()
    operator = inverter.aslinearoperator()
    np.testing.assert_allclose(operator @ b[0], inverter.transform(b[:1])[0], rtol=1e-8)
    np.testing.assert_allclose((operator @ b.T).T, inverter.transform(b), rtol=1e-8)
    # The dot test: a symmetric operator.
    assert b[0] @ (operator @ b[1]) == pytest.approx(b[1] @ (operator @ b[0]), rel=1e-7)


# -- dtype, device, verbose, memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, "float64", np.float64])
def test_dtype_is_that_of_the_work_alone(dtype):
    net, X, y = classification(torch.float32)
    inverter = HessianInverter("direct", 0.1, loss="cross_entropy", dtype=dtype, curvature="ggn").fit(net, (X, y))
    b = right_sides(inverter).float()
    assert inverter.curvature_.dtype == torch.float64
    assert inverter.transform(b).dtype == torch.float32
    assert net[0].weight.dtype == torch.float32
    assert inverter.solve(b).info["residual"].max() < 1e-12


def test_dtype_none_is_the_model_s_own():
    net, X, y = classification(torch.float32)
    inverter = HessianInverter("direct", 0.1, loss="cross_entropy", curvature="ggn").fit(net, (X.double(), y))
    assert inverter.curvature_.dtype == torch.float32


def test_device_auto_is_an_accelerator_where_there_is_one():
    expected = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inverter = fitted(device="auto")
    b = right_sides(inverter)
    assert inverter.curvature_.device.type == expected.type
    assert inverter.transform(b).device == b.device


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("verbose", [0, 1])
def test_verbose_shows_a_bar(method, verbose, capfd):
    inverter = fitted(method, verbose=verbose)
    inverter.transform(right_sides(inverter))
    shown = capfd.readouterr()
    assert bool(re.search(r"it/s|\d+/\d+|\d+it", shown.err)) == bool(verbose)
    assert shown.out == ""


def test_too_large_a_matrix_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("skinvert._memory.available_memory", lambda device: 10 * 2**10)
    monkeypatch.setattr("skinvert.curvature.ggn.GGN.to_dense", lambda *_: pytest.fail("the matrix was made"))
    with pytest.raises(MemoryError) as error:
        fitted("direct")
    # 3 · 26² · 8 bytes
    for word in ("p = 26", "15.8 KiB", "10 KiB", "cpu", 'method="cg"', "`params`"):
        assert word in str(error.value)


def test_too_large_a_factor_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("skinvert._memory.available_memory", lambda device: 10)
    monkeypatch.setattr("skinvert.operators.LowRank.factor", lambda *_: pytest.fail("the factor was made"))
    with pytest.raises(MemoryError, match=r"A factor of 2 rows needs about 112 bytes.*10 bytes.*cg"):
        HessianInverter("direct", 0.1).fit(np.ones((2, 3)))


def test_cg_needs_no_such_memory(monkeypatch):
    monkeypatch.setattr("skinvert._memory.available_memory", lambda device: 10 * 2**10)
    inverter = fitted("cg")
    assert inverter.solve(right_sides(inverter)).info["converged"].all()


# -- sample weights ----------------------------------------------------------------------------------------------------

WEIGHTS = np.array([2, 0, 1, 3] * 5)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
def test_weights_of_a_model_equal_repeated_rows(curvature):
    net, X, y = classification()
    settings = {"loss": "cross_entropy", "curvature": curvature}
    rows = np.repeat(np.arange(20), WEIGHTS)
    expected = HessianInverter("cg", **settings).fit(net, (X[rows], y[rows])).curvature_.to_dense()
    received = HessianInverter("cg", **settings).fit(net, (X, y), sample_weight=WEIGHTS).curvature_.to_dense()
    torch.testing.assert_close(received, expected, rtol=1e-10, atol=1e-12)


def test_weights_of_plain_rows_equal_repeated_rows():
    X = np.random.default_rng(0).standard_normal((20, 3))
    expected = HessianInverter("direct", 0.1).fit(np.repeat(X, WEIGHTS, axis=0)).transform(X)
    received = HessianInverter("direct", 0.1).fit(X, sample_weight=WEIGHTS).transform(X)
    np.testing.assert_allclose(received, expected, rtol=1e-10)


@pytest.mark.parametrize("with_model", [True, False])
def test_the_scale_of_weights_does_not_matter(with_model):
    net, X, y = classification()
    inverter = HessianInverter("direct", 0.1, curvature="ggn" if with_model else "auto", loss="cross_entropy")
    fit = (lambda w: inverter.fit(net, (X, y), w)) if with_model else (lambda w: inverter.fit(X, sample_weight=w))
    b = right_sides(fit(WEIGHTS))
    expected = inverter.transform(b)
    torch.testing.assert_close(fit(1e6 * WEIGHTS).transform(b), expected, rtol=1e-9, atol=1e-12)


# -- cg: starts, stagnation, indefinite curvature ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_x0_is_copied_and_never_written_to(kind):
    b = right_sides(fitted())
    x0 = torch.ones_like(b) if kind == "tensor" else np.ones(b.shape)
    fitted(CG(x0=x0)).transform(b)
    assert (x0 == 1).all()


def test_a_warm_start_saves_the_work_and_keeps_the_answer():
    cold = fitted("cg")
    b = right_sides(cold)
    x, info = cold.solve(b)
    warm = fitted(CG(x0=x)).solve(b)
    assert warm.info["n_iter"].tolist() == [0, 0, 0]
    assert torch.equal(warm.x, x)
    assert (info["n_iter"] > 0).all()


def test_one_row_of_x0_serves_all():
    inverter = fitted(CG(x0=np.ones((1, 26)), rtol=1e-10))
    b = right_sides(inverter)
    torch.testing.assert_close(inverter.transform(b), fitted("direct").transform(b), rtol=1e-7, atol=1e-8)


def ill_conditioned():
    """Return plain float32 rows whose H has condition 1e6, and right-hand sides."""
    generator = np.random.default_rng(0)
    Q, _ = np.linalg.qr(generator.standard_normal((40, 40)))
    X = (np.logspace(0, -3, 40)[:, None] * Q * np.sqrt(40)).astype(np.float32)
    return X, generator.standard_normal((2, 40)).astype(np.float32)


def test_stagnation_in_float32_is_told_with_its_way_out():
    X, b = ill_conditioned()
    with pytest.warns(ConvergenceWarning, match=r"did not converge on 2 of 2.*Try dtype=torch.float64"):
        info = HessianInverter(CG(maxiter=5000)).fit(X).solve(b).info
    assert info["stagnated"].tolist() == [True, True]
    assert info["converged"].tolist() == [False, False]
    assert np.isfinite(info["residual"]).all()


def test_the_way_out_of_stagnation_works():
    X, b = ill_conditioned()
    x, info = HessianInverter(CG(rtol=1e-5, maxiter=5000), dtype=torch.float64).fit(X).solve(b)
    assert info["converged"].all()
    assert x.dtype == np.float32


def test_too_few_iterations_are_told_with_the_residual_reached():
    inverter = fitted(CG(maxiter=1))
    with pytest.warns(ConvergenceWarning, match="maxiter") as caught:
        info = inverter.solve(right_sides(inverter)).info
    assert f"{info['residual'].max():.3g}" in str(caught[0].message)
    assert not info["converged"].any()


def test_a_singular_system_gives_cg_the_pseudo_inverse_s_solution():
    generator = np.random.default_rng(0)
    X, b = generator.standard_normal((10, 20)), generator.standard_normal((3, 20))
    with pytest.warns(scipy.linalg.LinAlgWarning, match="singular"):
        expected = HessianInverter("direct").fit(X).transform(b)
    with pytest.warns(ConvergenceWarning, match="singular to rounding"):
        x, info = HessianInverter("cg").fit(X).solve(b)
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-8)
    assert not info["converged"].any()


@pytest.mark.parametrize("method", METHODS)
def test_the_warning_of_an_indefinite_curvature_names_the_gradient_and_ggn(method):
    net, X, y = classification()
    with pytest.warns(UserWarning if method == "cg" else scipy.linalg.LinAlgWarning) as caught:
        inverter = HessianInverter(method, loss="cross_entropy").fit(net, (X, y))
        inverter.transform(right_sides(inverter))
    message = " ".join(str(warning.message) for warning in caught)
    assert f"{inverter.gradient_norm_:.3g}" in message
    assert 'curvature="ggn"' in message


def test_the_perturbation_that_cg_names_solves():
    net, X, y = classification()
    b = right_sides(fitted())
    with pytest.warns(ConvergenceWarning) as caught:
        HessianInverter("cg", loss="cross_entropy").fit(net, (X, y)).transform(b)
    named = float(re.search(r"hessian_perturbation=([\d.e-]+)", str(caught[0].message))[1])
    assert HessianInverter("cg", named, loss="cross_entropy").fit(net, (X, y)).solve(b).info["converged"].all()


# -- the user's own ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_later_training_does_not_reach_a_fitted_inverter(method):
    net, X, y = classification()
    net.append(nn.BatchNorm1d(2).double())
    inverter = HessianInverter(method, 0.5, loss="cross_entropy", curvature="ggn").fit(net, (X, y))
    b = right_sides(inverter)
    expected = inverter.transform(b)
    with torch.no_grad():
        for tensor in [*net.parameters(), net[-1].running_mean, net[-1].running_var]:
            tensor.add_(1.0)
    assert torch.equal(inverter.transform(b), expected)
