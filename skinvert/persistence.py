"""State to a file and back: plain values as JSON, arrays in safetensors, under a checksum; no code runs on load."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import torch

from ._check import must_be
from ._schema import check_fields
from ._state import unpack
from ._types import Array, State
from .encoding import LeftOut, Writer, decode_state, plain

__all__ = ["left_out", "load_state", "refusing_damage", "replacing", "require_present", "save_state"]

FORMAT, VERSION = "skinvert", 4
HEADER = ("format", "version", "kind", "state", "sha256")
# Names of parameters and plain values, no numbers of a curvature: a larger header is none of ours.
HEADER_BYTES = 16 * 2**20


def left_out(value: object) -> object:
    """Return what a file holds of a model or a loss: a name as it is, else a ``LeftOut``."""
    return value if value is None or isinstance(value, str | LeftOut) else LeftOut(type(value).__name__)


def require_present(value: Array, name: str) -> Array:
    """Return ``value``; raise where a file left it out."""
    if isinstance(value, LeftOut):
        hint = f"Try set_params({name}=...)."
        raise ValueError(must_be(f"{name} of a loaded inverter", "given again before a fit", value, hint))
    return value


# -- the file ----------------------------------------------------------------------------------------------------------


def save_state(
    path: str | os.PathLike[str],
    kind: str,
    state: State,
    fields: Mapping[str, str],
    optional: frozenset[str] = frozenset(),
) -> None:
    """Write ``state`` to a safetensors file, whole or not at all.

    The file is written beside ``path`` under another name, flushed to the disk and then renamed. What an earlier save
    left there when it was killed is removed.

    Parameters
    ----------
    path : str or Path
        Overwritten where it exists; an ordinary file, no device or pipe.
    kind : str
        What the state is of; ``load_state`` asks for the same.
    state : dict
        Of plain values, containers, arrays, tensors and objects of this package that hold nothing else.
    fields : mapping of str to str
        The types of the state's entries, in the words of ``check_fields``.
    optional : frozenset of str
        Those that need not be there.

    Raises
    ------
    ValueError
        Where the state holds anything else.
    FileNotFoundError
        Where the folder does not exist.
    OSError
        Where the disk is full; the file before is as it was.
    """
    _check_path(path)
    save_file = _safetensors().numpy.save_file
    writer = Writer()
    # The root first: what it refers to is collected on the way.
    root = writer.encode(state, kind)
    check_fields(kind, fields, plain(unpack(state)), optional)
    text = json.dumps({"root": root, "objects": writer.objects})
    header = {"format": FORMAT, "version": str(VERSION), "kind": kind, "state": text}
    header["sha256"] = _checksum(header, writer.arrays)
    needed = len(text) + sum(array.nbytes for array in writer.arrays.values())
    if len(text) > HEADER_BYTES // 2:
        raise ValueError(must_be("What save writes beside arrays", "small", f"{len(text):,} bytes", "Try pickle."))
    with replacing(path, needed) as temporary:
        try:
            save_file(writer.arrays, temporary, header)
        except _safetensors().SafetensorError as error:
            # Its own error for whatever the system refuses.
            raise OSError(errno.EIO, f"{os.fspath(path)!r} could not be written: {error}") from error


def load_state(
    path: str | os.PathLike[str], kinds: Mapping[str, tuple[Mapping[str, str], frozenset[str]]], device: torch.device
) -> tuple[str, State]:
    """Return which of ``kinds`` a file is of, and the state that ``save_state`` wrote, its operators on ``device``.

    It is checked entry by entry against the fields of its kind, of which some may be missing.

    Raises
    ------
    ValueError
        Where the file is damaged, altered, of another kind or of another version of the format.
    """
    _check_path(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(must_be("path", "a file that exists", repr(os.fspath(path))))
    header, arrays = _read(path)
    if header["sha256"] != _checksum(header, arrays):
        raise ValueError(_damaged(path, "contents that do not fit their checksum"))
    kind = header["kind"]
    if kind not in kinds:
        raise ValueError(must_be(f"{os.fspath(path)!r}", f"the file of a {' or '.join(kinds)}", f"one of a {kind}"))
    with refusing_damage(path, "a state that cannot be read"):
        state = decode_state(json.loads(header["state"]), arrays, device)
        check_fields(kind, kinds[kind][0], state, kinds[kind][1])
        return kind, state


def _check_path(path: object) -> None:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(must_be("path", "a str or a Path", type(path).__name__))


@contextmanager
def refusing_damage(path: str | os.PathLike[str], got: str) -> Iterator[None]:
    """Turn what a state raises that no ``save`` has written into the one error of damaged files."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(_damaged(path, f"{got} ({error})")) from error


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    safe_open = _safetensors().safe_open
    _check_size(path)
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


def _check_size(path: str | os.PathLike[str]) -> None:
    """Raise where the length that the file gives for its header is more than any of ours, or than the file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(HEADER_BYTES, max(os.path.getsize(path) - 8, 0)):
        raise ValueError(_damaged(path, f"a damaged one (a header of {length:,} bytes)"))


class _Foreign(ValueError):
    """A sound safetensors file that is none of ours, or one of a newer format."""


def _check_header(header: dict[str, str], path: str | os.PathLike[str]) -> None:
    if header.get("format") != FORMAT:
        must = "a file that `save` wrote"
        got = f"a safetensors file of format {header.get('format')!r}"
        raise _Foreign(must_be(repr(os.fspath(path)), must, got))
    if int(header["version"]) != VERSION:
        newer = int(header["version"]) > VERSION
        hint = "Try a newer skinvert." if newer else "Fit again and save again."
        got = f"version {header['version']}"
        raise _Foreign(must_be(f"The format of {os.fspath(path)!r}", f"of version {VERSION}", got, hint))
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
def replacing(path: str | os.PathLike[str], needed: int) -> Iterator[Path]:
    """Yield a path beside ``path``; what is written there then takes its place at once, or is removed."""
    # Through a link to what it points at: a rename would replace the link itself.
    target = Path(os.path.realpath(os.fspath(path)))
    _check_target(target, needed)
    _remove_abandoned(target.parent)
    temporary = target.with_name(f"{_own_prefix()}{os.getpid()}-{secrets.token_hex(8)}.tmp")
    try:
        _touch(temporary)
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


def _touch(temporary: Path) -> None:
    try:
        temporary.touch(exist_ok=False)
    except PermissionError as error:
        message = must_be("The folder of path", "one that can be written to", repr(str(temporary.parent)))
        raise PermissionError(errno.EACCES, message) from error


def _own_prefix() -> str:
    """Return how the names of this machine's temporary files begin: processes of another are not ours to judge."""
    return f".skinvert-{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}-"


def _check_target(target: Path, needed: int) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(must_be("The folder of path", "one that exists", repr(str(target.parent))))
    if target.is_dir():
        raise IsADirectoryError(must_be("path", "that of a file", f"the folder {str(target)!r}"))
    if target.exists() and not target.is_file():
        raise ValueError(must_be("path", "that of an ordinary file", f"the device, pipe or socket {str(target)!r}"))
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        message = must_be(f"The disk of {str(target)!r}", f"one with {needed:,} bytes free", f"{free:,}")
        raise OSError(errno.ENOSPC, message)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed saves left: temporary files of processes that are no more."""
    for left in folder.glob(f"{_own_prefix()}*.tmp"):
        process = left.name.removeprefix(_own_prefix()).partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            with suppress(OSError):
                left.unlink()


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        message = must_be("safetensors", "installed for save and load", "no such package", _INSTALL)
        raise ImportError(message) from error
    return safetensors


_INSTALL = 'Try `pip install "skinvert[persistence]"`, or pickle.'
