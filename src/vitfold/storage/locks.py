"""Files that one process at a time holds, however it ends: the system drops its lock with it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

NOT_SUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What a system says that lacks a call."""
_RECORD_BYTES = 4096


def try_lock(path: Path, *, create: bool = False) -> int | None:
    """Return a descriptor of a file that is now held by it, until it is closed; None if somebody else holds it.

    None, too, if the file was replaced while it was opened.

    Raises:
        OSError: if the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
    if _lock(descriptor) and _is_still(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


@contextlib.contextmanager
def held(path: Path, busy: str) -> Iterator[None]:
    """Hold a file, made now if there is none, in a folder that one command at a time may work in.

    Raises:
        BlockingIOError: with the words `busy`, if another command holds it.
        OSError: if it cannot be opened.
    """
    descriptor = try_lock(path, create=True)
    if descriptor is None:
        raise BlockingIOError(errno.EWOULDBLOCK, busy)
    try:
        yield
    finally:
        os.close(descriptor)


def sign(descriptor: int) -> None:
    """Write into a held file who holds it."""
    os.ftruncate(descriptor, 0)
    values = {"writer": "vitfold", "process": os.getpid(), "machine": socket.gethostname(), "since": int(time.time())}
    os.pwrite(descriptor, json.dumps(values).encode(), 0)


def signed(path: Path) -> dict[str, Any] | None:
    """Return what `sign` wrote: empty if it had no time to, None if somebody else wrote the file."""
    with path.open("rb") as file:
        content = file.read(_RECORD_BYTES)
    values = _record(content)
    return values if not content or values.get("writer") == "vitfold" else None


def holder(path: Path) -> str | None:
    """Return who holds a file, in words, if it says so."""
    try:
        values = signed(path) or {}
    except OSError:
        return None
    return f"process {values['process']} on {values['machine']}" if {"process", "machine"} <= set(values) else None


def _lock(descriptor: int) -> bool:
    """Lock a file; False if it is locked. Where a disk has no locks, the process that the file names has to be gone."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NOT_SUPPORTED | {errno.ENOLCK}:
                raise
        else:
            return True
    return not process_lives(_record(os.pread(descriptor, _RECORD_BYTES, 0)))


def process_lives(values: dict[str, Any]) -> bool:
    """Say whether the process of a record may still run; of one on another machine nobody knows, so it may."""
    if "process" not in values:
        return False
    return values.get("machine") != socket.gethostname() or Path(f"/proc/{values['process']}").exists()


def _is_still(descriptor: int, path: Path) -> bool:
    """Say whether a path still names the file that was opened: its owner may have removed it meanwhile."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    opened = os.fstat(descriptor)
    return (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)


def _record(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
