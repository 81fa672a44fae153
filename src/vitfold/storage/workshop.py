"""The folder beside a destination in which what is put there is made: `.NAME.partial` beside `NAME`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vitfold.errors import BundleError
from vitfold.storage.interrupts import uninterrupted
from vitfold.storage.locks import holder, sign, signed, try_lock

WRITER = "writer.json"
OLD = "old"
"""Where a workshop keeps what it is about to replace, on systems that need two renames for it."""
_PARTIAL = ".partial"
_EARLIER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(partial|old)")
"""What vitfold left before workshops had locks."""
_EARLIER_IDLE_S = 3600.0
_TRIES, _PAUSE_S = 40, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """A workshop: what it is for, its bytes, and whether its writer still lives."""

    path: Path
    destination: Path
    size_bytes: int
    lives: bool


def workshop_of(destination: Path) -> Path:
    """Return the workshop of a destination."""
    return destination.with_name(f".{destination.name}{_PARTIAL}") if destination.name else destination / _PARTIAL


@contextlib.contextmanager
def open_workshop(destination: Path) -> Iterator[Path]:
    """Hold the workshop of a destination, new or taken over from a writer who is gone: empty, and gone at the end.

    Raises:
        BundleError: if its writer lives, something else has its name, or it cannot be made.
    """
    folder = workshop_of(destination)
    lock: int | None = None
    try:
        with uninterrupted():
            lock = _lock_or_refuse(folder, destination)
        put_back(folder, destination)
        _empty(folder)
        for path in _earlier(destination):
            if _idle(path):
                shutil.rmtree(path, ignore_errors=True)
        sign(lock)
        yield folder
    finally:
        with uninterrupted():
            if lock is not None:
                put_back(folder, destination)
                _remove(folder)
                os.close(lock)


def recover(destination: Path) -> None:
    """Put back what a killed writer had moved aside and not yet replaced; wait for one that is just doing it."""
    workshop = workshop_of(destination)
    for _ in range(_TRIES):
        if os.path.lexists(destination) or not (workshop / OLD).is_dir():
            break
        lock = _taken(workshop)
        if lock is not None:
            try:
                put_back(workshop, destination)
                _remove(workshop)
            finally:
                os.close(lock)
            return
        time.sleep(_PAUSE_S)
    if not os.path.lexists(destination):
        for path in sorted(_earlier(destination), key=lambda one: one.stat().st_mtime):
            if path.suffix == ".old":
                with contextlib.suppress(OSError):
                    path.rename(destination)
                return


def leftovers(folder: Path) -> list[Leftover]:
    """Return the workshops in a folder, those of running commands and those that killed ones left."""
    found = []
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    for path in entries:
        earlier = _EARLIER.fullmatch(path.name)
        if path.is_symlink() or not path.is_dir():
            continue
        if earlier is not None:
            destination, lives = folder / earlier["name"], not _idle(path)
        elif _is_workshop(path):
            destination, lives = folder / path.name[1 : -len(_PARTIAL)], _lives(path)
        else:
            continue
        found.append(Leftover(path=path, destination=destination, size_bytes=_size(path), lives=lives))
    return found


def _lock_or_refuse(folder: Path, destination: Path) -> int:
    try:
        return _locked(folder, destination)
    except OSError as error:
        raise BundleError(
            f"cannot write {destination}: {error.strerror or error}; choose a folder that you may write to"
        ) from None


def _locked(folder: Path, destination: Path) -> int:
    """Make a workshop or take over that of a writer who is gone; return the lock on it.

    Raises:
        BundleError: if its writer lives, or the folder in the way is none.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if os.path.lexists(folder) and not _is_workshop(folder):
            raise BundleError(f"{folder} is in the way and is not vitfold's; move it, or choose another output")
        try:
            lock = try_lock(folder / WRITER, create=True)
        except FileNotFoundError:
            continue
        if lock is not None:
            return lock
        other = holder(folder / WRITER)
        if other is not None:
            raise BundleError(
                f"{destination} is being written by another command ({other}); wait for it, or choose another output"
            )
        time.sleep(_PAUSE_S)
    raise BundleError(f"{destination} is being written by another command; wait for it, or choose another output")


def _is_workshop(folder: Path) -> bool:
    """Say whether a folder has the name and the mark of a workshop; an empty one was just made."""
    if not (folder.name.startswith(".") and folder.name.endswith(_PARTIAL)) or folder.is_symlink():
        return False
    try:
        return not any(folder.iterdir()) or signed(folder / WRITER) is not None
    except FileNotFoundError:
        return not folder.is_dir() or not any(folder.iterdir())  # it vanishes just now
    except OSError:
        return False


def _taken(workshop: Path) -> int | None:
    """Return the lock on a workshop whose writer is gone, None if he lives or it cannot be opened."""
    try:
        return try_lock(workshop / WRITER)
    except OSError:
        return None


def _lives(workshop: Path) -> bool:
    lock = _taken(workshop)
    if lock is None:
        return (workshop / WRITER).exists()
    os.close(lock)
    return False


def put_back(workshop: Path, destination: Path) -> None:
    """Undo half of a replacement."""
    if (workshop / OLD).is_dir() and not os.path.lexists(destination):
        (workshop / OLD).rename(destination)


def _empty(workshop: Path) -> None:
    for entry in workshop.iterdir():
        if entry.name != WRITER:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _remove(workshop: Path) -> None:
    """Remove a workshop, its mark last: what a kill leaves of it is still one."""
    with contextlib.suppress(OSError):
        _empty(workshop)
        (workshop / WRITER).unlink(missing_ok=True)
        workshop.rmdir()


def _earlier(destination: Path) -> list[Path]:
    try:
        beside = list(destination.parent.iterdir())
    except OSError:
        return []
    found = ((path, _EARLIER.fullmatch(path.name)) for path in beside)
    return [path for path, match in found if match and match["name"] == destination.name and path.is_dir()]


def _idle(path: Path) -> bool:
    """Say whether nothing in a folder was touched for an hour."""
    try:
        newest = max(one.lstat().st_mtime for one in (path, *path.rglob("*")))
    except OSError:
        return False
    return time.time() - newest > _EARLIER_IDLE_S


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size if path.is_file() else 0
    return total
