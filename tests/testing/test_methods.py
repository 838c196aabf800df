"""The kit over every method of the registry, and over methods with one planted fault each."""

import copy

import pytest
import torch

from skinvert.methods import CG, MINRES, Arnoldi, Direct, Nystroem
from skinvert.methods.base import InverseOperator, Method, relative_residual
from skinvert.operators import Shifted
from skinvert.reasons import Reason, reasons
from skinvert.results import InverseHvpResult
from skinvert.testing import check_method, parametrize_with_methods

MORE = [
    Arnoldi(rank=6),
    Arnoldi(rank=6, complement="trace"),
    Nystroem(rank=6),
    CG(rtol=1e-12, block=True),
    MINRES(rtol=1e-12, block=True),
    CG(rtol=1e-12, preconditioner="jacobi"),
    CG(rtol=1e-12, preconditioner="nystroem"),
]


@parametrize_with_methods()
def test_registered(method, check):
    check(method)


@pytest.mark.slow
@parametrize_with_methods(MORE)
def test_settings(method, check):
    check(method)


class PlainInverse(InverseOperator):
    """A dense solve, with what one fault changes as an attribute."""

    name = "plain"

    def __init__(self, A, hessian_perturbation, fault=None):
        self.curvature, self.hessian_perturbation, self.fault = A, hessian_perturbation, fault
        self.matrix = A.to_dense()
        values = torch.linalg.eigvalsh(self.matrix) + hessian_perturbation
        self.positive_definite = bool(values[0] > 0) != (fault == "definite")
        self.calls = 0

    @property
    def gaussian(self):
        return self.fault == "root"

    def log_det(self):
        return 0.0 if self.gaussian else super().log_det()

    @property
    def lower_bound(self):
        return 1e9 if self.fault == "floor" else super().lower_bound

    def solve(self, B):
        shift = self.hessian_perturbation * (2 if self.fault == "twice" else 1)
        matrix = self.matrix + shift * torch.eye(self.size, dtype=self.dtype)
        X = torch.linalg.solve(matrix, B.mT).mT
        judge = Shifted(self.curvature, shift)
        if self.fault == "nan":
            X = torch.where(B.norm(dim=1, keepdim=True) == 0, torch.nan, X)
        if self.fault == "indefinite" and not self.positive_definite:
            X = 0.5 * X
        if self.fault == "floor":
            X = B / matrix.diagonal()
        if self.fault == "batch" and len(B) > 1:
            X = X + 1e-3 * X.mean(0)
        if self.fault == "draws":
            X = X + 1e-5 * torch.randn(X.shape, dtype=X.dtype)
        residual = relative_residual(judge, B, X)
        if self.fault == "residual":
            residual = relative_residual(Shifted(self.curvature, 3 * shift), B, X)
        converged = residual <= 1e-3
        if self.fault == "indefinite" and not self.positive_definite:
            converged = torch.ones_like(converged)
        reason = reasons(converged, Reason.STAGNATED)
        if self.fault == "reason":
            reason[:] = Reason.STAGNATED
        return InverseHvpResult(X, {"residual": residual, "converged": converged, "reason": reason})

    def at(self, hessian_perturbation):
        if self.fault == "at":
            return copy.copy(self)
        return PlainInverse(self.curvature, hessian_perturbation, self.fault)

    def solve_path(self, B, hessian_perturbations):
        results = super().solve_path(B, hessian_perturbations)
        if self.fault == "path":
            return [InverseHvpResult(1.1 * x, info) for x, info in results]
        return results

    def __getstate__(self):
        state = super().__getstate__()
        if self.fault == "pickle":
            state["hessian_perturbation"] = 0.0
        if self.fault == "shift":
            # The solutions are as before; what they are judged by is not.
            shift = state["hessian_perturbation"]
            state |= {"hessian_perturbation": 0.0, "matrix": self.matrix + shift * torch.eye(self.size)}
        return state


class Plain(Method):
    """A dense solve, right but for one fault."""

    name = "plain"
    cost, memory, exactness, choose_it_for = "p³ once", "p²", "exact", "tests"

    def __init__(self, *, fault=None):
        self.fault = fault

    def invert(self, A, hessian_perturbation, verbose=0):
        if self.fault == "settings":
            self.fault = "settings, twice"
        return PlainInverse(A, hessian_perturbation, self.fault)


def test_a_right_method_passes():
    check_method(Plain())


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("nan", "check_solutions_are_finite: solutions are finite"),
        ("twice", "check_exact_is_exact: x is that of a dense solve"),
        ("residual", "check_residual_is_true: the residual is the true"),
        ("indefinite", "check_converged_is_true: converged rows solve the system"),
        ("reason", "check_converged_is_true: `reason` is CONVERGED where `converged` is"),
        ("at", r"check_another_shift_is_fresh: at\(.*\) is at it"),
        ("path", "check_path_is_solve: a path's x is that of solve"),
        ("pickle", "check_state_survives_pickling: a pickled inverse solves as before"),
        ("shift", "check_state_survives_pickling: a pickled inverse is at its λ"),
        ("batch", "check_rows_are_alone: row 0 alone is as among others"),
        ("floor", "check_bounds_hold: gᵀx is within its bounds, or has none"),
        ("root", "check_root_is_of_the_inverse: `gaussian` is False, as stated"),
        ("draws", "check_solves_alike_twice: two solves give the same x"),
        ("definite", "check_definite_is_definite: positive_definite is"),
        ("settings", "check_settings_are_kept: the settings stay"),
    ],
)
def test_a_fault_is_told(fault, told):
    with pytest.raises(AssertionError, match=told):
        check_method(Plain(fault=fault))


def test_what_is_no_method_is_refused():
    with pytest.raises(TypeError, match="an instance of a Method"):
        check_method(Direct)


def test_a_method_that_refuses_a_definite_matrix_is_told():
    class Refusing(Plain):
        name = "refusing"

        def invert(self, A, hessian_perturbation, verbose=0):
            message = "never"
            raise ValueError(message)

    with pytest.raises(AssertionError, match="a definite problem is inverted"):
        check_method(Refusing())


def test_an_unstated_fact_is_told():
    class Silent(Plain):
        name = "silent"

    with pytest.raises(AssertionError, match="`cost` is stated"):
        check_method(Silent())
