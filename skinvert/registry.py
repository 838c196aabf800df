"""Method names to methods, for each type of model; and the functional face, ``solve_hvp``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

from . import methods
from ._autograd import ordinary
from ._rows import Rows
from ._validation import check_fits, check_hessian_perturbation, must_be
from .curvature import CURVATURES, build_curvature
from .data import as_batches
from .methods.base import Method
from .models import TorchTwiceDifferentiable, TwiceDifferentiable, as_model, describe
from .results import InverseHvpResult, InversionMethod

__all__ = ["InversionRegistry", "solve_hvp"]

SIGNATURE = ("model", "training_data", "b", "hessian_perturbation")


class InversionRegistry:
    """Maps (type of model, name of method) to what inverts its Hessian.

    Examples
    --------
    A function of one's own, used by name:

    >>> @InversionRegistry.register(TorchTwiceDifferentiable, "identity")
    ... def solve_identity(model, training_data, b, hessian_perturbation=0.0):
    ...     return InverseHvpResult(b, {})
    >>> InversionRegistry.get(TorchTwiceDifferentiable, "identity") is solve_identity
    True
    """

    registry: ClassVar[dict[tuple[type, str], Any]] = {}

    @classmethod
    def register(
        cls, model_type: type, inversion_method: InversionMethod | str, overwrite: bool = False
    ) -> Callable[[Any], Any]:
        """Decorate a function or a ``Method`` class that inverts for a type of model.

        Parameters
        ----------
        model_type : type
            ``TwiceDifferentiable`` or a subclass.
        inversion_method : InversionMethod or str
            The name.
        overwrite : bool, default=False
            Replace what the pair already has; without it the first is kept, with a warning.

        Raises
        ------
        TypeError
            For a wrong ``model_type`` or ``inversion_method``, when called.
        ValueError
            When decorating a function whose first four parameters are not ``model, training_data, b,
            hessian_perturbation``.
        """
        key = (_check_type(model_type), _check_name(inversion_method))

        def decorate(inverter: Any) -> Any:
            _check_signature(inverter)
            if key in cls.registry and not overwrite:
                warnings.warn(
                    f"{key[1]!r} is already registered for {model_type.__name__}: the first is kept. "
                    "Try overwrite=True.",
                    UserWarning,
                    stacklevel=2,
                )
            else:
                cls.registry[key] = inverter
            return inverter

        return decorate

    @classmethod
    def get(cls, model_type: type, inversion_method: InversionMethod | str) -> Any:
        """Return what is registered for a type of model or the nearest of its bases; ValueError where nothing is."""
        _check_type(model_type)
        name = _check_name(inversion_method)
        for base in model_type.__mro__:
            if (base, name) in cls.registry:
                return cls.registry[base, name]
        names = sorted({known for base, known in cls.registry if base in model_type.__mro__})
        raise ValueError(must_be(f"The method for {model_type.__name__}", f"one of {names}", repr(name)))

    @classmethod
    @ordinary
    def call(
        cls,
        inversion_method: InversionMethod | str,
        model: TwiceDifferentiable,
        training_data: Any,
        b: Any,
        hessian_perturbation: float = 0.0,
        **kwargs: Any,
    ) -> InverseHvpResult:
        """Solve (H + λI) x = b for each row of b; see ``solve_hvp``."""
        model = as_model(model)
        found = cls.get(type(model), inversion_method)
        if not is_method(found):
            return found(model, training_data, b, hessian_perturbation, **kwargs)
        shift = check_hessian_perturbation(hessian_perturbation)
        curvature = kwargs.pop("curvature", "auto")
        method = found(**kwargs)
        fixed = model.at_point() if isinstance(model, TorchTwiceDifferentiable) else model
        batches = as_batches(fixed.read(training_data) if hasattr(fixed, "read") else training_data, **describe(fixed))
        A = build_curvature(method.default_curvature if curvature == "auto" else curvature, fixed, batches)
        check_fits(shift, A.dtype)
        rows = Rows.of(b, A)
        check_requirements(method, A)
        x, info = rows.through(method.invert(A, shift)).solve(rows.tensor)
        return rows.result(x, info)


def solve_hvp(
    inversion_method: InversionMethod | str,
    model: TwiceDifferentiable,
    training_data: Any,
    b: Any,
    *,
    hessian_perturbation: float = 0.0,
    **kwargs: Any,
) -> InverseHvpResult:
    r"""Solve (H + λI) x = b for the curvature of a model and each row of b.

    Parameters
    ----------
    inversion_method : InversionMethod or str
        A name in the ``InversionRegistry``.
    model : TwiceDifferentiable
        A trained model; a skorch net is adapted.
    training_data : tuple, Dataset, DataLoader or iterable of batches
        The data of L.
    b : array or tensor of shape (k, p)
        Right-hand sides, one per row.
    hessian_perturbation : float, default=0.0
        λ ≥ 0.
    **kwargs
        The method's settings, and ``curvature``.

    Returns
    -------
    InverseHvpResult
        ``x`` (k, p), of the kind, dtype and device of b; ``info``.

    Examples
    --------
    >>> import torch
    >>> model = TorchTwiceDifferentiable(torch.nn.Linear(2, 1, bias=False), "mse")
    >>> X, y = torch.eye(2), torch.zeros(2, 1)
    >>> x, info = solve_hvp("direct", model, (X, y), torch.tensor([[3.0, 6.0]]), hessian_perturbation=2.0)
    >>> x  # H = 2 XᵀX / n is the identity here
    tensor([[1., 2.]])
    """
    return InversionRegistry.call(inversion_method, model, training_data, b, hessian_perturbation, **kwargs)


def is_method(value: Any) -> bool:
    """Return whether a registered value is a ``Method`` class, rather than a function."""
    return isinstance(value, type) and issubclass(value, Method)


def check_requirements(method: Method, A: Any) -> None:
    """Raise where an operator lacks what a method declares; the error names the curvatures that have it."""
    for needed in method.requires:
        if not hasattr(A, needed):
            names = [name for name, kind in CURVATURES.items() if hasattr(kind, needed)]
            hint = f"Try curvature= one of {names}." if names else ""
            got = f"{type(A).__name__}, which has none"
            raise ValueError(must_be(f"The curvature for {method.name}", f"one with `{needed}`", got, hint))


def _check_type(model_type: Any) -> type:
    if not isinstance(model_type, type):
        raise TypeError(must_be("model_type", "a type", repr(model_type)))
    return model_type


def _check_name(inversion_method: Any) -> str:
    if isinstance(inversion_method, InversionMethod):
        return inversion_method.value
    if not isinstance(inversion_method, str):
        raise TypeError(must_be("inversion_method", "an InversionMethod or a string", repr(inversion_method)))
    return inversion_method


def _check_signature(inverter: Any) -> None:
    if is_method(inverter):
        return
    names = tuple(inspect.signature(inverter).parameters)[: len(SIGNATURE)]
    if names != SIGNATURE:
        must = f"a function whose first parameters are {SIGNATURE}"
        raise ValueError(must_be("What is registered", must, str(names)))


for _name in methods.__all__:
    InversionRegistry.register(TwiceDifferentiable, getattr(methods, _name).name)(getattr(methods, _name))
