"""Files as they are read and written whole: ordinary ones of a bounded size, and never half of one.

The check before a file is opened: a pipe or a device that a path names would block, or never end.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from vitfold.storage.interrupts import uninterrupted
from vitfold.storage.locks import try_lock

TEXT_BYTES = 64 * 2**20
"""More than any text that vitfold reads holds."""
_TRIES, _PAUSE_S = 40, 0.05


def check_ordinary(path: Path) -> None:
    """Check that a path names a file on a disk.

    Raises:
        OSError: if there is none, or it is a folder, a pipe, a socket or a device.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path.name} is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path.name} is no ordinary file but a pipe, a socket or a device")


def read_ordinary(path: Path, most: int = TEXT_BYTES) -> bytes:
    """Return the content of an ordinary file of at most so many bytes.

    Raises:
        OSError: if there is none, it is none, it is larger, or it cannot be read.
    """
    check_ordinary(path)
    # Opened without waiting: what was an ordinary file may have become a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"{path.name} is larger than {most / 2**20:.0f} MiB")
    return content


def read_text(path: Path, most: int = TEXT_BYTES) -> str:
    """Return the content of an ordinary file as text in UTF-8.

    Raises:
        OSError: as `read_ordinary`.
        UnicodeDecodeError: if it is no such text.
    """
    return read_ordinary(path, most).decode("utf-8")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that readers, and whoever looks after a kill, see the former content or all of the new one.

    Raises:
        OSError: if it cannot be written, or another command is writing it.
    """
    if path.exists() and not path.is_file():  # /dev/stdout and its like
        path.write_bytes(content)
        return
    with uninterrupted():
        _write_whole(path.resolve() if path.is_symlink() else path, content)


def _write_whole(target: Path, content: bytes) -> None:
    partial = target.with_name(f".{target.name}.partial")
    for _ in range(_TRIES):
        descriptor = try_lock(partial, create=True)
        if descriptor is not None:
            break
        time.sleep(_PAUSE_S)
    else:
        raise OSError(f"another command is writing {target.name}")
    try:
        os.ftruncate(descriptor, 0)
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        if target.exists():
            partial.chmod(stat.S_IMODE(target.stat().st_mode))
        os.fsync(descriptor)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk, so that no rename gets there before it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
