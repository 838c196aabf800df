"""One case from end to end: fit, solve, and hold what is told against the oracle."""

import threading
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fuzz import losses as L
from fuzz import models as M
from fuzz.cases import right_hand_sides
from fuzz.oracle import Oracle
from fuzz.wrappers import IN_TORCH, laid_out, wrapped
from scipy.linalg import LinAlgWarning
from sklearn.exceptions import ConvergenceWarning
from torch.utils.data import DataLoader, TensorDataset

from skinvert import HessianInverter, PerSampleGradient
from skinvert.methods import CG, LiSSA

# Words of which each error of ours has one.
TELLING = ("must be", "Try", "ran out of memory", "diverged", "met NaN", "did not converge")
# The loosest relative residual that any method counts as solved.
LOOSEST = 1e-3
# Layers that subtract a row's own mean.
CENTRED = {"layer_norm", "group_norm", "instance_norm"}


class Silent(AssertionError):
    """Converged and without a warning, and wrong."""


class Raw(AssertionError):
    """An error that says nothing of what to do."""


class Changed(AssertionError):
    """Something of the user's is not as it was."""


@dataclass
class Solved:
    """A case that was fitted and solved: what went in, and what came of it, or what it was refused as."""

    module: Any
    X: Any
    y: Any
    loss: Any
    weights: Any
    oracle: Any
    inverter: Any = None
    b: Any = None
    x: Any = None
    info: Any = None
    # What was warned of the solutions.
    told: list = field(default_factory=list)
    refusal: str = ""


def run(case, shared=None):
    """Run a case; return what became of it: "solved", "warned", "not converged" or "refused".

    ``shared`` is a dict in which the variants of one case keep their oracle, and what others of them ask more of.
    """
    found = solved(case, {} if shared is None else shared)
    return found.refusal or judged(case, found)


def solved(case, shared):
    """Fit and solve a case, once for all that ask; raise Changed where it left something of the user's otherwise."""
    if case not in shared:
        found = Solved(*built(case, shared))
        before = state_of(found.module, found.X)
        _in_ambient(case, lambda: _solve(case, found))
        if not same(before, state_of(found.module, found.X)) or not found.module.training:
            raise Changed(repr(case))
        shared[case] = found
    return shared[case]


def built(case, shared):
    """Return module, X, y, loss, weights and oracle of a case; ``shared`` keeps the oracle."""
    torch.manual_seed(case.seed)
    module, X = M.build(case)
    plain, module = wrapped(case, module)
    plain.eval()
    with torch.no_grad():
        f = plain(X.clone()).double()
    module.train()
    loss = L.LOSSES[case.loss](f)
    y = loss.targets(f)
    y = y.to(case.model_dtype) if y.is_floating_point() else y
    weights = np.random.default_rng(case.seed).integers(0, 3, case.n) if case.form == "weighted" else None
    if weights is not None and not weights.any():
        weights[0] = 1
    oracle = shared.setdefault(("oracle", case.wrapper), None) or Oracle(case, plain, X, y, loss, weights)
    shared["oracle", case.wrapper] = oracle
    return module, X, y, loss, weights, oracle


def state_of(module, X):
    """What must be as it was."""
    tensors = [*module.parameters(), *module.buffers(), X]
    return (
        [t.detach().clone() for t in tensors],
        [p.requires_grad for p in module.parameters()],
        [p.grad for p in module.parameters()],
    )


def same(one, other):
    """Whether two states are equal."""
    return all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)) and one[1:] == other[1:]


def _in_ambient(case, function):
    if case.ambient == "thread":
        found = []
        thread = threading.Thread(target=lambda: found.append(_caught(function)))
        thread.start()
        thread.join()
        result = found[0]
    else:
        context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(case.ambient, nullcontext)
        with context():
            result = _caught(function)
    if isinstance(result, Exception):
        raise result
    return result


def _caught(function):
    try:
        return function()
    except Exception as error:  # handed over from the thread
        return error


def _method(case):
    if case.method.startswith("cg+"):
        return CG(preconditioner=case.method[3:])
    if case.method == "lissa":
        return LiSSA(batch_size=4, maxiter=300)
    return case.method


def data_of(case, X, y):
    X, y = laid_out(case, X), laid_out(case, y)
    if case.form == "arrays":
        return np.asarray(X), np.asarray(y)
    if case.form == "dataset":
        return TensorDataset(X, y)
    if case.form in ("loader", "shuffled"):
        return DataLoader(TensorDataset(X, y), batch_size=case.batch_size or 4, shuffle=case.form == "shuffled")
    if case.form == "batches":
        size = case.batch_size or 4
        return [(X[i : i + size], y[i : i + size]) for i in range(0, len(X), size)]
    return X, y


def inverter_of(case, loss, **more):
    """Return the inverter of a case, before its fit."""
    settings = {
        "curvature": case.curvature,
        "weight_decay": case.weight_decay,
        "blocks": case.blocks,
        "batch_size": case.batch_size,
        "dtype": case.dtype,
        "autocast": case.autocast,
        "random_state": 0,
    }
    return HessianInverter(_method(case), case.perturbation, loss=loss.given, **{**settings, **more})


def tried(case, function):
    """Return what a call returns, what it warned of rows, and what it was refused as, "" where it was not."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            result = function()
        except (ValueError, TypeError, MemoryError, FloatingPointError) as error:
            if not any(word in str(error) for word in TELLING):
                raise Raw(f"{type(error).__name__}: {error}\n{case!r}") from error
            return None, [], f"refused: {error}"
        except (Silent, Raw, Changed):
            raise
        except Exception as error:
            raise Raw(f"{type(error).__name__}: {error}\n{case!r}") from error
    # What is told of a model, not of a solution, excuses nothing.
    return result, [str(one.message) for one in told if _is_of_rows(one.category)], ""


def _solve(case, found):
    """Fit and solve, and put down what came of it."""

    def solve():
        found.inverter = inverter_of(case, found.loss)
        found.inverter.fit(found.module, data_of(case, found.X, found.y), found.weights)
        gradients = _gradients(case, found) if case.rhs == "gradients" else None
        found.b = right_hand_sides_of(case, found, gradients)
        return found.inverter.solve(found.b)

    result, found.told, found.refusal = tried(case, solve)
    if result is not None:
        found.x, found.info = result


def slope_of(case):
    """Return the rounding of torch's own hard sigmoid, whose slope of 1/6 is in float32 whatever the dtype."""
    return 1e-9 if {"hardsigmoid", "hardswish"} & set(case.activations) else 0.0


def _is_of_rows(category):
    return issubclass(category, ConvergenceWarning | LinAlgWarning)


def _gradients(case, found):
    """Return the oracle's per-sample gradients, against which skinvert's own are held."""
    with torch.inference_mode(False), torch.enable_grad():
        expected = found.oracle.gradient_rows()
    own = PerSampleGradient(found.module, loss=found.loss.given, batch_size=case.batch_size, dtype=case.dtype)
    weighted = {} if found.weights is None else {"sample_weight": found.weights}
    received = own.fit_transform(found.X, found.y, **weighted).double()
    # Rounding is relative to what is summed: at least the largest row.
    allowed = 3e3 * eps_of(case) * (float(expected.abs().max()) + case.input_scale)
    if not float((received - expected).abs().max()) <= allowed:
        raise Silent(f"gradients off by {float((received - expected).abs().max()):.3g}\n{case!r}")
    return expected


def right_hand_sides_of(case, found, gradients=None):
    """Return the right-hand sides of a case as the user has them."""
    if found.b is not None:
        return found.b
    if gradients is None and case.rhs == "gradients":
        with torch.enable_grad():
            gradients = found.oracle.gradient_rows()
    return _as_given(case, right_hand_sides(case, found.oracle.p, gradients))


def _as_given(case, b):
    if case.rhs == "integers":
        return b.numpy().astype(np.int64) if case.b_dtype == "numpy" else b.long()
    if case.b_dtype == "numpy":
        return laid_out(case, b).numpy() if case.layout in IN_TORCH else laid_out(case, b)
    # A huge or tiny row in float32 is another row.
    dtype = {"same": case.model_dtype, "float64": torch.float64, "float32": torch.float32}[case.b_dtype]
    return b.to(dtype)


def eps_of(case):
    """Return the relative rounding of what is computed for a case."""
    eps = torch.finfo(case.dtype or case.model_dtype).eps
    if CENTRED & set(case.layers):
        # Inputs that are nearly alike beside the bias below are divided by their spread, and eps = 1e-5.
        eps /= min(1.0, case.input_scale + 1e-5**0.5)
    return max(eps, slope_of(case))


def as_tensor(rows):
    """Return rows of any kind as a tensor, of their dtype."""
    return rows if isinstance(rows, torch.Tensor) else torch.from_numpy(np.array(rows))


def as_float64(rows):
    """Return rows of any kind in float64."""
    return as_tensor(rows).double()


def judged(case, found):
    """Hold a solution against the oracle; return what became of the case."""
    info, oracle, inverter = found.info, found.oracle, found.inverter
    b, x = as_float64(found.b), as_float64(found.x)
    if not torch.isfinite(x).all() and info["converged"].any() and not found.told:
        raise Silent(f"not finite\n{case!r}")
    if not oracle.mass() > 0:
        return "no oracle"
    A = curvature_of(case, found)
    if A is None:
        return "no oracle"
    with torch.enable_grad():
        hold_gradient(case, oracle, inverter.gradient_norm_, found.told)
    A = A + case.perturbation * torch.eye(len(A), dtype=A.dtype)
    floor, residual = floor_of(case, A, b, found.x), relative(b - x @ A, b)
    rtol = min(inverter.inverse_.tolerance, LOOSEST)
    converged = as_tensor(info["converged"])
    wrong = converged & ~(residual <= 10 * rtol + floor)
    if bool(wrong.any()) and not found.told:
        claimed = as_tensor(info["residual"])[wrong].max()
        allowed = f"{10 * rtol:.3g} + {floor[wrong].max():.3g}"
        raise Silent(f"residual {residual[wrong].max():.3g}, told {claimed:.3g}, allowed {allowed}\n{case!r}")
    return "warned" if found.told else "solved" if bool(converged.all()) else "not converged"


def relative(r, b):
    """Return the size of each row of r in terms of that of b, where that is none its own."""
    gap, size = r.norm(dim=1), b.norm(dim=1)
    return torch.where(size > 0, gap / size, gap)


def floor_of(case, A, b, x):
    """Return the residuals (k,) that products in float32, or of a network in it, cannot tell from 0."""
    # x comes back in b's dtype.
    eps, size = max(eps_of(case), torch.finfo(as_tensor(x).dtype).eps), b.norm(dim=1)
    return 200 * eps * torch.linalg.matrix_norm(A, 2) * as_float64(x).norm(dim=1) / torch.where(size > 0, size, 1.0)


def hold_gradient(case, oracle, received, told=()):
    """Raise Silent unless ‖∇L‖ is that of the oracle."""
    size = float(oracle.gradient().norm())
    # A confident row's gradient is what is left of probabilities that cancel, times the inputs.
    rows, cancelled = float(oracle.gradient_rows().norm()), 10 * case.input_scale
    allowed = eps_of(case) * (1e3 * max(size, rows) + cancelled)
    if abs(received - size) > allowed and not told:
        raise Silent(f"the gradient's norm {received} is {size}\n{case!r}")


def curvature_of(case, found):
    """Return H as the oracle has it, None where there is none; of draws, which it has not, the matrix itself."""
    oracle, name = found.oracle, found.inverter.curvature_name_
    if case.curvature.startswith("sampled"):
        return found.inverter.curvature_.to_dense().double()
    if name == "fisher" and not found.loss.is_fisher:
        return None
    with torch.enable_grad():
        return {"hessian": oracle.hessian, "empirical_fisher": oracle.empirical_fisher}.get(name, oracle.ggn)()
