"""Calibration as a step of the pipeline: which images, by which method, and what the bundle says about it.

Owns the choice of images and the record that `repeat` reads. Ranges and weights are `quant`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitfold.bench.environment import environment
from vitfold.digest import file_sha256
from vitfold.errors import CalibrationError
from vitfold.images import ImageSet
from vitfold.pipeline.plan import Folded
from vitfold.target import Target

if TYPE_CHECKING:
    from vitfold.quant import Progress, Scheme


def scheme_of(target: Target) -> Scheme:
    """Return what calibration has to respect on a target."""
    from vitfold.quant import Scheme

    return Scheme(
        symmetric=target.symmetric,
        weight_bits=target.weight_bits,
        uniform_only=target.engine != "simulation",
    )


def split_images(folded: Folded, images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return the calibration images that the recipe draws, and the others for comparing; all, if none are left."""
    quant = folded.recipe.quant
    assert quant is not None
    chosen = images.sample(quant.calibration_size, seed=quant.seed)
    return chosen, images.without(chosen) or images


def calibrate_folded(folded: Folded, images: ImageSet, *, progress: Progress | None = None) -> Folded:
    """Quantize a planned model on exactly these images.

    Raises:
        CalibrationError: on images or activations that give no ranges.
    """
    from vitfold.quant import calibrate, find_method

    quant = folded.recipe.quant
    if quant is None:
        return folded
    done = calibrate(
        folded.folded, folded.recipe.merge, quant, images, scheme=scheme_of(folded.target), progress=progress
    )
    settings = environment()
    record = {
        "method": find_method(quant.method).to_dict(),
        "seed": quant.seed,
        "root": str(Path(images.root).absolute()),
        "images": [
            {"path": path.relative_to(images.root).as_posix(), "sha256": file_sha256(path)} for path in images.paths
        ],
        "environment": {key: settings[key] for key in ("processor", "threads", "system", "python", "packages")},
        "quantizers": done.quantizers.digest(),
    }
    return replace(folded, folded=done.model, quantizers=done.quantizers, calibration=record)


def recorded_images(record: Mapping[str, Any], root: str | Path | None) -> ImageSet:
    """Return the images that a bundle was calibrated with, each checked against its digest.

    Raises:
        CalibrationError: naming the first image that is missing or has changed.
    """
    folder = Path(root or record["root"])
    paths = []
    for entry in record["images"]:
        path = folder / entry["path"]
        if not path.is_file():
            raise CalibrationError(f"the calibration image {path} is gone; give its folder with --images DIR")
        if file_sha256(path) != entry["sha256"]:
            raise CalibrationError(f"the calibration image {path} has changed since; restore it, or calibrate anew")
        paths.append(path)
    return ImageSet(root=str(folder), paths=tuple(paths), classes=None, class_index=None)
