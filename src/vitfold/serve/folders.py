"""Folders that an export writes: whole or not at all, and in the place of nothing but another one of its kind."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from vitfold.errors import BundleError
from vitfold.storage.ordinary import read_text
from vitfold.storage.placing import reserve


def write_folder(
    folder: str | Path,
    fill: Callable[[Path], None],
    *,
    format: str,
    mark: tuple[str, str],
    own: Callable[[Path], Collection[str]],
    overwrite: bool = False,
) -> Path:
    """Make a folder, let `fill` write into it, and put it in its place; return it.

    A folder of the same kind, which has a file with a text (`mark`), may be replaced; of what stands in it, `own` says
    what was written by the export. All else is kept.

    Raises:
        BundleError: if it cannot be written, or something else stands there.
    """

    def standing(former: Path) -> Collection[str]:
        name, text = mark
        try:
            ours = text in read_text(former / name)
        except (OSError, UnicodeDecodeError):
            ours = False
        if not ours:
            raise BundleError(
                f"{former} exists and was not written by `vitfold export --format {format}`; choose another"
            )
        return own(former)

    with reserve(folder, overwrite=overwrite, standing=standing) as place:
        draft = place.draft()
        try:
            draft.mkdir(parents=True)
            fill(draft)
        except OSError as error:
            raise BundleError(f"cannot write {folder}: {error}; free some space or choose another folder") from None
        return place.publish(draft)
