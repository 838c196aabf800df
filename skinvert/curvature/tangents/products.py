"""Rules of what is linear in each of two arguments, and of softmax."""

from __future__ import annotations

import torch

from .recording import Call, aten
from .rules import Push, Tangent, UnservedError, lifted, rule

__all__: list[str] = []


@rule(aten.mm.default, aten.bmm.default)
def _mm(call: Call, live: list[bool]) -> Push:
    a, b = _tensors(call, 2)
    return Push(lambda s, t: _product(s, b, a, t), live, [True], [a, b])


@rule(aten.addmm.default, aten.baddbmm.default)
def _addmm(call: Call, live: list[bool]) -> Push:
    if call.kwargs:
        raise UnservedError(call.operation.name())
    _, a, b = _tensors(call, 3)
    (shape,) = (one.shape for one in _tensors(call._replace(args=call.results), 1))

    def along(u: Tangent, s: Tangent, t: Tangent) -> Tangent:
        total = _product(s, b, a, t)
        if u is None:
            return total
        u = lifted(u, len(shape))
        return u.expand(len(u), *shape) if total is None else total.add_(u)

    return Push(along, live, [True], [a, b])


@rule(aten.convolution.default)
def _convolution(call: Call, live: list[bool]) -> Push:
    x, weight = _tensors(call, 2)
    setting = _single_group(call, call.args[3:9])
    out = call.results[0]
    assert isinstance(out, torch.Tensor)

    def along(s: Tangent, t: Tangent, u: Tangent, *_: Tangent) -> Tangent:
        total: Tangent = None
        if s is not None:
            total = aten.convolution(s.flatten(0, 1), weight, None, *setting).reshape(len(s), *out.shape)
        if t is not None:
            # All rows' kernels as more channels of one convolution.
            axis = 2 if setting[3] else 1
            kernels = t.movedim(0, axis - 1).flatten(axis - 1, axis)
            more = aten.convolution(x, kernels, None, *setting)
            more = more.reshape(len(x), len(t), *out.shape[1:]).movedim(1, 0)
            total = more if total is None else total.add_(more)
        if u is not None:
            u = u.reshape(len(u), 1, -1, *[1] * (out.ndim - 2))
            total = u.expand(len(u), *out.shape) if total is None else total + u
        return total

    return Push(along, live, [True], [x, weight])


@rule(aten.convolution_backward.default)
def _convolution_backward(call: Call, live: list[bool]) -> Push:
    g, x, weight = _tensors(call, 3)
    sizes, setting, mask = call.args[3], _single_group(call, call.args[4:10]), call.args[10]
    if setting[3]:
        raise UnservedError(call.operation.name())
    assert isinstance(mask, list | tuple)

    def pulled(g: torch.Tensor, x: torch.Tensor, kernel: torch.Tensor, wanted: list[bool]) -> list[torch.Tensor]:
        found: list[torch.Tensor] = aten.convolution_backward(g, x, kernel, sizes, *setting, wanted)
        return found

    def by_input(s: Tangent, t: Tangent) -> Tangent:
        total: Tangent = None
        if s is not None:
            many = s.flatten(0, 1)
            stand_in = x.new_empty(1).expand(len(many), *x.shape[1:])
            total = pulled(many, stand_in, weight, [True, False, False])[0].reshape(len(s), *x.shape)
        if t is not None:
            kernels = t.movedim(0, 1).flatten(1, 2)
            stand_in = x.new_empty(1).expand(len(x), kernels.shape[1], *x.shape[2:])
            more = pulled(g, stand_in, kernels, [True, False, False])[0]
            more = more.reshape(len(x), len(t), *x.shape[1:]).movedim(1, 0)
            total = more if total is None else total.add_(more)
        return total

    def by_kernel(s: Tangent, t: Tangent) -> Tangent:
        total: Tangent = None
        if s is not None:
            channels = s.movedim(0, 1).flatten(1, 2)
            stand_in = weight.new_empty(1).expand(channels.shape[1], *weight.shape[1:])
            more = pulled(channels, x, stand_in, [False, True, False])[1]
            total = more.reshape(len(s), *weight.shape)
        if t is not None:
            channels = t.movedim(0, 1).flatten(1, 2)
            stand_in = weight.new_empty(1).expand(len(weight), channels.shape[1], *weight.shape[2:])
            more = pulled(g, channels, stand_in, [False, True, False])[1]
            more = more.reshape(len(weight), len(t), *weight.shape[1:]).movedim(1, 0)
            total = more if total is None else total + more
        return total

    def along(s: Tangent, t: Tangent, v: Tangent, *_: Tangent) -> tuple[Tangent, Tangent, Tangent]:
        return (
            by_input(s, v) if mask[0] else None,
            by_kernel(s, t) if mask[1] else None,
            s.transpose(1, 2).flatten(3).sum((2, 3)) if mask[2] and s is not None else None,
        )

    return Push(along, live, [bool(one) for one in mask], [g, x, weight])


@rule(aten.max_pool2d_with_indices.default)
def _max_pool(call: Call, live: list[bool]) -> Push:
    (x,) = _tensors(call, 1)
    out, places = call.results
    assert isinstance(out, torch.Tensor) and isinstance(places, torch.Tensor)
    chosen = places.flatten(-2)

    def along(t: Tangent, *_: Tangent) -> tuple[Tangent, Tangent]:
        if t is None:
            return None, None
        flat = t.flatten(-2)
        return flat.gather(-1, chosen.expand(len(t), *chosen.shape)).reshape(len(t), *out.shape), None

    return Push(along, [True, *[False] * (len(live) - 1)], [True, False], [places])


@rule(aten.max_pool2d_with_indices_backward.default)
def _max_pool_backward(call: Call, live: list[bool]) -> Push | None:
    if not live[0]:
        return None
    x, places = call.args[1], call.args[7]
    assert isinstance(x, torch.Tensor) and isinstance(places, torch.Tensor)
    chosen, shape = places.flatten(-2), x.shape

    def along(t: Tangent, *_: Tangent) -> Tangent:
        if t is None:
            return None
        total = t.new_zeros(len(t), *shape[:-2], shape[-2:].numel())
        total.scatter_add_(-1, chosen.expand(len(t), *chosen.shape), t.flatten(-2))
        return total.reshape(len(t), *shape)

    return Push(along, [True, *[False] * (len(live) - 1)], [True], [places])


@rule(aten._softmax.default)
def _softmax(call: Call, live: list[bool]) -> Push:
    (q,), dim = _tensors(call._replace(args=call.results), 1), _axis(call)
    return Push(lambda t, *_: _centred(t * q, q, dim), live, [True], [q])


@rule(aten._softmax_backward_data.default)
def _softmax_backward(call: Call, live: list[bool]) -> Push:
    (g, q), dim = _tensors(call, 2), _axis(call, 2)
    inner = (g * q).sum(dim, keepdim=True)

    def along(s: Tangent, t: Tangent, *_: Tangent) -> Tangent:
        # q g − q Σ q g.
        total: Tangent = None if s is None else _centred(s * q, q, dim)
        if t is not None:
            more = t * (g - inner) - q * (t * g).sum(dim, keepdim=True)
            total = more if total is None else total.add_(more)
        return total

    return Push(along, live, [True], [g, q])


@rule(aten._log_softmax.default)
def _log_softmax(call: Call, live: list[bool]) -> Push:
    (y,), dim = _tensors(call._replace(args=call.results), 1), _axis(call)
    q = y.exp()
    return Push(lambda t, *_: t - (t * q).sum(dim, keepdim=True), live, [True], [q])


@rule(aten._log_softmax_backward_data.default)
def _log_softmax_backward(call: Call, live: list[bool]) -> Push:
    (g, y), dim = _tensors(call, 2), _axis(call, 2)
    q = y.exp()
    slope = q * g.sum(dim, keepdim=True)

    def along(s: Tangent, t: Tangent, *_: Tangent) -> Tangent:
        # g − q Σ g.
        total: Tangent = None if s is None else s - q * s.sum(dim, keepdim=True)
        if t is not None:
            total = -(t * slope) if total is None else total.sub_(t * slope)
        return total

    return Push(along, live, [True], [q, slope])


def _product(s: Tangent, b: torch.Tensor, a: torch.Tensor, t: Tangent) -> Tangent:
    """Return s b + a t."""
    total: Tangent = None if s is None else torch.matmul(s, b)
    if t is None:
        return total
    if a.ndim == 2:
        whole = a.expand(len(t), *a.shape)
        return torch.bmm(whole, t) if total is None else total.baddbmm_(whole, t)
    more = torch.matmul(a, t)
    return more if total is None else total.add_(more)


def _centred(products: torch.Tensor, q: torch.Tensor, dim: int) -> torch.Tensor:
    return products - q * products.sum(dim, keepdim=True)


def _tensors(call: Call, count: int) -> list[torch.Tensor]:
    """Return the first arguments."""
    found = [one for one in call.args[:count] if isinstance(one, torch.Tensor)]
    if len(found) != count:
        raise UnservedError(call.operation.name())
    return found


def _axis(call: Call, place: int = 1) -> int:
    """Return the axis that a call names, counted from the last, so that it is the tangent's too."""
    axis, result = call.args[place], call.results[0]
    assert isinstance(axis, int) and isinstance(result, torch.Tensor)
    return axis % result.ndim - result.ndim if result.ndim else -1


def _single_group(call: Call, setting: tuple[object, ...]) -> list[object]:
    """Return a convolution's stride, padding, dilation, transposed, output padding and groups."""
    if setting[5] != 1:
        raise UnservedError(call.operation.name())
    return list(setting)
