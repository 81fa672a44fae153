"""Accuracy and agreement of each class by itself, and the images whose label changed: what a mean hides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitfold.bench.classes import class_targets
from vitfold.bench.evaluation import Outputs, softmax
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedRow:
    """An image whose label is not the unfolded model's, and how sure both were; `truth` is its folder's name."""

    image: str
    truth: str | None
    original: str
    original_probability: float
    now: str
    now_probability: float


def changed(
    outputs: Outputs, images: ImageSet, *, labels: Sequence[str] | None, reference: Outputs
) -> list[ChangedRow]:
    """Return a row for each image whose label changed, the one that the unfolded model was surest of first.

    `outputs` and `reference` are logits (images, classes).
    """
    here = {i: row for row, i in enumerate(outputs.index)}
    said, then = softmax(outputs.values), softmax(reference.values)
    folders = images.class_index

    def named(label: int) -> str:
        return labels[label] if labels else str(label)

    rows = [
        ChangedRow(
            image=str(images.paths[i]),
            truth=images.classes[folders[i]] if images.classes and folders else None,
            original=named(int(then[row].argmax())),
            original_probability=float(then[row].max()),
            now=named(int(said[here[i]].argmax())),
            now_probability=float(said[here[i]].max()),
        )
        for row, i in enumerate(reference.index)
        if i in here and said[here[i]].argmax() != then[row].argmax()
    ]
    return sorted(rows, key=lambda one: (-one.original_probability, one.image))
