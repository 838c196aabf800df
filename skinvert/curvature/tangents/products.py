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


@rule(aten._softmax.default, aten._safe_softmax.default)
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
