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
from .claims import claim, quiet, raise_faults
from .problems import network, rows

__all__ = ["INVERTER_CHECKS", "check_inverter"]

# Relative difference of two solutions that are the same: iterative methods stop at 1e-3 of b at the worst.
CLOSE = 1e-2


def check_inverter(inverter: HessianInverter) -> None:
    """Hold an inverter's settings to what every fit must keep, on a small classifier that is not at a minimum.

    The model is left as it was; batches, their size and the ambient state of autograd do not matter; the residual is
    the true one; arrays and tensors, ``transform``, ``solve`` and ``path`` agree; ``inverse_transform`` is the way
    back; a clone, a refit and a pickle solve alike; and the estimator's ``random_state`` reaches the method.

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
    expected = _fitted(inverter).transform(_rhs())
    for size in (1, 3, 5):
        received = _fitted(clone(inverter).set_params(batch_size=size)).transform(_rhs())
        _same(received, expected, f"batch_size={size} gives the same x")


def check_residual_is_true(inverter: HessianInverter) -> None:
    """Hold ``info["residual"]`` to the dense matrix of the curvature, and converged rows to a small one."""
    fitted = _fitted(inverter)
    b = _rhs()
    x, info = fitted.solve(b)
    H = fitted.curvature_.apply(torch.eye(b.shape[1], dtype=b.dtype)).double()
    matrix = (H + H.mT) / 2 + fitted.hessian_perturbation_ * torch.eye(b.shape[1], dtype=torch.float64)
    expected = (x @ matrix - b).norm(dim=1) / b.norm(dim=1)
    gap = float((info["residual"] - expected).abs().max())
    claim(gap <= 1e-8 * max(1.0, float(expected.max())), "the residual is the true one", f"{gap:.3g} off")
    worst = float(expected[info["converged"]].max()) if bool(info["converged"].any()) else 0.0
    claim(worst <= 1e-2, "converged rows solve the system", f"a residual of {worst:.3g}")


def check_faces_agree(inverter: HessianInverter) -> None:
    """Hold arrays and tensors, ``transform``, ``solve``, ``path`` and the way back to each other."""
    fitted, b = _fitted(inverter), _rhs()
    x = fitted.transform(b)
    array = fitted.transform(b.numpy())
    claim(isinstance(array, np.ndarray), "an array gives an array", type(array).__name__)
    _same(torch.from_numpy(array), x, "arrays and tensors give the same x")
    _same(fitted.solve(b).x, x, "`solve` and `transform` give the same x")
    shift = fitted.hessian_perturbation_
    _same(fitted.path(b, [2 * shift, shift])[1], x, "`path` gives at λ what `transform` gives")
    if fitted.inverse_ is not None and not fitted.inverse_.approximate:
        _same(fitted.inverse_transform(x), b, "`inverse_transform` is the way back")


def check_ambient_state_does_not_matter(inverter: HessianInverter) -> None:
    """Hold the same solutions under ``no_grad`` and ``inference_mode``."""
    expected = _fitted(inverter).transform(_rhs())
    for ambient in (torch.no_grad, torch.inference_mode):
        with ambient():
            received = _fitted(inverter).transform(_rhs())
        _same(received.clone(), expected, f"{ambient.__name__} gives the same x")


def check_clones_solve_alike(inverter: HessianInverter) -> None:
    """Hold a clone, a second fit of one object, and a pickle to the same solutions."""
    fitted = _fitted(inverter)
    expected = fitted.transform(_rhs())
    claim(not vars(clone(fitted)).get("n_features_in_"), "a clone is not fitted", "a fitted one")
    _same(_fitted(clone(fitted)).transform(_rhs()), expected, "a clone fits alike")
    loaded = pickle.loads(pickle.dumps(fitted))
    _same(loaded.transform(_rhs()), expected, "a pickle solves alike")
    net, data = network()
    _same(fitted.fit(net, data).transform(_rhs()), expected, "a second fit solves alike")


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


def _same(received: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    gap, size = float((received - expected).norm()), float(expected.norm())
    claim(gap <= CLOSE * size, what, f"a difference of {gap:.3g} in {size:.3g}")
