"""One case from end to end: fit, solve, and hold what is told against the oracle."""

import threading
import warnings
from contextlib import nullcontext

import numpy as np
import torch
from fuzz import losses as L
from fuzz import models as M
from fuzz.cases import right_hand_sides
from fuzz.oracle import Oracle
from scipy.linalg import LinAlgWarning
from sklearn.exceptions import ConvergenceWarning
from torch.utils.data import DataLoader, TensorDataset

from skinvert import HessianInverter, PerSampleGradient
from skinvert.methods import CG, LiSSA

# Words of which each error of ours has one.
TELLING = ("must be", "Try", "ran out of memory", "diverged", "met NaN", "did not converge")
# The loosest relative residual that any method counts as solved.
LOOSEST = 1e-3


class Silent(AssertionError):
    """Converged and without a warning, and wrong."""


class Raw(AssertionError):
    """An error that says nothing of what to do."""


class Changed(AssertionError):
    """Something of the user's is not as it was."""


def run(case, shared=None):
    """Run a case; return what became of it: "solved", "warned", "not converged" or "refused".

    ``shared`` is a dict in which the variants of one case keep their oracle.
    """
    module, X, y, loss, weights, oracle = built(case, {} if shared is None else shared)
    before = state_of(module, X)
    outcome, facts = _in_ambient(case, lambda: _solve(case, module, X, y, loss, weights, oracle))
    if not same(before, state_of(module, X)) or not module.training:
        raise Changed(repr(case))
    if outcome is None:
        return facts
    return _judge(case, oracle, loss, *outcome, facts)


def built(case, shared):
    """Return module, X, y, loss, weights and oracle of a case; ``shared`` keeps the oracle."""
    torch.manual_seed(case.seed)
    module, X = M.build(case)
    module.eval()
    with torch.no_grad():
        f = module(X.clone()).double()
    module.train()
    loss = L.LOSSES[case.loss](f)
    y = loss.targets(f)
    y = y.to(case.model_dtype) if y.is_floating_point() else y
    weights = np.random.default_rng(case.seed).integers(0, 3, case.n) if case.form == "weighted" else None
    if weights is not None and not weights.any():
        weights[0] = 1
    oracle = shared.setdefault("oracle", None) or Oracle(case, module, X, y, loss, weights)
    shared["oracle"] = oracle
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
    if case.form == "arrays":
        return X.numpy(), y.numpy()
    if case.form == "dataset":
        return TensorDataset(X, y)
    if case.form in ("loader", "shuffled"):
        return DataLoader(TensorDataset(X, y), batch_size=case.batch_size or 4, shuffle=case.form == "shuffled")
    if case.form == "batches":
        size = case.batch_size or 4
        return [(X[i : i + size], y[i : i + size]) for i in range(0, len(X), size)]
    return X, y


def _solve(case, module, X, y, loss, weights, oracle):
    """Return ((inverter, b, x, info, warned), "") or (None, what it was refused as)."""
    inverter = HessianInverter(
        _method(case),
        case.perturbation,
        curvature=case.curvature,
        loss=loss.given,
        weight_decay=case.weight_decay,
        blocks=case.blocks,
        batch_size=case.batch_size,
        dtype=case.dtype,
        random_state=0,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            inverter.fit(module, data_of(case, X, y), weights)
            gradients = _gradients(case, module, X, y, loss, weights, oracle) if case.rhs == "gradients" else None
            b = _as_given(case, right_hand_sides(case, oracle.p, gradients))
            x, info = inverter.solve(b)
        except (ValueError, TypeError, MemoryError, FloatingPointError) as error:
            if not any(word in str(error) for word in TELLING):
                raise Raw(f"{type(error).__name__}: {error}\n{case!r}") from error
            return None, f"refused: {error}"
        except Silent:
            raise
        except Exception as error:
            raise Raw(f"{type(error).__name__}: {error}\n{case!r}") from error
    # What is told of a model, not of a solution, excuses nothing.
    return (inverter, b, x, info, [str(one.message) for one in told if _is_of_rows(one.category)]), ""


def slope_of(case):
    """Return the rounding of torch's own hard sigmoid, whose slope of 1/6 is in float32 whatever the dtype."""
    return 1e-9 if {"hardsigmoid", "hardswish"} & set(case.activations) else 0.0


def _is_of_rows(category):
    return issubclass(category, ConvergenceWarning | LinAlgWarning)


def _gradients(case, module, X, y, loss, weights, oracle):
    """Return the oracle's per-sample gradients, against which skinvert's own are held."""
    with torch.inference_mode(False), torch.enable_grad():
        expected = oracle.gradient_rows()
    own = PerSampleGradient(module, loss=loss.given, batch_size=case.batch_size, dtype=case.dtype)
    received = own.fit_transform(X, y, **({} if weights is None else {"sample_weight": weights})).double()
    eps = max(torch.finfo(case.dtype or case.model_dtype).eps, slope_of(case))
    # Rounding is relative to what is summed: at least the largest row.
    if not float((received - expected).abs().max()) <= 3e3 * eps * (float(expected.abs().max()) + case.input_scale):
        raise Silent(f"gradients off by {float((received - expected).abs().max()):.3g}\n{case!r}")
    return expected


def _as_given(case, b):
    if case.rhs == "integers":
        return b.numpy().astype(np.int64) if case.b_dtype == "numpy" else b.long()
    if case.b_dtype == "numpy":
        return b.numpy()
    # A huge or tiny row in float32 is another row.
    dtype = {"same": case.model_dtype, "float64": torch.float64, "float32": torch.float32}[case.b_dtype]
    return b.to(dtype)


def _judge(case, oracle, loss, inverter, b, x, info, told, _):
    b64, x64 = (torch.as_tensor(np.asarray(v)).double() for v in (b, x))
    dtype = case.dtype or case.model_dtype
    if not torch.isfinite(x64).all() and info["converged"].any() and not told:
        raise Silent(f"not finite\n{case!r}")
    if not oracle.mass() > 0:
        return "no oracle"
    with torch.enable_grad():
        A = _curvature(case, oracle, loss, inverter)
        gradient = oracle.gradient()
    if A is None:
        return "no oracle"
    # x comes back in b's dtype.
    given = torch.as_tensor(np.asarray(x)).dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(given).eps, slope_of(case))
    size = float(gradient.norm())
    if abs(inverter.gradient_norm_ - size) > 1e3 * eps * max(size, float(oracle.gradient_rows().norm())) and not told:
        raise Silent(f"the gradient's norm {inverter.gradient_norm_} is {size}\n{case!r}")
    A = A + case.perturbation * torch.eye(len(A), dtype=A.dtype)
    gap, sizes = (x64 @ A - b64).norm(dim=1), b64.norm(dim=1)
    residual = torch.where(sizes > 0, gap / sizes, gap)
    # What float32 products of a float32 network cannot know.
    floor = 200 * eps * torch.linalg.matrix_norm(A, 2) * x64.norm(dim=1) / torch.where(sizes > 0, sizes, 1.0)
    rtol = min(inverter.inverse_.tolerance, LOOSEST)
    converged = torch.as_tensor(np.asarray(info["converged"]))
    wrong = converged & ~(residual <= 10 * rtol + floor)
    if bool(wrong.any()) and not told:
        claimed = torch.as_tensor(np.asarray(info["residual"]))[wrong].max()
        allowed = f"{10 * rtol:.3g} + {floor[wrong].max():.3g}"
        raise Silent(f"residual {residual[wrong].max():.3g}, told {claimed:.3g}, allowed {allowed}\n{case!r}")
    return "warned" if told else "solved" if bool(converged.all()) else "not converged"


def _curvature(case, oracle, loss, inverter):
    name = inverter.curvature_name_
    if name == "hessian":
        return oracle.hessian()
    if name == "empirical_fisher":
        return oracle.empirical_fisher()
    if name == "fisher" and not loss.is_fisher:
        return None
    return oracle.ggn()
