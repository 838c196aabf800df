"""The columns of right-hand sides: their names, and the way from and to named parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from sklearn.base import OneToOneFeatureMixin
from sklearn.utils.validation import check_is_fitted

from ._check import must_be
from ._frames import check_columns
from ._types import Array
from .parameters import ParameterLayout

__all__ = ["NamedColumns"]


class NamedColumns(OneToOneFeatureMixin):
    """Names of the p columns, and rows by them: of a model's parameters, or of plain rows."""

    _layout: ParameterLayout | None

    def get_feature_names_out(self, input_features: Array | None = None) -> np.ndarray:
        """Return the p names of the columns: ``"fc1.weight[0,3]"``, or the input's own for plain rows."""
        check_is_fitted(self, "n_features_in_")
        if self._layout is not None:
            return np.asarray(self._layout.feature_names(), dtype=object)
        names: np.ndarray = super().get_feature_names_out(input_features)
        return names

    def flatten(self, mapping: Mapping[str, Array] | Iterable[Array]) -> Array:
        """Return rows (k, p) of named tensors or arrays ``(k, *shape)``; one row without k; n c of ``(n, c, *shape)``.

        A sequence, such as ``torch.autograd.grad`` returns, is taken in the order of ``parameter_names_``. One row may
        lack axes of length 1: ``{"coef": model.coef_, "intercept": model.intercept_}`` of any scikit-learn model.
        """
        return self._named().flatten(mapping)

    def unflatten(self, x: Array) -> dict[str, Array]:
        """Return named tensors or arrays ``(k, *shape)`` of rows (k, p)."""
        layout = self._named()
        check_columns(x, layout.feature_names())
        return layout.unflatten(x)

    def _named(self) -> ParameterLayout:
        check_is_fitted(self, "n_features_in_")
        if self._layout is None:
            raise TypeError(must_be("flatten and unflatten", "called after a fit on a model", "a fit on plain rows"))
        return self._layout
