"""A folder whose files have the digests that its manifest states."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitfold.errors import BundleError, nearest
from vitfold.storage.checked import ImplausibleError, parse_json
from vitfold.storage.digest import file_sha256
from vitfold.storage.ordinary import read_ordinary, read_text, sync_file
from vitfold.storage.placing import Place, Swap, atomic_swap, check_place, followed, reserve
from vitfold.storage.workshop import recover

FORMAT = "vitfold.bundle"
VERSION = 1
MANIFEST = "manifest.json"
FILES = 1000
"""More files than any bundle lists."""
REMAKE = "make one with: vitfold optimize SOURCE -o OUT.fold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A manifest as it was read: its values, and the digest of its text, which names the whole folder."""

    values: Mapping[str, Any]
    digest: str


@contextlib.contextmanager
def reserve_bundle(path: str | Path, *, overwrite: bool = False, swap: Swap = atomic_swap) -> Iterator[Place]:
    """Hold the destination of a bundle from before the work until `publish`; other writers are refused.

    Raises:
        BundleError: if it cannot be written, may not be replaced, or somebody else is writing it.
    """
    with reserve(path, overwrite=overwrite, standing=standing_bundle, swap=swap) as place:
        yield place


def seal(folder: Path, write: Callable[[Path], Mapping[str, Any]]) -> Path:
    """Make a folder, let `write` fill it and return the manifest, and write that with the digests of all files.

    Raises:
        BundleError: if it cannot be written.
    """
    try:
        folder.mkdir()
        manifest = write(folder)
        header = {"format": FORMAT, "version": VERSION, **manifest, "files": _file_table(folder)}
        (folder / MANIFEST).write_text(json.dumps(header, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for path in folder.iterdir():
            sync_file(path)
    except OSError as error:
        raise BundleError(f"cannot write {folder}: {error}; free some space or choose another folder") from None
    return folder


def check_destination(path: str | Path, *, overwrite: bool) -> None:
    """Check that a bundle may be written there, before anything slow starts.

    Raises:
        BundleError: if something else stands there, or a bundle that may not be replaced.
    """
    check_place(followed(path), overwrite=overwrite, standing=standing_bundle)


def standing_bundle(folder: Path) -> set[str]:
    """Return which files of a bundle are its own: the manifest and those that it lists.

    Raises:
        BundleError: if the folder is no bundle, or does not say which files are its own.
    """
    left = "it is left untouched"
    try:
        values = parse_json(read_text(folder / MANIFEST))
    except FileNotFoundError:
        raise BundleError(f"{folder} exists and is not a bundle; choose another output, {left}") from None
    except (OSError, ValueError):
        raise BundleError(
            f"{folder} exists and its {MANIFEST} cannot be read, so it is not known to be a bundle; remove it yourself "
            f"or choose another output, {left}"
        ) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError(
            f"{folder} exists and is not a bundle: its {MANIFEST} is another program's; choose another output, {left}"
        )
    files = values.get("files")
    if not isinstance(files, dict):
        raise BundleError(
            f"{folder} exists and its {MANIFEST} does not say which files are the bundle's; remove it yourself or "
            f"choose another output, {left}"
        )
    return {MANIFEST, *files}


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
    recover(folder)
    if not folder.exists():
        around = [p.name for p in folder.parent.iterdir() if p.suffix == ".fold"] if folder.parent.is_dir() else []
        raise BundleError(f"no such bundle: {folder} ({nearest(folder.name, around) if around else REMAKE})")
    try:
        content = read_ordinary(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; {REMAKE}") from None
    except OSError as error:
        raise BundleError(f"cannot read {folder / MANIFEST}: {error}; make the bundle again") from None
    try:
        values = parse_json(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise BundleError(f"{folder / MANIFEST} is damaged: it is not UTF-8; make the bundle again") from None
    except ImplausibleError as error:
        raise BundleError(f"{folder / MANIFEST} is damaged: {error}; make the bundle again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError(f"{folder} is not a bundle: its {MANIFEST} lacks the format {FORMAT!r}")
    version = values.get("version")
    if type(version) is not int or version < 1:
        shown = json.dumps(version)[:40]
        raise BundleError(f"{folder} states the format version {shown}, which is not one; make the bundle again")
    if version > VERSION:
        raise BundleError(
            f"{folder} has format version {version}, this vitfold reads up to {VERSION}; "
            "upgrade with: pip install -U vitfold"
        )
    return Header(values=values, digest=hashlib.sha256(content).hexdigest())


def check_files(folder: Path, header: Header, needed: Sequence[str]) -> int:
    """Check every file against its digest; return the bytes of all.

    Raises:
        BundleError: if the manifest does not list a needed file, or a listed one is missing or damaged.
    """
    files = header.values.get("files")
    if not isinstance(files, dict) or len(files) > FILES:
        raise BundleError(f"{folder / MANIFEST} is damaged: it has no list of files; make the bundle again")
    for name in needed:
        if name not in files:
            raise BundleError(f"{folder / MANIFEST} is damaged: it does not list {name}; make the bundle again")
    return sum(_check_file(folder, name, entry) for name, entry in files.items())


def _check_file(folder: Path, name: str, entry: Any) -> int:
    if not isinstance(entry, dict) or Path(name).name != name or name in ("", ".", "..", MANIFEST) or "\\" in name:
        raise BundleError(f"{folder / MANIFEST} lists the file {name[:60]!r}, which a bundle cannot hold")
    path = folder / name
    if len(os.fsencode(name)) > 255 or not path.is_file() or path.is_symlink():
        raise BundleError(f"{folder} lacks the file {name}; copy the whole folder again or make the bundle again")
    size = path.stat().st_size
    if size != entry.get("size_bytes") or file_sha256(path) != entry.get("sha256"):
        raise BundleError(
            f"{path} is damaged: its sha256 is not the one in {MANIFEST}; copy it again or make the bundle again"
        )
    return size
