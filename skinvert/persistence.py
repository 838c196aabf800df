"""State to a file and back: plain values as JSON, arrays in safetensors, under a checksum; no code runs on load."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._state import Packed, TensorState, pack, unpack
from ._validation import must_be
from .parameters import ParameterLayout

__all__ = ["LeftOut", "left_out", "load_state", "require_present", "save_state"]

FORMAT, VERSION = "skinvert", 1
HEADER = ("format", "version", "kind", "state", "sha256")


@dataclass(frozen=True)
class LeftOut:
    """Stands for a setting that a file leaves out, so that a later fit cannot take it for one that was never given.

    Parameters
    ----------
    what : str
        The type of what was left out.
    """

    what: str

    def __repr__(self) -> str:
        return f"<{self.what}, left out of the file>"


def left_out(value: Any) -> Any:
    """Return what a file holds of a model or a loss: a name as it is, else a ``LeftOut``."""
    return value if value is None or isinstance(value, str | LeftOut) else LeftOut(type(value).__name__)


def require_present(value: Any, name: str) -> Any:
    """Return ``value``; raise where a file left it out."""
    if isinstance(value, LeftOut):
        hint = f"Try set_params({name}=...)."
        raise ValueError(must_be(f"{name} of a loaded inverter", "given again before a fit", value, hint))
    return value


# -- the file ----------------------------------------------------------------------------------------------------------


def save_state(path: str | os.PathLike[str], kind: str, state: dict[str, Any]) -> None:
    """Write ``state`` to a safetensors file, whole or not at all.

    The file is written beside ``path`` under another name, flushed to the disk and then renamed.

    Parameters
    ----------
    path : str or Path
        Overwritten where it exists.
    kind : str
        What the state is of; ``load_state`` asks for the same.
    state : dict
        Of plain values, containers, arrays, tensors and objects of this package that hold nothing else.

    Raises
    ------
    ValueError
        Where the state holds anything else.
    FileNotFoundError
        Where the folder does not exist.
    """
    save_file = _safetensors().numpy.save_file
    writer = _Writer()
    # The root first: what it refers to is collected on the way.
    root = writer.encode(state, kind)
    text = json.dumps({"root": root, "objects": writer.objects})
    header = {"format": FORMAT, "version": str(VERSION), "kind": kind, "state": text}
    header["sha256"] = _checksum(header, writer.arrays)
    with _replacing(path) as temporary:
        save_file(writer.arrays, temporary, header)


def load_state(path: str | os.PathLike[str], kind: str, device: torch.device) -> dict[str, Any]:
    """Return the state that ``save_state`` wrote, with its operators on ``device``.

    Raises
    ------
    ValueError
        Where the file is damaged, altered, of another kind, or of a format newer than this one.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(must_be("path", "a file that exists", repr(os.fspath(path))))
    header, arrays = _read(path)
    if header["sha256"] != _checksum(header, arrays):
        raise ValueError(_damaged(path, "contents that do not fit their checksum"))
    if header["kind"] != kind:
        raise ValueError(must_be(f"{os.fspath(path)!r}", f"the file of a {kind}", f"one of a {header['kind']}"))
    try:
        return _decoded(json.loads(header["state"]), arrays, device)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(_damaged(path, f"a state that cannot be read ({error})")) from error


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    safe_open = _safetensors().safe_open
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            header: dict[str, str] = file.metadata() or {}
            _check_header(header, path)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (_Foreign, MemoryError):
        raise
    except Exception as error:
        # safetensors raises errors of its own, and of NumPy where a dtype was altered.
        raise ValueError(_damaged(path, f"a damaged one ({error})")) from error
    return header, arrays


class _Foreign(ValueError):
    """A sound safetensors file that is none of ours, or one of a newer format."""


def _check_header(header: dict[str, str], path: str | os.PathLike[str]) -> None:
    if header.get("format") != FORMAT:
        must = "a file that `save` wrote"
        got = f"a safetensors file of format {header.get('format')!r}"
        raise _Foreign(must_be(repr(os.fspath(path)), must, got))
    if int(header["version"]) > VERSION:
        got, hint = f"version {header['version']}", "Try a newer skinvert."
        raise _Foreign(must_be(f"The format of {os.fspath(path)!r}", f"of version {VERSION} or older", got, hint))
    if missing := [name for name in HEADER if name not in header]:
        message = f"its header has no {', '.join(missing)}"
        raise ValueError(message)


def _checksum(header: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps([header[name] for name in HEADER if name != "sha256"]).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.name} {array.shape};".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _damaged(path: str | os.PathLike[str], got: str) -> str:
    hint = "It was truncated or altered: save it again."
    return must_be(repr(os.fspath(path)), "a file as `save` wrote it", got, hint)


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside ``path``; what is written there then takes its place at once, or is removed."""
    # Through a link to what it points at: a rename would replace the link itself.
    target = Path(os.path.realpath(os.fspath(path)))
    if not target.parent.is_dir():
        raise FileNotFoundError(must_be("The folder of path", "one that exists", repr(str(target.parent))))
    if target.is_dir():
        raise IsADirectoryError(must_be("path", "that of a file", f"the folder {str(target)!r}"))
    temporary = target.with_name(f".skinvert-{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        # Whatever writes the file, its permissions are those of an ordinary one, or of the one before.
        mode = (target if target.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        # The rename itself is on the disk only with the folder.
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        message = must_be("safetensors", "installed for save and load", "no such package", _INSTALL)
        raise ImportError(message) from error
    return safetensors


_INSTALL = 'Try `pip install "skinvert[persistence]"`, or pickle.'


# -- state <-> JSON and arrays -----------------------------------------------------------------------------------------


def _table() -> dict[str, type]:
    """Return the classes that a file may name: ours that hold state. No other name is ever looked up."""
    found: list[type] = [LeftOut, ParameterLayout, *_below(TensorState)]
    return {_name_of(cls): cls for cls in found if _is_ours(cls)}


def _below(cls: type) -> list[type]:
    children: list[type] = cls.__subclasses__()
    return [below for child in children for below in (child, *_below(child))]


def _name_of(cls: type) -> str:
    return f"{cls.__module__.partition('.')[2]}.{cls.__qualname__}"


def _is_ours(cls: type) -> bool:
    package = __name__.partition(".")[0]
    ours = cls.__module__.partition(".")[0] == package
    return ours and getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls


class _Writer:
    """Collects arrays and objects while it turns values into JSON; what is met twice is written once.

    A list is ``["list", ...]``, and so is everything else that JSON has no form for, under its own tag.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.objects: list[list[Any]] = []
        self._seen: dict[tuple[Any, ...], Any] = {}
        self._names = {cls: name for name, cls in _table().items()}
        # Kept alive, so that no address is used twice.
        self._kept: list[Any] = []

    def encode(self, value: Any, where: str) -> Any:
        """Return ``value`` as JSON; ``where`` it stands is for the error."""
        value = pack(_plain(value))
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Packed):
            return ["packed", value.kind, self.encode(value.value, where), list(value.axes)]
        if isinstance(value, np.ndarray):
            return self._array(value, where)
        if type(value) in (list, tuple):
            return [type(value).__name__, [self.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]]
        if type(value) is dict:
            pairs = [[self.encode(k, where), self.encode(v, f"{where}.{k}")] for k, v in value.items()]
            return ["dict", pairs]
        return self._object(value, where)

    def _array(self, array: np.ndarray, where: str) -> Any:
        if array.dtype == object:
            return ["object array", self.encode(array.tolist(), where)]
        if array.dtype.kind not in "biuf":
            raise ValueError(self._refusal(f"an array of dtype {array.dtype}", where))
        array = np.asarray(array, order="C")
        # Empty arrays have no address of their own.
        place = array.ctypes.data if array.size else f"empty {len(self.arrays)}"
        key = (place, array.shape, array.dtype.str)
        if key not in self._seen:
            self._seen[key] = f"array{len(self.arrays)}"
            self.arrays[self._seen[key]] = array
        return ["array", self._seen[key]]

    def _object(self, value: Any, where: str) -> Any:
        if type(value) not in self._names:
            raise ValueError(self._refusal(type(value).__name__, where))
        key = ("object", id(value))
        if key not in self._seen:
            self._seen[key] = len(self.objects)
            self._kept.append(value)
            entry = [self._names[type(value)], None]
            self.objects.append(entry)
            entry[1] = self.encode(value.__getstate__(), f"{where}.{type(value).__name__}")
        return ["object", self._seen[key]]

    def _refusal(self, got: str, where: str) -> str:
        return must_be(f"What save writes, {where},", "plain, or skinvert's own", got, "Try pickle or joblib.")


def _plain(value: Any) -> Any:
    """Return NumPy scalars as Python's, and classes that name a dtype as dtypes."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, type) and (value in (float, int) or issubclass(value, np.generic)):
        return np.dtype(value)
    return value


def _decoded(content: dict[str, Any], arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Any]:
    table = _table()
    # All objects first, empty, since they may refer to one another.
    objects: list[Any] = [object.__new__(table[name]) for name, _ in content["objects"]]
    for found, (_, state) in zip(objects, content["objects"], strict=True):
        _fill(found, _decode(state, arrays, objects), device)
    return dict(unpack(_decode(content["root"], arrays, objects)))


def _decode(value: Any, arrays: dict[str, np.ndarray], objects: list[Any]) -> Any:
    if not isinstance(value, list):
        return value
    tag, content = value[0], value[1]
    if tag == "packed":
        return Packed(content, _decode(value[2], arrays, objects), tuple(value[3]))
    if tag == "array":
        return arrays[content]
    if tag == "object":
        return objects[content]
    if tag == "object array":
        return np.array(_decode(content, arrays, objects), dtype=object)
    if tag == "dict":
        return {_decode(k, arrays, objects): _decode(v, arrays, objects) for k, v in content}
    return {"list": list, "tuple": tuple}[tag](_decode(item, arrays, objects) for item in content)


def _fill(found: Any, state: dict[str, Any], device: torch.device) -> None:
    if not isinstance(found, TensorState):
        found.__dict__.update(state)
        return
    found.__setstate__(state)
    found.__dict__.update({name: _moved(value, device) for name, value in found.__dict__.items()})


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.device):
        return device
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value
