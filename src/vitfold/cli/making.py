"""What commands that make bundles share: the extra that they need, the model, what options say about quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from vitfold.bench.classes import fitting_classes, without_classes
from vitfold.bench.environment import busy_remark
from vitfold.cli.terminal import note
from vitfold.errors import VitfoldError, missing_extra
from vitfold.images import find_images
from vitfold.model.spec import MAPS
from vitfold.recipe import quant_from_scheme

if TYPE_CHECKING:
    from pathlib import Path

    from vitfold.artifacts.bundle import Bundle
    from vitfold.cli.groups import CalibrationArgs
    from vitfold.images import ImageSet
    from vitfold.model import Architecture
    from vitfold.model.preprocess import Exif
    from vitfold.recipe import QuantRecipe


def require_optimize() -> None:
    """Raise if the extra that makes bundles is not installed."""
    import importlib.util

    for package in ("torch", "onnx_ir"):
        if importlib.util.find_spec(package) is None:
            raise VitfoldError(missing_extra(package, "optimize", "making a bundle"))


def given_images(folder: Path) -> ImageSet:
    """Find the images of a folder, and say what of it was left out.

    Raises:
        ImageError: if there are none.
    """
    found = find_images(folder)
    if found.remark is not None:
        note(found.remark)
    return found


def judged_images(images: ImageSet, spec: Architecture, labels: tuple[str, ...] | None) -> ImageSet:
    """Return what a model is measured on; say before any work how class folders are read, or why there is no top-1."""
    if images.classes is None or spec.head in ("features", *MAPS):
        return images
    if spec.head == "single_label":
        return fitting_classes(images, labels, spec.output_width, note)
    what = "gives numbers (a regression)" if spec.head == "regression" else "answers every label by itself"
    note(f"no top-1, because the model {what}, and a folder names one class")
    return without_classes(images)


def turned(bundle: Bundle, exif: Exif | None) -> Bundle:
    """Return a bundle that reads images as --exif says, where it says something."""
    manifest = bundle.manifest
    if exif is None or exif == manifest.preprocess.exif:
        return bundle
    return replace(bundle, manifest=manifest.changed(preprocess=replace(manifest.preprocess, exif=exif)))


def say_busy(environment: Mapping[str, Any]) -> None:
    """Remark that a measurement was taken on a busy machine, where it was."""
    remark = busy_remark(environment)
    if remark is not None:
        note(remark)


def needed_quant(quant: str | None, method: str | None, calibration: CalibrationArgs) -> QuantRecipe:
    """Return the quantization that options ask for, where a command is about nothing else."""
    found = quant_recipe(quant, method, calibration)
    if found is None:
        raise typer.BadParameter("give the bits to try, for example w8a8", param_hint="--quant")
    return found


def quant_recipe(quant: str | None, method: str | None, calibration: CalibrationArgs) -> QuantRecipe | None:
    """Return the quantization that options ask for."""
    found = None if quant is None else quant_from_scheme(quant.lower())
    if found is None:
        return None
    size, seed = calibration.calibration_size, calibration.calibration_seed
    return replace(found, method=method or "vitfold", calibration_size=size, seed=seed)
