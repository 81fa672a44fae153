"""A bundle as a function of images.

Owns what a caller may hand in and what comes back. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Float
from PIL import Image

from vitfold.bundle import Bundle, open_bundle
from vitfold.engines import Session, open_session
from vitfold.errors import ImageError
from vitfold.images import prepared_ahead, read_image

ImageLike = str | Path | Image.Image


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """The output row of one image: logits of a classifier, or an embedding."""

    output: Float[np.ndarray, ...]
    labels: tuple[str, ...] | None

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Return the k most probable labels with their softmax probabilities, best first."""
        shifted = np.exp(self.output - self.output.max())
        probabilities = shifted / shifted.sum()
        best = np.argsort(-probabilities, kind="stable")[:k]
        return [(self.labels[i] if self.labels else str(i), float(probabilities[i])) for i in best]


class Predictor:
    """An open bundle: call it with one image or several; close it, or use it in `with`."""

    def __init__(self, bundle: Bundle, *, engine: str | None = None, threads: int | None = None) -> None:
        self.bundle = bundle
        self.session: Session = open_session(bundle, engine=engine, threads=threads)

    @property
    def classifies(self) -> bool:
        """True if outputs are logits over classes."""
        return self.bundle.manifest.spec.output == "logits"

    def __call__(self, images: ImageLike | Iterable[ImageLike], *, batch: int = 8) -> list[Prediction]:
        """Return one prediction per image; paths are decoded while the engine runs, Pillow images used as they are.

        Raises:
            ImageError: if an image cannot be read.
        """
        items: Sequence[ImageLike] = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
        preprocess, labels = self.bundle.manifest.preprocess, self.bundle.manifest.labels

        def prepare(group: Sequence[ImageLike]) -> Float[np.ndarray, "B 3 H W"]:
            return np.stack([preprocess(_decoded(item)) for item in group])

        predictions: list[Prediction] = []
        groups = (items[start : start + batch] for start in range(0, len(items), batch))
        for pixels in prepared_ahead(groups, prepare):
            self.session.bind(pixels)
            self.session.run()
            predictions += [Prediction(output=row, labels=labels) for row in self.session.fetch()]
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


def _decoded(item: ImageLike) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, (str, Path)):
        return read_image(item)
    raise ImageError(f"cannot read an image from {type(item).__name__}; give a path or a Pillow image")


def open_predictor(path: str | Path, *, engine: str | None = None, threads: int | None = None) -> Predictor:
    """Open a bundle for prediction.

    Raises:
        BundleError: if it is missing or damaged.
        EngineError: if the engine refuses it.
    """
    return Predictor(open_bundle(path), engine=engine, threads=threads)
