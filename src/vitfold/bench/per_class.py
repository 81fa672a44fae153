"""Accuracy and agreement of each class by itself: where a mean hides that one class is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitfold.bench.classes import class_targets
from vitfold.bench.evaluation import Outputs
from vitfold.images import ImageSet


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRow:
    """What is measured of the images of one class folder; without a reference nothing is said of it."""

    name: str
    images: int
    top1: float
    agreement: float | None = None
    reference_top1: float | None = None


def per_class(
    outputs: Outputs, images: ImageSet, *, labels: Sequence[str] | None, reference: Outputs | None
) -> list[ClassRow]:
    """Return a row for each class folder with readable images, in their order.

    `outputs` are logits (images, classes) of images in class folders, and so is `reference`, of the unfolded model.

    Raises:
        ImageError: if there are no class folders, or they do not fit the classes.
    """
    targets = np.array(class_targets(images, labels, outputs.values.shape[1]))
    assert images.classes is not None
    assert images.class_index is not None
    said = dict(zip(outputs.index, outputs.values.argmax(1).tolist(), strict=True))
    then = {} if reference is None else dict(zip(reference.index, reference.values.argmax(1).tolist(), strict=True))
    rows = []
    for place, name in enumerate(images.classes):
        mine = [i for i, folder in enumerate(images.class_index) if folder == place and i in said]
        if not mine:
            continue
        both = [i for i in mine if i in then]
        rows.append(
            ClassRow(
                name=name,
                images=len(mine),
                top1=float(np.mean([said[i] == targets[i] for i in mine])),
                agreement=float(np.mean([said[i] == then[i] for i in both])) if both else None,
                reference_top1=float(np.mean([then[i] == targets[i] for i in both])) if both else None,
            )
        )
    return rows
