"""A job's folder: the list of its images, written once, and one Parquet file for each part that is done."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitfold.errors import VitfoldError
from vitfold.serve.mapping.sources import Reference, Source, references
from vitfold.storage.locks import holder, sign, try_lock
from vitfold.storage.ordinary import read_text, sync_file, write_whole

OWN = "_job"
"""The folder in the output that is no data; readers of Parquet folders leave names with an underscore out."""
_JOB, _LOCK = "job.json", "lock"
_PART = re.compile(r"part-(\d{8})\.parquet")
_GROUPS = 64
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A folder of `parts` parts of `part_rows` images each, `total` in all; the last part has the rest.

    `token` is a file that is there as long as the command runs: workers end when it is gone.
    """

    folder: Path
    token: Path
    total: int
    part_rows: int
    column: str | None

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.total // self.part_rows)

    def rows_of(self, part: int) -> int:
        """Return how many images a part has."""
        return min(self.part_rows, self.total - part * self.part_rows)

    def path(self, part: int) -> Path:
        """Return where a part's file is, once it is done."""
        return self.folder / f"part-{part:08}.parquet"

    def done(self) -> set[int]:
        """Return the parts whose files are there."""
        found = (_PART.fullmatch(entry.name) for entry in os.scandir(self.folder))
        return {int(match[1]) for match in found if match is not None}

    def unread(self, parts: Iterable[int]) -> int:
        """Return how many images of finished parts could not be read."""
        from pyarrow import parquet

        return sum(
            parquet.read_table(self.path(part), columns=["error"])["error"].drop_null().length() for part in parts
        )

    def references(self, part: int) -> list[Reference]:
        """Return what a part's images are."""
        from pyarrow import parquet

        with parquet.ParquetFile(_list(self.folder, part // _GROUPS)) as file:
            table = file.read_row_group(part % _GROUPS, use_threads=False)
        return list(zip(*(table[name].to_pylist() for name in ("id", "path", "offset", "size")), strict=True))

    def stop(self) -> None:
        """Let workers end, also those that the command does not reach any more."""
        self.token.unlink(missing_ok=True)

    def write(self, part: int, table: Any) -> None:
        """Put a part's table at its place, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        from pyarrow import parquet

        draft = self.folder / OWN / f"{part:08}.{os.getpid()}.partial"
        try:
            parquet.write_table(table, draft, compression="zstd")
            sync_file(draft)
            draft.replace(self.path(part))
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def open_job(folder: Path, source: Source, facts: dict[str, Any], part_rows: int, *, arrays: bool) -> Iterator[Job]:
    """Begin a job in a folder or go on with it; nobody else may until the end of the block.

    Args:
        folder: new, empty, or of the same job.
        source: what the job reads; its list is written when the job begins, and stays.
        facts: what the results depend on, as JSON has it: a job with others is another job.
        part_rows: images of a part.
        arrays: whether the model takes arrays.

    Raises:
        VitfoldError: if another command works there, the folder holds something else, or another job.
    """
    facts = facts | {"format": _FORMAT, "input": os.path.realpath(source.given), "kind": source.kind}
    facts |= {"column": source.column, "id": source.ids, "part_rows": part_rows}
    try:
        _check_folder(folder)
        (folder / OWN).mkdir(parents=True, exist_ok=True)
        lock = try_lock(folder / OWN / _LOCK, create=True)
    except OSError as error:
        raise VitfoldError(f"cannot write {folder}: {error.strerror}; choose another --output") from None
    if lock is None:
        other = holder(folder / OWN / _LOCK) or "another command"
        raise VitfoldError(f"{folder} is being written by {other}; wait for it, or choose another --output")
    try:
        sign(lock)
        for left in itertools.chain((folder / OWN).glob("*.partial"), (folder / OWN).glob("run-*")):
            left.unlink(missing_ok=True)
        begun = _begun(folder)
        if begun is None:
            with _undone(folder):
                total = _write_list(folder, source, part_rows, arrays)
            begun = {"facts": facts, "tables": source.state(), "total": total}
            write_whole(folder / OWN / _JOB, json.dumps(begun, indent=1).encode())
        else:
            _check_same(folder, begun, facts, source)
        token = folder / OWN / f"run-{os.getpid()}-{time.time_ns()}"
        token.touch()
        job = Job(folder=folder, token=token, total=begun["total"], part_rows=part_rows, column=source.column)
        try:
            yield job
        finally:
            job.stop()
    except OSError as error:
        if error.errno is None:
            raise
        raise full(folder, error) from None
    finally:
        os.close(lock)


def full(folder: Path, error: OSError) -> VitfoldError:
    """Return the message for an output that cannot be written."""
    space = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    cure = "free some space" if space else "mend that"
    words = os.strerror(error.errno) if error.errno else str(error)
    return VitfoldError(f"{folder}: {words}; {cure} and run the same command again: what is done is kept")


@contextlib.contextmanager
def _undone(folder: Path) -> Iterator[None]:
    """Leave nothing of a job that could not begin."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder / OWN, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise VitfoldError(f"{folder} is a file; --output is a folder of Parquet files")
    if not (folder / OWN).is_dir() and any(folder.iterdir()):
        raise VitfoldError(f"{folder} holds other files and no job of `vitfold map`; choose another --output")


def _begun(folder: Path) -> dict[str, Any] | None:
    """Return what a job's folder says of itself, None if its list was not complete yet."""
    try:
        values = json.loads(read_text(folder / OWN / _JOB))
        return {"facts": dict(values["facts"]), "tables": values["tables"], "total": int(values["total"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise VitfoldError(f"{folder / OWN / _JOB} is damaged; remove {folder}, or choose another --output") from None


def _check_same(folder: Path, begun: dict[str, Any], facts: dict[str, Any], source: Source) -> None:
    """Check that the job of a folder is this one.

    Raises:
        VitfoldError: naming what differs.
    """
    for name in dict.fromkeys((*begun["facts"], *facts)):
        then, now = begun["facts"].get(name), facts.get(name)
        if then != now:
            raise VitfoldError(
                f"{folder} was begun with {name.replace('_', ' ')} {_short(then)}, and this is {_short(now)}; take the "
                "same, choose another --output, or remove the folder"
            )
    if begun["tables"] != source.state():
        raise VitfoldError(
            f"{source.given} changed since {folder} was begun, so that its rows are others; choose another --output"
        )


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _list(folder: Path, number: int) -> Path:
    """Return a file of the list: so many parts are a group of rows each, and its index stays small."""
    return folder / OWN / f"list-{number:06}.bin"


def _write_list(folder: Path, source: Source, part_rows: int, arrays: bool) -> int:
    """Write references to all images, a part at a time; return how many there are."""
    import pyarrow as pa
    from pyarrow import parquet

    names = pa.schema([("id", pa.string()), ("path", pa.binary()), ("offset", pa.int64()), ("size", pa.int64())])
    found = references(source, arrays=arrays)
    parts = iter(lambda: list(itertools.islice(found, part_rows)), [])
    total = 0
    for number in itertools.count():
        some = list(itertools.islice(parts, 1))
        if not some:
            break
        with parquet.ParquetWriter(_list(folder, number), names, compression="zstd") as writer:
            for part in itertools.chain(some, itertools.islice(parts, _GROUPS - 1)):
                writer.write_table(_table(part, names), row_group_size=part_rows)
                total += len(part)
    if not total:
        raise VitfoldError(f"{source.given} holds no images; give another folder, pattern or table")
    return total


def _table(found: Sequence[Reference], names: Any) -> Any:
    import pyarrow as pa

    return pa.table(dict(zip(names.names, map(list, zip(*found, strict=True)), strict=True)), schema=names)
