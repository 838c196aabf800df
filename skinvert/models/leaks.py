"""A look-out for what a copy of a model must not do: reach the user's own tensors, or compute in a lower precision.

What is bound to the user's model in a way that no copy can follow (a global, a C extension) would be a constant to
every derivative, and x = b/λ would pass for a solution.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from .._check import must_be
from .._telling import warn
from .holders import tensors_within
from .own_eval import OwnEval

__all__ = ["Watch", "refuses_hooks"]

Found = dict[int, tuple[str, torch.Tensor]]

# What is asked of a tensor but its values. Properties come as the `__get__` of their descriptors.
_ASKED = frozenset(
    ("shape", "dtype", "device", "ndim", "layout", "names", "requires_grad", "grad_fn", "grad", "itemsize", "nbytes")
    + ("size", "dim", "numel", "nelement", "ndimension", "element_size", "stride", "storage_offset", "get_device")
    + ("__len__", "__hash__", "data_ptr", "untyped_storage", "type_as", "output_nr", "result_type", "can_cast")
)


class Watch:
    """What belongs to the user's own model, to be looked out for during the first forward pass and loss of a copy.

    Parameters
    ----------
    found : dict
        The name and the tensor of everything in the user's model, by its identity.
    differentiated : set of int
        The identities of the parameters that are selected or require a gradient. A loss may read others: they are
        constants there.
    dtype : torch.dtype
        Of θ.

    Attributes
    ----------
    lower : list of torch.dtype
        The lower precision that the forward pass went through, if any.
    quiet : bool
        Whether nothing is said of it: the copy is a probe's, not the user's.
    own_eval : OwnEval or None
        What the user's own ``eval()`` makes of the model, if more than flags.
    globals : dict
        Those by which the forward pass knows modules of the user's model, and which.
    """

    def __init__(self, found: Found, differentiated: set[int], dtype: torch.dtype) -> None:
        self.found, self.dtype = found, dtype
        self.lower: list[torch.dtype] = []
        self.quiet = False
        self.own_eval: OwnEval | None = None
        self.globals: dict[str, str] = {}
        self.differentiated = {key: item for key, item in found.items() if key in differentiated}

    def over_forward(self, compute: Callable[[], Any]) -> Any:
        """Return the outputs of a forward pass; raise where it uses the user's tensors, or half precision.

        It is computed twice where it takes derivatives by ``torch.func``, under which autograd cannot be looked at.
        """
        half: list[torch.dtype] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dtype in (torch.float16, torch.bfloat16):
                half.append(tensor.dtype)
            return tensor

        look = _LookOut(self.found, self.dtype)
        with _told(look, "The model's forward pass", _FORWARD_HINT):
            try:
                with saved_tensors_hooks(pack, lambda tensor: tensor):
                    outputs = compute()
            except RuntimeError as error:
                if not refuses_hooks(error):
                    raise
                outputs = compute()
        half += [dtype for dtype in look.lower if dtype.itemsize < 4]
        if half:
            raise ValueError(must_be("What the model computes", f"in {self.dtype}, as θ is", half[0], _CAST_HINT))
        self.lower = look.lower[:1]
        return outputs

    def warn_of_casts(self) -> None:
        """Warn where a forward pass went through a lower precision."""
        for dtype in () if self.quiet else self.lower:
            what = must_be("What the model computes", f"in {self.dtype}, as θ is", dtype, _CAST_HINT)
            # From the first batch of an objective, through `HessianInverter.fit`, to its caller.
            warn(what, UserWarning)

    def warn_of_globals(self) -> None:
        """Warn where a forward pass knows the user's modules by globals: it will not know their copies."""
        for name, path in () if self.quiet else self.globals.items():
            must = "one that knows its modules through `self` and what they hold"
            got = f"a global {name!r} that is, or holds, {path}, which its copy is not"
            warn(must_be("The model's forward pass", must, got, _GLOBAL_HINT), UserWarning)

    @contextmanager
    def over_loss(self) -> Iterator[None]:
        """Raise where the user's parameters are used in a loss."""
        with _told(_LookOut(self.differentiated, self.dtype), "The loss", _LOSS_HINT):
            yield

    def look_out(self) -> AbstractContextManager[Any]:
        """Return a context in which the first use of the user's tensors is an error, whatever it is."""
        return _LookOut(self.found, self.dtype)

    def check_modules(self, loss: Any) -> None:
        """Raise where a module of the loss holds the user's parameters: the copy of it would take them along."""
        held = {id(t) for part in vars(loss).values() if isinstance(part, nn.Module) for t in tensors_within(part)}
        _refuse([name for key, (name, _) in self.differentiated.items() if key in held], "The loss", _LOSS_HINT)

    def check(self, losses: torch.Tensor) -> None:
        """Raise where the losses depend on the user's own parameters, by whatever way."""
        own = {key: item for key, item in self.differentiated.items() if item[1].requires_grad}
        if not losses.requires_grad or not own:
            return
        tensors = [tensor for _, tensor in own.values()]
        parts = torch.autograd.grad(losses.sum(), tensors, retain_graph=True, allow_unused=True)
        used = [name for (name, _), part in zip(own.values(), parts, strict=True) if part is not None]
        _refuse(used, "The loss", f"{_LOSS_HINT} {_FORWARD_HINT}")


_FORWARD_HINT = (
    "Reach parameters through `self` in `forward`, not through a global or another object; in a subclass of "
    "TorchTwiceDifferentiable use the `module` that `outputs` is given."
)
_GLOBAL_HINT = (
    "`module is ablated` and `scales[module]` find another object here: keep a flag or a number on the module itself."
)
_LOSS_HINT = (
    "A loss takes outputs and targets: give an L2 penalty on the parameters as `weight_decay=`; for other terms "
    "subclass TorchTwiceDifferentiable and let `outputs` compute them from its `module`."
)
_CAST_HINT = (
    "Remove `torch.autocast` and casts such as `.half()` or `.float()` from its forward pass: they cost the curvature "
    "its accuracy."
)


def refuses_hooks(error: Exception) -> bool:
    """Return whether this is the refusal of a transform of ``torch.func`` to run where saved tensors are looked at."""
    return "saved tensor hooks" in str(error)


def _refuse(used: Iterable[str], what: str, hint: str) -> None:
    names = list(dict.fromkeys(used))
    if names:
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        got = f"a use of your own model's {listed}, past the copy that is differentiated"
        raise ValueError(must_be(what, "a function of the copy's parameters alone", got, hint)) from None


@contextmanager
def _told(look: _LookOut, what: str, hint: str) -> Iterator[None]:
    """Look out while the context lasts, and raise for what was used."""
    try:
        with look:
            yield
    except Exception:
        # The look-out's own, or what a model made of it.
        _refuse(look.used, what, hint)
        raise
    _refuse(look.used, what, hint)


class _LookOut(TorchFunctionMode):
    """Stop at the first call that is given one of some tensors: it might change it (running statistics)."""

    def __init__(self, tensors: Found, dtype: torch.dtype) -> None:
        super().__init__()
        self.tensors, self.dtype = tensors, dtype
        self.used: list[str] = []
        self.lower: list[torch.dtype] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = [self.tensors[id(t)][0] for t in _tensors((args, kwargs)) if id(t) in self.tensors]
        if used and not _asks(func):
            self.used += used
            raise _Used
        result = func(*args, **kwargs)
        # Constants in a lower precision (a mask, positions) are none of our business.
        results = [t.dtype for t in _tensors(result) if t.requires_grad and t.is_floating_point()]
        self.lower += [dtype for dtype in results if dtype.itemsize < self.dtype.itemsize]
        return result


class _Used(RuntimeError):
    """Ends a forward pass; what was used is told by its watch."""

    def __str__(self) -> str:
        return "a use of your own model's tensors"


def _asks(func: Any) -> bool:
    name = _name_of(func)
    if name == "__get__" and isinstance(func, types.MethodWrapperType):
        name = _name_of(func.__self__)
    return name in _ASKED or name.startswith(("is_", "new_")) or name.endswith("_like")


def _name_of(func: Any) -> str:
    # Functions of torch's are of many types, some without a name.
    return getattr(func, "__name__", "")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
