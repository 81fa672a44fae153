"""A bundle as a function of images.

Owns what a caller may hand in and what comes back. Needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float

from vitfold.bench.evaluation import finite_outputs
from vitfold.bundle import Bundle, open_bundle
from vitfold.decoding import listed, prepared
from vitfold.engines import Session, open_session
from vitfold.errors import ArgumentError, EngineError, VitfoldError, check_whole
from vitfold.images import prepared_ahead
from vitfold.model.spec import Head, sigmoid

ImageLike = Any
"""A path, a Pillow image, the bytes of a file, an open binary file, an array or a tensor of 8 bits; see `decoding`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """The output row of one image: logits of a classifier, numbers of a regression, or an embedding.

    `head` says which of them.
    """

    output: Float[np.ndarray, ...]
    labels: tuple[str, ...] | None
    head: Head = "single_label"

    @property
    def probabilities(self) -> Float[np.ndarray, " C"]:
        """The softmax of the logits; where every label is a yes or no of its own, the sigmoid of each.

        Raises:
            VitfoldError: if the output is numbers or an embedding, or not finite.
        """
        if self.head not in ("single_label", "multi_label"):
            kind = "the numbers of a regression" if self.head == "regression" else "an embedding"
            raise VitfoldError(f"this output is {kind} and has no probabilities; use .output or .values()")
        if not np.isfinite(self.output).all():
            raise EngineError("the output is NaN or infinite, so that no class is probable; make the bundle again")
        if self.head == "multi_label":
            return sigmoid(self.output)
        shifted = np.exp(self.output - self.output.max())
        softmax: Float[np.ndarray, " C"] = shifted / shifted.sum()
        return softmax

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

    def _name(self, i: int) -> str:
        return self.labels[i] if self.labels else str(i)


class Predictor:
    """An open bundle: call it with one image or several; close it, or use it in `with`."""

    def __init__(self, bundle: Bundle, *, engine: str | None = None, threads: int | None = None) -> None:
        self.bundle = bundle
        self.session: Session = open_session(bundle, engine=engine, threads=threads)

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
                tensors (C, H, W) of uint8; an array or tensor of four dimensions is a batch.
            batch: images per call of the engine.

        Raises:
            ImageError: if an image cannot be read.
            ArgumentError: if `batch` is no number of images.
            EngineError: if an output is NaN or infinite.
        """
        check_whole("batch", batch, least=1)
        items = listed(images)
        preprocess, labels, head = self.bundle.manifest.preprocess, self.bundle.manifest.labels, self.head

        def prepare(group: Sequence[ImageLike]) -> Float[np.ndarray, "B 3 H W"]:
            return np.stack([prepared(item, preprocess) for item in group])

        names = [_shown(item, place) for place, item in enumerate(items)]
        predictions: list[Prediction] = []
        groups = (items[start : start + batch] for start in range(0, len(items), batch))
        for pixels in prepared_ahead(groups, prepare):
            self.session.bind(pixels)
            self.session.run()
            rows = finite_outputs(self.session.fetch(), names[len(predictions) :])
            predictions += [Prediction(output=row, labels=labels, head=head) for row in rows]
        return predictions

    def close(self) -> None:
        """Release the engine."""
        self.session.close()

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


def open_predictor(path: str | Path, *, engine: str | None = None, threads: int | None = None) -> Predictor:
    """Open a bundle for prediction.

    Raises:
        BundleError: if it is missing or damaged.
        EngineError: if the engine refuses it.
    """
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"open takes the path of a bundle, found {type(path).__name__}")
    return Predictor(open_bundle(path), engine=engine, threads=threads)
