"""Sizes of images, as users, sidecars and configurations state them: one side, or height and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from vitfold.errors import SourceError


def parse_size(size: int | str | Sequence[int] | None) -> int | tuple[int, int] | None:
    """Read the size of images: one side of square ones, or height and width; a pair of equal ones becomes one side.

    Raises:
        SourceError: if it is neither.
    """
    if size is None or (isinstance(size, int) and size >= 1):
        return size
    sides = [
        str(side).strip()
        for side in (
            size.lower().split("x") if isinstance(size, str) else size if isinstance(size, Sequence) else [size]
        )
    ]
    if len(sides) not in (1, 2) or not all(side.isdigit() and int(side) >= 1 for side in sides):
        raise SourceError(f"--image-size takes pixels per side, as 384, or HEIGHTxWIDTH, as 384x512; found {size!r}")
    height, width = int(sides[0]), int(sides[-1])
    return height if height == width else (height, width)


@overload
def pair(size: None) -> None: ...
@overload
def pair(size: int | Sequence[Any]) -> tuple[int, int]: ...
def pair(size: int | Sequence[Any] | None) -> tuple[int, int] | None:
    """Return height and width of one side or of both, None of nothing."""
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
