"""Parts computed on Daft: in processes of this machine, or on a cluster of Ray."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vitfold.errors import ImageError, VitfoldError
from vitfold.serve.mapping.items import Item, items
from vitfold.serve.mapping.job import Job, full
from vitfold.serve.tables import BatchPredictor

Dtype = Literal["float32", "float16"]
MOST_VALUES = 65_536
"""Numbers of one image that a row of a table holds."""
_LOOK = 16
"""After so many images a worker looks whether it is still wanted."""
_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A part: how many images it has, how many of them cannot be read, and why the job has to end, if it has to."""

    part: int
    images: int = 0
    unread: int = 0
    failure: str | None = None


class _StoppedError(Exception):
    """The command that wanted the part has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Computes parts of a job; sent to whoever computes them."""

    job: Job
    predict: BatchPredictor
    dtype: Dtype
    fail_fast: bool

    def __call__(self, part: int) -> Done:
        """Compute one part and write its file; what a user can mend is in the answer, as errors do not travel well."""
        try:
            return self._computed(part)
        except _StoppedError:
            return Done(part=part, failure="stopped")
        except VitfoldError as error:
            return Done(part=part, failure=str(error))
        except OSError as error:
            return Done(part=part, failure=str(full(self.job.folder, error)))

    def _computed(self, part: int) -> Done:
        self._check_running()
        found = self.job.references(part)
        columns = self.predict.columns(self._while_running(items(found, self.job.column)))
        unread = [one is not None for one in columns["error"]]
        if self.fail_fast and any(unread):
            place = unread.index(True)
            raise ImageError(f"{found[place][0]}: {columns['error'][place]} (or leave out --fail-fast)")
        self.job.write(part, as_table([one[0] for one in found], columns, unread, self.dtype))
        return Done(part=part, images=len(found), unread=sum(unread))

    def _while_running(self, found: Iterator[Item]) -> Iterator[Item]:
        for number, one in enumerate(found):
            if number % _LOOK == 0:
                self._check_running()
            yield one

    def _check_running(self) -> None:
        if not self.job.token.exists():
            raise _StoppedError


def as_table(ids: Sequence[str], columns: dict[str, np.ndarray], unread: Sequence[bool], dtype: Dtype) -> Any:
    """Return a table of Arrow in which the values of images that cannot be read are null.

    In a list of fixed length every number of it is: Arrow cannot read a missing one back from Parquet.
    """
    import pyarrow as pa

    absent = np.array(unread, bool)
    number = pa.float16() if dtype == "float16" else pa.float32()
    made = {"id": pa.array(ids, pa.string())}
    for name, column in columns.items():
        if name == "labels":
            made[name] = pa.array(list(column), pa.list_(pa.string()))
        elif name == "scores":
            made[name] = pa.array(list(column), pa.list_(pa.float32()))
        elif name == "score":
            made[name] = pa.array(column, pa.float32(), mask=absent)
        elif column.dtype == object:
            made[name] = pa.array(list(column), pa.string())
        else:
            flat = column.reshape(len(column), -1)
            values = pa.array(flat.reshape(-1).astype(dtype), number, mask=np.repeat(absent, flat.shape[1]))
            made[name] = pa.FixedSizeListArray.from_arrays(values, flat.shape[1])
    return pa.table(made)


def check_columns(predict: BatchPredictor, columns: Sequence[str] | None, *, most: int = MOST_VALUES) -> list[str]:
    """Return the columns of a job, all that the model has if none are named, of at most so many numbers an image.

    Raises:
        VitfoldError: if the model has not what was asked for, or numbers that no table should hold.
    """
    offered = predict.offered()
    chosen = list(offered) if columns is None else list(dict.fromkeys(columns))
    for name in chosen:
        if name not in offered:
            head = predict.predictor.head
            raise VitfoldError(
                f"this bundle (head: {head}) has no column {name!r} but {', '.join(offered)}; "
                "for an embedding make a bundle with --outputs embedding"
            )
        if (values := int(np.prod(offered[name]))) > most:
            raise VitfoldError(
                f"{name} of this bundle has {values} numbers an image, too many for a table; take other --columns, or "
                "write them by vitfold predict -o FILE.npy"
            )
    return chosen


def computed(
    work: Callable[[int], Done], parts: Sequence[int], *, workers: int, ray: str | None, stop: Callable[[], None]
) -> Generator[Done, None, None]:
    """Yield what came of each part, as it is done.

    Args:
        work: computes a part.
        parts: which ones, each a task for Daft.
        workers: how many processes compute.
        ray: address of a cluster of Ray, on which the workers are then.
        stop: lets workers end soon; called at the end, however it comes.

    Raises:
        VitfoldError: if a worker ended without an answer.
    """
    for name in ("DO_NOT_TRACK", "SCARF_NO_ANALYTICS"):
        os.environ.setdefault(name, "1")  # Daft would tell its makers of every run
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
    import daft
    from daft import DataType

    if ray is not None:
        daft.set_runner_ray(ray, noop_if_initialized=True)
    answer = DataType.struct(
        {"images": DataType.int64(), "unread": DataType.int64(), "failure": DataType.string(), "part": DataType.int64()}
    )

    called = daft.method.batch(return_dtype=answer, batch_size=1)(_Worker.__call__)
    kind = type("Worker", (_Worker,), {"__call__": called})
    worker = daft.cls(max_concurrency=workers, use_process=True)(kind)(work)
    frame = daft.from_pydict({"part": list(parts)}).into_batches(1)
    answers = frame.select(worker(daft.col("part")).alias("done"))
    found: queue.SimpleQueue[Done | Exception | None] = queue.SimpleQueue()
    # Daft waits for all tasks when an iterator is left early, so that it is left by a thread that may be left behind.
    thread = threading.Thread(target=_collect, args=(answers, found), daemon=True)
    thread.start()
    try:
        while (one := found.get()) is not None:
            if isinstance(one, Exception):
                raise _ended(one) from None
            if one.failure is not None:
                raise VitfoldError(one.failure)
            yield one
    finally:
        stop()
        thread.join(_PATIENCE_S)


def _collect(answers: Any, found: queue.SimpleQueue[Done | Exception | None]) -> None:
    try:
        for batch in answers.to_arrow_iter(results_buffer_size=1):
            for one in batch.column(0).to_pylist():
                found.put(Done(**one))
        found.put(None)
    except Exception as error:
        found.put(error)


def _ended(error: Exception) -> Exception:
    if isinstance(error, RuntimeError) and "closed the connection" in str(error):
        cure = "run the same command again, with fewer --workers"
        return VitfoldError(f"a worker was killed, perhaps for want of memory; {cure}")
    return error


class _Worker:
    """Computes the parts of a column of Daft; Python finds it by name where it arrives."""

    def __init__(self, work: Callable[[int], Done]) -> None:
        self._work = work

    def __call__(self, parts: Any) -> list[dict[str, Any]]:
        found = [self._work(part) for part in parts.to_pylist()]
        return [{name: getattr(one, name) for name in ("part", "images", "unread", "failure")} for one in found]
