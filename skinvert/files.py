"""Fitted inverters as pickles and files, without model and data where the factorisation serves without them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self, SupportsIndex

import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from ._check import must_be, resolve_device
from ._state import pack, unpack
from ._types import Device, State
from .persistence import left_out, load_state, refusing_damage, save_state

__all__ = ["UNSAVED", "Saved", "Whole", "load", "savable"]

# The classes that a file may be of, by their names: a closed list.
KINDS: dict[str, type[Saved]] = {}

# What a file leaves out: requests of metadata, callbacks, the library of the rows that were fitted, other processes.
UNSAVED = ("_metadata_request", "_skl_callbacks", "_namespace", "_ranks")


def savable(cls: type[Saved]) -> type[Saved]:
    """Decorate a class of ours that ``load`` may return."""
    KINDS[cls.__name__] = cls
    return cls


class Saved(BaseEstimator, ABC):
    """An estimator whose state can leave out the model: what pickles and files hold of it."""

    @abstractmethod
    def _serves_alone(self) -> bool:
        """Return whether it is fitted, and its factorisation serves without the curvature."""

    @abstractmethod
    def _file_state(self) -> State:
        """Return what a file holds; raise where a file of arrays cannot hold what the solves need."""

    @classmethod
    @abstractmethod
    def _file_fields(cls) -> tuple[Mapping[str, str], frozenset[str]]:
        """Return the types of what a file holds, in the words of ``check_fields``, and what of it may be missing."""

    @classmethod
    def _restored(cls, state: State) -> Self:
        """Return the estimator of a decoded state; ValueError where that contradicts itself."""
        restored = object.__new__(cls)
        restored.__setstate__(state)
        return restored

    def __getstate__(self) -> State:
        """Leave out the curvature, and with it model, loss and data, where the factorisation serves without it.

        An inverter that is not fitted, or solves with the model, keeps them all.
        """
        state = self._whole_state()
        if self._serves_alone():
            for name in ("curvature_", "_model", "_data"):
                state.pop(name, None)
            state.update({name: left_out(state[name]) for name in ("model", "loss")})
        return state

    def _whole_state(self) -> State:
        """Return all that it has, model and data too."""
        state = dict(super().__getstate__())
        if "process_group" in state:
            # A connection between processes.
            state["process_group"] = left_out(state["process_group"])
        return {name: pack(value) if name in ("device", "dtype") else value for name, value in state.items()}

    def __setstate__(self, state: State) -> None:
        """Restore the attributes."""
        super().__setstate__(
            {name: unpack(state[name]) if name in ("device", "dtype") else state[name] for name in state}
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        """Return what pickle, joblib and copy rebuild the inverter from."""
        return _blank, (type(self),), self.__getstate__()

    def __reduce__(self) -> tuple[object, ...] | str:
        """Refuse a model by name where skops, which alone calls this, would stumble over its tensors."""
        state = self.__getstate__()
        if state.get("_model") is not None or isinstance(state["model"], torch.nn.Module):
            got = "a torch model, which an inverter needs to be fitted, and some methods to solve"
            raise ValueError(must_be("What skops writes", "without torch models", got, "Try pickle or joblib."))
        reduced: tuple[object, ...] | str = super().__reduce__()
        return reduced

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted inverse to a safetensors file, which ``skinvert.load`` reads anywhere.

        The file holds the factorisation, the settings and the names of the parameters, under a checksum. It holds no
        model, no data, no code, and no device; metadata requests are left out too. It takes the place of ``path`` once
        it is complete, so that an interrupted save loses nothing.

        Parameters
        ----------
        path : str or Path
            Overwritten where it exists.

        Raises
        ------
        ValueError
            For a method that solves with the model, such as ``"cg"``, and for settings that are not plain.

        Examples
        --------
        >>> import tempfile
        >>> import numpy as np
        >>> from skinvert import HessianInverter
        >>> X = np.array([[2.0, 0.0], [0.0, 2.0]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     HessianInverter("direct", 2.0).fit(X).save(f"{folder}/inverse.safetensors")
        ...     load(f"{folder}/inverse.safetensors").transform(np.array([[4.0, 8.0]]))
        array([[1., 2.]])
        """
        check_is_fitted(self, "n_features_in_")
        name = type(self).__name__
        if KINDS.get(name) is not type(self):
            raise TypeError(must_be("save", f"called on a {' or '.join(KINDS)} itself", name, "Try pickle."))
        save_state(path, name, self._file_state(), *self._file_fields())


class Whole:
    """Stands for a fitted inverter in a pickle that is asked for more than its factorisation: model and data come too.

    Parameters
    ----------
    inverter : Saved
        What comes back from the pickle in its place.
    """

    def __init__(self, inverter: Saved) -> None:
        self.inverter = inverter

    def __reduce__(self) -> tuple[object, ...]:
        """Return what the inverter is rebuilt from."""
        return _with_all, (type(self.inverter), self.inverter._whole_state())


def _with_all(cls: type[Saved], state: State) -> Saved:
    restored = _blank(cls)
    restored.__setstate__(state)
    return restored


def _blank(cls: type[Saved]) -> Saved:
    """Return an estimator without attributes, for ``__setstate__``; not by ``__reduce__``, which refuses models."""
    return object.__new__(cls)


def load(path: str | os.PathLike[str], device: Device = None) -> Saved:
    """Return the inverter that ``save`` wrote: it transforms as the one saved, to the last bit.

    No code in the file is run: it holds numbers, plain values and names of skinvert's own classes. To fit again, give
    model and loss again.

    Parameters
    ----------
    path : str or Path
        The file.
    device : str or torch.device, default=None
        Where it solves: None is the CPU, wherever it was fitted; "auto" a GPU when there is one.

    Returns
    -------
    HessianInverter or HessianInverterCV
        Fitted: what was saved.

    Raises
    ------
    ValueError
        For a file that is truncated, altered, of a newer format, or none of ``save``'s.
    """
    where = resolve_device(device, torch.device("cpu"))
    kind, state = load_state(path, {name: cls._file_fields() for name, cls in KINDS.items()}, where)
    with refusing_damage(path, "one whose inverse gives another answer than it was saved with"):
        return KINDS[kind]._restored(state)
