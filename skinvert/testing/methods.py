"""What every method of inversion must keep, whatever it does inside."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.base import clone

from .._check import must_be
from ..methods.base import InverseOperator, Method
from ..methods.quadratic import QuadraticForms
from ..models import TwiceDifferentiable
from ..reasons import Reason
from ..registry import InversionRegistry
from ..system import is_method
from .claims import ROUNDING, claim, numbers, quiet, raise_faults
from .problems import Problem, problems_for, rows
from .recorded import Recorded

if TYPE_CHECKING:
    import pytest

__all__ = ["METHOD_CHECKS", "check_method", "parametrize_with_methods", "registered_methods"]

# How many of a method's states are gone on from.
STATES = 5


def check_method(method: Method) -> None:
    """Hold a method to all that every method must keep; AssertionError with every fault that was found.

    A is each curvature of a small network, and plain rows, as far as they have the faces that the method requires;
    the oracle is the dense float64 matrix. The method's own ``tight`` settings say how exact it can be made.

    Parameters
    ----------
    method : Method
        An instance; its class need not be registered.

    Raises
    ------
    AssertionError
        With one line for each check that failed.

    Examples
    --------
    >>> from skinvert.methods import Direct
    >>> check_method(Direct())
    """
    if not isinstance(method, Method):
        raise TypeError(must_be("method", "an instance of a Method", repr(method)))
    raise_faults(method, type(method).__name__, METHOD_CHECKS)


def registered_methods() -> dict[str, Method]:
    """Return an instance, at its tight settings, of each method of the registry by its name."""
    kinds = {name: kind for (model, name), kind in InversionRegistry.registry.items() if model is TwiceDifferentiable}
    return {name: kind.tight() for name, kind in kinds.items() if is_method(kind)}


def parametrize_with_methods(methods: Iterable[Method] | None = None) -> pytest.MarkDecorator:
    """Return a decorator that calls a test with each ``method`` and each ``check`` of it.

    Parameters
    ----------
    methods : iterable of Method, default=None
        None is every method of the registry at its tight settings.

    Examples
    --------
    >>> @parametrize_with_methods()
    ... def test_methods(method, check):
    ...     check(method)
    """
    import pytest

    given = list(registered_methods().values() if methods is None else methods)
    cases = [
        pytest.param(method, check, id=f"{type(method).__name__}-{check.__name__}")
        for method in given
        for check in METHOD_CHECKS
    ]
    return pytest.mark.parametrize(("method", "check"), cases)


def check_settings_are_kept(method: Method) -> None:
    """Hold that ``invert`` leaves the settings alone, and that ``clone`` and ``pickle`` keep them."""
    before = {name: repr(value) for name, value in method.get_params(deep=False).items()}
    for problem, _ in _inverses(method, definite=True):
        _inverse(problem, method)
    after = {name: repr(value) for name, value in method.get_params(deep=False).items()}
    _claim(before == after, f"the settings stay {before}", after)
    again = {name: repr(value) for name, value in pickle.loads(pickle.dumps(method)).get_params(deep=False).items()}
    _claim(before == again, f"a pickle keeps the settings {before}", again)


def check_says_what_it_is(method: Method) -> None:
    """Hold that the class states its row in the table of methods, and requires faces that some curvature has."""
    for name in ("name", "cost", "memory", "exactness", "choose_it_for"):
        _claim(bool(_stated(type(method), name)), f"`{name}` is stated", "nothing")
    _claim(any(True for _ in problems_for(method)), "some curvature has the faces it requires", method.requires)
    for problem, inverse in _inverses(method, definite=True):
        kind = type(method.choose(problem.A, problem.shift))
        _claim(inverse.keeps_operator == kind.keeps_operator, "`keeps_operator` is as stated", inverse, problem)


def check_solutions_are_finite(method: Method) -> None:
    """Hold that finite b, zeros and tiny ones among them, have finite solutions, and zero that of zero."""
    for problem, inverse in _inverses(method):
        B = rows(4, problem.A.size, problem.A.dtype)
        B[1], B[2] = 0.0, 1e-20 * B[2]
        before = B.clone()
        x, info = inverse.solve(B)
        _claim(bool(torch.isfinite(x).all()), "solutions are finite", "NaN or infinity", problem)
        _claim(x.shape == B.shape and x.dtype == B.dtype, "x has b's shape and dtype", (x.shape, x.dtype), problem)
        _claim(bool((x[1] == 0).all()), "x = 0 for b = 0", float(x[1].norm()), problem)
        _claim(bool((B == before).all()), "b is left as it was", "another b", problem)
        for name in ("residual", "converged", "reason"):
            _claim(name in info and info[name].shape == (len(B),), f"info[{name!r}] has one entry a row", info, problem)


def check_residual_is_true(method: Method) -> None:
    """Hold that ``info["residual"]`` is ‖(H + λI)x − b‖ / ‖b‖ of the exact H."""
    for problem, inverse in _inverses(method):
        B = rows(5, problem.A.size, problem.A.dtype)
        x, info = inverse.solve(B)
        _truly(problem, B, x, info["residual"], "the residual")


def check_converged_is_true(method: Method) -> None:
    """Hold that rows reported as converged solve the exact system, on indefinite matrices too, and others say why."""
    for problem, inverse in _inverses(method):
        B = rows(5, problem.A.size, problem.A.dtype)
        x, info = inverse.solve(B)
        converged, told = info["converged"].cpu().bool(), info["reason"].cpu().tolist()
        claimed = problem.residuals(B, x)[converged]
        limit = max(10 * type(method).accuracy, 10 * ROUNDING[B.dtype])
        _claim(bool((claimed <= limit).all()), "converged rows solve the system", numbers(claimed), problem)
        _claim(set(told) <= set(Reason), "each `reason` is a Reason", told, problem)
        agrees = converged.tolist() == [reason == Reason.CONVERGED for reason in told]
        _claim(agrees, "`reason` is CONVERGED where `converged` is", told, problem)


def check_exact_is_exact(method: Method) -> None:
    """Hold a method that is not approximate to a dense solve of a definite system, for any number of rows."""
    for problem, inverse in _inverses(method):
        if inverse.approximate or not problem.definite:
            continue
        for k in (1, 3, problem.A.size + 2):
            B = rows(k, problem.A.size, problem.A.dtype)
            x, info = inverse.solve(B)
            expected = problem.solutions(B)
            error = float((x.double().cpu() - expected).norm() / expected.norm())
            limit = problem.condition * max(type(method).accuracy, ROUNDING[B.dtype])
            _claim(error <= limit, f"x is that of a dense solve, within {limit:.2g}", f"{error:.3g} off", problem)
            # What is asked of float64 may be below the rounding of float32.
            converged = B.dtype == torch.float32 or bool(info["converged"].all())
            _claim(converged, "every row converges", info["converged"].tolist(), problem)


def check_definite_is_definite(method: Method) -> None:
    """Hold that ``positive_definite``, where it is known, is what ``eigvalsh`` says of the operator inverted."""
    for problem, inverse in _inverses(method):
        if inverse.positive_definite is None:
            continue
        operator = inverse.operator.to_dense().double().cpu().numpy()
        least = float(np.linalg.eigvalsh(operator)[0])
        _claim(inverse.positive_definite == (least > 0), f"positive_definite is {least > 0}", "the contrary", problem)


def check_another_shift_is_fresh(method: Method) -> None:
    """Hold that ``at(λ)`` is the inverse that ``invert`` makes at that λ."""
    for problem, inverse in _inverses(method, definite=True):
        for shift in (3.0 * problem.shift, problem.shift):
            there = problem.at(shift)
            moved, fresh = inverse.at(shift), _inverse(there, clone(method))
            _claim(
                moved.hessian_perturbation == shift, f"at({shift:.3g}) is at it", moved.hessian_perturbation, problem
            )
            B = rows(3, problem.A.size, problem.A.dtype)
            _same(problem.at(shift), method, moved.solve(B).x, fresh.solve(B).x, f"at({shift:.3g}) is a fresh inverse")
            same = moved.positive_definite == fresh.positive_definite
            _claim(same, "at(λ) claims definiteness as a fresh one does", moved.positive_definite, problem)
            judged = moved.exact is not None or inverse.exact is None or not moved.approximate
            _claim(judged, "at(λ) is judged where the inverse is", "no judge", problem)


def check_path_is_solve(method: Method) -> None:
    """Hold that ``solve_path`` gives at each λ what ``solve`` gives there: solutions, residuals and verdicts."""
    for problem, inverse in _inverses(method, definite=True):
        B, shifts = rows(3, problem.A.size, problem.A.dtype), [4 * problem.shift, problem.shift]
        results = inverse.solve_path(B, shifts)
        _claim(len(results) == len(shifts), f"a path has {len(shifts)} results", len(results), problem)
        for shift, (x, info) in zip(shifts, results, strict=True):
            there = problem.at(shift)
            alone, own = inverse.at(shift).solve(B)
            _same(there, method, x, alone, "a path's x is that of solve")
            _claim(bool((info["converged"] == own["converged"]).all()), "both judge alike", info["converged"], there)
            _truly(there, B, x, info["residual"], "a path's residual")


def check_rows_are_alone(method: Method) -> None:
    """Hold that rows solved together are as alone, and that the solution is linear in b."""
    for problem, inverse in _inverses(method, definite=True):
        B = rows(4, problem.A.size, problem.A.dtype)
        X = inverse.solve(B).x
        for i in range(len(B)):
            _same(problem, method, X[i : i + 1], inverse.solve(B[i : i + 1]).x, f"row {i} alone is as among others")
        mixture = inverse.solve(2 * B[:1] - 3 * B[1:2]).x
        _same(problem, method, mixture, 2 * X[:1] - 3 * X[1:2], "x is linear in b")


def check_bounds_hold(method: Method) -> None:
    """Hold quadratic forms to their bounds, of pairs and of rows alone, on indefinite matrices too."""
    for problem, inverse in _inverses(method):
        G, B = rows(4, problem.A.size, problem.A.dtype), rows(5, problem.A.size, problem.A.dtype, seed=1)
        pairs, own = inverse.quadratic(G, B), inverse.quadratic(B)
        _within(problem, pairs, G.double() @ problem.solutions(B).mT, "gᵀx is within its bounds, or has none")
        _within(problem, own, (B.double() * problem.solutions(B)).sum(1), "bᵀx is within its bounds, or has none")


def check_root_is_of_the_inverse(method: Method) -> None:
    """Hold ``log_det`` and ``root`` to the matrix that is inverted, where the method is ``gaussian``; else to raise."""
    for problem, inverse in _inverses(method):
        stated = type(method.choose(problem.A, problem.shift)).gaussian
        _claim(inverse.gaussian == stated, f"`gaussian` is {stated}, as stated", inverse.gaussian, problem)
        matrix = inverse.operator.to_dense().double().cpu().numpy()
        if not stated or float(np.linalg.eigvalsh(matrix)[0]) <= 0:
            _claim(_raises(inverse), "what has no root raises", "none", problem)
            continue
        expected, limit = float(np.linalg.slogdet(matrix)[1]), problem.condition * ROUNDING[inverse.dtype]
        gap = abs(inverse.log_det() - expected)
        _claim(gap <= limit * len(matrix), f"log_det() is {expected:.4g}", inverse.log_det(), problem)
        identity = torch.eye(inverse.noise_size, dtype=inverse.dtype, device=inverse.device)
        S = inverse.root(identity).double().cpu().numpy()
        gap = float(np.linalg.norm(S.T @ S @ matrix - np.eye(len(matrix)), 2))
        _claim(gap <= 10 * limit, "root times its transpose is the inverse", f"{gap:.3g} off", problem)


def check_solves_alike_twice(method: Method) -> None:
    """Hold that two solves, and two inversions with one seed, agree, and leave the global generators alone."""
    seeded = _seeded(method)
    for problem, inverse in _inverses(seeded, definite=True):
        B = rows(3, problem.A.size, problem.A.dtype)
        before = _global_states()
        X, again = inverse.solve(B).x, inverse.solve(B).x
        other = _inverse(problem, clone(seeded)).solve(B).x
        after = _global_states()
        _claim(torch.equal(X, again), "two solves give the same x", float((X - again).norm()), problem)
        _claim(torch.equal(X, other), "two inversions with one seed do", float((X - other).norm()), problem)
        _claim(before == after, "global generators are left alone", "other states", problem)


def check_state_survives_pickling(method: Method) -> None:
    """Hold that an inverse that was pickled solves as before, is judged as before, and serves another λ as before."""
    for problem, inverse in _inverses(method, definite=True):
        B, shift = rows(3, problem.A.size, problem.A.dtype), 2 * problem.shift
        loaded = pickle.loads(pickle.dumps(inverse))
        x, info = loaded.judged_by(problem.A).solve(B)
        _same(problem, method, x, inverse.solve(B).x, "a pickled inverse solves as before")
        kept = loaded.hessian_perturbation
        _claim(kept == inverse.hessian_perturbation, "a pickled inverse is at its λ", kept, problem)
        _truly(problem, B, x, info["residual"], "a pickled inverse's residual")
        moved = loaded.at(shift).solve(B).x
        _same(problem.at(shift), method, moved, inverse.at(shift).solve(B).x, "it serves another λ as before")


def check_resumes_from_any_state(method: Method) -> None:
    """Hold ``resume``, of a method that ``resumes``, to the bits of ``invert`` from each state that it tells.

    The states are as they come back from a file; of many the first, the last and some between are tried.
    """
    if not type(method).resumes:
        return
    for problem, inverse in _inverses(_seeded(method), definite=True):
        B = rows(3, problem.A.size, problem.A.dtype)
        expected, first = inverse.solve(B).x, Recorded(problem.A.device)
        x = _resumed(problem, method, first).solve(B).x
        _claim(torch.equal(x, expected), "`resume` gives the bits of `invert`", _gap(x, expected), problem)
        _claim(bool(first.written), "`resume` tells its checkpoint what it has done", "no state", problem)
        for which in sorted({int(at) for at in np.linspace(0, len(first.written) - 1, STATES)}):
            again = Recorded(problem.A.device, first.written[which]())
            x = _resumed(problem, method, again).solve(B).x
            what = f"`resume` from state {which + 1} of {len(first.written)}"
            _claim(torch.equal(x, expected), f"{what} gives the bits of `invert`", _gap(x, expected), problem)
            _claim(bool(again.resumed_stages), f"{what} asks for what is known", "a run from the beginning", problem)


METHOD_CHECKS: list[Callable[[Method], None]] = [
    check_settings_are_kept,
    check_says_what_it_is,
    check_solutions_are_finite,
    check_residual_is_true,
    check_converged_is_true,
    check_exact_is_exact,
    check_definite_is_definite,
    check_another_shift_is_fresh,
    check_path_is_solve,
    check_rows_are_alone,
    check_bounds_hold,
    check_root_is_of_the_inverse,
    check_solves_alike_twice,
    check_state_survives_pickling,
    check_resumes_from_any_state,
]


def _some(method: Method) -> Iterator[Problem]:
    for dtype in (torch.float64, torch.float32):
        yield from problems_for(method, dtype)


def _inverses(method: Method, definite: bool = False) -> Iterator[tuple[Problem, InverseOperator]]:
    """Yield the problems that a method does not refuse, with their inverses; warnings are off meanwhile."""
    for problem in _some(method):
        if definite and not problem.definite:
            continue
        try:
            inverse = _inverse(problem, clone(method))
            if not problem.definite:
                with quiet():
                    inverse.solve(rows(1, problem.A.size, problem.A.dtype))
        except ValueError as error:
            # To refuse what is not definite is right; to refuse any other is not.
            refused = not problem.definite or (method.needs_psd and not problem.semidefinite)
            _claim(refused, "a definite problem is inverted", f"{type(error).__name__}: {error}", problem)
            continue
        with quiet():
            yield problem, inverse


def _inverse(problem: Problem, method: Method) -> InverseOperator:
    with quiet():
        return problem.invert(method)


def _seeded(method: Method) -> Method:
    seeded = clone(method)
    return seeded.set_params(random_state=0) if "random_state" in seeded.get_params() else seeded


def _resumed(problem: Problem, method: Method, checkpoint: Recorded) -> InverseOperator:
    with quiet():
        chosen = _seeded(method).choose(problem.A, problem.shift)
        return chosen.resume(problem.A, problem.shift, checkpoint).judged_by(problem.A)


def _gap(X: torch.Tensor, Y: torch.Tensor) -> str:
    return f"{float((X - Y).norm()):.3g} off"


def _same(problem: Problem, method: Method, X: torch.Tensor, Y: torch.Tensor, what: str) -> None:
    size = float(Y.double().norm())
    error = float((X.double() - Y.double()).norm()) / (size or 1.0)
    limit = 2 * problem.condition * max(type(method).accuracy, ROUNDING[X.dtype])
    _claim(error <= limit, f"{what}, within {limit:.2g}", f"{error:.3g} off", problem)


def _truly(problem: Problem, B: torch.Tensor, X: torch.Tensor, received: torch.Tensor, what: str) -> None:
    expected = problem.residuals(B, X)
    error = float((received.double().cpu() - expected).abs().max())
    limit = ROUNDING[B.dtype] * max(1.0, float(expected.max()))
    _claim(error <= limit, f"{what} is the true {numbers(expected)}", numbers(received), problem)


def _within(problem: Problem, forms: QuadraticForms, exact: torch.Tensor, what: str) -> None:
    outside = torch.maximum(forms.lower.cpu() - exact, exact - forms.upper.cpu()).nan_to_num(-1.0)
    # The dense solve has a rounding of its own.
    limit = 1e-12 * problem.condition * float(exact.abs().max())
    _claim(float(outside.max()) <= limit, what, f"{numbers(outside)} outside", problem)


def _raises(inverse: InverseOperator) -> bool:
    """Return whether both faces of a root raise, in words of what is in the way."""
    expected, told = (ValueError if inverse.gaussian else TypeError), []
    for face in (inverse.log_det, lambda: inverse.root(torch.eye(inverse.noise_size, dtype=inverse.dtype))):
        try:
            face()
        except (TypeError, ValueError) as error:
            told.append(type(error) is expected and "must be" in str(error))
    return told == [True, True]


def _claim(holds: bool, what: str, got: object, problem: Problem | None = None) -> None:
    where = "" if problem is None else f"{problem.name} ({problem.A.dtype}, λ = {problem.shift:.3g})"
    claim(holds, what, got, where)


def _stated(kind: type, name: str) -> object:
    """Return what a class itself says, not what it inherits."""
    return vars(kind).get(name)


def _global_states() -> tuple[bytes, str]:
    """Return the states of the generators that belong to the user."""
    return torch.random.get_rng_state().numpy().tobytes(), repr(np.random.get_state(legacy=False))
