"""One table: every registered method × every curvature it accepts × models × dtypes × batches × right-hand sides."""

import numpy as np
import pytest
import torch
from definitions import DEFINITIONS, EXACT_TO, SETTINGS, SETTINGS_FLOAT32, definition_of
from facts import ITERATIVE, LOOSE
from oracles import oracle_matrix, perturbation_for, relative_error
from problems import number_of_rows, problem
from sklearn.exceptions import ConvergenceWarning

from skinvert import HessianInverter, InversionRegistry, TwiceDifferentiable
from skinvert.curvature import CURVATURES, faces_of
from skinvert.methods import Direct
from skinvert.methods.base import Method

MODELS = {"linear": "mse", "softmax": "cross_entropy", "mlp": "cross_entropy", "cnn2d": "cross_entropy"}
# A Neumann series takes some 20 times the condition in steps.
CONDITION = dict.fromkeys(LOOSE, 5.0)


def registered():
    """Return the methods by name, a test's own included."""
    return {
        name: kind
        for (model_type, name), kind in InversionRegistry.registry.items()
        if model_type is TwiceDifferentiable and isinstance(kind, type) and issubclass(kind, Method)
    }


def accepted(kind):
    return [name for name in CURVATURES if set(kind.requires) <= faces_of(name)]


def dense(case, curvature):
    # For these losses the Fisher is the GGN; test_fisher shows it from the definition.
    return oracle_matrix(case, "ggn" if curvature == "fisher" else curvature)


TABLE = [
    pytest.param(
        name, curvature, model, dtype, batch_size, id=f"{name}-{curvature}-{model}-{str(dtype)[6:]}-{batch_size}"
    )
    for name, kind in registered().items()
    for curvature in accepted(kind)
    for model in MODELS
    for dtype in (torch.float32, torch.float64)
    for batch_size in (6, 7)
]


def check(name, curvature, model, dtype, batch_size):
    """Hold one fit against the definition for 1, 7 and p + 5 right-hand sides."""
    case = problem(model, MODELS[model], 0.1, batch_size == 7, batch_size)
    H = dense(case, curvature)
    shift = max(perturbation_for(H, CONDITION.get(name, 100.0)), 0.05)
    settings = (SETTINGS if dtype == torch.float64 else SETTINGS_FLOAT32).get(name, {})
    method = registered()[name](**settings)
    inverter = HessianInverter(method, shift, curvature=curvature, **case.settings(dtype=dtype))
    if method.needs_psd and np.linalg.eigvalsh(H)[0] < 0:
        with pytest.raises(ValueError, match="ggn"):
            inverter.fit(case.module, case.data, case.sample_weight)
        return
    inverter.fit(case.module, case.data, case.sample_weight)
    tolerance = EXACT_TO.get(name, {torch.float32: 1e-3, torch.float64: 1e-8}[dtype])
    # Hundreds of products a row: an iterative method takes more rows than parameters on the small models.
    many = () if name in ITERATIVE and case.p > 25 else ("p+5",)
    for k in ("1", "7", *many):
        b = case.right_hand_sides(number_of_rows(k, case.p))
        expected = definition_of(name)(case, curvature, H, shift, b)
        received, info = inverter.solve(b)
        assert relative_error(received, expected) <= tolerance
        assert info["residual"].shape == info["converged"].shape == (len(b),)


@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("name", "curvature", "model", "dtype", "batch_size"), TABLE)
def test_is_its_definition(name, curvature, model, dtype, batch_size):
    check(name, curvature, model, dtype, batch_size)


def test_a_method_of_a_test_is_in_the_table(monkeypatch):
    monkeypatch.setattr(InversionRegistry, "registry", dict(InversionRegistry.registry))

    @InversionRegistry.register(TwiceDifferentiable, "twice_the_answer")
    class Twice(Direct):
        def invert(self, A, hessian_perturbation, verbose=0):
            inverse = super().invert(A, hessian_perturbation, verbose)
            inverse.cholesky = inverse.cholesky / np.sqrt(2)
            return inverse

    assert accepted(registered()["twice_the_answer"]) == list(CURVATURES)
    with pytest.warns(ConvergenceWarning), pytest.raises(AssertionError):
        check("twice_the_answer", "ggn", "mlp", torch.float64, 6)


def test_each_definition_is_of_a_method():
    assert set(DEFINITIONS) <= set(registered())
