"""The tokens of all images between two blocks: in memory, or in files where they would take too much of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from safetensors.torch import load_file, save_file
from torch import Tensor

LIMIT_BYTES = 2 << 30
Columns = Mapping[str, Tensor]


class Streams:
    """Columns of tokens, one group of images after another; they may be replaced while they are gone through.

    What goes beyond `limit_bytes` lies in a temporary folder, which leaves with the context.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit, self._held, self._written = limit_bytes, 0, 0
        self._groups: list[Columns | Path] = []
        self._folder = tempfile.TemporaryDirectory(prefix="vitfold-")

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._folder.cleanup()

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number: int) -> Columns:
        kept = self._groups[number]
        return load_file(kept) if isinstance(kept, Path) else kept

    def __setitem__(self, number: int, columns: Columns) -> None:
        """Replace a group, or add one behind the last."""
        if number == len(self._groups):
            self._groups.append({})
        before = self._groups[number]
        if isinstance(before, Path):
            before.unlink()
        else:
            self._held -= _size(before)
        if self._held + _size(columns) > self._limit:
            self._written += 1
            path = Path(self._folder.name) / f"{self._written}.safetensors"
            save_file({name: value.contiguous() for name, value in columns.items()}, path)
            self._groups[number] = path
        else:
            self._held += _size(columns)
            self._groups[number] = columns


def _size(columns: Columns) -> int:
    return sum(value.nbytes for value in columns.values())
