"""How a folder appears at a path: complete or not at all, with nothing lost on the way."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vitfold.errors import BundleError
from vitfold.storage.locks import NOT_SUPPORTED
from vitfold.storage.workshop import OLD, open_workshop, recover

Standing = Callable[[Path], Collection[str]]
"""Says which entries of a folder belong to what vitfold wrote there; raises BundleError if it wrote nothing."""
Swap = Callable[[Path, Path], bool]


@dataclass(slots=True, kw_only=True, eq=False)
class Place:
    """A destination that nobody else writes to, and the workshop beside it; `kept` are the user's files in it."""

    destination: Path
    workshop: Path
    standing: Standing
    overwrite: bool
    swap: Swap
    kept: list[str] = field(default_factory=list)

    def draft(self, name: str = "new") -> Path:
        """Return where a candidate may be made; it is gone unless it is published."""
        return self.workshop / name

    def publish(self, draft: Path) -> Path:
        """Put a finished draft at the destination by one rename; return where it is.

        What was replaced is gone with the workshop, but for files that vitfold did not write: they move along.

        Raises:
            BundleError: if something else stands there by now, or it cannot be written.
        """
        check_place(self.destination, overwrite=self.overwrite, standing=self.standing)
        try:
            if self.destination.exists() and any(self.destination.iterdir()):
                self.kept += _carry_over(self.destination, draft, self.standing(self.destination))
                if not self.swap(draft, self.destination):
                    _change_places(draft, self.destination, self.workshop / OLD)
            else:
                draft.rename(self.destination)
            _sync(self.destination.parent)
        except OSError as error:
            raise BundleError(f"cannot write {self.destination}: {_words(error)}; choose another output") from None
        return self.destination


def atomic_swap(one: Path, other: Path) -> bool:
    """Let two folders change their names in one step; False where the system cannot."""
    call = _exchanging_call()
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))


def two_renames(one: Path, other: Path) -> bool:
    """Do what `atomic_swap` does on a system that cannot: nothing."""
    return one == other


@contextlib.contextmanager
def reserve(path: str | Path, *, overwrite: bool, standing: Standing, swap: Swap = atomic_swap) -> Iterator[Place]:
    """Hold a destination from before the work until it is done: others are refused, and leftovers are removed.

    A symbolic link is followed: what it points to is written. Nothing is left behind but what was published.

    Raises:
        BundleError: if the destination cannot be written, may not be replaced, or somebody else is writing it.
    """
    destination = followed(path)
    check_place(destination, overwrite=overwrite, standing=standing)
    made = _make_parents(destination)
    try:
        with open_workshop(destination) as workshop:
            # Whoever held it before may have finished meanwhile.
            check_place(destination, overwrite=overwrite, standing=standing)
            yield Place(destination=destination, workshop=workshop, standing=standing, overwrite=overwrite, swap=swap)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def followed(path: str | Path) -> Path:
    """Return the absolute path that is written: where a symbolic link points, else the path itself.

    Raises:
        BundleError: if links lead in a circle.
    """
    given = Path(path)
    try:
        absolute = given.resolve() if given.name in ("", "..") else given.absolute()
        return absolute.resolve() if absolute.is_symlink() else absolute
    except (OSError, RuntimeError):
        raise BundleError(f"{given} is a symbolic link that leads nowhere; choose another output") from None


def check_place(destination: Path, *, overwrite: bool, standing: Standing) -> None:
    """Check that a folder may be put there, before anything slow starts.

    Raises:
        BundleError: if something else stands there, or something that may not be replaced.
    """
    try:
        _check_standing(destination, overwrite=overwrite, standing=standing)
    except OSError as error:
        raise BundleError(f"cannot write {destination}: {_words(error)}; choose another output") from None


def _check_standing(destination: Path, *, overwrite: bool, standing: Standing) -> None:
    recover(destination)
    if not destination.exists():
        if destination.is_symlink():
            raise BundleError(f"{destination} is a symbolic link that leads nowhere; choose another output")
        return
    if not destination.is_dir():
        raise BundleError(f"{destination} exists and is a file; choose another output")
    if os.path.ismount(destination):
        raise BundleError(f"{destination} is where a disk is mounted, which no rename replaces; choose a folder in it")
    names = [entry.name for entry in destination.iterdir()]
    if not names:
        return
    own = standing(destination)
    if not overwrite:
        raise BundleError(f"{destination} exists already; pass --overwrite to replace it, or choose another output")
    for name in sorted(set(names) - set(own)):
        entry = destination / name
        if not (entry.is_symlink() or entry.is_file() or entry.is_dir()):
            raise BundleError(f"{entry} is neither a file nor a folder; move it elsewhere, or choose another output")


def check_space(destination: Path, needed_bytes: int) -> None:
    """Check that a disk has room for what is going to be written.

    Raises:
        BundleError: saying how much is needed and how much is free.
    """
    folder = destination
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise BundleError(
            f"{destination} takes about {needed_bytes / 1e6:.0f} MB while it is made, and {free / 1e6:.0f} MB are free "
            "there; free some space or choose an output on another disk"
        )


def _change_places(draft: Path, destination: Path, old: Path) -> None:
    """Move the old one aside and the new one in: a kill in between is undone by whoever comes next."""
    destination.rename(old)
    try:
        draft.rename(destination)
    except OSError:
        old.rename(destination)
        raise


def _carry_over(former: Path, draft: Path, own: Collection[str]) -> list[str]:
    """Bring along what vitfold did not write; return the names."""
    kept = sorted(entry.name for entry in former.iterdir() if entry.name not in own)
    for name in kept:
        source, copy = former / name, draft / name
        if os.path.lexists(copy):
            raise BundleError(
                f"{source} is not vitfold's, and the new bundle has a file of that name; move it elsewhere first"
            )
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, copy, symlinks=True, copy_function=_link)
        else:
            _link(str(source), str(copy))
    return kept


def _link(source: str, copy: str) -> None:
    """Give a file a second name, or copy it where the disk has no such names."""
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, copy, follow_symlinks=False)


def _make_parents(destination: Path) -> list[Path]:
    """Make the folders that lead to a destination; return those that were not there, the innermost first."""
    made: list[Path] = []
    folder = destination.parent
    while not folder.exists() and folder != folder.parent:
        made.append(folder)
        folder = folder.parent
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleError(
            f"cannot write {destination}: {_words(error)}; choose a folder that you may write to"
        ) from None
    return made


def _sync(folder: Path) -> None:
    """Let a rename reach the disk."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _words(error: OSError) -> str:
    return error.strerror or str(error)


@functools.cache
def _exchanging_call() -> Callable[[bytes, bytes], int] | None:
    """Return Linux's renameat2 or macOS's renamex_np, called to exchange; None where there is neither."""
    here, exchange = -100, 2
    try:
        library = ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):
        return None
    if hasattr(library, "renameat2"):
        call = library.renameat2
        return lambda one, other: int(call(here, one, here, other, exchange))
    if hasattr(library, "renamex_np"):
        swap = library.renamex_np
        return lambda one, other: int(swap(one, other, exchange))
    return None
