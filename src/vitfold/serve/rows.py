"""Answers written while they are made: rows of JSON or CSV, or one array of outputs."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vitfold.errors import VitfoldError
from vitfold.model.spec import Head
from vitfold.serve.predictor import Prediction
from vitfold.storage.interrupts import uninterrupted
from vitfold.storage.ordinary import sync_file
from vitfold.storage.workshop import open_workshop

Row = tuple[Mapping[str, Any], Prediction | None]
"""What is said of one image, and its prediction, if it could be read."""
Write = Callable[[Sequence[Row]], None]

SUFFIXES = (".jsonl", ".csv", ".npy")


@contextmanager
def open_rows(path: Path, columns: Sequence[str], total: int, *, overwrite: bool = False) -> Iterator[Write]:
    """Open a file for the rows of `total` images; hand out the function that writes some of them.

    Of `.jsonl` and `.csv` (with these `columns`) every call appends whole lines, so that what stands in the file after
    an interrupt, or on a full disk, are whole rows. A `.npy` file of the outputs (images, ...) in float32, with a row
    of NaN for an image that cannot be read, appears at the end of the block, or not at all.

    Raises:
        VitfoldError: if the suffix is another one, the file exists and may not be replaced, or it cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise VitfoldError(f"{path} has to end in one of {', '.join(SUFFIXES)}: that says what is written")
    if path.is_dir() or (path.exists() and not overwrite):
        raise VitfoldError(f"{path} exists already; pass --overwrite to replace it, or choose another output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = {".npy": _array, ".csv": _csv, ".jsonl": _jsonl}[path.suffix.lower()]
        with opened(path, columns, total) as write:
            yield write
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise VitfoldError(f"cannot write {path}: {error.strerror}; free some space or choose another file") from None


@contextmanager
def _jsonl(path: Path, columns: Sequence[str], total: int) -> Iterator[Write]:  # noqa: ARG001 (all formats take the same)
    with _lines(path) as append:
        yield lambda rows: append("".join(json.dumps(values, allow_nan=False) + "\n" for values, _ in rows))


@contextmanager
def _csv(path: Path, columns: Sequence[str], total: int) -> Iterator[Write]:  # noqa: ARG001
    def text(rows: Sequence[Mapping[str, Any]], *, header: bool = False) -> str:
        held = io.StringIO()
        writer = csv.DictWriter(held, columns, lineterminator="\n", restval="")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return held.getvalue()

    with _lines(path) as append:
        append(text([], header=True))
        yield lambda rows: append(text([flat(values) for values, _ in rows]))


@contextmanager
def _lines(path: Path) -> Iterator[Callable[[str], None]]:
    """Open a file anew; hand out the function that appends whole lines to it, or none of them."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    whole = 0

    def append(text: str) -> None:
        nonlocal whole
        left = memoryview(text.encode())
        with uninterrupted():
            try:
                while left:
                    left = left[os.write(descriptor, left) :]
            except OSError:
                os.ftruncate(descriptor, whole)
                raise
            whole += len(text.encode())

    try:
        yield append
    finally:
        os.close(descriptor)


@contextmanager
def _array(path: Path, columns: Sequence[str], total: int) -> Iterator[Write]:  # noqa: ARG001
    shape: tuple[int, ...] | None = None
    unread = 0
    with open_workshop(path.absolute()) as workshop:
        draft = workshop / "new.npy"
        with draft.open("wb") as file:

            def write(rows: Sequence[Row]) -> None:
                nonlocal shape, unread
                for _, prediction in rows:
                    if prediction is None:
                        unread += 1
                        continue
                    if shape is None:
                        shape = prediction.output.shape
                        _begin(file, (total, *shape))
                    _fill(file, shape, unread)
                    unread = 0
                    file.write(np.ascontiguousarray(prediction.output, np.float32).tobytes())

            yield write
            if shape is None:
                raise VitfoldError(f"{path} was not written: there is no output to write")
            _fill(file, shape, unread)
        sync_file(draft)
        draft.replace(path)


def _begin(file: Any, shape: tuple[int, ...]) -> None:
    described = np.lib.format.dtype_to_descr(np.dtype(np.float32))
    np.lib.format.write_array_header_1_0(file, {"descr": described, "fortran_order": False, "shape": shape})


def _fill(file: Any, shape: tuple[int, ...], rows: int) -> None:
    for _ in range(rows):
        file.write(np.full(shape, np.nan, np.float32).tobytes())


def answer(prediction: Prediction, top: int, threshold: float) -> dict[str, Any]:
    """Return what is said of one image, as plain JSON values."""
    if prediction.head == "single_label":
        return {"top": [{"label": label, "probability": p} for label, p in prediction.top(top)]}
    if prediction.head == "multi_label":
        ranked = prediction.top(top)
        return {"top": [{"label": label, "probability": p, "chosen": p >= threshold} for label, p in ranked]}
    if prediction.head == "regression":
        return {"values": [{"label": label, "value": value} for label, value in prediction.values()]}
    if prediction.head == "map":
        values = prediction.output
        return {"map": {"shape": list(values.shape), "least": float(values.min()), "most": float(values.max())}}
    if prediction.head == "segmentation":
        return {"classes": [{"label": label, "share": share} for label, share in prediction.shares()[:top]]}
    return {"embedding": [float(x) for x in prediction.output.reshape(-1)]}


def columns_of(head: Head, top: int, width: int) -> tuple[str, ...]:
    """Return the columns of CSV files for a model of so many outputs."""
    ranks = range(1, (width if head == "regression" else min(top, width)) + 1)
    kinds = {
        "single_label": ("label", "probability"),
        "multi_label": ("label", "probability", "chosen"),
        "regression": ("label", "value"),
        "segmentation": ("label", "share"),
    }
    own = [f"{name}_{rank}" for rank in ranks for name in kinds.get(head, ())]
    rest = {"map": ["shape", "least", "most"], "features": ["embedding"]}.get(head, own)
    return ("image", *rest, "error")


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of JSON as one of a table: entries of a list by their rank, an embedding as a list in JSON."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {name: json.dumps(one) if isinstance(one, list) else one for name, one in value.items()}
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            found |= {f"{name}_{rank}": one for rank, entry in enumerate(value, 1) for name, one in entry.items()}
        else:
            found[key] = json.dumps(value) if isinstance(value, list) else value
    return found
