"""One case's scores: to first order and by a Newton step, held against dense float64 inverses."""

import warnings

import numpy as np
import torch
from fuzz import runner

from skinvert import HessianInverter, InfluenceFunction

# Rows that are left out by a Newton step.
LEFT_OUT = 2


def run(case, shared=None):
    """Return what became of a case: "solved", "warned", "no oracle" or "refused"."""
    module, X, y, loss, weights, oracle = runner.built(case, {} if shared is None else shared)
    if not oracle.mass() > 0:
        return "no oracle"
    with torch.enable_grad():
        H = oracle.ggn() if case.curvature == "ggn" else oracle.hessian()
    if not torch.isfinite(H).all():
        return "no oracle"
    values = torch.linalg.eigvalsh(H)
    shift = float(max(0.0, -2 * values[0]) + 0.1 * values.abs().max()) or 1.0
    A = H + shift * torch.eye(len(H), dtype=H.dtype)
    before = runner.state_of(module, X)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            outcome = _held(case, module, X, y, loss, weights, oracle, A, shift)
        except (ValueError, TypeError, MemoryError) as error:
            if not any(word in str(error) for word in runner.TELLING):
                raise runner.Raw(f"{type(error).__name__}: {error}\n{case!r}") from error
            return f"refused: {error}"
        except runner.Silent:
            raise
        except Exception as error:
            raise runner.Raw(f"{type(error).__name__}: {error}\n{case!r}") from error
    if not runner.same(before, runner.state_of(module, X)) or not module.training:
        raise runner.Changed(repr(case))
    return "warned" if told and outcome == "solved" else outcome


def _held(case, module, X, y, loss, weights, oracle, A, shift):
    settings = {"loss": loss.given, "weight_decay": case.weight_decay, "batch_size": case.batch_size}
    name = "ggn" if case.curvature == "ggn" else "hessian"
    inverter = HessianInverter("direct", shift, curvature=name, dtype=case.dtype, **settings)
    influence = InfluenceFunction(inverter, batch_size=case.batch_size)
    influence.fit(module, runner.data_of(case, X, y), sample_weight=weights)
    received = influence.transform((X, y)).double()
    shares = oracle.weights / oracle.weights.sum()
    with torch.enable_grad():
        rows = oracle.gradient_rows()
    solutions = torch.linalg.solve(A, rows.mT).mT
    expected = rows @ solutions.mT * shares
    allowed = _allowed(case, oracle, A, rows) * shares.max()
    _check(case, "first order", received, expected, allowed)
    _check(case, "self", torch.as_tensor(influence.self_influence()).double(), expected.diagonal(), allowed)
    if case.dtype is torch.float32 or case.model_dtype is torch.float32:
        return "solved"
    return _newton(case, InfluenceFunction(inverter, removal="newton"), module, X, y, weights, oracle, A)


def _newton(case, influence, module, X, y, weights, oracle, A):
    influence.fit(module, runner.data_of(case, X, y), sample_weight=weights)
    scores = influence.transform((X, y))
    shares, generator = oracle.weights / oracle.weights.sum(), np.random.default_rng(case.seed)
    for j in generator.choice(len(X), min(LEFT_OUT, len(X)), replace=False).tolist():
        with torch.enable_grad():
            row = oracle.row_by_logits(j) if case.loss == "nll" else oracle.row_ggn(j)
            rows, own = oracle.gradient_rows(), oracle.scale * shares[j] * row
        gradient = shares[j] * rows[j]
        step = torch.linalg.solve(A - own, gradient)
        expected = oracle.losses(step) - oracle.losses(0 * step)
        allowed = _allowed(case, oracle, A - own, rows) * shares[j] + 1e-12 * oracle.losses(step).max()
        _check(case, "newton", scores[:, j].double(), expected, allowed)
    return "solved"


def _allowed(case, oracle, A, rows):
    """What rounding makes of gᵀA⁻¹b: of the gradients, and of A, which an oracle by differences has to nine digits."""
    eps = max(torch.finfo(case.dtype or case.model_dtype).eps, runner.slope_of(case))
    size = float(rows.norm(dim=1).max())
    # As for the gradients themselves: relative to what is summed in them.
    gradient = 3e3 * eps * (float(rows.abs().max()) + case.input_scale) * len(A) ** 0.5
    inverse = 1 / float(torch.linalg.eigvalsh(A).abs().min())
    matrix = 1e3 * max(eps, 1e-9 if oracle.differenced else 0.0) * float(torch.linalg.cond(A))
    return inverse * (matrix * size**2 + gradient * (2 * size + gradient))


def _check(case, what, received, expected, allowed):
    """Raise Silent where scores are off by more than is allowed."""
    allowed = float(allowed)
    gap = float((received - expected).abs().max())
    if not gap <= allowed:
        raise runner.Silent(f"{what}: scores off by {gap:.3g}, allowed {allowed:.3g}\n{case!r}")
