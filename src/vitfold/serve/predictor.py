"""A bundle as a function of images.

What a caller may hand in and what comes back, and how threads and processes share it. Needs no torch.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Num

from vitfold.artifacts.bundle import Bundle, open_bundle
from vitfold.bench.evaluation import finite_outputs, softmax
from vitfold.decoding import listed, prepared
from vitfold.engines import ENGINES, MAIN, Port, Session, open_session
from vitfold.errors import ArgumentError, BundleError, EngineError, ImageError, VitfoldError, check_whole
from vitfold.images import prepared_ahead
from vitfold.model.spec import Head, ViTSpec, sigmoid

ImageLike = Any
"""A path, a Pillow image, the bytes of a file, an open binary file, an array or a tensor of 8 bits; see `decoding`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """What a model says of one image: logits of a classifier, numbers of a regression, or features.

    `head` says which of them `output` is: the model's first one. `outputs` are all of them by name.
    """

    output: Float[np.ndarray, ...]
    labels: tuple[str, ...] | None
    head: Head = "single_label"
    outputs: Mapping[str, Float[np.ndarray, ...]] = field(default_factory=dict)

    @property
    def probabilities(self) -> Float[np.ndarray, " C"]:
        """The softmax of the logits; where every label is a yes or no of its own, the sigmoid of each.

        Raises:
            VitfoldError: if the output is numbers or an embedding, or not finite.
        """
        if self.head not in ("single_label", "multi_label"):
            kinds = {"regression": "the numbers of a regression", "map": "a map", "segmentation": "a map of classes"}
            kind = kinds.get(self.head, "an embedding")
            raise VitfoldError(f"this output is {kind} and has no probabilities; use .output or .values()")
        if not np.isfinite(self.output).all():
            raise EngineError("the output is NaN or infinite, so that no class is probable; make the bundle again")
        if self.head == "multi_label":
            return sigmoid(self.output)
        return softmax(self.output)

    def top(self, k: int = 5, *, threshold: float | None = None) -> list[tuple[str, float]]:
        """Return the k most probable labels with their probabilities, best first; those from `threshold` on, if given.

        Raises:
            VitfoldError: if k is less than 1, the threshold no probability, or the model no classifier.
        """
        check_whole("k", k, least=1)
        if threshold is not None and not (isinstance(threshold, int | float) and 0 <= threshold <= 1):
            raise ArgumentError(f"threshold must be a probability from 0 to 1, found {threshold!r}")
        found = self.probabilities
        best = [i for i in np.argsort(-found, kind="stable")[:k] if threshold is None or found[i] >= threshold]
        return [(self._name(int(i)), float(found[i])) for i in best]

    def values(self) -> list[tuple[str, float]]:
        """Return every output with its name, in order: what a regression says."""
        return [(self._name(i), float(value)) for i, value in enumerate(self.output.reshape(-1))]

    def shares(self) -> list[tuple[str, float]]:
        """Return the classes of a segmentation with the share of pixels that each has, the largest first.

        Raises:
            VitfoldError: if the output is no segmentation.
        """
        if self.head != "segmentation":
            raise VitfoldError("this output is no segmentation, and has no classes of pixels; use .output")
        found, counts = np.unique(self.output.argmax(0), return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [(self._name(int(found[i])), float(counts[i] / counts.sum())) for i in order]

    def _name(self, i: int) -> str:
        return self.labels[i] if self.labels else str(i)


class Predictor:
    """An open bundle: call it with one image or several; close it, or use it in `with`.

    Threads may share it: they decode images side by side and take turns in the engine. A pickled one opens its bundle
    again where it arrives, as spawned processes need it; a forked process opens it again by itself, on ONNX Runtime.
    """

    def __init__(self, bundle: Bundle, *, engine: str | None = None, threads: int | None = None) -> None:
        self.bundle = bundle
        self._engine, self._threads = engine, threads
        self._turn = threading.Lock()
        self._session: Session | None = open_session(bundle, engine=engine, threads=threads)
        self._forked = False
        _OPEN.add(self)

    @property
    def session(self) -> Session:
        """The engine's session; it serves one caller at a time.

        Raises:
            EngineError: if the predictor is closed, or its engine does not outlive a fork.
            BundleError: in a forked process, if the bundle is not the same any more.
        """
        if self._session is None and self._forked:
            self._session, self._forked = self._opened_again(), False
        if self._session is None:
            raise EngineError("this predictor is closed; open the bundle again")
        return self._session

    @property
    def head(self) -> Head:
        """What outputs are: one class, several labels, numbers, or features."""
        return self.bundle.manifest.spec.head

    @property
    def classifies(self) -> bool:
        """True if outputs are logits over classes or labels."""
        return self.head in ("single_label", "multi_label")

    def __call__(self, images: ImageLike, *, batch: int = 8) -> list[Prediction]:
        """Return one prediction per image; the next ones are decoded while the engine runs.

        Args:
            images: one image or several: paths, Pillow images, bytes or open files, NumPy arrays (H, W, C) or torch
                tensors (C, H, W) of uint8; an array or tensor of four dimensions is a batch. For a model that takes
                arrays: .npy files, arrays or tensors of its shape, or one with a dimension more in front.
            batch: images per call of the engine.

        Raises:
            ImageError: if an image cannot be read.
            ArgumentError: if `batch` is no number of images.
            EngineError: if the predictor is closed, an output is NaN or infinite, or not what the bundle promises.
        """
        items = listed(images, len(self.bundle.manifest.preprocess.shape))
        return [one for one in self.stream(items, batch=batch) if isinstance(one, Prediction)]

    def stream(
        self, images: Iterable[ImageLike], *, batch: int = 8, skip_bad: bool = False
    ) -> Iterator[Prediction | ImageError]:
        """Yield one prediction per image, in order, and hold a few batches at any time, however many images there are.

        Args:
            images: single images, as `__call__` takes them; a generator is read as far as batches are prepared. An
                `ImageError` in the place of an image says why there is none.
            batch: images per call of the engine.
            skip_bad: yield the error of an image that cannot be read, or whose output is NaN or infinite, in its place,
                instead of raising it.

        Raises:
            ImageError: if an image cannot be read, unless `skip_bad`.
            ArgumentError: if `batch` is no number of images.
            EngineError: if the predictor is closed, an output is not what the bundle promises, or, unless `skip_bad`,
                is NaN or infinite.
        """
        check_whole("batch", batch, least=1)
        return self._stream(enumerate(images), batch, skip_bad)

    def _stream(
        self, items: Iterator[tuple[int, ImageLike]], batch: int, skip_bad: bool
    ) -> Iterator[Prediction | ImageError]:
        preprocess, labels, head = self.bundle.manifest.preprocess, self.bundle.manifest.labels, self.head

        def prepare(group: Sequence[tuple[int, ImageLike]]) -> tuple[list[str | ImageError], list[np.ndarray]]:
            found: list[str | ImageError] = []
            pixels = []
            for place, item in group:
                try:
                    if isinstance(item, ImageError):
                        raise item
                    pixels.append(prepared(item, preprocess))
                    found.append(_shown(item, place))
                except ImageError as error:
                    if not skip_bad:
                        raise
                    found.append(error)
            return found, pixels

        groups = iter(lambda: list(itertools.islice(items, batch)), [])
        for found, pixels in prepared_ahead(groups, prepare):
            made = self.run(np.stack(pixels)) if pixels else {}
            if pixels and not skip_bad:
                finite_outputs(next(iter(made.values())), [one for one in found if isinstance(one, str)])
            rows = iter(range(len(pixels)))
            for one in found:
                if isinstance(one, ImageError):
                    yield one
                    continue
                row = next(rows)
                outputs = {name: values[row] for name, values in made.items()}
                if skip_bad and not all(np.isfinite(values).all() for values in outputs.values()):
                    yield ImageError(f"the model's output for {one} is NaN or infinite")
                    continue
                yield Prediction(output=next(iter(outputs.values())), labels=labels, head=head, outputs=outputs)

    def embed(self, images: ImageLike, *, batch: int = 8) -> Float[np.ndarray, "B ..."]:
        """Return the embeddings of images as one array, one row each.

        Raises:
            VitfoldError: if the model gives none; and as a call does.
        """
        return self._stacked(self.port("image_embeds"), images, batch)

    def logits(self, images: ImageLike, *, batch: int = 8) -> Float[np.ndarray, "B ..."]:
        """Return the logits of images as one array, one row each.

        Raises:
            VitfoldError: if the model is no classifier; and as a call does.
        """
        return self._stacked(self.port("logits"), images, batch)

    def port(self, wanted: Literal["image_embeds", "logits"]) -> Port:
        """Return the output that holds logits, or embeddings of whole images.

        Raises:
            VitfoldError: if there is none, saying what there is.
        """
        ports = self.session.parts[MAIN].outputs
        features = self.head == "features" and not self.bundle.manifest.spec.dense
        first = self.classifies if wanted == "logits" else features
        for number, one in enumerate(ports):
            if one.name == wanted or (number == 0 and first):
                return one
        word = "logits" if wanted == "logits" else "embedding"
        raise VitfoldError(
            f"{self.bundle.path} gives {', '.join(one.name for one in ports)} (head: {self.head}) and no {word}; "
            f"make a bundle with --outputs {word}, or use .outputs of predictions"
        )

    def _stacked(self, port: Port, images: ImageLike, batch: int) -> Float[np.ndarray, "B ..."]:
        rows = [one.outputs[port.name] for one in self(images, batch=batch)]
        return np.stack(rows) if rows else np.empty((0, *port.shape), np.float32)

    def run(self, pixels: Num[np.ndarray, "B ..."]) -> dict[str, Float[np.ndarray, "B ..."]]:
        """Return the outputs by name for images that are prepared already.

        Raises:
            EngineError: if the predictor is closed, or the graph returns what its manifest does not promise.
        """
        with self._turn:
            made = self.session.named(pixels)
        rows = next(iter(made.values()))
        spec = self.bundle.manifest.spec
        last = spec.embed_dim if spec.dense and isinstance(spec, ViTSpec) else spec.output_width
        axis = 1 if spec.head == "segmentation" else -1
        if rows.ndim < 2 or (len(rows), rows.shape[axis]) != (len(pixels), last):
            raise EngineError(
                f"{self.bundle.path}: the graph returned {rows.shape} for {len(pixels)} images, and its manifest "
                f"promises {last} values each; make the bundle again"
            )
        return made

    def close(self) -> None:
        """Release the engine, when whoever is using it is done."""
        with self._turn:
            if self._session is not None:
                self._session.close()
            self._session, self._forked = None, False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle where the bundle lies and which it is."""
        if self._session is None and not self._forked:
            raise EngineError("this predictor is closed, so it cannot be handed on; open the bundle again")
        return reopen, (os.fspath(self.bundle.path.absolute()), self._engine, self._threads, self.bundle.digest)

    def _opened_again(self) -> Session:
        engine = self._engine or str(self.bundle.manifest.target["engine"])
        if not ENGINES[engine].forks:
            raise EngineError(
                f"{engine} does not work in a process that was forked behind it; start processes by "
                "multiprocessing.get_context('spawn'), or open the bundle in each"
            )
        bundle = _same_bundle(self.bundle.path, self.bundle.digest)
        return open_session(bundle, engine=self._engine, threads=self._threads)

    def _leave_to_parent(self) -> None:
        """In a forked process: forget the session and the lock, whose threads are those of the parent."""
        self._turn = threading.Lock()
        if self._session is not None:
            _OF_PARENT.append(self._session)
            self._session, self._forked = None, True

    def __enter__(self) -> Predictor:
        """Enter a context that closes the predictor."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _shown(item: ImageLike, place: int) -> str:
    """Name an image in a message."""
    return str(item) if isinstance(item, str | Path) else f"image {place}"


_OPEN: weakref.WeakSet[Predictor] = weakref.WeakSet()
_OF_PARENT: list[Session] = []
"""Sessions of the process that this one was forked from: to release one would wait for threads that are not here."""


def _after_fork() -> None:
    for predictor in list(_OPEN):
        predictor._leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def reopen(path: str, engine: str | None, threads: int | None, digest: str) -> Predictor:
    """Open the bundle of a predictor that was pickled.

    Raises:
        BundleError: if it is missing, damaged or another one by now.
    """
    return Predictor(_same_bundle(Path(path), digest), engine=engine, threads=threads)


def _same_bundle(path: Path, digest: str) -> Bundle:
    bundle = open_bundle(path)
    if bundle.digest != digest:
        raise BundleError(f"{path} was replaced since this predictor was opened; open it anew with vitfold.open")
    return bundle


def open_predictor(path: str | Path, *, engine: str | None = None, threads: int | None = None) -> Predictor:
    """Open a bundle for prediction.

    Raises:
        BundleError: if it is missing or damaged.
        EngineError: if the engine refuses it, or threads is no number for this machine.
    """
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"open takes the path of a bundle, found {type(path).__name__}")
    return Predictor(open_bundle(path), engine=engine, threads=threads)
