"""From references to what the model takes: paths, bytes of files, or the reason why there is no image."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vitfold.errors import ImageError
from vitfold.images import prepared_ahead
from vitfold.serve.mapping.sources import REMOTE, SCHEME, Reference, is_lance, open_lance

_URLS = 32
_CELLS = 64
Item = str | bytes | ImageError


def items(found: Iterable[Reference], column: str | None) -> Iterator[Item]:
    """Yield what holds each image; bytes are read as they are asked for, URLs some ahead.

    Raises:
        OSError: if a table or an archive cannot be read.
    """
    for (kind, path), group in itertools.groupby(found, key=_kind):
        if kind == "range":
            yield from _ranges(path, group)
        elif kind == "row":
            yield from _cells(Path(os.fsdecode(path)), [offset for _, _, offset, _ in group], str(column))
        elif kind == "url":
            for done in prepared_ahead(_sliced(place.decode() for _, place, _, _ in group), _downloaded, workers=1):
                yield from done
        else:
            yield from (_local(place) for _, place, _, _ in group)


def _kind(one: Reference) -> tuple[str, bytes]:
    _, path, offset, size = one
    if size >= 0 or offset >= 0:
        return ("range" if size >= 0 else "row"), path
    scheme = SCHEME.match(path[:40].decode("utf-8", "replace"))
    return "url" if scheme is not None and scheme[1].lower() in REMOTE else "path", b""


def _local(place: bytes) -> Item:
    return os.fsdecode(place) if place else ImageError("the row names no image")


def _ranges(path: bytes, found: Iterable[Reference]) -> Iterator[bytes]:
    with Path(os.fsdecode(path)).open("rb") as file:
        for _, _, offset, size in found:
            file.seek(offset)
            yield file.read(size)


def _cells(path: Path, rows: Sequence[int], column: str) -> Iterator[Item]:
    """Yield the images of neighbouring rows of a table; only the groups of rows that hold them are read."""
    import pyarrow as pa
    from pyarrow import parquet

    if is_lance(path):
        opened = open_lance(path)
        for start in range(0, len(rows), _CELLS):
            taken = opened.take(list(rows[start : start + _CELLS]), columns=[column])
            yield from (_cell(one) for one in taken.column(0).to_pylist())
        return
    if path.suffix == ".arrow":
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
            yield from _taken(((one.num_rows, one.column(column)) for one in stream), rows)
        return
    with parquet.ParquetFile(path) as file:
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = list(itertools.accumulate(counts))
        wanted = [i for i, end in enumerate(ends) if end > rows[0] and end - counts[i] <= rows[-1]]
        before = ends[wanted[0]] - counts[wanted[0]]
        batches = file.iter_batches(batch_size=_CELLS, row_groups=wanted, columns=[column], use_threads=False)
        yield from _taken(((one.num_rows, one.column(0)) for one in batches), [row - before for row in rows])


def _taken(batches: Iterable[tuple[int, Any]], rows: Sequence[int]) -> Iterator[Item]:
    start, first, last = 0, rows[0], rows[-1]
    for count, values in batches:
        if start > last:
            return
        low = max(first - start, 0)
        if low < count:
            part = values.slice(low, min(count, last + 1 - start) - low)
            yield from (_cell(part[i].as_py()) for i in range(len(part)))
        start += count


def _cell(value: Any) -> Item:
    if isinstance(value, dict):  # as Hugging Face has images
        value = value["bytes"] or value.get("path")
    return ImageError("the row holds no image") if value is None else value


def _sliced(urls: Iterator[str]) -> Iterator[list[str]]:
    return iter(lambda: list(itertools.islice(urls, _URLS)), [])


def _downloaded(urls: list[str]) -> list[Item]:
    found = _download(urls, "null")
    return [_reason(url) if one is None else one for url, one in zip(urls, found, strict=True)]


def _reason(url: str) -> Item:
    """Ask once more for what did not come: Daft says why only where one error ends all."""
    try:
        (found,) = _download([url], "raise")
    except Exception as error:  # every store has errors of its own
        return ImageError(f"{url} cannot be fetched: {' '.join(str(error).split())[:300]}")
    return found if isinstance(found, bytes) else ImageError(f"{url} cannot be fetched")


def _download(urls: list[str], on_error: str) -> list[Any]:
    import daft
    from daft.functions import download
    from daft.recordbatch import MicroPartition

    table = MicroPartition.from_pydict({"url": urls})
    fetched = table.eval_expression_list([download(daft.col("url"), on_error=on_error)])
    return list(fetched.to_pydict()["url"])
