"""Compensation of merging as a step of the pipeline: which images, what is kept, and what the bundle says about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitfold.artifacts.cache import keep_arrays, key_of, read_arrays
from vitfold.errors import CalibrationError
from vitfold.images import ImageSet, find_images
from vitfold.pipeline.plan import Plan, head_dims_left
from vitfold.pipeline.writing import FIDELITY_IMAGES
from vitfold.recipe import MergeRecipe

if TYPE_CHECKING:
    from vitfold.quant import Progress

SEED = 0
_FORMAT = 4
_RECORD = "record"


def divide_for_compensation(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return the images that layers are refitted on, and others to compare on, a quarter of all at most.

    Raises:
        CalibrationError: if they are too few.
    """
    from vitfold.compensation import LEAST_IMAGES, MOST_IMAGES

    count = min(MOST_IMAGES, len(images.paths) - min(FIDELITY_IMAGES, len(images.paths) // 4))
    if count < LEAST_IMAGES:
        raise CalibrationError(
            f"weights are refitted on three quarters of the images, and {count} of {len(images.paths)} are too few; "
            f"give at least {-(-LEAST_IMAGES * 4 // 3)}, better 2000, others by --calibration-images, or leave "
            "--compensate and --prune-mlp out"
        )
    chosen = images.sample(count, seed=SEED)
    return chosen, images.without(chosen) or images


def all_for_compensation(images: ImageSet) -> ImageSet:
    """Return the images that layers are refitted on where others are compared on: as many as help.

    Raises:
        CalibrationError: if they are too few.
    """
    from vitfold.compensation import MOST_IMAGES, check_enough

    check_enough(len(images.paths))
    return images.sample(min(MOST_IMAGES, len(images.paths)), seed=SEED)


def recorded_division(record: Mapping[str, Any], root: str | Path | None) -> tuple[ImageSet, ImageSet]:
    """Return the images that a bundle's layers were refitted on, checked by their digest, and others.

    Raises:
        CalibrationError: if they are not the same any more.
    """
    folder = Path(root or record["root"])
    images = find_images(folder)
    chosen, others = divide_for_compensation(images)
    if chosen.digest() != record["digest"]:
        chosen = images.sample(record.get("images", 0), seed=SEED)
        others = images.without(chosen) or images
    if chosen.digest() != record["digest"]:
        raise CalibrationError(
            f"the images of {folder} are not those that merging was compensated on; give their folder with --images "
            "DIR, or make the bundle anew without --from"
        )
    return chosen, others


def compensate_plan(folded: Plan, images: ImageSet, *, progress: Progress | None = None) -> Plan:
    """Refit weights to what merging and pruning change, on exactly these images; kept for the next call.

    A plan that prunes nothing and merges nothing, or does not ask for it, is returned as it is.

    Raises:
        CalibrationError: on too few images.
        RecipeError: if no layer of the model can be refitted.
    """
    if not folded.needs_compensation:
        return folded
    from vitfold.compensation import compensate, with_widths
    from vitfold.quant import Progress
    from vitfold.quant.network import ImageExamples

    model, merge, digest = folded.folded, folded.recipe.merge, images.digest()
    merge = merge if any(merge.r) else MergeRecipe(r=merge.r, order="index")  # there no order matters
    prune = folded.recipe.prune
    key = key_of(_FORMAT, model.digest(), replace(merge, compensate=True), prune, digest)
    kept = read_arrays("compensation", key)
    if kept is None or _RECORD not in kept:
        examples = ImageExamples(images=images, preprocess=model.preprocess)
        progress = progress or Progress()
        done = compensate(model, merge, examples, prune=prune, step=progress.step, advance=progress.advance)
        kept = {name: array for name, array in done.model.params.items() if array is not model.params.get(name)}
        kept[_RECORD] = np.frombuffer(json.dumps(done.to_dict()).encode(), np.uint8)
        keep_arrays("compensation", key, kept)
    measured = json.loads(kept[_RECORD].tobytes())
    refitted = {name: array for name, array in kept.items() if name != _RECORD}
    mended = with_widths(model, {**model.params, **refitted}, head_dims_left(prune, model.spec))
    record = {**measured, "root": str(Path(images.root).absolute()), "seed": SEED, "digest": digest}
    return replace(folded, folded=mended, compensated=mended, compensation=record)
