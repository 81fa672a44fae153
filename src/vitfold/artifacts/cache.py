"""Where vitfold keeps what it need not compute twice.

The folder, its bound, the atomic write, and the marks by which its own entries are told from what else lies there:
only those are counted and removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vitfold.errors import CacheError
from vitfold.model import Array
from vitfold.storage.locks import try_lock
from vitfold.version import __version__

FOLDER = "VITFOLD_CACHE"
LIMIT = "VITFOLD_CACHE_GB"
_DEFAULT_GB = 8.0
_ABANDONED_S = 24 * 3600.0
"""A partial file as old as this belongs to no writer that still runs."""
_PARTIAL = ".partial"
MARK = "CACHEDIR.TAG"
"""Lies in a cache that vitfold made, and by it backups know one; never in a folder that held something before."""
_MARK_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# A cache of vitfold (https://bford.info/cachedir/). Entries named by 64 digits can be computed again.\n"
)
KINDS = frozenset(
    (
        *(
            "calibration",
            "compensation",
            "exactness",
            "predictors",
            "pruning",
            "reference",
            "registers",
            "remedies",
            "search",
            "searches",
        ),
        *("step-plans", "step-searches", "tensorrt", "texts"),
    )
)
"""The folders of entries in a cache without the mark: an earlier one, or a folder with other things in it."""
_OWN = re.compile(r"[0-9a-f]{64}(\.[a-z]+)?(\.[0-9a-f]{8}\.partial)?|tmp[a-z0-9_]{8}\.partial")
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """What lies under one key: a file or a folder, with its bytes and the time of its last use (seconds)."""

    path: Path
    kind: str
    size: int
    used: float


def cache_folder() -> Path:
    """Return the cache folder: $VITFOLD_CACHE, or the system's place for caches."""
    return Path(os.environ.get(FOLDER) or platformdirs.user_cache_dir("vitfold")).expanduser()


def cache_limit() -> int:
    """Return how many bytes the cache may hold: $VITFOLD_CACHE_GB times 10^9, else 8 GB.

    Raises:
        CacheError: if the variable is no number of gigabytes.
    """
    text = os.environ.get(LIMIT, "").strip()
    try:
        gigabytes = float(text) if text else _DEFAULT_GB
    except ValueError:
        gigabytes = -1.0
    if not 0.0 <= gigabytes < 1e9:
        raise CacheError(f"{LIMIT}={text!r} is no number of gigabytes; give one such as 8, or 0 to keep nothing")
    return int(gigabytes * 1e9)


def cache_entries() -> list[Entry]:
    """Return what is kept, the least recently used first; nothing that vitfold did not make."""
    found = (_entry(path) for kind in _kinds() for path in _listed(kind) if _is_own(path))
    return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.used)


def clear_cache() -> int:
    """Remove everything that is kept and that no command works in; return the bytes freed."""
    return sum(entry.size for entry in cache_entries() if not _in_use(entry.path) and _remove(entry.path))


def key_of(*parts: object) -> str:
    """Return the key of what follows from these values: the sha256 over all of them and vitfold's version.

    Numbers, texts, None, arrays (of torch too), and dataclasses, mappings and sequences of them. Hand over whole
    dataclasses: a field that is added to one then changes the key by itself.

    Raises:
        TypeError: for a value that has no canonical form.
    """
    total = hashlib.sha256(__version__.encode())
    for part in parts:
        _add(total, part)
    return total.hexdigest()


def _add(total: Any, part: object) -> None:
    if hasattr(part, "detach") and hasattr(part, "numpy"):
        part = part.detach().numpy()
    if isinstance(part, np.ndarray | np.generic):
        total.update(f"{part.dtype}{part.shape}".encode())
        total.update(np.asarray(part, order="C").tobytes())
    elif is_dataclass(part):
        total.update(f"{type(part).__name__}{{".encode())
        for field in fields(part):
            total.update(f"{field.name}=".encode())
            _add(total, getattr(part, field.name))
        total.update(b"}")
    elif isinstance(part, Mapping):
        total.update(b"{")
        for name in sorted(part):
            _add(total, name)
            _add(total, part[name])
        total.update(b"}")
    elif isinstance(part, tuple | list):
        total.update(b"(")
        for one in part:
            _add(total, one)
        total.update(b")")
    elif part is None or isinstance(part, str | int | float):
        total.update(f"{part!r},".encode())
    else:
        raise TypeError(f"a {type(part).__name__} is no part of a key")


def entry_folder(kind: str, key: str) -> Path:
    """Return the folder of this key, made now if there is none, and used now.

    Raises:
        CacheError: if it cannot be made.
    """
    path = _file(kind, key, "")
    try:
        _make_kind(path.parent)
        path.mkdir(exist_ok=True)
        os.utime(path)
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error}; set {FOLDER} to a folder that can be written") from None
    return path


def find_file(kind: str, key: str, suffix: str = ".safetensors") -> Path | None:
    """Return where the entry of this key lies, used now, or None."""
    path = _file(kind, key, suffix)
    try:
        os.utime(path)
    except FileNotFoundError:
        return None
    except OSError:
        # A read-only cache is read all the same.
        return path if path.is_file() else None
    return path


def keep_file(kind: str, key: str, write: Callable[[Path], object], suffix: str = ".safetensors") -> None:
    """Keep what `write` writes; a reader sees all of it or nothing. A full or read-only disk is no error.

    What was used longest ago makes room for it.

    Raises:
        CacheError: if the limit of the cache is no number.
    """
    limit = cache_limit()
    path = _file(kind, key, suffix)
    try:
        _make_kind(path.parent)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
        try:
            write(partial)
            if partial.stat().st_size > limit:
                return
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _make_room(limit, path)
    except (OSError, SafetensorError):
        return


def read_arrays(kind: str, key: str) -> dict[str, Array] | None:
    """Return the arrays kept under this key, or None; a damaged entry counts as none and is removed."""
    path = find_file(kind, key)
    if path is None:
        return None
    try:
        arrays: dict[str, Array] = load_file(path)
    except (SafetensorError, OSError):
        path.unlink(missing_ok=True)
        return None
    return arrays


def read_bytes(kind: str, key: str, suffix: str) -> bytes | None:
    """Return the bytes kept under this key, or None."""
    path = find_file(kind, key, suffix)
    try:
        return None if path is None else path.read_bytes()
    except OSError:
        return None


def keep_bytes(kind: str, key: str, suffix: str, content: bytes) -> None:
    """Keep bytes under this key."""
    keep_file(kind, key, lambda path: path.write_bytes(content), suffix)


def keep_arrays(kind: str, key: str, arrays: Mapping[str, Array]) -> None:
    """Keep arrays under this key."""
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    keep_file(kind, key, lambda path: save_file(whole, path))


def _file(kind: str, key: str, suffix: str) -> Path:
    if not _KEY.fullmatch(key):
        raise ValueError(f"a key of the cache is a sha256, not {key!r}")
    return cache_folder() / kind / f"{key}{suffix}"


def _make_kind(folder: Path) -> None:
    """Make the folder of a kind of entries; mark the cache where there is none yet."""
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    if not any(root.iterdir()):
        (root / MARK).write_text(_MARK_TEXT, encoding="utf-8")
    folder.mkdir(exist_ok=True)


def _kinds() -> Iterator[Path]:
    """Yield the folders of entries: all in a cache with the mark, else those of vitfold's names."""
    root = cache_folder()
    try:
        marked = (root / MARK).read_text(encoding="utf-8", errors="replace") == _MARK_TEXT
    except OSError:
        marked = False
    for folder in _listed(root):
        if folder.is_dir() and (marked or folder.name in KINDS):
            yield folder


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_own(path: Path) -> bool:
    """Say whether an entry has a name that only vitfold gives; folders have keys without a suffix."""
    return not path.is_symlink() and bool((_KEY if path.is_dir() else _OWN).fullmatch(path.name))


def _in_use(path: Path) -> bool:
    """Say whether a command works in a folder: it holds one of its journals."""
    for rows in path.glob("*.jsonl") if path.is_dir() else ():
        try:
            descriptor = try_lock(rows)
        except OSError:
            continue
        if descriptor is None:
            return True
        os.close(descriptor)
    return False


def _entry(path: Path) -> Entry | None:
    """Return the entry that lies here; None if another process has removed it meanwhile."""
    try:
        stats = [one.lstat() for one in (path, *path.rglob("*"))] if path.is_dir() else [path.lstat()]
    except OSError:
        return None
    return Entry(
        path=path,
        kind=path.parent.name,
        size=sum(one.st_size for one in stats if stat.S_ISREG(one.st_mode)),
        used=max(one.st_mtime for one in stats),
    )


def _make_room(limit: int, newest: Path) -> None:
    """Remove what was used longest ago until the rest fits the limit; not the newest, nor what is being written."""
    entries = [entry for entry in cache_entries() if entry.path != newest]
    total = newest.stat().st_size + sum(entry.size for entry in entries)
    for entry in entries:
        if total <= limit:
            return
        if entry.path.suffix == _PARTIAL and time.time() - entry.used < _ABANDONED_S:
            continue
        if not _in_use(entry.path) and _remove(entry.path):
            total -= entry.size


def _remove(path: Path) -> bool:
    """Remove a file or a folder; a reader that has it open keeps it."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError:
        return False
    return True
