"""What each method of the registry solves, as a dense float64 formula; no code of skinvert's."""

import numpy as np
import torch
from facts import LOOSE, TIGHT
from kronecker_oracles import KroneckerOracle
from oracles import Oracle, solution

RANK = 6

# Settings with which the formulas below are what is computed; an iterative method is asked for all digits.
TRUNCATED = {"arnoldi": {"rank": RANK}, "nystroem": {"rank": RANK}}
SETTINGS = {name: method.get_params(deep=False) for name, method in TIGHT.items()} | TRUNCATED
# What is asked of float64 may be below the rounding of float32.
SETTINGS_FLOAT32 = {name: SETTINGS[name] if name in LOOSE or name in TRUNCATED else {} for name in SETTINGS}


def exact(case, curvature, H, shift, b):
    return solution(H, shift, b)


def diagonal(case, curvature, H, shift, b):
    return b / (np.diag(H) + shift)


def truncated(case, curvature, H, shift, b):
    """The eigenvalues of largest magnitude; for the others the penalty's mean on their span."""
    values, vectors = np.linalg.eigh(H)
    order = np.argsort(-np.abs(values))
    kept, rest = vectors[:, order[:RANK]], vectors[:, order[RANK:]]
    mean = 0.0 if case is None else case.weight_decay
    return solution((kept * values[order[:RANK]]) @ kept.T + mean * rest @ rest.T, shift, b)


def nystroem(case, curvature, H, shift, b):
    """(HΩ)(ΩᵀHΩ)⁺(HΩ)ᵀ for the Ω of the seed."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(len(H), dtype=torch.float64, generator=generator) for _ in range(min(RANK, len(H)))]
    Y = H @ torch.stack(rows).numpy().T
    core = torch.stack(rows).numpy() @ Y
    return solution(Y @ np.linalg.pinv(core, rcond=1e-13, hermitian=True) @ Y.T, shift, b)


def harmonic_mean(case, curvature, H, shift, b):
    """The mean of the samples' own inverses."""
    oracle = Oracle(case)
    D = np.diag(shift + oracle.penalty.numpy())
    return b @ np.mean([np.linalg.inv(np.outer(g, g) + D) for g in oracle.gradient_rows()], axis=0)


def kronecker(kind):
    def solve(case, curvature, H, shift, b):
        net = case.module if isinstance(case.module, torch.nn.Sequential) else torch.nn.Sequential(case.module)
        oracle = KroneckerOracle(
            net,
            case.X,
            case.y,
            lambda f, y: case.summed(f, y),
            # A mean over c outputs divides each row's sum by c.
            mass=lambda y: y.numel() if case.loss == "mse" else 1.0,
            weights=case.counts,
            empirical=curvature == "empirical_fisher",
        )
        return solution(getattr(oracle, kind)() + case.weight_decay * np.eye(len(H)), shift, b)

    return solve


# By default a method promises the exact solution. Formulas of the matrix alone, and those of the samples of a case.
OF_THE_MATRIX = {"diagonal": diagonal, "arnoldi": truncated, "nystroem": nystroem}
OF_SAMPLES = {"harmonic_mean": harmonic_mean, "kfac": kronecker("kfac"), "ekfac": kronecker("ekfac")}
DEFINITIONS = OF_THE_MATRIX | OF_SAMPLES
# rtol times the condition.
EXACT_TO = {name: 5 * TIGHT[name].accuracy for name in LOOSE}


def definition_of(name):
    return DEFINITIONS.get(name, exact)
