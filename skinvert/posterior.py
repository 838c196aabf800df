"""What a fitted inverter says beside solutions: quadratic forms with bounds, and the Gaussian with H + λI as precision.

Mixed into ``HessianInverter``, which says what is fitted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from ._autograd import ordinary
from ._rows import Rows
from ._types import Array
from .methods.base import InverseOperator
from .methods.quadratic import QuadraticForms

__all__ = ["Posterior"]


class Posterior(ABC):
    """Quadratic forms of a fitted inverse."""

    @ordinary
    def quadratic(self, G: Array, B: Array | None = None, *, one_sided: bool = False) -> QuadraticForms:
        r"""Return gᵀ(H + λI)⁻¹b of the exact H for all pairs of rows, with bounds that hold.

        Whatever the method inverts and however far it was run: solutions x are corrected by their true residuals r,

        .. math:: |g^T(H+λI)^{-1}b - (x_g^T b + r_g^T x_b)| ≤ ‖r_g‖ ‖r_b‖ / μ,

        with μ a lower bound of the eigenvalues of H + λI: λ and the least penalty of a curvature that is positive
        semi-definite by construction, what a second factorisation proves of a Hessian that ``"direct"`` inverts, and
        else unknown. Residuals are computed in float64 from the parameters and data as they were fitted, a float32
        model's too. Costs a solve and a product for each row, in float32 also a pass over the data, once.

        Parameters
        ----------
        G : array or tensor of shape (q, p)
            Rows g; test gradients, say.
        B : array or tensor of shape (k, p), default=None
            Rows b; None gives gᵀ(H + λI)⁻¹g of each row alone, self-influence, which its value never exceeds.
        one_sided : bool, default=False
            Solve for G alone: the bound is ‖r_g‖‖b‖/μ, and k may be large.

        Returns
        -------
        QuadraticForms
            ``values``, ``bounds``, ``lower`` and ``upper``, (q, k) or (q,), of G's kind and device, in float64.
            ``bounds`` are NaN where μ is not known, or H not at hand: an approximate or a float32 inverse that was
            loaded.

        Examples
        --------
        One step of conjugate gradients; the exact value is 4/2 + 4/4 = 3.

        >>> import numpy as np
        >>> from skinvert import HessianInverter
        >>> from skinvert.methods import CG
        >>> X = np.array([[np.sqrt(2.0), 0.0], [0.0, np.sqrt(6.0)]])  # H = XᵀX / n is diag(1, 3)
        >>> inverter = HessianInverter(CG(rtol=0.5), hessian_perturbation=1.0).fit(X)
        >>> forms = inverter.quadratic(np.array([[2.0, 2.0]]), np.array([[2.0, 2.0]]))
        >>> forms.values.round(3), forms.bounds.round(3), bool(abs(forms.values - 3.0) <= forms.bounds)
        (array([[2.64]]), array([[0.8]]), True)
        """
        inverse = self._certified("quadratic")
        g, b = self._rows(G, double=True), None if B is None else self._rows(B, double=True)
        forms = inverse.quadratic(g.tensor, None if b is None else b.tensor, one_sided=one_sided)
        forms = forms.times(2 * g.powers if b is None else g.powers[:, None] + b.powers)
        return QuadraticForms(**g.back_info(vars(forms)))

    # -- what the estimator says of itself ---------------------------------------------------------------------------

    @abstractmethod
    def _factorised(self, what: str, hint: str = ...) -> InverseOperator: ...

    @abstractmethod
    def _rows(self, b: Array, *, double: bool = False) -> Rows: ...

    def _certified(self, what: str) -> InverseOperator:
        """Return the inverse, held against the exact curvature where that is at hand, whatever ``check_residual``."""
        return self._factorised(what).judged_by(vars(self).get("curvature_"))
