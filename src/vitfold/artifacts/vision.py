"""What a manifest says of a model of images, checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitfold.artifacts.manifest import COUNT, sha256_entry
from vitfold.model import Architecture, Preprocess, ViTSpec, preprocess_from_dict, spec_from_dict
from vitfold.model.graph import KIND
from vitfold.model.sinks import Sinks
from vitfold.model.spec import with_names_of_today
from vitfold.recipe import (
    MergeRecipe,
    PruneRecipe,
    QuantRecipe,
    Recipe,
    RegistersRecipe,
    recipe_from_dict,
    tokens_per_block,
)
from vitfold.storage.checked import ImplausibleError, Range, as_type, check_fields, entry, section
from vitfold.target import ENGINES


@dataclass(frozen=True, slots=True, kw_only=True)
class Vision:
    """The Vision Transformer that a graph holds, without its weights, and what was done to it.

    `tokens` are those that enter each block and those that leave the last; `macs` are per image. `fidelity` says how
    far the bundle is from the unfolded model on real images, if any were given, `calibration` how a quantized bundle
    was calibrated: method, seed, images with their digests, environment, and `compensation` on how many images which
    layers were refitted to merging, with which ridge, and the error of the output on held-out images before and after.
    """

    spec: Architecture
    preprocess: Preprocess
    recipe: Recipe
    tokens: tuple[int, ...]
    macs: int
    fidelity: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    compensation: Mapping[str, Any] | None = None


_SIZE: Range = (1, 2**16)
_WIDTH: Range = (1, 2**20)
_SPEC: dict[str, Range] = {
    **dict.fromkeys(("image_size", "patch_size"), _SIZE),
    **dict.fromkeys(("channels", "num_layers", "num_heads", "head_dim", "block_heads", "block_head_dims"), _SIZE),
    **dict.fromkeys(("embed_dim", "mlp_dim", "block_mlp_dims"), _WIDTH),
    **dict.fromkeys(("registers", "map_heads", "map_mlp_width", "outputs"), (0, 2**24)),
    "norm_eps": (0.0, 1.0),
}
_PREPROCESS: dict[str, Range] = {
    **dict.fromkeys(("resize_size", "crop_size", "arrays"), _SIZE),
    "mean": (-1e3, 1e3),
    "std": (1e-6, 1e3),
}
_RECIPE: dict[str, Range] = {
    "units": _WIDTH,
    "heads": _SIZE,
    "head_dims": _SIZE,
    "r": (0, 2**24),
    "calibration_size": (1, 2**31),
    "seed": (-(2**63), 2**63),
}
_SECTIONS = {"merge": MergeRecipe, "quant": QuantRecipe, "registers": RegistersRecipe, "prune": PruneRecipe}
_FIDELITY: dict[str, Range] = {
    **dict.fromkeys(("top1", "top5", "agreement", "miou"), (0.0, 1.0)),
    "cosine": (-1.01, 1.01),
    "sqnr_db": (-1e4, 1e4),
}


def read_vision(
    values: Mapping[str, Any], *, labels: tuple[str, ...] | None, target: Mapping[str, Any], name: str
) -> Vision:
    """Return what a manifest says of a Vision Transformer; `name` is the file's, for messages.

    Raises:
        ImplausibleError: naming the first value that is wrong.
        VitfoldError: if the spec or the recipe is none that this vitfold knows.
    """
    spec = _spec(with_names_of_today(values.get("spec")))
    recipe = _recipe(values.get("recipe"), name)
    _check_quantization(target, recipe)
    check_fields(Preprocess, values.get("preprocess"), "preprocess", _PREPROCESS)
    if labels is not None and len(labels) != spec.output_width:
        raise ImplausibleError(f"there are {len(labels)} labels for {spec.output_width} outputs")
    fidelity = entry(values, "fidelity", Mapping[str, Any] | None)
    if fidelity is not None:
        entry(fidelity, "images", int, "fidelity", COUNT)
        for key, within in _FIDELITY.items():
            entry(fidelity, key, float | None, "fidelity", within)
    return Vision(
        spec=spec,
        preprocess=preprocess_from_dict(values["preprocess"]),
        recipe=recipe,
        tokens=_tokens(values, spec, recipe),
        macs=entry(values, "macs", int, within=COUNT),
        fidelity=fidelity,
        calibration=_calibration(entry(values, "calibration", Mapping[str, Any] | None)),
        compensation=_compensation(entry(values, "compensation", Mapping[str, Any] | None)),
    )


def _check_quantization(target: Mapping[str, Any], recipe: Recipe) -> None:
    """Check that a target says of quantized products what decides how they run."""
    if recipe.quant is None and not ENGINES[target["engine"]].executes:
        raise ImplausibleError("the bundle is simulated, and its recipe quantizes nothing")
    if recipe.quant is not None:
        for key in ("activation_type", "quantized_product", "weight_bits"):
            if key not in target:
                raise ImplausibleError(f"target.{key} is missing")


def _spec(value: Any) -> Architecture:
    if isinstance(value, dict) and value.get("kind") == KIND:
        return spec_from_dict(value)
    values = check_fields(ViTSpec, value, "spec", _SPEC)
    if values.get("sinks") is not None:
        check_fields(Sinks, values["sinks"], "spec.sinks", {"tau": (0.0, 1e9), "rows": (0, 2**16)})
    return spec_from_dict(values)


def _recipe(value: Any, name: str) -> Recipe:
    values = section(value, "recipe")
    for key, kind in _SECTIONS.items():
        if key in values:
            check_fields(kind, values[key], f"recipe.{key}", _RECIPE)
    return recipe_from_dict(_stated(values), name=name)


def _stated(values: dict[str, Any]) -> dict[str, Any]:
    """Say what bundles of before `quant.calibrate_merged` was written left unsaid: they were calibrated merged."""
    quant, merge = values.get("quant"), values.get("merge")
    if quant is None or merge is None or "calibrate_merged" in quant or not any(merge["r"]):
        return values
    return {**values, "quant": {**quant, "calibrate_merged": True}}


def _tokens(values: Mapping[str, Any], spec: Architecture, recipe: Recipe) -> tuple[int, ...]:
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


def _compensation(values: dict[str, Any] | None) -> dict[str, Any] | None:
    if values is None:
        return None
    where = "compensation"
    for key in ("images", "held_out"):
        entry(values, key, int, where, COUNT)
    for key in ("error_before", "error_after"):
        entry(values, key, float, where, (0.0, 1e39))
    entry(values, "root", str, where)
    entry(values, "seed", int, where, _RECIPE["seed"])
    sha256_entry(values, "digest", where)
    layers = values.get("layers")
    if not isinstance(layers, list):
        as_type(layers, tuple[str, ...], f"{where}.layers")
    for i, layer in enumerate(layers or ()):
        at = f"{where}.layers[{i}]"
        entry(section(layer, at), "layer", str, at)
        entry(layer, "ridge", float | None, at, (0.0, 1e9))
        entry(layer, "left_ratio", float, at, (-1.0, 1e9))
        for key in ("units", "heads", "head_dim"):
            if key in layer:
                entry(layer, key, int, at, _WIDTH)
    return values


def _check_environment(values: dict[str, Any]) -> None:
    where = "calibration.environment"
    processor = section(values.get("processor"), f"{where}.processor")
    for key, kind in (("name", str), ("architecture", str), ("instruction_sets", tuple[str, ...])):
        entry(processor, key, kind, f"{where}.processor")
    settings = section(processor.get("settings", {}), f"{where}.processor.settings")
    for name in settings:
        entry(settings, name, str, f"{where}.processor.settings")
    entry(values, "threads", int, where, (1, 2**20))
    for key in ("system", "python"):
        entry(values, key, str, where)
    packages = section(values.get("packages"), f"{where}.packages")
    for name in packages:
        entry(packages, name, str | None, f"{where}.packages")
