"""What a fitted case answers beside solutions: a path over λ, quadratic forms with bounds, and variances of outputs."""

from dataclasses import replace

import numpy as np
import torch
from fuzz import runner
from fuzz.cases import choice
from fuzz.losses import CLASSIFYING
from fuzz.together import hold_alike


def run(case, shared):
    """Return what became of a case; raise Silent where an answer is not what the oracle has, within its own bounds."""
    if choice(case, "blocks", 4) == 0:
        case = replace(case, blocks="layer")
    outcome = runner.run(case, shared)
    found = runner.solved(case, shared)
    if found.refusal or not found.oracle.mass() > 0 or not torch.isfinite(runner.as_float64(found.x)).all():
        return outcome
    if case.blocks:
        _hold_blocks(case, found)
    # One question a case: each costs as much as a solve, or more.
    (_hold_path, _hold_quadratic, _hold_variances)[choice(case, "question", 3)](case, found)
    return outcome


def _hold_path(case, found):
    """Each λ of a path is solved as well as the fitted one: they shift the operator that is inverted, and no more."""
    fitted = found.inverter.hessian_perturbation_
    shifts = [fitted * factor for factor in (1, 2, 10)] if fitted else [0, 0.1, 1]
    paths, told, refusal = runner.tried(case, lambda: found.inverter.path(found.b, shifts))
    if refusal or told:
        return
    for shift, x in zip(shifts, paths, strict=True):
        hold_alike(case, found, x, f"at λ = {shift:g}", shift - case.perturbation)


def _hold_blocks(case, found):
    """Solutions are those of the blocks of H on its diagonal, a layer each, where the blocks are inverted exactly."""
    H, inverse = runner.curvature_of(case, found), found.inverter.inverse_
    if H is None or found.told or any(block.approximate for block in inverse.inverses):
        return
    names = [name.partition("[")[0].rpartition(".")[0] for name in found.inverter.get_feature_names_out()]
    layers = np.unique(names, return_inverse=True)[1]
    A = H * torch.from_numpy(layers[:, None] == layers) + case.perturbation * torch.eye(len(H), dtype=H.dtype)
    b, x = runner.as_float64(found.b), runner.as_float64(found.x)
    residual = runner.relative(x @ A - b, b)
    floor = runner.floor_of(case, A, b, found.x)
    converged = torch.stack([runner.as_tensor(info["converged"]) for info in found.info["blocks"]]).all(0)
    wrong = converged & ~(residual <= 10 * min(inverse.tolerance, runner.LOOSEST) * len(found.info["blocks"]) + floor)
    if bool(wrong.any()):
        raise runner.Silent(f"blocks leave {residual[wrong].max():.3g} of their own matrix\n{case!r}")


def _hold_quadratic(case, found):
    """The bounds contain gᵀ(H + λI)⁻¹b of the oracle's H, whatever the method inverts."""
    H = runner.curvature_of(case, found)
    if H is None or not torch.isfinite(H).all():
        return
    A = H + case.perturbation * torch.eye(len(H), dtype=H.dtype)
    values = torch.linalg.eigvalsh(A).abs()
    # What the oracle has to so many digits.
    digits = 1e-4 if case.dtype is torch.float32 else 1e-7 if found.oracle.differenced else 1e-10
    digits = max(digits, runner.slope_of(case))
    if not values.min() > 10 * digits * values.max():
        return
    generator = np.random.default_rng(case.seed)
    G, B = (generator.standard_normal((rows, len(H))) for rows in (2, 3))
    forms, _, refusal = runner.tried(case, lambda: found.inverter.quadratic(G, B))
    if refusal:
        return
    G, B = torch.from_numpy(G), torch.from_numpy(B)
    exact = G @ torch.linalg.solve(A, B.mT)
    slack = digits * G.norm(dim=1)[:, None] * B.norm(dim=1) * values.max() / values.min() ** 2
    lower, upper = runner.as_float64(forms.lower), runner.as_float64(forms.upper)
    # NaN, where no bound is known, excludes nothing.
    wrong = (exact < lower - slack) | (exact > upper + slack)
    if bool(wrong.any()):
        gap = torch.maximum(lower - exact, exact - upper)[wrong].max()
        raise runner.Silent(f"a quadratic form is out of its bounds by {gap:.3g}, slack {slack.max():.3g}\n{case!r}")


def _hold_variances(case, found):
    """The variance of each output is J(A⁻¹Jᵀ) / N of the oracle's J, by the inverter's own solutions.

    N is what the labels weigh, where torch's own losses divide by that, else Σw.
    """
    if found.told:
        return
    i = case.seed % case.n
    rows = slice(i, i + 1)
    data = found.X[rows], found.y[rows]
    received, told, refusal = runner.tried(case, lambda: found.inverter.predictive_variance(*data))
    J = found.oracle.row_jacobian(i)[0]
    x, also, refused = runner.tried(case, lambda: found.inverter.transform(J))
    if refusal or refused or told or also:
        return
    of_labels = case.loss in CLASSIFYING and not case.loss.startswith("callable")
    total = found.oracle.mass() if of_labels else float(found.oracle.weights.sum())
    inverse = found.inverter.inverse_
    expected = (J * runner.as_float64(x)).sum(1) / total
    # Jacobians to rounding; and iterations, which may end one step apart.
    eps = 1e3 * runner.eps_of(case) + (10 * inverse.tolerance if inverse.keeps_operator else 0.0)
    least = float(torch.linalg.eigvalsh(inverse.operator.to_dense().double()).abs().min())
    allowed = eps * J.norm(dim=1) * (J.norm(dim=1) + case.input_scale) / (least * total + 1e-300)
    gap = (runner.as_float64(received).reshape(-1) - expected).abs()
    if not bool((gap <= allowed).all()):
        raise runner.Silent(f"a variance off by {gap.max():.3g}, allowed {allowed.max():.3g}\n{case!r}")
