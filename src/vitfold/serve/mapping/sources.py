"""What a job reads: every kind of input becomes a list of references to images, in an order that stays."""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from vitfold.decoding import ARRAYS, suffixes
from vitfold.errors import VitfoldError, missing_extra, nearest

REMOTE = frozenset({"http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"})
"""Schemes of URLs that Daft reads."""
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
"""How URLs begin; drives of Windows have one letter."""
_COLUMNS = ("image", "path", "url", "file", "file_name", "filename", "bytes")
_TABLES = {".csv": "csv", ".parquet": "parquet", ".pq": "parquet", ".tar": "tar", ".arrow": "arrow"}
_ROWS = 4096
_VERSIONS = "_versions"

Reference = tuple[str, bytes, int, int]
"""Id, path, offset and size of an image: a part of a file; without a size a row of a table, or, at -1, all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Images, or tables and archives that hold or name them; `column` is the column of images, `ids` that of ids."""

    kind: str
    given: str
    files: tuple[Path, ...]
    column: str | None = None
    ids: str | None = None

    def state(self) -> list[list[Any]]:
        """Return name, bytes and time of change of every table, by which a changed one is noticed."""
        if self.kind == "images":
            return []
        told = [path / _VERSIONS if self.kind == "lance" else path for path in self.files]
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in told]


def find_source(given: str, *, column: str | None = None, ids: str | None = None) -> Source:
    """Say what an input is: a folder, a pattern, tables, tar files, or a data set of Hugging Face that was saved.

    Raises:
        VitfoldError: if there is nothing, or nothing that can be read.
    """
    path = Path(given)
    if SCHEME.match(given):
        raise VitfoldError(f"{given} is a URL; give a table on this machine, of which a column holds URLs of images")
    if not path.exists():
        found = sorted(Path(one) for one in glob.iglob(given, recursive=True))  # noqa: PTH207 (absolute patterns, too)
        found = [one for one in found if one.is_file()] or found  # else what lies in a folder would come twice
        if not found:
            raise VitfoldError(f"nothing matches {given}; give a folder, a pattern in quotes, a table or a tar file")
    else:
        found = _tables_in(path) if path.is_dir() else [path]
    if unread := next((one for one in found if one.name.endswith((".tar.gz", ".tgz"))), None):
        raise VitfoldError(f"{unread} is not read; unpack a compressed tar file")
    kinds = {"lance" if is_lance(one) else _TABLES.get(one.suffix.lower(), "images") for one in found}
    if len(kinds) > 1:
        raise VitfoldError(f"{given} holds {' and '.join(sorted(kinds))}; give one kind at a time by a pattern")
    kind = kinds.pop()
    if kind in ("images", "tar"):
        if column or ids:
            raise VitfoldError(f"{given} is no table, so that it has no column {column or ids!r}; leave the option out")
        return Source(kind=kind, given=given, files=tuple(one.absolute() for one in found))
    files = tuple(one.absolute() for one in found)
    names = [name for name, _ in fields(kind, files[0])]
    if column is None:
        known = [name for name in names if name.lower() in _COLUMNS]
        column = names[0] if len(names) == 1 else known[0] if len(known) == 1 else None
        if column is None:
            raise VitfoldError(f"{given} has the columns {', '.join(names)}; name that of the images by --column")
    for one in (column, ids):
        if one is not None and one not in names:
            raise VitfoldError(f"{given} has no column {one!r}: {nearest(one, names)}")
    return Source(kind=kind, given=given, files=files, column=column, ids=ids)


def _tables_in(folder: Path) -> list[Path]:
    """Return the tables of a folder that holds them and no images, else the folder itself."""
    names = sorted(one.name for one in os.scandir(folder))
    if "dataset_dict.json" in names:
        splits = ", ".join(str(folder / name) for name in names if (folder / name).is_dir())
        raise VitfoldError(f"{folder} holds several splits; give one of {splits}")
    for suffix in (".arrow",) if "dataset_info.json" in names else (".parquet", ".tar"):
        if found := [folder / name for name in names if name.endswith(suffix) and not name.startswith((".", "_"))]:
            return found
    return [folder]


def is_lance(path: Path) -> bool:
    """Return whether a folder is a Lance table: these keep their versions in one place."""
    return (path / _VERSIONS).is_dir()


def open_lance(path: Path) -> Any:
    """Open a Lance table.

    Raises:
        VitfoldError: if it cannot be read, or the package that reads it is not installed.
    """
    try:
        import lance
    except ImportError:
        raise VitfoldError(missing_extra("pylance", "lance", f"reading the Lance table {path}")) from None
    try:
        return lance.dataset(str(path))
    except (ValueError, OSError) as error:
        raise VitfoldError(f"{path} cannot be read ({error}); write it again, or give another") from None


def fields(kind: str, path: Path) -> list[tuple[str, Any]]:
    """Return names and types of a table's columns.

    Raises:
        VitfoldError: if it cannot be read.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    if kind == "lance":
        return [(field.name, field.type) for field in open_lance(path).schema]
    try:
        if kind == "csv":
            with csv.open_csv(path) as reader:
                return [(name, pa.string()) for name in reader.schema.names]
        if kind == "parquet":
            schema = parquet.read_schema(path)
        else:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                schema = stream.schema
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        empty = "is empty" if path.stat().st_size == 0 else f"cannot be read ({error})"
        raise VitfoldError(f"{path} {empty}; write it again, or give another") from None
    return [(field.name, field.type) for field in schema]


def references(source: Source, *, arrays: bool) -> Iterator[Reference]:
    """Yield a reference to every image, in an order that does not change, holding one folder or batch at a time.

    Args:
        source: what to read.
        arrays: whether the model takes arrays, as .npy files, and no pictures.

    Raises:
        VitfoldError: if a table cannot be read, its column holds no images, or URLs that nobody here can read.
    """
    kept = ARRAYS if arrays else suffixes()
    if source.kind == "images":
        given, root = str(Path(source.given)), str(Path(source.given).absolute())
        for path in source.files:
            alone = (str(path),) if len(source.files) == 1 or _suffix(path.name) in kept else ()
            for one in _walked(str(path), kept) if path.is_dir() else alone:
                shown = given + one[len(root) :] if str(path) == root else one
                yield shown.encode("utf-8", "backslashreplace").decode(), os.fsencode(one), -1, -1
    elif source.kind == "tar":
        for path in source.files:
            yield from _members(path, kept)
    else:
        yield from _rows(source)


def _walked(folder: str, kept: frozenset[str], above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Yield the images below a folder; links to folders are followed, but not in a circle."""
    try:
        status = os.stat(folder)  # noqa: PTH116
        with os.scandir(folder) as found:
            entries = sorted((one for one in found if not one.name.startswith(".")), key=lambda one: one.name)
    except OSError as error:
        raise VitfoldError(f"{folder} cannot be read: {error.strerror}; change its permissions, or move it") from None
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in entries:
        if entry.is_dir():
            yield from _walked(entry.path, kept, (*above, here))
        elif _suffix(entry.name) in kept:
            yield entry.path


def _suffix(name: str) -> str:
    """Return a suffix without Path, which would keep every name."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _members(path: Path, kept: frozenset[str]) -> Iterator[Reference]:
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile() and _suffix(member.name) in kept:
                    name = member.name.encode("utf-8", "backslashreplace").decode()
                    yield name, os.fsencode(path), member.offset_data, member.size
                archive.members.clear()  # type: ignore[attr-defined]  # else they stay, a million of them
    except (tarfile.TarError, OSError) as error:
        raise VitfoldError(f"{path} is no tar file, or cut short ({error}); fetch it again") from None


def _rows(source: Source) -> Iterator[Reference]:
    import pyarrow as pa

    number = 0
    for path in source.files:
        types = dict(fields(source.kind, path))
        if missing := {source.column, source.ids} - {None} - set(types):
            raise VitfoldError(
                f"{path} has no column {missing.pop()!r} as {source.files[0]} has; give tables of one kind"
            )
        kind = types[str(source.column)]
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        named = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not named and not _holds_bytes(kind):
            raise VitfoldError(
                f"the column {source.column!r} of {path} holds {kind}; give one of paths, URLs or bytes of image files"
            )
        columns = [one for one in (source.column if named else None, source.ids) if one is not None]
        for row, values in enumerate(_values(source.kind, path, columns)):
            if named and number == 0:
                _check_scheme(values[0], path)
            given = values[-1] if source.ids else values[0] if named else None
            identity = str(number) if given is None else str(given)
            yield (identity, _place(values[0], path), -1, -1) if named else (identity, os.fsencode(path), row, -1)
            number += 1


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _check_scheme(value: str | None, table: Path) -> None:
    """Check the first row: where all rows have a scheme that nobody reads, the job need not begin."""
    scheme = SCHEME.match(value or "")
    if scheme is not None and scheme[1].lower() not in REMOTE | {"file"}:
        known = ", ".join(sorted(REMOTE | {"file"}))
        raise VitfoldError(f"{table}: {value} has the scheme {scheme[1]}, which is not read; known: {known}")


def _place(value: str | None, table: Path) -> bytes:
    """Return a URL as it is, and a path as absolute: a table's relative paths begin at its folder."""
    if not value:
        return b""
    scheme = SCHEME.match(value)
    if scheme is None:
        return os.path.join(os.fsencode(table.parent), value.encode())  # noqa: PTH118 (Path would keep every name)
    return os.fsencode(url2pathname(urlsplit(value).path)) if scheme[1].lower() == "file" else value.encode()


def _values(kind: str, path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns, row by row."""
    read: dict[str, Callable[..., Iterator[Any]]] = {
        "csv": _csv,
        "parquet": _parquet,
        "arrow": _arrow,
        "lance": _lance,
    }
    for batch in read[kind](path, columns):
        if not columns:
            yield from ((),) * batch.num_rows
        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import csv

    convert = csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()))
    try:
        with csv.open_csv(path, convert_options=convert) as reader:
            yield from reader
    except pa.ArrowInvalid as error:
        raise VitfoldError(f"{path} is no CSV that can be read ({error}); write it again") from None


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        if columns:
            yield from file.iter_batches(batch_size=_ROWS, columns=list(columns))
            return
        for group in range(file.num_row_groups):
            yield from _Rows.of(file.metadata.row_group(group).num_rows)


def _arrow(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            yield batch.select(columns) if columns else _Rows(num_rows=batch.num_rows)


def _lance(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    opened = open_lance(path)
    if columns:
        yield from opened.to_batches(columns=list(columns), batch_size=_ROWS, scan_in_order=True)
    else:
        yield from _Rows.of(opened.count_rows())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """So many rows of no columns."""

    num_rows: int

    @classmethod
    def of(cls, count: int) -> Iterator[_Rows]:
        """Yield rows in bounded numbers."""
        for start in range(0, count, _ROWS):
            yield cls(num_rows=min(_ROWS, count - start))
