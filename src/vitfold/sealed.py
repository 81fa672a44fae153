"""A folder whose files have the digests that its manifest states.

Owns how one is written so that a reader never sees half of it, and how damage is found. What else a manifest holds is
the business of those who write it: `bundle` and `step_bundle`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitfold.digest import file_sha256
from vitfold.errors import BundleError, nearest

FORMAT = "vitfold.bundle"
VERSION = 1
MANIFEST = "manifest.json"
REMAKE = "make one with: vitfold optimize SOURCE -o OUT.fold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A manifest as it was read: its values, and the digest of its text, which names the whole folder."""

    values: Mapping[str, Any]
    digest: str


def write_sealed(path: str | Path, write: Callable[[Path], Mapping[str, Any]], *, overwrite: bool = False) -> Path:
    """Write a folder beside its destination, then rename it into place; return where it is.

    `write` is handed an empty folder, writes files into it and returns the manifest. Nothing is left behind if it
    raises or the user interrupts; an existing folder is replaced only by a complete one.

    Raises:
        BundleError: if the destination cannot be written, or exists and may not be replaced.
    """
    destination = Path(path).absolute()
    check_destination(destination, overwrite=overwrite)
    work = destination.parent / f".{destination.name}.{secrets.token_hex(4)}.partial"
    try:
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir(mode=0o700)
        except OSError as error:
            raise BundleError(f"cannot write {destination}: {error}; choose a folder that you may write to") from None
        manifest = write(work)
        header = {"format": FORMAT, "version": VERSION, **manifest, "files": _file_table(work)}
        (work / MANIFEST).write_text(json.dumps(header, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        _put_in_place(work, destination)
    except OSError as error:
        raise BundleError(f"cannot write {destination}: {error}; free some space or choose another folder") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return destination


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Check that a bundle may be written there, before anything slow starts.

    Raises:
        BundleError: if something else stands there, or a bundle that may not be replaced.
    """
    if not destination.exists():
        return
    if not destination.is_dir():
        raise BundleError(f"{destination} exists and is a file; choose another output")
    if any(destination.iterdir()) and not (destination / MANIFEST).exists():
        raise BundleError(f"{destination} exists and is not a bundle; choose another output, it is left untouched")
    if any(destination.iterdir()) and not overwrite:
        raise BundleError(f"{destination} exists already; pass --overwrite to replace it, or choose another output")


def _put_in_place(work: Path, destination: Path) -> None:
    work.chmod(0o755)
    if not destination.exists():
        work.rename(destination)
        return
    old = work.with_suffix(".old")
    destination.rename(old)
    try:
        work.rename(destination)
    except OSError:
        old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _file_table(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }


def read_header(folder: Path) -> Header:
    """Read a manifest of this format.

    Raises:
        BundleError: if there is none, or it is damaged or newer than this vitfold.
    """
    if not folder.exists():
        around = [p.name for p in folder.parent.iterdir() if p.suffix == ".fold"] if folder.parent.is_dir() else []
        raise BundleError(f"no such bundle: {folder} ({nearest(folder.name, around) if around else REMAKE})")
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; {REMAKE}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read {folder / MANIFEST}: {error}; make the bundle again") from None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise BundleError(f"{folder / MANIFEST} is damaged ({error}); make the bundle again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError(f"{folder} is not a bundle: its {MANIFEST} lacks the format {FORMAT!r}")
    version = values.get("version")
    if not isinstance(version, int) or version < 1:
        raise BundleError(f"{folder} states the format version {version!r}, which is not one; make the bundle again")
    if version > VERSION:
        raise BundleError(
            f"{folder} has format version {version}, this vitfold reads up to {VERSION}; "
            "upgrade with: pip install -U vitfold"
        )
    return Header(values=values, digest=hashlib.sha256(text.encode("utf-8")).hexdigest())


def check_files(folder: Path, header: Header, needed: Sequence[str]) -> int:
    """Check every file against its digest; return the bytes of all.

    Raises:
        BundleError: if the manifest does not list a needed file, or a listed one is missing or damaged.
    """
    files = header.values.get("files")
    for name in needed:
        if not isinstance(files, dict) or name not in files:
            raise BundleError(f"{folder / MANIFEST} is damaged: it does not list {name}; make the bundle again")
    assert isinstance(files, dict)
    return sum(_check_file(folder, name, entry) for name, entry in files.items())


def _check_file(folder: Path, name: str, entry: Any) -> int:
    if not isinstance(entry, dict) or Path(name).name != name or name in (".", ".."):
        raise BundleError(f"{folder / MANIFEST} lists the file {name!r}, which a bundle cannot hold")
    path = folder / name
    if not path.is_file() or path.is_symlink():
        raise BundleError(f"{folder} lacks the file {name}; copy the whole folder again or make the bundle again")
    size = path.stat().st_size
    if size != entry.get("size_bytes") or file_sha256(path) != entry.get("sha256"):
        raise BundleError(
            f"{path} is damaged: its sha256 is not the one in {MANIFEST}; copy it again or make the bundle again"
        )
    return size
