"""What every fitted inverter must keep, from the user's model to the solutions."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from torch import nn

from .._check import must_be
from ..inverter import HessianInverter
from ..methods.base import Method
from .claims import ROUNDING, claim, quiet, raise_faults
from .problems import dense, network, rows

__all__ = ["INVERTER_CHECKS", "check_inverter"]

# Relative difference of two solutions of one approximation: which of two near eigenvalues a rank keeps is rounding's.
CLOSE = 1e-4


def check_inverter(inverter: HessianInverter) -> None:
    """Hold an inverter's settings to what every fit must keep, on a small classifier that is not at a minimum.

    The model is left as it was; batches, their size and the ambient state of autograd do not matter; the residual is
    the true one; arrays and tensors, ``transform``, ``solve`` and ``path`` agree; ``inverse_transform`` is the way
    back; a clone, a refit and a pickle solve alike; and the estimator's ``random_state`` reaches the method. Solutions
    are the same where they differ by the method's ``accuracy`` (its tolerance, where it stops by one) times the
    condition, or by 1e-4 where it says that it is approximate.

    Parameters
    ----------
    inverter : HessianInverter
        Not fitted; its ``model`` and ``loss`` are replaced by the kit's.

    Raises
    ------
    AssertionError
        With one line for each check that failed.

    Examples
    --------
    >>> check_inverter(HessianInverter("direct", 0.5, curvature="ggn"))
    """
    if not isinstance(inverter, HessianInverter):
        raise TypeError(must_be("inverter", "a HessianInverter", repr(inverter)))
    with quiet():
        raise_faults(inverter, repr(inverter), INVERTER_CHECKS)


def check_model_is_left_alone(inverter: HessianInverter) -> None:
    """Hold the model's mode, parameters, gradients and buffers to what they were."""
    net, data = network()
    net = nn.Sequential(net, nn.Dropout(0.5)).train()
    next(net.parameters()).grad = torch.ones_like(next(net.parameters()))
    before = _snapshot(net)
    _fitted(inverter, net, data).transform(_rhs())
    claim(_snapshot(net) == before, "the model is left as it was", "another mode, parameter or gradient")


def check_batches_do_not_matter(inverter: HessianInverter) -> None:
    """Hold the same solutions for batches of one row, ragged ones and one of all."""
    fitted = _fitted(inverter)
    expected = fitted.transform(_rhs())
    for size in (1, 3, 5):
        received = _fitted(clone(inverter).set_params(batch_size=size)).transform(_rhs())
        _same(received, expected, fitted, f"batch_size={size} gives the same x")


def check_residual_is_true(inverter: HessianInverter) -> None:
    """Hold ``info["residual"]`` to the dense matrix of the curvature, and converged rows to a small one."""
    fitted = _fitted(inverter)
    b = _rhs()
    x, info = fitted.solve(b)
    expected = (x @ _matrix(fitted) - b).norm(dim=1) / b.norm(dim=1)
    gap, rounding = float((info["residual"] - expected).abs().max()), ROUNDING[fitted.curvature_.dtype]
    claim(gap <= rounding * max(1.0, float(expected.max())), "the residual is the true one", f"{gap:.3g} off")
    worst = float(expected[info["converged"]].max()) if bool(info["converged"].any()) else 0.0
    limit = 2 * max(_accuracy(fitted), rounding)
    claim(worst <= limit, f"converged rows solve the system, within {limit:.2g}", f"a residual of {worst:.3g}")


def check_faces_agree(inverter: HessianInverter) -> None:
    """Hold arrays and tensors, ``transform``, ``solve``, ``path`` and the way back to each other."""
    fitted, b = _fitted(inverter), _rhs()
    x = fitted.transform(b)
    array = fitted.transform(b.numpy())
    claim(isinstance(array, np.ndarray), "an array gives an array", type(array).__name__)
    _same(torch.from_numpy(array), x, fitted, "arrays and tensors give the same x")
    _same(fitted.solve(b).x, x, fitted, "`solve` and `transform` give the same x")
    shift = fitted.hessian_perturbation_
    _same(fitted.path(b, [2 * shift, shift])[1], x, fitted, "`path` gives at λ what `transform` gives")
    if fitted.inverse_ is not None and not fitted.inverse_.approximate:
        _same(fitted.inverse_transform(x), b, fitted, "`inverse_transform` is the way back")


def check_ambient_state_does_not_matter(inverter: HessianInverter) -> None:
    """Hold the same solutions under ``no_grad`` and ``inference_mode``."""
    fitted = _fitted(inverter)
    expected = fitted.transform(_rhs())
    for ambient in (torch.no_grad, torch.inference_mode):
        with ambient():
            received = _fitted(inverter).transform(_rhs())
        _same(received.clone(), expected, fitted, f"{ambient.__name__} gives the same x")


def check_clones_solve_alike(inverter: HessianInverter) -> None:
    """Hold a clone, a second fit of one object, and a pickle to the same solutions."""
    fitted = _fitted(inverter)
    expected = fitted.transform(_rhs())
    claim(not vars(clone(fitted)).get("n_features_in_"), "a clone is not fitted", "a fitted one")
    _same(_fitted(clone(fitted)).transform(_rhs()), expected, fitted, "a clone fits alike")
    loaded = pickle.loads(pickle.dumps(fitted))
    _same(loaded.transform(_rhs()), expected, fitted, "a pickle solves alike")
    net, data = network()
    _same(fitted.fit(net, data).transform(_rhs()), expected, fitted, "a second fit solves alike")


def check_random_state_is_handed_on(inverter: HessianInverter) -> None:
    """Hold that a method which draws gets the estimator's seed, and keeps one of its own."""
    fitted = _fitted(clone(inverter).set_params(random_state=7))
    drawing = fitted.method_.get_params() if isinstance(fitted.method_, Method) else {}
    if "random_state" in drawing:
        own = inverter.get_params().get("method__random_state")
        expected = 7 if own is None else own
        claim(drawing["random_state"] == expected, f"the method's random_state is {expected}", drawing["random_state"])


INVERTER_CHECKS: list[Callable[[HessianInverter], None]] = [
    check_model_is_left_alone,
    check_batches_do_not_matter,
    check_residual_is_true,
    check_faces_agree,
    check_ambient_state_does_not_matter,
    check_clones_solve_alike,
    check_random_state_is_handed_on,
]


def _fitted(inverter: HessianInverter, net: nn.Module | None = None, data: Any = None) -> HessianInverter:
    own, own_data = network()
    settings = {"model": None, "loss": "cross_entropy"}
    return clone(inverter).set_params(**settings).fit(own if net is None else net, own_data if data is None else data)


def _rhs() -> torch.Tensor:
    return rows(3, sum(parameter.numel() for parameter in network()[0].parameters()))


def _snapshot(net: nn.Module) -> list[object]:
    tensors = [*net.parameters(), *net.buffers()]
    tensors += [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    return [[module.training for module in net.modules()], *(t.detach().numpy().tobytes() for t in tensors)]


def _matrix(fitted: HessianInverter) -> torch.Tensor:
    """Return A + λI (p, p), float64, from the products of the exact A."""
    H = torch.from_numpy(dense(fitted.curvature_))
    return H + fitted.hessian_perturbation_ * torch.eye(len(H), dtype=torch.float64)


def _accuracy(fitted: HessianInverter) -> float:
    """Return the relative residual that an exact method promises."""
    inverse, kind = fitted.inverse_, type(fitted.method_) if isinstance(fitted.method_, Method) else Method
    if inverse is None or not inverse.keeps_operator:
        return kind.accuracy
    # What solves by iterations stops at its tolerance; `accuracy` is that of its tight settings.
    return max(kind.accuracy, inverse.tolerance)


def _same(received: torch.Tensor, expected: torch.Tensor, fitted: HessianInverter, what: str) -> None:
    gap, size = float((received - expected).norm()), float(expected.norm())
    limit = 2 * float(torch.linalg.cond(_matrix(fitted))) * max(_accuracy(fitted), ROUNDING[fitted.curvature_.dtype])
    if fitted.inverse_ is not None and fitted.inverse_.approximate:
        limit = max(limit, CLOSE)
    claim(gap <= limit * size, f"{what}, within {limit:.2g}", f"a difference of {gap:.3g} in {size:.3g}")
