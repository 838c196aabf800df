"""Leverage, studentised residuals, Cook's distance, DFBETAS: what each row does to a regression that was fitted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .._check import must_be
from .._frames import frame_of
from .._memory import check_memory, rows_within
from .._types import Array, Batch
from ..curvature import GGN, Objective, gauss_newton
from ..curvature.per_sample import jacobian_rows
from ..models import TorchTwiceDifferentiable, map_tensors
from .families import Family, family_of
from .fitted import Fitted

__all__ = ["Diagnostics", "diagnose", "leverage"]

OF_A_ROW = ("leverage", "residuals", "studentized_internal", "studentized_external", "cooks_distance", "dffits")


@dataclass(frozen=True)
class Diagnostics:
    r"""What each training row does to a regression with one output f: arrays of one entry a row.

    With weights wᵢ, mean μᵢ and variance φV(μᵢ) of yᵢ, hᵢ the leverage, and ₍ᵢ₎ for the fit without row i by one step
    of Newton's method: exact for squared error, the usual one-step approximation for a logistic or Poisson regression.

    ========================  ====================================================================================
    ``leverage``              hᵢ: the share of yᵢ in its own fit
    ``residuals``             rᵢ = √wᵢ (yᵢ − μᵢ) / √V(μᵢ), Pearson's
    ``studentized_internal``  rᵢ / √(φ (1 − hᵢ))
    ``studentized_external``  rᵢ / √(φ₍ᵢ₎ (1 − hᵢ))
    ``cooks_distance``        ‖F(θ − θ₍ᵢ₎)‖² / (φ Σh), with FᵀF the information of all rows
    ``dffits``                ``studentized_external`` √(hᵢ / (1 − hᵢ))
    ``dfbetas``               (θ − θ₍ᵢ₎) / √(φ₍ᵢ₎ diag(I⁻¹)), I the information, penalty and λ included
    ========================  ====================================================================================

    φ is Σr²/(n − Σh) for squared error, n the rows of wᵢ > 0: weights are inverse variances, as WLS takes them, not
    counts. It is 1 for a logistic or Poisson regression, with row i or without, where both studentised residuals are
    the same. Σh is p, or with a penalty the effective number of parameters. A row that alone decides a parameter, with
    hᵢ = 1 to rounding, has NaN beside its leverage and residual.

    Parameters
    ----------
    leverage, residuals, studentized_internal, studentized_external, cooks_distance, dffits : ndarray of shape (n,)
        See above.
    dfbetas : ndarray of shape (n, p)
        One column a parameter, in the order of ``inverter_.get_feature_names_out()``.
    dispersion : float
        φ.
    df_model, df_residual : float
        Σh and n − Σh.
    index : ndarray of shape (n,), default=None
        Labels of the rows, as ``InfluenceFunction.index_``.
    parameter_names : ndarray of shape (p,), default=None
        The columns of ``dfbetas``.

    References
    ----------
    Belsley, Kuh & Welsch (1980), "Regression Diagnostics", ch. 2. Pregibon (1981), "Logistic regression diagnostics".
    Where there is no penalty they are statsmodels' ``OLSInfluence`` and ``GLMInfluence``.
    """

    leverage: np.ndarray
    residuals: np.ndarray
    studentized_internal: np.ndarray
    studentized_external: np.ndarray
    cooks_distance: np.ndarray
    dffits: np.ndarray
    dfbetas: np.ndarray
    dispersion: float
    df_model: float
    df_residual: float
    index: np.ndarray | None = None
    parameter_names: np.ndarray | None = None

    def to_frame(self, library: str = "pandas") -> Array:
        """Return the diagnostics as a data frame of n rows, with ``dfbetas[name]`` for each parameter.

        Parameters
        ----------
        library : {"pandas", "polars"}, default="pandas"
            Whose frame, if it is installed. The rows' labels are its index, or in polars the column ``index``.

        Returns
        -------
        DataFrame
            The six statistics of a row, in the order above, then p columns of DFBETAS.

        Examples
        --------
        >>> import pandas as pd
        >>> from sklearn.linear_model import LinearRegression
        >>> from skinvert import InfluenceFunction
        >>> X, y = pd.DataFrame({"one": [1.0, 1.0, 1.0]}, index=list("abc")), np.array([1.0, 1.0, 4.0])
        >>> model = LinearRegression(fit_intercept=False).fit(X, y)
        >>> frame = InfluenceFunction().fit(model, (X, y)).diagnostics().to_frame()
        >>> frame.cooks_distance.round(6).to_dict()
        {'a': 0.25, 'b': 0.25, 'c': 1.0}
        """
        names = range(self.dfbetas.shape[1]) if self.parameter_names is None else self.parameter_names
        columns = {name: vars(self)[name] for name in OF_A_ROW}
        columns |= {f"dfbetas[{name}]": column for name, column in zip(names, self.dfbetas.T, strict=True)}
        return frame_of(columns, self.index, library)


def leverage(fitted: Fitted) -> torch.Tensor:
    """Return tr(Fᵢ A⁻¹ Fᵢᵀ) (n,), with FᵢᵀFᵢ = (wᵢ/Σw) Jᵢᵀ(∇²_f ℓᵢ)Jᵢ."""
    ggn, training = gauss_newton(fitted.objective), fitted.training
    found = torch.empty(training.count, dtype=ggn.dtype, device=ggn.device)
    most = min(fitted.most, rows_within(3 * ggn.rank * ggn.size * ggn.dtype.itemsize))
    for place, batch, shares in training.parts(most):
        F = ggn.factor_of(batch, shares)
        found[place] = (F * fitted.solve(F.flatten(0, 1)).reshape(F.shape)).sum((1, 2))
    return found


def diagnose(fitted: Fitted) -> Diagnostics:
    """Return the diagnostics of a fitted regression."""
    objective = fitted.objective
    family = _family(objective)
    size = 4 * fitted.training.count * objective.size * objective.dtype.itemsize
    check_memory(size, "DFBETAS", "Try `leverage()`, or fewer parameters with `params`.", torch.device("cpu"))
    _check_inverse(fitted)
    # The information of all rows at φ = 1 is T A: L is a mean, and torch's mse twice a log-likelihood.
    T = objective.mass_sum / family.scale
    rows = _Rows.joined(list(_parts(fitted)))
    inverse = torch.cat([_diagonal_part(fitted, start) for start in range(0, objective.size, fitted.most)])
    return _diagnostics(rows, _Fit(T, inverse, _shift(fitted), _data_gradient(objective), family))


@dataclass(frozen=True)
class _Rows:
    """Of each row: J A⁻¹ and J A⁻¹ Jᵀ of its output, u = −∂ and d = ∂² of its share of L by it, h = d J A⁻¹ Jᵀ."""

    Z: torch.Tensor
    m: torch.Tensor
    u: torch.Tensor
    d: torch.Tensor
    weighs: torch.Tensor

    @classmethod
    def joined(cls, parts: list[_Rows]) -> _Rows:
        return cls(*(torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])))

    @property
    def h(self) -> torch.Tensor:
        return self.d * self.m

    @property
    def free(self) -> torch.Tensor:
        """1 − h, NaN where it is 0 to rounding."""
        free = 1 - self.h
        return torch.where(free > math.sqrt(torch.finfo(free.dtype).eps), free, torch.nan)

    @property
    def dfbeta(self) -> torch.Tensor:
        """θ − θ₍ᵢ₎ (n, p)."""
        return self.Z * (self.u / self.free)[:, None]


@dataclass(frozen=True)
class _Fit:
    """Of the fit: T, diag(A⁻¹), A − GGN as a diagonal, the gradient of L without its penalty, the loss's family."""

    T: float
    inverse: torch.Tensor
    shift: torch.Tensor
    gradient: torch.Tensor
    family: Family


def _diagnostics(rows: _Rows, fit: _Fit) -> Diagnostics:
    h, free, n, df = rows.h, rows.free, int(rows.weighs.sum()), float(rows.h.sum())
    r = math.sqrt(fit.T) * torch.where(rows.u == 0, 0.0, rows.u / rows.d.sqrt())
    if fit.family.dispersion is None and not n - df > 1e-6:
        raise ValueError(must_be("The rows", f"more than the {df:.4g} parameters that they decide", n))
    dispersion = float(r.square().sum()) / (n - df) if fit.family.dispersion is None else fit.family.dispersion
    without = _dispersions(rows, fit, r, n) if fit.family.dispersion is None else torch.full_like(r, dispersion)
    external = r / (without * free).sqrt()
    moved = fit.T * _moved(rows, fit)
    dfbetas = rows.dfbeta / (without[:, None] * fit.inverse / fit.T).sqrt()
    arrays = {
        "leverage": h,
        "residuals": r,
        "studentized_internal": r / (dispersion * free).sqrt(),
        "studentized_external": external,
        "cooks_distance": moved / (dispersion * df),
        "dffits": external * (h / free).sqrt(),
        "dfbetas": dfbetas,
    }
    found = {name: values.cpu().numpy() for name, values in arrays.items()}
    return Diagnostics(**found, dispersion=dispersion, df_model=df, df_residual=n - df)


def _moved(rows: _Rows, fit: _Fit) -> torch.Tensor:
    """Return (θ − θ₍ᵢ₎)ᵀ GGN (θ − θ₍ᵢ₎), by A Z = Jᵀ."""
    return (rows.u / rows.free).square() * (rows.m - rows.Z.square() @ fit.shift)


def _dispersions(rows: _Rows, fit: _Fit, r: torch.Tensor, n: int) -> torch.Tensor:
    """Return φ₍ᵢ₎: the squares at θ₍ᵢ₎ of the other rows, over their number less their Σh there."""
    squares = r.square().sum() - 2 * fit.T * rows.dfbeta @ fit.gradient + fit.T * _moved(rows, fit)
    others = squares - (r / rows.free).square()
    # tr(A₍ᵢ₎⁻¹ GGN₍ᵢ₎), by Woodbury's identity.
    df = rows.h.sum() - rows.d / rows.free * (rows.Z.square() @ fit.shift)
    left = n - rows.weighs.to(df) - df
    return torch.where(left > 1e-6, others / left, torch.nan)


def _parts(fitted: Fitted) -> Iterator[_Rows]:
    objective, training = fitted.objective, fitted.training
    model = objective.model
    most = min(fitted.most, rows_within(3 * objective.size * objective.dtype.itemsize))
    for _, batch, shares in training.parts(most):
        J = jacobian_rows(model, batch)[:, 0]
        Z = fitted.solve(J)
        slope, curvature = _derivatives(model, batch)
        scaled = objective.scale * shares
        yield _Rows(Z, (J * Z).sum(1), -scaled * slope, scaled * curvature, shares > 0)


def _derivatives(model: TorchTwiceDifferentiable, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first and second derivative (m,) of each row's numerator in its output."""
    outputs = model.forward(map_tensors(torch.clone, batch)).detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(model.per_sample_loss(outputs, batch).sum(), outputs)
    closed = model.output_hessian(outputs.detach(), batch)
    if closed is None:
        raise TypeError(must_be("The loss", "one with an output Hessian in closed form", str(model.loss)))
    return slope.reshape(-1), closed.columns(0, closed.rank).square().sum((1, 2))


def _family(objective: Objective) -> Family:
    batch, _ = next(iter(objective.batches))
    outputs = objective.model.forward(map_tensors(torch.clone, batch)).detach()
    if outputs[0].numel() != 1:
        got = f"{outputs[0].numel()} outputs"
        raise ValueError(must_be("The model for diagnostics", "of one output", got, "`leverage()` takes several."))
    return family_of(objective.model, outputs, batch)


def _shift(fitted: Fitted) -> torch.Tensor:
    """Return what A has beside the GGN, a diagonal (p,): the penalty's and λ."""
    objective = fitted.objective
    zero = torch.zeros(objective.size, dtype=objective.dtype, device=objective.device)
    return (zero if objective.penalty is None else objective.penalty) + fitted.inverter.hessian_perturbation_


def _data_gradient(objective: Objective) -> torch.Tensor:
    return objective.gradient if objective.penalty is None else objective.gradient - objective.model.penalty_gradient()


def _diagonal_part(fitted: Fitted, start: int) -> torch.Tensor:
    """Return entries of diag(A⁻¹) from ``start`` on, as many as are solved at once."""
    p, model = fitted.model.num_params, fitted.model
    places = torch.arange(start, min(start + fitted.most, p), device=model.device)
    units = torch.zeros(len(places), p, dtype=model.dtype, device=model.device)
    own = torch.arange(len(places), device=model.device)
    units[own, places] = 1
    return fitted.solve(units)[own, places]


def _check_inverse(fitted: Fitted) -> None:
    """Raise unless the inverse is that of the GGN, penalty and λ included, on a random direction."""
    objective = fitted.objective
    generator = torch.Generator("cpu").manual_seed(0)
    b = torch.randn(1, objective.size, generator=generator, dtype=torch.float64, device="cpu")
    b = b.to(objective.device, objective.dtype)
    x = fitted.solve(b)
    error = float((GGN(objective).apply(x) + fitted.inverter.hessian_perturbation_ * x - b).norm() / b.norm())
    if not error <= 1e-3:
        must = "that of the GGN, with the penalty and λ, and of full rank"
        hint = 'Try curvature="ggn", an exact method, or inputs without linearly dependent columns.'
        raise ValueError(must_be("The inverse for diagnostics", must, f"one {error:.3g} off a solution", hint))
