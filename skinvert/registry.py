"""Method names to methods, for each type of model; and the functional face, ``solve_hvp``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ClassVar

from sklearn.base import clone

from . import methods
from ._autograd import ordinary
from ._check import must_be
from ._frames import check_columns, refuse_parameters
from ._linear_map import solve_linear
from ._naming import may_take
from ._rows import Rows
from ._types import Array, Data, RandomState, State, TrainedModel
from .methods.base import Method
from .models import TorchTwiceDifferentiable, TwiceDifferentiable, as_model
from .perturbation import check_perturbation, resolve
from .results import InverseHvpResult, InversionMethod
from .system import Function, Inverter, assemble, is_method, seeded_method

__all__ = ["InversionRegistry", "find_method", "solve_hvp"]

SIGNATURE = ("model", "training_data", "b", "hessian_perturbation")
# What `solve_hvp` takes beside a method's own settings.
OWN = (
    "autocast",
    "batch_size",
    "blocks",
    "curvature",
    "device",
    "dtype",
    "loss",
    "params",
    "random_state",
    "sample_weight",
    "verbose",
    "weight_decay",
)
# Other libraries' words for our settings.
RENAMED = {
    **dict.fromkeys(
        ("regularization", "hessian_regularization", "dampen", "damping", "damp", "lam", "lambda_", "ridge"),
        "hessian_perturbation",
    ),
    **dict.fromkeys(("rank_estimate", "krylov_dimension", "n_components"), "rank"),
    **dict.fromkeys(("max_iter", "max_iterations", "maxiters", "n_iter"), "maxiter"),
    **dict.fromkeys(("tol", "eps"), "rtol"),
    **dict.fromkeys(("seed", "generator"), "random_state"),
    "progress": "verbose",
    "pre_conditioner": "preconditioner",
    "h0": "x0",
    "loss_fn": "loss",
}


class InversionRegistry:
    """Maps (type of model, name of method) to what inverts its Hessian.

    Examples
    --------
    A function of one's own, used by name:

    >>> from skinvert import TorchTwiceDifferentiable
    >>> @InversionRegistry.register(TorchTwiceDifferentiable, "identity")
    ... def solve_identity(model, training_data, b, hessian_perturbation=0.0):
    ...     return InverseHvpResult(b, {})
    >>> InversionRegistry.get(TorchTwiceDifferentiable, "identity") is solve_identity
    True
    """

    registry: ClassVar[dict[tuple[type, str], Inverter]] = {}

    @classmethod
    def register(
        cls, model_type: type, inversion_method: InversionMethod | str, overwrite: bool = False
    ) -> Callable[[Inverter], Inverter]:
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

        def decorate(inverter: Inverter) -> Inverter:
            _check_signature(inverter)
            if may_take(key, cls.registry, overwrite, repr(key[1]), f" for {model_type.__name__}"):
                cls.registry[key] = inverter
            return inverter

        return decorate

    @classmethod
    def get(cls, model_type: type, inversion_method: InversionMethod | str) -> Inverter:
        """Return what is registered for a type of model or the nearest of its bases; ValueError where nothing is."""
        _check_type(model_type)
        name = _check_name(inversion_method)
        for base in model_type.__mro__:
            if (base, name) in cls.registry:
                return cls.registry[base, name]
        names = sorted({known for base, known in cls.registry if base in model_type.__mro__})
        raise ValueError(must_be(f"The method for {model_type.__name__}", f"one of {names}", repr(name)))

    @classmethod
    def call(
        cls,
        inversion_method: InversionMethod | str,
        model: TrainedModel,
        training_data: Data,
        b: Array,
        hessian_perturbation: float | str = 0.0,
        **kwargs: object,
    ) -> InverseHvpResult:
        """Solve (H + λI) x = b for each row of b; see ``solve_hvp``."""
        given: State = kwargs
        if not isinstance(model, TwiceDifferentiable):
            model = as_model(model, given.pop("loss", None), given.pop("weight_decay", 0.0))
        found = cls.get(type(model), inversion_method)
        settings, own = _split_settings(found, inversion_method, given)
        # A model that brings its own is told so.
        as_model(model, own.pop("loss", None), own.pop("weight_decay", 0.0))
        if not is_method(found):
            _refuse_relative(hessian_perturbation)
            return solve_linear(b, lambda rows: found(model, training_data, rows, hessian_perturbation, **settings))
        setting = check_perturbation(hessian_perturbation)
        # Of the method and of the curvature alike, as the estimator's.
        random_state = own.pop("random_state", None)
        if "random_state" in settings:
            random_state, settings["random_state"] = settings["random_state"], None
        method = seeded_method(found(**settings), random_state)
        refuse_parameters(b)
        system = assemble(model, training_data, method=method, random_state=random_state, **own)
        check_columns(b, system.layout.feature_names() if system.layout else ())
        Rows.of(b, system.curvature)
        (shift,) = resolve([setting], system.curvature, random_state)
        _, inverse = system.invert(method, shift, own.get("verbose", 0))

        @ordinary
        def solve(b: Array) -> InverseHvpResult:
            rows = Rows.of(b, inverse)
            return rows.result(*rows.through(inverse).solve(rows.tensor))

        return solve_linear(b, solve)


def find_method(
    method: str | InversionMethod | Method, model_type: type | None, random_state: RandomState
) -> Method | Function:
    """Return a configured method, seeded where it draws, or a user's function; for plain rows of no type no function.

    Parameters
    ----------
    method : str, InversionMethod or Method
        A registered name, or an instance, which is cloned.
    model_type : type or None
        Of the adapted model.
    random_state : int, RandomState or None
        See ``seeded_method``.
    """
    if isinstance(method, Method):
        return seeded_method(clone(method), random_state)
    found = InversionRegistry.get(model_type or TorchTwiceDifferentiable, method)
    if is_method(found):
        return seeded_method(found(), random_state)
    if model_type is None:
        must = "a Method for plain arrays"
        raise ValueError(must_be("method", must, f"the function {method!r}, which wants a model"))
    return found


def solve_hvp(
    inversion_method: InversionMethod | str,
    model: TwiceDifferentiable,
    training_data: Data,
    b: Array,
    *,
    hessian_perturbation: float | str = 0.0,
    **kwargs: object,
) -> InverseHvpResult:
    r"""Solve (H + λI) x = b for the curvature of a model and each row of b.

    Parameters
    ----------
    inversion_method : InversionMethod or str
        A name in the ``InversionRegistry``.
    model : TwiceDifferentiable
        A trained model; a module (with ``loss``), a skorch net or a scikit-learn model is adapted.
    training_data : tuple, Dataset, DataLoader or iterable of batches
        The data of L.
    b : array or tensor of shape (k, p)
        Right-hand sides, one per row.
    hessian_perturbation : float or str, default=0.0
        λ ≥ 0, or a share of the mean eigenvalue of H, ``"1e-2 rel"``, as for ``HessianInverter``.
    **kwargs
        The method's settings, and of ``HessianInverter``'s ``curvature``, ``loss``, ``weight_decay``, ``params``,
        ``blocks``, ``batch_size`` (``"lissa"``'s own is its minibatch), ``device``, ``dtype``, ``random_state``,
        ``verbose``, and ``sample_weight``. A registered function takes what its signature has.

    Returns
    -------
    InverseHvpResult
        ``x`` (k, p), of the kind, dtype and device of b; ``info``. Where b requires a gradient, x is differentiable.

    Examples
    --------
    >>> import torch
    >>> from skinvert import TorchTwiceDifferentiable
    >>> model = TorchTwiceDifferentiable(torch.nn.Linear(2, 1, bias=False), "mse")
    >>> X, y = torch.eye(2), torch.zeros(2, 1)
    >>> x, info = solve_hvp("direct", model, (X, y), torch.tensor([[3.0, 6.0]]), hessian_perturbation=2.0)
    >>> x  # H = 2 XᵀX / n is the identity here
    tensor([[1., 2.]])
    """
    return InversionRegistry.call(inversion_method, model, training_data, b, hessian_perturbation, **kwargs)


def _split_settings(found: Inverter, name: InversionMethod | str, kwargs: State) -> tuple[State, State]:
    """Return the settings that go to the method, and those of the curvature; TypeError for one that is neither."""
    parameters = inspect.signature(found).parameters
    known = [key for key in parameters if key not in (*SIGNATURE, "self")]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return kwargs, {}
    valid = [*known, *(OWN if is_method(found) else ())]
    for key in kwargs:
        if key not in valid:
            ours = RENAMED.get(key, "")
            hint = f"Try `{ours}`." if ours in (*valid, "hessian_perturbation") else ""
            raise TypeError(must_be(f"A setting of {str(name)!r}", f"one of {sorted(set(valid))}", repr(key), hint))
    own = {key: value for key, value in kwargs.items() if key not in known}
    return {key: value for key, value in kwargs.items() if key in known}, own


def _refuse_relative(hessian_perturbation: float | str) -> None:
    """Raise where a function, which is handed λ before any curvature is made, would be given a share of H."""
    if isinstance(hessian_perturbation, str):
        hint = "Try `HessianInverter`, which finds it."
        raise TypeError(must_be("hessian_perturbation for a function", "a number", repr(hessian_perturbation), hint))


def _check_type(model_type: object) -> type:
    if not isinstance(model_type, type):
        raise TypeError(must_be("model_type", "a type", repr(model_type)))
    return model_type


def _check_name(inversion_method: object) -> str:
    if isinstance(inversion_method, InversionMethod):
        return inversion_method.value
    if not isinstance(inversion_method, str):
        raise TypeError(must_be("inversion_method", "an InversionMethod or a string", repr(inversion_method)))
    return inversion_method


def _check_signature(inverter: Inverter) -> None:
    if is_method(inverter):
        return
    names = tuple(inspect.signature(inverter).parameters)[: len(SIGNATURE)]
    if names != SIGNATURE:
        must = f"a function whose first parameters are {SIGNATURE}"
        raise ValueError(must_be("What is registered", must, str(names)))


for _name in methods.__all__:
    _method = vars(methods)[_name]
    InversionRegistry.register(TwiceDifferentiable, _method.name)(_method)
