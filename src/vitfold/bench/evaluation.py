"""Running a session over a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from vitfold.engines import Session
from vitfold.errors import EngineError, ImageError
from vitfold.images import ImageSet, batches
from vitfold.model import Preprocess
from vitfold.progress import Advance


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outputs:
    """One output row per readable image; `index` are the images' positions in the set."""

    values: Float[np.ndarray, "B ..."]
    index: tuple[int, ...]
    skipped: tuple[str, ...]


def finite_outputs(values: Float[np.ndarray, "B ..."], of: str | Sequence[str]) -> Float[np.ndarray, "B ..."]:
    """Return outputs as they are, none of which is NaN or infinite; `of` names them, or each row.

    Raises:
        EngineError: naming the first that is.
    """
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))
    if len(bad):
        name = of if isinstance(of, str) else str(of[bad[0]])
        raise EngineError(
            f"the model's output for {name} is NaN or infinite ({len(bad)} of {len(values)} in its batch); its values "
            "overflow the type that the graph computes in, or its weights are damaged: make the bundle for a float32 "
            "target (--target cpu), or use another checkpoint"
        )
    return values


def softmax(logits: Float[np.ndarray, "*B C"]) -> Float[np.ndarray, "*B C"]:
    """Return the probabilities of classes."""
    powers: Float[np.ndarray, "*B C"] = np.exp(logits - logits.max(-1, keepdims=True))
    powers /= powers.sum(-1, keepdims=True)
    return powers


def run_over(
    session: Session,
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch: int = 8,
    skip_bad: bool = False,
    advance: Advance | None = None,
) -> Outputs:
    """Run every image through the session; `advance(n)` is called after each n images.

    Raises:
        ImageError: at the first unreadable image unless `skip_bad`, or if none is readable.
        EngineError: if an output is NaN or infinite.
    """
    rows: list[Float[np.ndarray, "B ..."]] = []
    index: list[int] = []
    skipped: list[str] = []
    for group in batches(images, preprocess, batch=batch, skip_bad=skip_bad, on_skip=skipped.append):
        rows.append(finite_outputs(session(group.pixel_values), [str(images.paths[i]) for i in group.index]))
        index.extend(group.index)
        if advance is not None:
            advance(len(group.index))
    if not rows:
        raise ImageError(f"none of the {len(images.paths)} images in {images.root} can be read; first: {skipped[0]}")
    return Outputs(values=np.concatenate(rows), index=tuple(index), skipped=tuple(skipped))
