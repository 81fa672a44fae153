"""The directory on disk that optimizing makes and serving opens.

Owns what stands in its manifest. How the folder is written and checked is `sealed`'s business, what the files mean to
a runtime `engines`'. docs/bundle.md is the specification.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitfold.errors import BundleError, VitfoldError
from vitfold.model import Preprocess, ViTSpec, preprocess_from_dict, spec_to_dict, vit_spec_from_dict
from vitfold.products import Product, products_of_recipe
from vitfold.recipe import Recipe, recipe_from_dict
from vitfold.sealed import MANIFEST, check_files, read_header, write_sealed

MODEL = "model.onnx"
WEIGHTS = "weights.safetensors"
QUANTIZERS = "quantizers.safetensors"
RECIPE = "recipe.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a bundle but its weights.

    `tokens` are those that enter each block and those that leave the last; `macs` are per image.
    `verified` says how far the engine's output is from the reference interpreter's, `fidelity` how
    far this bundle is from the unfolded model on real images, if any were given. `calibration` says how a
    quantized bundle was calibrated: method, seed, images with their digests, environment.
    """

    vitfold: str
    spec: ViTSpec
    preprocess: Preprocess
    labels: tuple[str, ...] | None
    recipe: Recipe
    target: Mapping[str, Any]
    tokens: tuple[int, ...]
    macs: int
    origin: Mapping[str, Any]
    model_digest: str
    verified: Mapping[str, Any]
    fidelity: Mapping[str, Any] | None
    calibration: Mapping[str, Any] | None = None

    @property
    def simulated(self) -> bool:
        """True if no engine executes it: the bundle holds weights and quantizers instead of a graph."""
        return self.target.get("engine") == "simulation"

    @property
    def products(self) -> tuple[Product, ...]:
        """The integer products that the graph asks of its runtime, which not every processor computes exactly."""
        return products_of_recipe(self.target, self.recipe.quant)

    @property
    def has_trained_weights(self) -> bool:
        """False for seeded random weights, whose outputs hardly depend on the image: no fidelity is meant by them."""
        return has_trained_weights(self.origin)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without the format header and the file list."""
        return {
            "vitfold": self.vitfold,
            "spec": spec_to_dict(self.spec),
            "preprocess": self.preprocess.to_dict(),
            "labels": None if self.labels is None else list(self.labels),
            "recipe": self.recipe.to_dict(),
            "target": dict(self.target),
            "tokens": list(self.tokens),
            "macs": self.macs,
            "origin": dict(self.origin),
            "model_digest": self.model_digest,
            "verified": dict(self.verified),
            "fidelity": None if self.fidelity is None else dict(self.fidelity),
            "calibration": None if self.calibration is None else dict(self.calibration),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An opened bundle whose files had the digests that its manifest states."""

    path: Path
    manifest: Manifest
    size_bytes: int
    digest: str

    @property
    def name(self) -> str:
        """The directory's name without its suffix."""
        return self.path.name.removesuffix(".fold")

    @property
    def onnx_path(self) -> Path:
        """The ONNX graph."""
        return self.path / MODEL


def has_trained_weights(origin: Mapping[str, Any]) -> bool:
    """Return whether an origin names trained weights, so that a fidelity says something."""
    return bool(origin["arguments"].get("weights") != "random")


def write_bundle(path: str | Path, write: Callable[[Path], Manifest], *, overwrite: bool = False) -> Bundle:
    """Write a bundle as a whole or not at all; `write` is handed the path of model.onnx and returns the manifest.

    Raises:
        BundleError: if the destination cannot be written, or exists and may not be replaced.
    """

    def fill(folder: Path) -> Mapping[str, Any]:
        manifest = write(folder / MODEL)
        (folder / RECIPE).write_text(manifest.recipe.to_toml(), encoding="utf-8")
        return manifest.to_dict()

    return open_bundle(write_sealed(path, fill, overwrite=overwrite))


def copy_bundle(
    bundle: Bundle, path: str | Path, *, fidelity: Mapping[str, Any] | None, overwrite: bool = False
) -> Bundle:
    """Write a bundle anew elsewhere, with another fidelity in its manifest.

    Raises:
        BundleError: if the destination cannot be written.
    """

    def write(onnx_path: Path) -> Manifest:
        for file in bundle.path.iterdir():
            if file.name != MANIFEST:
                shutil.copyfile(file, onnx_path.with_name(file.name))
        return replace(bundle.manifest, fidelity=fidelity)

    return write_bundle(path, write, overwrite=overwrite)


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle and check every file against its digest.

    Raises:
        BundleError: if it is missing, not a bundle of a Vision Transformer, newer than this vitfold, or damaged.
    """
    folder = Path(path)
    header = read_header(folder)
    if "kind" in header.values:
        raise BundleError(
            f"{folder} holds the steps of a diffusion model, which only these take: vitfold diffuse, vitfold bench and "
            "vitfold inspect"
        )
    manifest = _read_manifest(folder, header.values)
    size = check_files(folder, header, (WEIGHTS, QUANTIZERS) if manifest.simulated else (MODEL,))
    return Bundle(path=folder, manifest=manifest, size_bytes=size, digest=header.digest)


def _read_manifest(folder: Path, values: Mapping[str, Any]) -> Manifest:
    try:
        return Manifest(
            vitfold=values["vitfold"],
            spec=vit_spec_from_dict(values["spec"]),
            preprocess=preprocess_from_dict(values["preprocess"]),
            labels=None if values["labels"] is None else tuple(values["labels"]),
            recipe=recipe_from_dict(values["recipe"], name=f"{folder}/{MANIFEST}"),
            target=values["target"],
            tokens=tuple(values["tokens"]),
            macs=values["macs"],
            origin=values["origin"],
            model_digest=values["model_digest"],
            verified=values["verified"],
            fidelity=values["fidelity"],
            calibration=values.get("calibration"),
        )
    except (KeyError, TypeError, AttributeError, VitfoldError) as error:
        raise BundleError(f"{folder / MANIFEST} is damaged: {error!r}; make the bundle again") from None
