"""The kit over every method of the registry, and over methods with one planted fault each."""

import copy

import pytest
import torch

from skinvert._checkpoint import NOWHERE
from skinvert.methods import CG, MINRES, Arnoldi, Direct, Nystroem
from skinvert.methods.base import InverseOperator, Method, relative_residual
from skinvert.operators import Dense, Shifted
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


@pytest.mark.one_in(3)
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


class Summing(Plain):
    """Squares A row by row, and inverts it; goes on after the rows that a checkpoint has, right but for one fault."""

    name, resumes = "summing", True
    cost, memory, exactness, choose_it_for = "p³ once", "p²", "exact", "tests"

    def invert(self, A, hessian_perturbation, verbose=0):
        return self.resume(A, hessian_perturbation, NOWHERE)

    def resume(self, A, hessian_perturbation, checkpoint, verbose=0):
        fields = {"done": "int", "total": "tensor[p,p]"}
        known = None if self.fault == "forgetful" else checkpoint.resumed("sum", fields)
        matrix = A.to_dense()
        state = {"done": 0, "total": torch.zeros_like(matrix)} if known is None else dict(known)
        for j in range(state["done"], len(matrix)):
            if self.fault == "early":
                state["done"] = j + 1
                checkpoint.keep("sum", lambda: self.told(state))
            state["total"][j] += matrix[j]
            state["done"] = j + 1
            if self.fault not in ("early", "silent"):
                checkpoint.keep("sum", lambda: self.told(state))
        if self.fault == "another" and checkpoint.keeps:
            state["total"] *= 1 + 1e-6
        return PlainInverse(Dense(state["total"]), hessian_perturbation)

    def told(self, state):
        total = state["total"].float().to(state["total"].dtype) if self.fault == "rounded" else state["total"]
        total = total[:1] if self.fault == "shape" else total
        return {**state, "total": self if self.fault == "object" else total}


def test_a_method_that_resumes_rightly_passes():
    check_method(Summing())


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("early", r"`resume` from state 1 of \d+ gives the bits of `invert`"),
        ("rounded", r"`resume` from state \d+ of \d+ gives the bits of `invert`"),
        ("shape", "must be a file of this job"),
        ("forgetful", r"`resume` from state 1 of \d+ asks for what is known"),
        ("silent", "`resume` tells its checkpoint what it has done"),
        ("another", "`resume` gives the bits of `invert`"),
        ("object", "must be plain, or skinvert's own"),
    ],
)
def test_a_fault_of_resume_is_told(fault, told):
    with pytest.raises(AssertionError, match=f"check_resumes_from_any_state: .*{told}") as error:
        check_method(Summing(fault=fault))
    assert "fails 1 of" in str(error.value)


def test_a_seldom_state_is_tried():
    """Of many states the last is among those that are gone on from."""

    class Late(Summing):
        name = "late"
        cost, memory, exactness, choose_it_for = Plain.cost, Plain.memory, Plain.exactness, Plain.choose_it_for

        def told(self, state):
            wrong = state["done"] == len(state["total"])
            return {**state, "total": 2 * state["total"]} if wrong else super().told(state)

    with pytest.raises(AssertionError, match=r"from state (\d+) of \1 gives the bits"):
        check_method(Late())


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
