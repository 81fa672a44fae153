"""Calibration as a step of the pipeline: which images, by which method, and what the bundle says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitfold.bench.environment import environment
from vitfold.errors import CalibrationError, RecipeError
from vitfold.images import ImageSet
from vitfold.pipeline.plan import Plan, keep_fusible
from vitfold.recipe import FLOAT, MergeRecipe, Recipe, tokens_per_block
from vitfold.storage.digest import file_sha256
from vitfold.target import Target

if TYPE_CHECKING:
    from vitfold.quant import Calibrated, Progress, QuantConstraints
    from vitfold.quant.sensitivity import SiteSensitivity
    from vitfold.registers import RemedySearchResult

RANKING_IMAGES = 24


def constraints_of(target: Target) -> QuantConstraints:
    """Return what calibration has to respect on a target."""
    from vitfold.quant import QuantConstraints

    return QuantConstraints.of(target)


def calibration_merging(recipe: Recipe) -> MergeRecipe:
    """Return the merging of the model that is calibrated: the recipe's, or none."""
    assert recipe.quant is not None
    return recipe.merge if recipe.quant.calibrate_merged else MergeRecipe(r=())


def split_images(folded: Plan, images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return the calibration images that the recipe draws, and the others for comparing; all, if none are left."""
    quant = folded.recipe.quant
    assert quant is not None
    chosen = images.sample(quant.calibration_size, seed=quant.seed)
    return chosen, images.without(chosen) or images


def find_registers(
    folded: Plan, images: ImageSet, *, progress: Progress | None = None
) -> tuple[Plan, RemedySearchResult | None]:
    """Fold what the recipe says about sink tokens, found by measurement on the images where it leaves that open.

    Also returns what was measured, None where nothing had to be. A recipe without registers, or a plan that has them
    already, is returned as it is; "auto" may find that nothing is worth doing.

    Raises:
        RecipeError: if the recipe does not fit the model.
    """
    wanted = folded.recipe.registers
    if wanted is None or folded.folded.spec.sinks is not None:
        return folded, None
    from vitfold.registers import explain, fold_registers, measure_remedies

    quant = folded.recipe.quant
    assert quant is not None
    found: RemedySearchResult | None = None
    if not wanted.resolved:
        names = None if wanted.remedy == "auto" else (wanted.remedy,)
        scheme = constraints_of(folded.target)
        found = measure_remedies(
            folded.folded, folded.recipe.merge, quant, images, names=names, confirm=scheme, progress=progress
        )
        folded = replace(folded, remarks=(*folded.remarks, explain(found)))
        if found.chosen.recipe is None:
            return replace(folded, recipe=replace(folded.recipe, registers=None)), found
        wanted = found.chosen.recipe
    if progress is not None:
        progress.step(f"registers: {wanted.remedy}")
    advance = None if progress is None else progress.advance
    model = fold_registers(folded.folded, wanted, images, advance=advance)
    recipe, remarks = keep_fusible(replace(folded.recipe, registers=wanted), folded.target, model.spec)
    remarks = tuple(dict.fromkeys((*folded.remarks, *remarks)))
    done = replace(folded, folded=model, recipe=recipe, remarks=remarks)
    tokens_per_block(model.spec, recipe.merge.r)
    return done, found


def calibrate_plan(folded: Plan, images: ImageSet, *, progress: Progress | None = None) -> Plan:
    """Quantize a planned model on exactly these images, after doing something about its sinks where it says so.

    Raises:
        CalibrationError: on images or activations that give no ranges.
    """
    from vitfold.quant import calibrate, find_method

    if folded.needs_compensation:
        raise RecipeError("weights are refitted before calibration; call compensate_plan first")
    folded, _ = find_registers(folded, images, progress=progress)
    quant = folded.recipe.quant
    if quant is None:
        return folded
    merge = calibration_merging(folded.recipe)
    done = calibrate(folded.folded, merge, quant, images, scheme=constraints_of(folded.target), progress=progress)
    settings = environment()
    polished: dict[str, Any] = {}
    if quant.polish_minutes:
        done, polished["polish"] = polish(folded, done, images, progress=progress)
        folded = replace(folded, remarks=(*folded.remarks, explain_polish(polished["polish"])))
    record = {
        "method": find_method(quant.method).to_dict(),
        "seed": quant.seed,
        "root": str(Path(images.root).absolute()),
        "images": [
            {"path": path.relative_to(images.root).as_posix(), "sha256": file_sha256(path)} for path in images.paths
        ],
        "environment": {key: settings[key] for key in ("processor", "threads", "system", "python", "packages")},
        "quantizers": done.quantizers.digest(),
        **polished,
    }
    return replace(folded, folded=done.model, quantizers=done.quantizers, calibration=record)


def polish(
    folded: Plan, done: Calibrated, images: ImageSet, *, progress: Progress | None = None
) -> tuple[Calibrated, dict[str, Any]]:
    """Train what was calibrated to give what the original gives, unmerged and in float; also say how that went.

    Raises:
        CalibrationError: on too few images.
        RecipeError: if no gradient reaches anything that could be trained.
    """
    from vitfold.quant.network import ImageExamples, network_of
    from vitfold.quant.polish import polish_network

    quant = folded.recipe.quant
    assert quant is not None
    found = polish_network(
        network_of(folded.model, MergeRecipe(r=())),
        network_of(done.model, folded.recipe.merge),
        done.quantizers,
        ImageExamples(images=images, preprocess=folded.model.preprocess),
        budget=quant.polish_minutes * 60.0,
        seed=quant.seed,
        half_scales=constraints_of(folded.target).half_scales,
        say=(lambda _: None) if progress is None else progress.step,
    )
    model = done.model.with_params(done.model.spec, found.params)
    return replace(done, model=model, quantizers=found.quantizers), found.record.to_dict()


def explain_polish(record: Mapping[str, Any]) -> str:
    """Say in a sentence what polishing did."""
    measured = f"{record['updates']} updates on {record['images']} images; on {record['held_out']} held out the loss"
    if record["kept"]:
        return f"polished: {measured} fell from {record['loss_before']:.4g} to {record['loss_after']:.4g}"
    return f"not polished: {measured} did not fall below {record['loss_before']:.4g}, so the calibrated model is kept"


def rank_sites(
    folded: Plan, calibration: ImageSet, images: ImageSet, *, progress: Progress | None = None
) -> tuple[SiteSensitivity, ...]:
    """Return every site that the plan quantizes, the costliest first, measured on `images`."""
    from vitfold.quant import calibrate
    from vitfold.quant.sensitivity import measure_sensitivity

    quant = folded.recipe.quant
    if quant is None:
        raise RecipeError("sensitivity needs a quantization; add --quant w8a8")
    merge = folded.recipe.merge
    seen = calibration_merging(folded.recipe)
    done = calibrate(folded.folded, seen, quant, calibration, scheme=constraints_of(folded.target), progress=progress)
    if progress is None:
        return measure_sensitivity(done, merge, images)
    return measure_sensitivity(done, merge, images, step=progress.step)


def keep_float(
    folded: Plan, calibration: ImageSet, count: int, *, scheme: str = FLOAT, progress: Progress | None = None
) -> Plan:
    """Return the plan with its `count` most sensitive sites left float, or rounded by another `scheme`, as "w8a16".

    They are found on calibration images: what they cost is a property of the model, not of these images.
    """
    quant = folded.recipe.quant
    if quant is None:
        return folded
    ranked = rank_sites(folded, calibration, calibration.first(RANKING_IMAGES), progress=progress)
    sites = {**quant.sites, **{one.site: scheme for one in ranked[:count]}}
    return replace(folded, recipe=replace(folded.recipe, quant=replace(quant, sites=sites)))


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
