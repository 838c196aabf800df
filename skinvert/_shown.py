"""What a notebook shows of an estimator: a table of what was fitted, above scikit-learn's diagram of the settings."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from sklearn import get_config
from sklearn.utils import estimator_html_repr

__all__ = ["Shown"]

TABLE = "<table><caption>{name}, as fitted</caption><tbody>{rows}</tbody></table>"
ROW = '<tr><th style="text-align: left">{name}</th><td style="text-align: left">{value}</td></tr>'


class Shown(ABC):
    """An estimator whose HTML says what was fitted.

    By IPython's protocol, as scikit-learn's own estimators: ``sklearn.set_config(display="text")`` turns it off.
    """

    @abstractmethod
    def _facts(self) -> Mapping[str, object]:
        """Return what was fitted, each fact by its name; nothing before a fit."""

    @property
    def _repr_html_(self) -> Callable[[], str]:
        """HTML, for front ends that ask for it alone."""
        if get_config()["display"] != "diagram":
            message = "_repr_html_ is there where sklearn's `display` is 'diagram'"
            raise AttributeError(message)
        return self._page

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, str]:
        """Return text, and HTML where sklearn's ``display`` asks for it."""
        found = {"text/plain": repr(self)}
        return {**found, "text/html": self._page()} if get_config()["display"] == "diagram" else found

    def _page(self) -> str:
        return _table(type(self).__name__, self._facts()) + str(estimator_html_repr(self))


def _table(name: str, facts: Mapping[str, object]) -> str:
    """Return the facts as a table, or nothing where there are none."""
    rows = [ROW.format(name=html.escape(fact), value=html.escape(str(value))) for fact, value in facts.items()]
    return TABLE.format(name=html.escape(name), rows="".join(rows)) if rows else ""
