"""What a file of an inverter holds, and the one answer in it that tells a sound inverse from an altered one."""

from __future__ import annotations

import inspect
import warnings

import torch

from ._check import must_be
from ._types import State
from .methods.base import InverseOperator, Method, default_tolerance
from .methods.blocks import BlockInverse
from .parameters import ParameterLayout

__all__ = ["OPTIONAL", "answer", "check_answer", "check_container", "file_fields", "setting_fields"]

FITTED = {
    "n_features_in_": "int",
    "n_samples_": "int",
    "feature_names_in_": "names",
    "method_": "Method",
    "inverse_": "InverseOperator",
    "curvature_name_": "str",
    "hessian_perturbation_": "float",
    "gradient_norm_": "float",
    "parameter_names_": "names",
    "eigenvalues_": "array",
    "_layout": "ParameterLayout|None",
    "_sklearn_output_config": "plain",
    "answer": "tensor[2,p]|tensor[3,p]",
}
# scikit-learn's, of `set_output`.
CONTAINERS = ["default", "pandas", "polars"]
OPTIONAL = frozenset(FITTED) - {"n_features_in_", "method_", "inverse_", "hessian_perturbation_", "_layout", "answer"}
# Another machine rounds otherwise, as much as the condition allows; an altered inverse answers something else.
TOLERANCE = {torch.float32: 5e-2, torch.float64: 1e-3}


def file_fields(cls: type) -> dict[str, str]:
    """Return the types of all that a file of ``cls`` may hold: its settings, which ``fit`` checks, and FITTED."""
    return {**setting_fields(cls), **FITTED}


def setting_fields(cls: type) -> dict[str, str]:
    """Return the types of the settings of ``cls`` in a file."""
    settings = dict.fromkeys(inspect.signature(cls).parameters, "plain|Method|SampledGGN|SampledFisher|LeftOut")
    # `fit` takes True and False alone, and each solve asks for it.
    return {**settings, "check_residual": "bool"}


def answer(inverse: InverseOperator) -> torch.Tensor:
    """Return (A + λI)⁻¹b, (A + λI)b and, where it is cheap, (A + μI)⁻¹b: (2, p) or (3, p).

    b is fixed, of numbers that any machine makes alike, and μ is of A's own size: what serves other λ is asked as well.
    """
    b = torch.cos(torch.arange(1, inverse.size + 1, dtype=torch.float64))[None].to(inverse.device, inverse.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        applied = inverse.operator.apply(b)
        rows = [inverse.solve(b).x, applied]
        if inverse.moves:
            rows.append(inverse.at(float(applied.double().norm() / b.double().norm())).solve(b).x)
        return torch.cat(rows).cpu()


def check_answer(state: State) -> None:
    """Raise ValueError unless the inverse of a decoded state is of its size, and gives the answer kept."""
    inverse, expected, layout = state["inverse_"], state.pop("answer"), state["_layout"]
    _check_layout(layout, state["n_features_in_"])
    _check_twice_kept(state, inverse, layout)
    if not inverse.size == expected.shape[1] == state["n_features_in_"]:
        got = f"an inverse of size {inverse.size} for {state['n_features_in_']} parameters"
        raise ValueError(must_be("The inverse", f"of size {expected.shape[1]}", got))
    inverse.check()
    found, expected = answer(inverse).double(), expected.double()
    if found.shape != expected.shape:
        raise ValueError(must_be("The answer", f"of shape {tuple(found.shape)}", f"shape {tuple(expected.shape)}"))
    error = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-300)
    # Not (error > ...): NaN compares false.
    if not bool((error <= TOLERANCE[inverse.dtype]).all()):
        got = f"another one, by {float(error.max()):.3g} of it"
        raise ValueError(must_be("The inverse's answer", "the one that it was saved with", got))


def _check_layout(layout: ParameterLayout | None, size: int) -> None:
    if layout is None:
        return
    sound = type(layout.names) is tuple and type(layout.shapes) is tuple and len(layout.names) == len(layout.shapes)
    sound = sound and all(type(s) is tuple and all(type(i) is int and 0 < i < 2**40 for i in s) for s in layout.shapes)
    if not sound or len(set(layout.names)) != len(layout.names) or layout.num_params != size:
        raise ValueError(must_be("The layout", f"of {size} parameters, one shape a name", repr(layout)[:200]))


def _check_twice_kept(state: State, inverse: InverseOperator, layout: ParameterLayout | None) -> None:
    """Raise where what a file holds in two places differs between them."""
    names = state.get("parameter_names_")
    if layout is not None and names is not None and list(names) != list(layout.names):
        raise ValueError(must_be("The names of the parameters", "those of the layout", repr(names)[:80]))
    columns = state.get("feature_names_in_")
    if (layout is None) != (names is None) or (columns is not None and (layout or len(columns) != inverse.size)):
        must = "of the parameters after a fit on a model, of the p columns after one on rows"
        raise ValueError(must_be("The names", must, "others"))
    _check_rtol(state["method_"], inverse)
    if inverse.hessian_perturbation != state["hessian_perturbation_"]:
        got = f"{inverse.hessian_perturbation:g}"
        raise ValueError(must_be("λ of the inverse", f"{state['hessian_perturbation_']:g}", got))
    check_container(state)


def check_container(state: State) -> None:
    """Raise for a container that no output has."""
    container = state.get("_sklearn_output_config", {})
    if type(container) is not dict or container not in [{}, *({"transform": name} for name in CONTAINERS)]:
        raise ValueError(must_be("_sklearn_output_config", f"one of {CONTAINERS}", repr(container)[:80]))


def _check_rtol(method: Method, inverse: InverseOperator) -> None:
    """Raise where a factorisation calls another residual converged than its method does, or than the default."""
    for block in inverse.inverses if isinstance(inverse, BlockInverse) else [inverse]:
        asked = method.get_params().get("rtol")
        rtol = default_tolerance(block.dtype) if asked is None else asked
        if vars(block).get("rtol", rtol) != rtol:
            raise ValueError(must_be("rtol of the inverse", f"its method's, {rtol}", vars(block)["rtol"]))
