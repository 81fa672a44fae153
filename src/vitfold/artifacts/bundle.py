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

from vitfold.artifacts.digested import MANIFEST, check_files, read_header, reserve_bundle, seal
from vitfold.artifacts.manifest import COUNT, checked_origin, checked_target, checked_verified, sha256_entry
from vitfold.errors import BundleError, VitfoldError
from vitfold.model import Preprocess, ViTSpec, preprocess_from_dict, spec_to_dict, vit_spec_from_dict
from vitfold.model.sinks import Sinks
from vitfold.model.spec import with_names_of_today
from vitfold.products import Product, products_of_recipe
from vitfold.recipe import MergeRecipe, QuantRecipe, Recipe, RegistersRecipe, recipe_from_dict, tokens_per_block
from vitfold.storage.checked import ImplausibleError, Range, as_type, check_fields, entry, section
from vitfold.storage.placing import Place

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

    with reserve_bundle(path, overwrite=overwrite) as place:
        return publish_bundle(place, open_bundle(seal(place.draft(), fill)))


def publish_bundle(place: Place, draft: Bundle) -> Bundle:
    """Put a bundle that was made in a workshop at its destination; return it there.

    Raises:
        BundleError: if it cannot be written.
    """
    return replace(draft, path=place.publish(draft.path))


def copy_bundle(
    bundle: Bundle, path: str | Path, *, fidelity: Mapping[str, Any] | None, overwrite: bool = False
) -> Bundle:
    """Write a bundle anew elsewhere, with another fidelity in its manifest.

    Raises:
        BundleError: if the destination cannot be written.
    """

    def write(onnx_path: Path) -> Manifest:
        for name in read_header(bundle.path).values["files"]:
            shutil.copyfile(bundle.path / name, onnx_path.with_name(name))
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
    needed = (WEIGHTS, QUANTIZERS, RECIPE) if manifest.simulated else (MODEL, RECIPE)
    size = check_files(folder, header, needed)
    return Bundle(path=folder, manifest=manifest, size_bytes=size, digest=header.digest)


def _read_manifest(folder: Path, values: Mapping[str, Any]) -> Manifest:
    """Check every value and build the manifest.

    Raises:
        BundleError: naming the first that is wrong.
    """
    try:
        return _manifest(values, name=f"{folder}/{MANIFEST}")
    except (ImplausibleError, VitfoldError) as error:
        raise BundleError(f"{folder / MANIFEST} is damaged: {error}; make the bundle again") from None


_SIZE: Range = (1, 2**16)
_WIDTH: Range = (1, 2**20)
_SPEC: dict[str, Range] = {
    **dict.fromkeys(("image_size", "patch_size"), _SIZE),
    **dict.fromkeys(("channels", "num_layers", "num_heads", "head_dim"), _SIZE),
    **dict.fromkeys(("embed_dim", "mlp_dim"), _WIDTH),
    **dict.fromkeys(("registers", "map_heads", "map_mlp_width", "outputs"), (0, 2**24)),
    "norm_eps": (0.0, 1.0),
}
_PREPROCESS: dict[str, Range] = {
    **dict.fromkeys(("resize_size", "crop_size"), _SIZE),
    "mean": (-1e3, 1e3),
    "std": (1e-6, 1e3),
}
_RECIPE: dict[str, Range] = {"r": (0, 2**24), "calibration_size": (1, 2**31), "seed": (-(2**63), 2**63)}
_SECTIONS = {"merge": MergeRecipe, "quant": QuantRecipe, "registers": RegistersRecipe}
_FIDELITY: dict[str, Range] = {
    **dict.fromkeys(("top1", "top5", "agreement"), (0.0, 1.0)),
    "cosine": (-1.01, 1.01),
    "sqnr_db": (-1e4, 1e4),
}


def _manifest(values: Mapping[str, Any], *, name: str) -> Manifest:
    spec = _spec(with_names_of_today(values.get("spec")))
    recipe = _recipe(values.get("recipe"), name)
    target = checked_target(values.get("target"))
    _check_quantization(target, recipe)
    check_fields(Preprocess, values.get("preprocess"), "preprocess", _PREPROCESS)
    labels = entry(values, "labels", tuple[str, ...] | None)
    if labels is not None and len(labels) != spec.output_width:
        raise ImplausibleError(f"there are {len(labels)} labels for {spec.output_width} outputs")
    fidelity = entry(values, "fidelity", Mapping[str, Any] | None)
    if fidelity is not None:
        entry(fidelity, "images", int, "fidelity", COUNT)
        for key, within in _FIDELITY.items():
            entry(fidelity, key, float | None, "fidelity", within)
    return Manifest(
        vitfold=entry(values, "vitfold", str),
        spec=spec,
        preprocess=preprocess_from_dict(values["preprocess"]),
        labels=labels,
        recipe=recipe,
        target=target,
        tokens=_tokens(values, spec, recipe),
        macs=entry(values, "macs", int, within=COUNT),
        origin=checked_origin(values.get("origin")),
        model_digest=sha256_entry(values, "model_digest"),
        verified=checked_verified(values.get("verified")),
        fidelity=fidelity,
        calibration=_calibration(entry(values, "calibration", Mapping[str, Any] | None)),
    )


def _check_quantization(target: Mapping[str, Any], recipe: Recipe) -> None:
    """Check that a target says of quantized products what decides how they run."""
    if recipe.quant is None and target["engine"] == "simulation":
        raise ImplausibleError("the bundle is simulated, and its recipe quantizes nothing")
    if recipe.quant is not None:
        for key in ("activation_type", "quantized_product", "weight_bits"):
            if key not in target:
                raise ImplausibleError(f"target.{key} is missing")


def _spec(value: Any) -> ViTSpec:
    values = check_fields(ViTSpec, value, "spec", _SPEC)
    if values.get("sinks") is not None:
        check_fields(Sinks, values["sinks"], "spec.sinks", {"tau": (0.0, 1e9), "rows": (0, 2**16)})
    return vit_spec_from_dict(values)


def _recipe(value: Any, name: str) -> Recipe:
    values = section(value, "recipe")
    for key, kind in _SECTIONS.items():
        if key in values:
            check_fields(kind, values[key], f"recipe.{key}", _RECIPE)
    return recipe_from_dict(values, name=name)


def _tokens(values: Mapping[str, Any], spec: ViTSpec, recipe: Recipe) -> tuple[int, ...]:
    found: tuple[int, ...] = entry(values, "tokens", tuple[int, ...], within=(1, 2**32))
    expected = tokens_per_block(spec, recipe.merge.r)
    # Tokens that a remedy against sinks deletes are in the spec of simulated bundles only.
    if recipe.registers is None and found != expected:
        raise ImplausibleError(f"tokens are {_short(found)}, and the recipe gives {_short(expected)}")
    if len(found) != len(expected):
        raise ImplausibleError(f"tokens has {len(found)} entries for {spec.num_layers} blocks")
    return found


def _short(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")


def _calibration(values: dict[str, Any] | None) -> dict[str, Any] | None:
    if values is None:
        return None
    method = section(values.get("method"), "calibration.method")
    for key in ("name", "activations"):
        entry(method, key, str, "calibration.method")
    _check_environment(section(values.get("environment"), "calibration.environment"))
    entry(values, "seed", int, "calibration", _RECIPE["seed"])
    entry(values, "root", str, "calibration")
    sha256_entry(values, "quantizers", "calibration")
    images = values.get("images")
    if not isinstance(images, list):
        as_type(images, tuple[str, ...], "calibration.images")
    for i, image in enumerate(images or ()):
        where = f"calibration.images[{i}]"
        name = entry(section(image, where), "path", str, where)
        if name.startswith("/") or ".." in name.split("/"):
            raise ImplausibleError(f"{where}.path leads out of the folder of images")
        sha256_entry(image, "sha256", where)
    return values


def _check_environment(values: dict[str, Any]) -> None:
    where = "calibration.environment"
    processor = section(values.get("processor"), f"{where}.processor")
    for key, kind in (("name", str), ("architecture", str), ("instruction_sets", tuple[str, ...])):
        entry(processor, key, kind, f"{where}.processor")
    entry(values, "threads", int, where, (1, 2**20))
    for key in ("system", "python"):
        entry(values, key, str, where)
    packages = section(values.get("packages"), f"{where}.packages")
    for name in packages:
        entry(packages, name, str | None, f"{where}.packages")
