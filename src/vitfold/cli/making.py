"""What commands that make bundles share: the extra that they need, the model, what options say about quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vitfold.cli.terminal import note, quiet_stdout
from vitfold.errors import VitfoldError, missing_extra

if TYPE_CHECKING:
    from pathlib import Path

    from vitfold.artifacts.bundle import Bundle
    from vitfold.images import ImageSet
    from vitfold.model import Model, ViTSpec
    from vitfold.model.preprocess import Exif
    from vitfold.recipe import QuantRecipe

Say = Callable[[str], None]


def require_optimize() -> None:
    """Raise if the extra that makes bundles is not installed."""
    import importlib.util

    for package in ("torch", "onnx_ir"):
        if importlib.util.find_spec(package) is None:
            raise VitfoldError(missing_extra(package, "optimize", "making a bundle"))


def load_model(source: str, say: Say, *arguments: Any, exif: Exif | None = None, problem: Any = None) -> Model:
    """Load a model by arch, num_classes, image_size, weights and seed; what it prints goes to stderr."""
    from vitfold.sources import load_source

    say(f"loading {source}")
    names = ("arch", "num_classes", "image_size", "weights", "seed")
    with quiet_stdout():
        model = load_source(source, **dict(zip(names, arguments, strict=True)), problem=problem).model
    return model if exif is None else replace(model, preprocess=replace(model.preprocess, exif=exif))


def given_images(folder: Path) -> ImageSet:
    """Find the images of a folder, and say what of it was left out.

    Raises:
        ImageError: if there are none.
    """
    from vitfold.images import find_images

    found = find_images(folder)
    if found.remark is not None:
        note(found.remark)
    return found


def judged_images(images: ImageSet, spec: ViTSpec, labels: tuple[str, ...] | None) -> ImageSet:
    """Return what a model is measured on; say before any work how class folders are read, or why there is no top-1."""
    from vitfold.bench.classes import fitting_classes, without_classes

    if images.classes is None or spec.head == "features":
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
    from vitfold.bench.environment import busy_remark

    remark = busy_remark(environment)
    if remark is not None:
        note(remark)


def quant_recipe(quant: str | None, method: str | None, size: int, seed: int) -> QuantRecipe | None:
    """Return the quantization that options ask for."""
    from vitfold.recipe import quant_from_scheme

    found = None if quant is None else quant_from_scheme(quant.lower())
    if found is None:
        return None
    return replace(found, method=method or "vitfold", calibration_size=size, seed=seed)
