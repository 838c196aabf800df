"""What a fitted inverter says beside solutions: quadratic forms with bounds, and the Gaussian with H + λI as precision.

Mixed into ``HessianInverter``, which says what is fitted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from sklearn.utils import check_random_state

from ._autograd import ordinary
from ._check import check_number, must_be
from ._memory import rows_within
from ._rows import Rows
from ._types import Array, RandomState
from .methods.base import InverseOperator, Method
from .methods.quadratic import QuadraticForms
from .registry import InversionRegistry
from .results import Spectrum
from .system import Function, is_method

__all__ = ["Posterior", "own_spectrum"]


def own_spectrum(inverse: InverseOperator) -> Spectrum:
    """Return the eigenvalues of A as the method inverts it; TypeError where it knows none."""
    found = inverse.own_eigenvalues
    if found is None:
        must, hint = 'a method that knows its own, for of="inverse"', 'Try of="curvature".'
        raise TypeError(must_be("method", must, repr(inverse.name), hint))
    values = found.double().cpu().numpy()
    ends = (float(values[0]), 0.0), (float(values[-1]), 0.0)
    return Spectrum(values, np.full(len(values), 1 / len(values)), True, *ends)


class Posterior(ABC):
    """Quadratic forms of a fitted inverse, and the Gaussian that it is the covariance of."""

    method_: Method | Function

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

    @ordinary
    def log_det(self) -> float:
        """Return log det(H + λI) of the operator that the method inverts: an approximation's own for ``"kfac"``.

        Returns
        -------
        float
            Of the natural logarithm, summed in float64.

        Raises
        ------
        TypeError
            Where the method knows no root of H + λI; the error names those that do.
        ValueError
            Where H + λI is not positive definite.

        Examples
        --------
        >>> import numpy as np
        >>> from skinvert import HessianInverter
        >>> X = np.sqrt(2) * np.eye(2)  # H = XᵀX / n is the identity
        >>> HessianInverter("direct", hessian_perturbation=1.0).fit(X).log_det()  # log 4
        1.386...
        """
        return self._gaussian("log_det").log_det()

    @ordinary
    def sample(self, n_samples: int = 1, random_state: RandomState = None) -> np.ndarray:
        """Return draws from N(0, (H + λI)⁻¹), one per row, of the operator that the method inverts.

        The Laplace posterior of θ is θ̂ plus such a draw over √N, with N the factor between the mean loss and the
        negative log posterior: n for a loss that is a negative log-likelihood, see ``covariance``.

        Parameters
        ----------
        n_samples : int, default=1
            Number of draws.
        random_state : int, RandomState or None, default=None
            Of the draws.

        Returns
        -------
        ndarray of shape (n_samples, p)
            In the inverse's dtype; ``unflatten`` names its parts.

        Examples
        --------
        >>> import numpy as np
        >>> from skinvert import HessianInverter
        >>> X = np.sqrt(2) * np.eye(2)  # H = XᵀX / n is the identity
        >>> inverter = HessianInverter("direct", hessian_perturbation=3.0).fit(X)
        >>> bool(abs(inverter.sample(4000, random_state=0).std() - 0.5) < 0.02)
        True
        """
        n_samples = check_number(n_samples, "n_samples", owner="sample", low=1, integer=True)
        inverse, generator = self._gaussian("sample"), check_random_state(random_state)
        draws = torch.empty(n_samples, inverse.size, dtype=inverse.dtype, device=inverse.device)
        for part in draws.split(rows_within(5 * inverse.noise_size * 8, n_samples)):
            noise = generator.standard_normal((len(part), inverse.noise_size))
            part.copy_(inverse.root(torch.from_numpy(noise).to(part)))
        return draws.cpu().numpy()

    # -- what the estimator says of itself ---------------------------------------------------------------------------

    @abstractmethod
    def _factorised(self, what: str, hint: str = ...) -> InverseOperator: ...

    @abstractmethod
    def _rows(self, b: Array, *, double: bool = False) -> Rows: ...

    def _gaussian(self, what: str) -> InverseOperator:
        """Return the inverse, which has a root; TypeError that names the methods that do."""
        inverse = self._factorised(what)
        if not inverse.gaussian:
            kinds = [kind for kind in InversionRegistry.registry.values() if is_method(kind)]
            names = sorted(kind.name for kind in kinds if kind.gaussian)
            raise TypeError(must_be(f"method for {what}", f"one of {names}", repr(self.method_)))
        return inverse

    def _certified(self, what: str) -> InverseOperator:
        """Return the inverse, held against the exact curvature where that is at hand, whatever ``check_residual``."""
        return self._factorised(what).judged_by(vars(self).get("curvature_"))
