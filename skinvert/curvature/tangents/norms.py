"""Rules of norms: x̂ = (x − μ) r over axes, scaled by γ and shifted by β."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .recording import Call, aten
from .rules import Push, Tangent, by_graph, rule

__all__: list[str] = []


@rule(aten.native_batch_norm.default)
def _batch_norm(call: Call, live: list[bool]) -> Push | None:
    x, gamma, _, mean, variance, training, _, eps = call.args
    if training:
        # Statistics of the batch itself have derivatives.
        return by_graph(call, live)
    unit, slope = _by_statistics(x, mean, variance, eps)
    scale = slope if gamma is None else slope * _channels(gamma, unit)

    def along(s: Tangent, t: Tangent, u: Tangent, *_: Tangent) -> tuple[Tangent, None, None]:
        moved = None if t is None else _channels(t, unit) * unit
        shift = None if u is None else _channels(u, unit).expand(len(u), *unit.shape)
        return _total(None if s is None else s * scale, moved, shift), None, None

    return Push(along, [*live[:3], *[False] * 5], [True, False, False], [unit, scale])


@rule(aten.native_batch_norm_backward.default)
def _batch_norm_backward(call: Call, live: list[bool]) -> Push | None:
    g, x, gamma, mean, variance, _, _, training, eps, mask = call.args
    if training:
        return by_graph(call, live)
    unit, slope = _by_statistics(x, mean, variance, eps)
    assert isinstance(g, torch.Tensor) and isinstance(mask, list | tuple)
    scale = slope if gamma is None else slope * _channels(gamma, unit)
    steep = g * slope

    def along(s: Tangent, t: Tangent, u: Tangent, *_: Tangent) -> tuple[Tangent, Tangent, Tangent]:
        by_x = _total(None if s is None else s * scale, None if u is None else steep * _channels(u, unit))
        by_gamma = _total(None if s is None else _over(s * unit), None if t is None else _over(t * steep))
        return by_x if mask[0] else None, by_gamma if mask[1] else None, _over(s) if mask[2] and s is not None else None

    wanted = [bool(one) for one in mask]
    return Push(along, [*live[:3], *[False] * (len(live) - 3)], wanted, [unit, scale, steep])


@rule(aten.native_layer_norm.default)
def _layer_norm(call: Call, live: list[bool]) -> Push:
    x, shape, gamma, _, _ = call.args
    norm = _Normalised.of(x, call.results[1], call.results[2], shape)
    size = norm.ndim

    def along(*tangents: Tangent) -> tuple[Tangent, None, None]:
        s, (t, u, _) = tangents[0], tangents[-3:]
        changed = None if s is None else norm.along(s)
        if changed is not None and isinstance(gamma, torch.Tensor):
            changed = changed * gamma
        moved = None if t is None else _last(t, norm.unit) * norm.unit
        shift = None if u is None else _last(u, norm.unit).expand(len(u), *norm.unit.shape)
        return _total(changed, moved, shift), None, None

    used = [live[0], *[False] * size, *live[1 + size : 3 + size], False]
    held = [norm.unit, norm.slope, *([gamma] if isinstance(gamma, torch.Tensor) else [])]
    return Push(along, used, [True, False, False], held)


@rule(aten.native_layer_norm_backward.default)
def _layer_norm_backward(call: Call, live: list[bool]) -> Push:
    g, x, shape, mean, rstd, gamma, _, mask = call.args
    norm = _Normalised.of(x, mean, rstd, shape)
    assert isinstance(g, torch.Tensor) and isinstance(mask, list | tuple)
    pulled = g * gamma if isinstance(gamma, torch.Tensor) else g
    size, inner, result = norm.ndim, norm.mean(norm.unit * pulled), norm.along(pulled)

    def by_x(s: Tangent, t: Tangent, u: Tangent) -> Tangent:
        # r (h − mean h − x̂ mean(x̂ h)), h = γ g.
        direct = _total(
            None if s is None else (s * gamma if isinstance(gamma, torch.Tensor) else s),
            None if u is None else _last(u, norm.unit) * g,
        )
        total = None if direct is None else norm.along(direct)
        if t is None:
            return total
        changed = norm.along(t)
        bent = changed * inner + norm.unit * norm.mean(changed * pulled)
        return _total(total, -norm.slope * (bent + norm.mean(norm.unit * t) * result))

    def along(*tangents: Tangent) -> tuple[Tangent, Tangent, Tangent]:
        s, t, u = tangents[0], tangents[1], tangents[4 + size]
        by_gamma = None if s is None else norm.over(s * norm.unit)
        if t is not None:
            by_gamma = _total(by_gamma, norm.over(norm.along(t) * g))
        return (
            by_x(s, t, u) if mask[0] else None,
            by_gamma if mask[1] else None,
            norm.over(s) if mask[2] and s is not None else None,
        )

    used = [place in (0, 1, 4 + size) and has for place, has in enumerate(live)]
    held = [norm.unit, norm.slope, g, pulled, inner, result]
    return Push(along, used, [bool(one) for one in mask], held)


@rule(aten.native_group_norm.default)
def _group_norm(call: Call, live: list[bool]) -> Push:
    x, gamma, _, samples, _, _, groups, _ = call.args
    y, mean, rstd = call.results
    assert isinstance(x, torch.Tensor) and isinstance(mean, torch.Tensor) and isinstance(rstd, torch.Tensor)
    assert isinstance(samples, int) and isinstance(groups, int)
    norm = _Normalised.of(x.reshape(samples, groups, -1), mean, rstd, [1])
    unit = norm.unit.reshape(x.shape)

    def along(s: Tangent, t: Tangent, u: Tangent, *_: Tangent) -> tuple[Tangent, Tangent, Tangent]:
        moved = None if t is None else _channels(t, unit) * unit
        shift = None if u is None else _channels(u, unit).expand(len(u), *unit.shape)
        if s is None:
            return _total(moved, shift), None, None
        rows = s.reshape(len(s), *norm.unit.shape)
        changed = norm.along(rows).reshape(s.shape)
        if isinstance(gamma, torch.Tensor):
            changed = changed * _channels(gamma, unit)
        by_rstd = -norm.slope.square() * norm.mean(norm.unit * rows)
        return _total(changed, moved, shift), norm.mean(rows)[..., 0], by_rstd[..., 0]

    held = [norm.unit, norm.slope, *([gamma] if isinstance(gamma, torch.Tensor) else [])]
    return Push(along, [*live[:3], *[False] * (len(live) - 3)], [True, True, True], held)


@dataclass(frozen=True)
class _Normalised:
    """x̂ and r over the last ``ndim`` axes."""

    unit: torch.Tensor
    slope: torch.Tensor
    ndim: int

    @classmethod
    def of(cls, x: object, mean: object, rstd: object, shape: object) -> _Normalised:
        """Return x̂ of x and its statistics."""
        assert isinstance(x, torch.Tensor) and isinstance(mean, torch.Tensor) and isinstance(rstd, torch.Tensor)
        assert isinstance(shape, list | tuple)
        lead = [*x.shape[: x.ndim - len(shape)], *[1] * len(shape)]
        slope = rstd.reshape(lead)
        return cls((x - mean.reshape(lead)) * slope, slope, len(shape))

    def mean(self, t: torch.Tensor) -> torch.Tensor:
        """Return the means over the axes."""
        return t.mean(tuple(range(-self.ndim, 0)), keepdim=True)

    def along(self, t: torch.Tensor) -> torch.Tensor:
        """Return the derivative of x̂ along t: r (t − mean t − x̂ mean(x̂ t)), a symmetric map."""
        return self.slope * (t - self.mean(t) - self.unit * self.mean(self.unit * t))

    def over(self, t: torch.Tensor) -> torch.Tensor:
        """Return the sums over all other axes, row by row."""
        axes = tuple(range(1, t.ndim - self.ndim))
        return t.sum(axes) if axes else t


def _by_statistics(x: object, mean: object, variance: object, eps: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x̂ and r (C, 1, ...) by running statistics."""
    assert isinstance(x, torch.Tensor) and isinstance(variance, torch.Tensor) and isinstance(eps, float)
    slope = _channels((variance + eps).rsqrt(), x)
    return (x - _channels(mean, x)) * slope, slope


def _channels(of: object, x: torch.Tensor) -> torch.Tensor:
    """Return numbers (C,), or rows of them, along the second axis of x."""
    assert isinstance(of, torch.Tensor)
    ones = [1] * (x.ndim - 2)
    return of.reshape(-1, *ones) if of.ndim == 1 else of.reshape(len(of), 1, -1, *ones)


def _last(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return rows of numbers that lie along the last axes of x."""
    return t.reshape(len(t), *[1] * (x.ndim - (t.ndim - 1)), *t.shape[1:])


def _over(t: torch.Tensor) -> torch.Tensor:
    """Return the sums over all axes but the row and the channel."""
    return t.transpose(1, 2).flatten(3).sum((2, 3)) if t.ndim > 3 else t.sum(1)


def _total(*parts: Tangent) -> Tangent:
    total: Tangent = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total
