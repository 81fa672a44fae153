"""Running a session over a folder of images.

Owns the loop that decodes while the engine runs and keeps only outputs, so memory stays bounded
whatever the size of the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from vitfold.engines import Session
from vitfold.errors import ImageError
from vitfold.images import ImageSet, batches
from vitfold.model import Preprocess


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outputs:
    """One output row per readable image; `index` are the images' positions in the set."""

    values: Float[np.ndarray, "B ..."]
    index: tuple[int, ...]
    skipped: tuple[str, ...]


def run_over(
    session: Session,
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch: int = 8,
    skip_bad: bool = False,
    advance: Callable[[int], Any] | None = None,
) -> Outputs:
    """Run every image through the session; `advance(n)` is called after each n images.

    Raises:
        ImageError: at the first unreadable image unless `skip_bad`, or if none is readable.
    """
    rows: list[Float[np.ndarray, "B ..."]] = []
    index: list[int] = []
    skipped: list[str] = []
    for group in batches(images, preprocess, batch=batch, skip_bad=skip_bad, on_skip=skipped.append):
        session.bind(group.pixel_values)
        session.run()
        rows.append(session.fetch())
        index.extend(group.index)
        if advance is not None:
            advance(len(group.index))
    if not rows:
        raise ImageError(f"none of the {len(images.paths)} images in {images.root} can be read; first: {skipped[0]}")
    return Outputs(values=np.concatenate(rows), index=tuple(index), skipped=tuple(skipped))
