"""Where vitfold keeps what it need not compute twice.

Owns the folder and the atomic write. What is kept, and under which key, is the caller's choice.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import platformdirs
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vitfold.model import Array


def cache_folder() -> Path:
    """Return the cache folder: $VITFOLD_CACHE, or the system's place for caches."""
    return Path(os.environ.get("VITFOLD_CACHE") or platformdirs.user_cache_dir("vitfold"))


def kept_file(kind: str, key: str, suffix: str = ".safetensors") -> Path:
    """Return where the entry of this key lies, if there is one."""
    return cache_folder() / kind / f"{key}{suffix}"


def keep_file(kind: str, key: str, write: Callable[[Path], object], suffix: str = ".safetensors") -> None:
    """Keep what `write` writes; a reader sees all of it or nothing. A full or read-only disk is no error."""
    path = kept_file(kind, key, suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            partial = Path(file.name)
        try:
            write(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError):
        return


def read_arrays(kind: str, key: str) -> dict[str, Array] | None:
    """Return the arrays kept under this key, or None; a damaged entry counts as none and is removed."""
    path = kept_file(kind, key)
    if not path.is_file():
        return None
    try:
        arrays: dict[str, Array] = load_file(path)
    except (SafetensorError, OSError):
        path.unlink(missing_ok=True)
        return None
    return arrays


def read_bytes(kind: str, key: str, suffix: str) -> bytes | None:
    """Return the bytes kept under this key, or None."""
    try:
        return kept_file(kind, key, suffix).read_bytes()
    except OSError:
        return None


def keep_bytes(kind: str, key: str, suffix: str, content: bytes) -> None:
    """Keep bytes under this key."""
    keep_file(kind, key, lambda path: path.write_bytes(content), suffix)


def keep_arrays(kind: str, key: str, arrays: Mapping[str, Array]) -> None:
    """Keep arrays under this key."""
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    keep_file(kind, key, lambda path: save_file(whole, path))
