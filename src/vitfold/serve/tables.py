"""A bundle as a function of batches of a table, which frameworks for large tables send to their workers."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitfold.artifacts.bundle import open_bundle
from vitfold.engines import MAIN, Port
from vitfold.errors import ArgumentError, ImageError, VitfoldError, check_whole
from vitfold.serve.predictor import Prediction, Predictor, reopen

_OPENING = threading.Lock()


class BatchPredictor:
    """Adds what a model says of the images of a batch: a picklable function from columns to columns.

    Called with a mapping from names to columns it returns a dictionary of arrays, with a DataFrame of pandas another
    one, with an iterator of either an iterator. The column `image` holds paths, bytes of files, or arrays (H, W, C) of
    uint8. These are added, as the model has them:

    * `label`, `score`: the most probable label and its probability.
    * `labels`, `scores`: lists of the `top` most probable, best first, if `top` is given.
    * `embedding`: one row of float32 per image.
    * `output`: the first output, where it is neither logits nor an embedding.
    * `error`: why an image cannot be read, else None. Its other values are None, or NaN.

    The bundle is opened at the first call in each process, once for all copies that arrive there, and checked to be the
    one that this was made of; so its path has to lead to it there, too. `columns` are those to add, all by default;
    `error` is always there.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        engine: str | None = None,
        threads: int | None = None,
        batch: int = 8,
        image: str = "image",
        top: int | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        check_whole("batch", batch, least=1)
        if top is not None:
            check_whole("top", top, least=1)
        opened = open_bundle(bundle)
        self._key = (str(opened.path.absolute()), engine, threads, opened.digest)
        self._batch, self._image, self._top = batch, image, top
        self._wanted = None if columns is None else tuple(columns)

    @property
    def predictor(self) -> Predictor:
        """The open bundle of this process."""
        with _OPENING:
            return _opened(*self._key)

    def close(self) -> None:
        """Release the bundle in this process, for all copies; the next call opens it again."""
        with _OPENING:
            _opened(*self._key).close()
            _opened.cache_clear()

    def __call__(self, batch: Any) -> Any:
        """Return a batch with the columns that the model adds.

        Raises:
            ArgumentError: if it is no batch, or has no column of images.
            EngineError: if the engine fails; a broken image is a row with `error`.
        """
        frame = _is_frame(batch)
        if not frame and not isinstance(batch, Mapping):
            if isinstance(batch, Iterator):
                return map(self, batch)
            raise ArgumentError(f"a batch is a dictionary of columns or a DataFrame, found {type(batch).__name__}")
        if self._image not in batch:
            raise ArgumentError(
                f"the batch has no column {self._image!r} but {', '.join(map(str, batch))}; name the column of images "
                "by image="
            )
        added = self.columns(batch[self._image])
        if frame:
            missing = [one is not None for one in added["error"]]
            return batch.assign(**{name: _of_objects(column, missing) for name, column in added.items()})
        return _whole(batch) | added

    def offered(self) -> dict[str, tuple[int, ...]]:
        """Return the columns that the model can add, with the shape of a row; `error` is not among them.

        Raises:
            VitfoldError: if the bundle cannot be opened.
        """
        predictor = self.predictor
        found: dict[str, tuple[int, ...]] = {}
        if predictor.classifies:
            found |= {"label": (), "score": ()}
            if self._top is not None:
                ranks = min(self._top, predictor.bundle.manifest.spec.output_width)
                found |= {"labels": (ranks,), "scores": (ranks,)}
        if (numbers := self._numbers()) is not None:
            found[numbers[0]] = tuple(numbers[1].shape)
        return found

    def _numbers(self) -> tuple[str, Port] | None:
        """Return the column of numbers and the output that it holds."""
        with contextlib.suppress(VitfoldError):
            return "embedding", self.predictor.port("image_embeds")
        return None if self.predictor.classifies else ("output", self.predictor.session.parts[MAIN].outputs[0])

    def columns(self, images: Iterable[Any]) -> dict[str, np.ndarray]:
        """Return what the model says of images, a column each; an `ImageError` among them stands for itself.

        Raises:
            ArgumentError: if the model has no column that was asked for.
            EngineError: if the engine fails.
        """
        predictor, offered = self.predictor, self.offered()
        wanted = tuple(offered) if self._wanted is None else self._wanted
        for name in wanted:
            if name not in offered:
                head = predictor.head
                raise ArgumentError(f"the model (head: {head}) has no column {name!r}; it has {', '.join(offered)}")
        found = list(predictor.stream(images, batch=self._batch, skip_bad=True))
        columns: dict[str, np.ndarray] = {}
        if {"label", "score", "labels", "scores"} & set(wanted):
            ranks = 1 if self._top is None else self._top
            best = [one.top(ranks) if isinstance(one, Prediction) else None for one in found]
            columns["label"] = _objects([one and one[0][0] for one in best])
            columns["score"] = np.array([one[0][1] if one else np.nan for one in best], np.float32)
            columns["labels"] = _objects([one and [label for label, _ in one] for one in best])
            columns["scores"] = _objects([one and np.array([score for _, score in one], np.float32) for one in best])
        numbers = self._numbers()
        if numbers is not None and numbers[0] in wanted:
            columns[numbers[0]] = rows = np.full((len(found), *numbers[1].shape), np.nan, np.float32)
            for row, one in zip(rows, found, strict=True):
                if isinstance(one, Prediction):
                    row[...] = one.outputs[numbers[1].name]
        error = _objects([str(one) if isinstance(one, ImageError) else None for one in found])
        return {name: columns[name] for name in wanted} | {"error": error}


@functools.lru_cache(maxsize=4)
def _opened(path: str, engine: str | None, threads: int | None, digest: str) -> Predictor:
    return reopen(path, engine, threads, digest)


def _is_frame(batch: Any) -> bool:
    return type(batch).__module__.partition(".")[0] == "pandas" and hasattr(batch, "assign")


def _whole(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns whose lists stay lists of what they hold: bytes that end in zeros, arrays of several sizes."""
    return {name: one if isinstance(one, np.ndarray) else _objects(list(one)) for name, one in batch.items()}


def _objects(values: list[Any]) -> np.ndarray:
    column = np.empty(len(values), object)
    for place, value in enumerate(values):
        column[place] = value
    return column


def _of_objects(column: np.ndarray, missing: list[bool]) -> np.ndarray:
    """Return a column of a DataFrame: rows of an array are lists, and None where there is no row."""
    if column.ndim == 1:
        return column
    return _objects([None if gone else row.tolist() for row, gone in zip(column, missing, strict=True)])
