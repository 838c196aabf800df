"""What stands in a copy for each tensor of a user's model: leaves to differentiate by, snapshots, shared constants."""

from __future__ import annotations

import torch
from torch import nn

from .._autograd import own_tensor
from .._check import must_be
from .._memory import working_memory

__all__ = ["Conversion", "parameter_like"]


class Conversion:
    """Tensors in another dtype on another device; selected parameters become leaves that require a gradient.

    Parameters
    ----------
    module : Module
        Over the user's tensors.
    selected : set of int
        The identities of the selected parameters.
    own : torch.dtype
        The dtype that the model has.
    dtype, device
        Those to have.
    """

    def __init__(
        self, module: nn.Module, selected: set[int], own: torch.dtype, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.selected, self.dtype, self.device = selected, dtype, device
        self.changes = dtype != own
        self.registered = {id(t): name for name, t in [*module.named_parameters(), *module.named_buffers()]}
        # Frozen ones may be trained later: copies of them are out of reach.
        frozen = sum(tensor.nbytes for tensor in module.parameters() if id(tensor) not in selected)
        self.copies_frozen = frozen <= working_memory()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.device.type == "meta":
                raise ValueError(must_be(f"{name} of the model", "on a device that holds numbers", "'meta'"))
            if id(tensor) in selected and not tensor.is_floating_point():
                hint = "Leave it out with `params=`."
                raise ValueError(must_be(f"The parameter {name}", "real and floating", tensor.dtype, hint))

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what stands in for a tensor."""
        is_parameter, registered = isinstance(tensor, nn.Parameter), id(tensor) in self.registered
        if not (registered or is_parameter or type(tensor) is torch.Tensor) or tensor.device.type == "meta":
            # Of a class of its own, in an attribute: not ours to convert.
            return tensor
        # An attribute may be in a dtype of its own, as long as the model keeps the one that it was written for.
        dtype = self.dtype if registered or is_parameter or self.changes else tensor.dtype
        chosen = id(tensor) in self.selected
        # Buffers and attributes are written to in a forward pass; frozen parameters are shared where they are large.
        snapshot = chosen or not is_parameter or self.copies_frozen
        data = own_tensor(tensor.detach()).to(self.device, dtype if tensor.is_floating_point() else None, copy=snapshot)
        return parameter_like(tensor, data, chosen, self.registered.get(id(tensor), "")) if is_parameter else data


def parameter_like(tensor: torch.Tensor, data: torch.Tensor, requires_grad: bool, name: str = "") -> torch.Tensor:
    """Return ``data`` as a parameter of the class that ``tensor`` is of: a forward pass may ask for it."""
    kind = type(tensor)
    if isinstance(data, kind) or kind is nn.Parameter:
        # The flag of classes that know no `nn.Parameter` is set there.
        return nn.Parameter(data, requires_grad=False).requires_grad_(requires_grad)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        hint = "Put a plain `nn.Parameter` in its place."
        must = "of a class that `detach` and `to` keep, or without `__torch_dispatch__`"
        raise ValueError(must_be(f"The parameter {name}".rstrip(), must, kind.__name__, hint))
    # Not its own constructor, which may take other arguments.
    made: torch.Tensor = data.as_subclass(kind)
    return made.requires_grad_(requires_grad)
