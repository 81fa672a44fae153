"""`vitfold optimize`: a model in, a verified bundle out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitfold import pipeline
from vitfold.artifacts.bundle import open_bundle
from vitfold.artifacts.digested import check_destination, reserve_bundle
from vitfold.bench.environment import environment
from vitfold.bench.reference import reference_from_origin
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.finishing import check_room, make_bundle, publish
from vitfold.cli.groups import CalibrationArgs, ModelArgs, RecipeArgs, SearchArgs, refuse
from vitfold.cli.making import given_images, judged_images, quant_recipe, require_optimize, say_busy
from vitfold.cli.optimized import OptimizeResult, print_solution, report_made
from vitfold.cli.searching import Bounded, run_search
from vitfold.cli.terminal import counted, note, quiet_stdout, skipped, steps, working
from vitfold.decoding import check_readable
from vitfold.errors import GateError, ImageError, VitfoldError
from vitfold.images import find_images
from vitfold.progress import Say
from vitfold.recipe import MergeRecipe
from vitfold.schedule import resolve_r
from vitfold.target import find_target

if TYPE_CHECKING:
    from vitfold.images import ImageSet
    from vitfold.model import Model
    from vitfold.pipeline import Plan, Solution
    from vitfold.pipeline.plan import Merge
    from vitfold.recipe import PruneRecipe, QuantRecipe
    from vitfold.registers import RemedySearchResult


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What the command line asks for."""

    source: str | None
    output: Path | None
    images: Path | None
    calibration_images: Path | None
    wanted: RecipeArgs
    calibration: CalibrationArgs
    search: SearchArgs
    model: ModelArgs
    dry_run: bool
    skip_bad: bool
    overwrite: bool
    min_agreement: float | None
    json: bool

    def load(self, say: Say) -> Model:
        assert self.source is not None
        return self.model.load(self.source, say)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be made, the images that ranges and refitted layers come from, and those that it is compared on."""

    folded: Plan
    calibration: ImageSet | None
    comparing: ImageSet | None
    refitting: ImageSet | None = None


@command(
    shown="output merge quant images max_drop target dry_run overwrite json",
    brief={
        "source": "timm:NAME, hf:FOLDER, torchvision:NAME, open_clip:NAME, FILE.onnx or FILE.safetensors.",
        "merge": "Tokens merged per block, as 8 or 8,8,4; auto; or none.",
        "quant": "Bits of weights and activations, as w8a8, or none.",
        "images": "Photos, or a sub-folder per class; needed to quantize.",
        "max_drop": "Search the fastest recipe within a drop in top-1.",
        "target": "Engine: cpu, openvino, tensorrt-int8, fastest, ...",
        "json": "Print JSON on stdout instead of tables.",
    },
    examples=(
        "vitfold optimize demo --merge 2 -o demo.fold",
        "vitfold optimize timm:vit_base_patch16_224 --merge 8 --quant w8a8 \\",
        "    --images PHOTOS -o vit.fold",
        "vitfold optimize mine.safetensors --arch vit_small_patch16_224 \\",
        "    --num-classes 7 --images VAL --max-drop 1 -o mine.fold",
    ),
)
def optimize(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="demo, timm:NAME, hf:REPO_OR_FOLDER, torchvision:NAME, open_clip:NAME, FILE.onnx, FILE.pt2, "
            "FILE.py:FUNCTION, or FILE.safetensors with "
            "--arch; not with --from.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.fold", help="The bundle to write.")
    ] = None,
    images: options.Images = None,
    calibration_images: options.CalibrationImages = None,
    *,
    wanted: RecipeArgs,
    calibration: CalibrationArgs,
    search: SearchArgs,
    model: ModelArgs,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    skip_bad: options.SkipBad = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    min_agreement: options.MinAgreement = None,
    json: options.Json = False,
) -> None:
    """Merge tokens, quantize, emit ONNX, verify it in the engine and write a bundle."""
    job = _Job(
        source=source,
        output=output,
        images=images,
        calibration_images=calibration_images,
        wanted=wanted,
        calibration=calibration,
        search=search,
        model=model,
        dry_run=dry_run,
        skip_bad=skip_bad,
        overwrite=overwrite,
        min_agreement=min_agreement,
        json=json,
    )
    _check(job)
    require_optimize()
    if output is not None and not dry_run:
        check_destination(output, overwrite=overwrite)
    find_target(wanted.base)
    found = None if images is None else given_images(images)
    if search:
        _search(job, found)
    else:
        _make(job, found)


def _check(job: _Job) -> None:
    """Refuse options that contradict each other, before any work."""
    wanted = job.wanted
    refuse(
        (job.output is None and not job.dry_run, "give -o OUT.fold, or --dry-run", "-o"),
        ((job.source is None) == (wanted.repeat is None), "give either SOURCE or --from BUNDLE", "SOURCE"),
        (job.min_agreement is not None and job.images is None, "--min-agreement needs --images", "--min-agreement"),
        (
            job.calibration_images is not None and wanted.repeat is not None,
            "--from takes the images that its bundle names; leave it out",
            "--calibration-images",
        ),
        (
            job.model.exif is not None and wanted.repeat is not None,
            "--from reads images as its bundle does; leave it out",
            "--exif",
        ),
        *_refused_recipes(job),
        *_refused_searches(job),
    )


def _refused_recipes(job: _Job) -> tuple[tuple[bool, str, str], ...]:
    """What a recipe and the options that stand for one may not be asked together, or without images."""
    wanted = job.wanted
    merge, target = wanted.merge or "", wanted.target or ""
    quantizes = bool(wanted.quant) or target.startswith("tensorrt")
    named = wanted.recipe is not None or wanted.repeat is not None
    unseen = (job.images or job.calibration_images) is None
    return (
        (
            wanted.recipe is not None and wanted.chosen,
            "give either --recipe or --merge, --quant, --method and --registers",
            "--recipe",
        ),
        (
            wanted.merge_rule != "tome" and (named or merge.startswith("auto")),
            "--merge-rule goes with tokens that --merge names",
            "--merge-rule",
        ),
        (
            wanted.method is not None and not quantizes,
            "--method needs --quant, for example --quant w8a8",
            "--method",
        ),
        (
            wanted.calibrate_merged and (named or not quantizes),
            "--calibrate-merged needs --quant, for example --quant w8a8; recipes say quant.calibrate_merged = true",
            "--calibrate-merged",
        ),
        (
            wanted.polish > 0 and (named or not quantizes),
            "--polish needs --quant, for example --quant w4a4; recipes say quant.polish_minutes = 6",
            "--polish",
        ),
        (
            wanted.compensate and (unseen or (merge in ("", "0", "none") and not job.search)),
            "--compensate needs --images, and goes with --merge; recipes say merge.compensate = true",
            "--compensate",
        ),
        (
            (wanted.prune, wanted.prune_mlp) != (None, None) and unseen,
            "--prune and --prune-mlp refit weights on images: give --images DIR, some 2000 like those that the model "
            "will see",
            "--images",
        ),
        (None not in (wanted.prune, wanted.prune_mlp), "give either --prune or --prune-mlp", "--prune"),
        (
            wanted.prune is not None and wanted.repeat is not None,
            "--from takes the recipe of its bundle; leave it out",
            "--prune",
        ),
    )


def _refused_searches(job: _Job) -> tuple[tuple[bool, str, str], ...]:
    """What a search needs, and what it chooses by itself."""
    wanted, search, bounds = job.wanted, job.search, "--max-drop, --max-latency-ms"
    own = (
        any((wanted.merge, wanted.method, wanted.registers, wanted.recipe, wanted.compensate))
        or (wanted.prune, wanted.prune_mlp) != (None, None)
        or wanted.keep_float > 0
        or wanted.calibrate_merged
        or wanted.polish > 0
        or job.dry_run
    )
    return (
        (search.max_drop is not None and search.max_latency_ms is not None, "give one of both", bounds),
        (bool(search) and job.images is None, "a search measures on images: give --images DIR", "--images"),
        (
            bool(search) and own,
            "a search chooses --merge, --compensate, --prune, --method, --registers, --keep-float and recipes, without "
            "--polish; leave them out",
            bounds,
        ),
        (bool(search) and job.source is None, "a search needs SOURCE", "SOURCE"),
    )


def _search(job: _Job, found: ImageSet | None) -> None:
    """Find the recipe by measurement, and write its bundle."""
    assert found is not None
    assert job.output is not None
    with steps("search") as say:
        model = job.load(say)
    bounded = Bounded(
        search=job.search,
        calibration=job.calibration,
        calibration_images=job.calibration_images,
        quant=job.wanted.quant,
        target=job.wanted.target,
    )
    before = environment()
    run_search(model, found, job.output, bounded, overwrite=job.overwrite, json=job.json)
    say_busy(before)


def _make(job: _Job, found: ImageSet | None) -> None:
    """Make the bundle of a recipe that was named, or of `--merge auto`."""
    wanted, solution, measured = job.wanted, None, None
    destination = None if job.dry_run else job.output
    reserving = nullcontext() if destination is None else reserve_bundle(destination, overwrite=job.overwrite)
    with reserving as place, working("optimize") as (say, advance):
        if wanted.repeat is not None:
            plan = _repeated(wanted.repeat, job.images, found, say)
        else:
            plan, solution = _planned(job, found, say)
        made = OptimizeResult(folded=plan.folded)
        if place is not None:
            check_room(place, plan.folded)
            plan = _decodable(plan, skip_bad=job.skip_bad)
            plan, measured = _calibrated(plan, wanted.keep_float, say, advance)
            if wanted.target == "fastest":
                say("racing ONNX Runtime and OpenVINO")
                plan = replace(plan, folded=pipeline.fastest(plan.folded))
            race = None if plan.calibration is None or wanted.repeat is not None else pipeline.race
            merging = None if wanted.repeat is not None else pipeline.race_merging
            made = make_bundle(
                *(plan.folded, plan.comparing, place, say),
                race=race,
                merging=merging,
                keep_slower=wanted.keep_slower,
            )
            made = publish(made, place, job.min_agreement)
    report_made(made, measured, json=job.json)
    if solution is not None:
        print_solution(solution)
    for remark in made.folded.remarks:
        note(remark)
    if job.images is not None and job.model.weights == "random":
        note("random weights: no fidelity was measured, since their outputs hardly depend on the image")
    if made.missed is not None:
        raise GateError(made.missed)


def _planned(job: _Job, found: ImageSet | None, say: Say) -> tuple[_Plan, Solution | None]:
    """Load the model and plan what options say of it."""
    wanted, calibration, solution = job.wanted, job.calibration, None
    model = job.load(say)
    found = None if found is None else judged_images(found, model.spec, model.labels)
    read = None if wanted.recipe is None else pipeline.read_recipe(wanted.recipe, model.spec)
    implied = None if read is not None else find_target(wanted.base).implied_quant
    asked = quant_recipe(wanted.quant or implied, wanted.method, calibration)
    if asked is not None:
        asked = replace(asked, calibrate_merged=wanted.calibrate_merged, polish_minutes=wanted.polish)
    batches = wanted.batches()
    schedule: str | tuple[int, ...] | None = wanted.merge
    if wanted.merge is not None and wanted.merge.partition(":")[0] == "auto":
        solution = _solved(model, found, wanted, say, asked)
        schedule = solution.r
    own = None if job.calibration_images is None else given_images(job.calibration_images)
    folded = pipeline.optimize(
        model,
        merge=schedule,
        rule=wanted.merge_rule,
        compensate=wanted.compensate,
        prune=wanted.prune_mlp if wanted.prune is None else _pruned(model, schedule, wanted, asked, own, found, say),
        quant=asked or wanted.quant,
        registers=wanted.registers,
        recipe=read,
        target=wanted.base,
        batch=batches,
    )
    plan = _divided(folded, found, own, dry_run=job.dry_run)
    from vitfold.pipeline.foreseen import foreseen

    for remark in foreseen(folded, plan.calibration, keep_float=wanted.keep_float):
        note(remark)
    return plan, solution


def _solved(model: Model, found: ImageSet | None, wanted: RecipeArgs, say: Say, quant: QuantRecipe | None) -> Solution:
    """Find the schedule of `--merge auto`, or auto:R for the distortion of another constant R."""
    if found is None:
        raise VitfoldError("--merge auto measures on images what merging does: give --images DIR")
    target, batch = wanted.base, wanted.batches()
    like = str(wanted.merge).partition(":")[2] or pipeline.LIKE
    if find_target(target).runtime.gpu:
        usual = pipeline.USUAL_BATCH if batch is None else batch[1]
        pipeline.check_forecast(model.spec, target=target, gpu=wanted.gpu, batch=usual)
        merging = pipeline.measure_merging(model, found, **pipeline.ON_GPUS, say=say)
        say("solving")
        return pipeline.solve_merge(merging, target=target, gpu=wanted.gpu, batch=usual, like=like)
    plan = pipeline.roughly_calibrated(model, quant, target, found)
    table = pipeline.measure_latency(plan, say=say)
    merging = pipeline.measure_merging(model, found, **pipeline.on_this_machine(plan), say=say)
    say("solving")
    return pipeline.solve_measured(merging, table, like=like)


def _pruned(
    model: Model,
    schedule: Merge,
    wanted: RecipeArgs,
    quant: QuantRecipe | None,
    own: ImageSet | None,
    found: ImageSet | None,
    say: Say,
) -> PruneRecipe:
    """Find which heads and hidden units stay where a share of the blocks' work goes, on the images of refitting."""
    from vitfold.quant import Progress

    assert wanted.prune is not None
    images = own
    if images is None:
        assert found is not None
        images, _ = pipeline.divide_for_compensation(found)
    merge = MergeRecipe(r=resolve_r(schedule, model.spec), rule=wanted.merge_rule)
    widths = pipeline.fusible_widths(find_target(wanted.base), quant)
    return pipeline.solve_prune(model, merge, images, wanted.prune, widths=widths, progress=Progress(step=say))


def _repeated(path: Path, images: Path | None, found: ImageSet | None, say: Say) -> _Plan:
    """Plan what a bundle was made with: its model, its recipe, its target, its calibration images."""
    given = open_bundle(path)
    manifest = given.manifest
    say(f"loading {manifest.origin['source']}")
    with quiet_stdout():
        model = reference_from_origin(given).model
    assert model is not None
    batch = manifest.target.get("batch")
    folded = pipeline.optimize(
        model,
        recipe=manifest.recipe,
        target=str(manifest.target["name"]),
        batch=None if batch is None else tuple(batch),
    )
    if manifest.compensation is not None:
        refitting, others = pipeline.recorded_division(manifest.compensation, images)
        calibration = None
        if manifest.calibration is not None:
            calibration = pipeline.recorded_images(manifest.calibration, images)
        comparing = judged_images(others, model.spec, model.labels)
        return _Plan(folded=folded, calibration=calibration, comparing=comparing, refitting=refitting)
    if manifest.calibration is None:
        found = None if found is None else judged_images(found, model.spec, model.labels)
        return _Plan(folded=folded, calibration=None, comparing=found)
    calibration = pipeline.recorded_images(manifest.calibration, images)
    everything = judged_images(found or find_images(calibration.root), model.spec, model.labels)
    return _Plan(folded=folded, calibration=calibration, comparing=everything.without(calibration) or everything)


def _divided(folded: Plan, found: ImageSet | None, own: ImageSet | None, *, dry_run: bool) -> _Plan:
    """Divide the images between calibration and comparison; calibration may have images of its own.

    Raises:
        VitfoldError: if the recipe quantizes or compensates and there are no images.
    """
    if folded.needs_compensation and not (found is None and own is None and dry_run):
        if own is not None:
            refitting = pipeline.all_for_compensation(own)
            calibration = pipeline.split_images(folded, refitting)[0] if folded.needs_calibration else None
            return _Plan(folded=folded, calibration=calibration, comparing=found, refitting=refitting)
        if found is None:
            raise VitfoldError(
                "compensating merging and pruning refit weights on images: give --images DIR, some 2000 pictures like "
                "those that the model will see"
            )
        refitting, comparing = pipeline.divide_for_compensation(found)
        calibration = pipeline.split_images(folded, refitting)[0] if folded.needs_calibration else None
        return _Plan(folded=folded, calibration=calibration, comparing=comparing, refitting=refitting)
    if not folded.needs_calibration or (found is None and own is None and dry_run):
        return _Plan(folded=folded, calibration=None, comparing=found)
    if own is not None:
        calibration, others = pipeline.split_images(folded, own)
        return _Plan(folded=folded, calibration=calibration, comparing=found or others)
    if found is None:
        raise VitfoldError(
            "quantization calibrates on images: give --images DIR, some hundred pictures like those that "
            "the model will see"
        )
    calibration, comparing = pipeline.split_images(folded, found)
    return _Plan(folded=folded, calibration=calibration, comparing=comparing)


def _decodable(plan: _Plan, *, skip_bad: bool) -> _Plan:
    """Check every image before minutes of calibration, or leave the unreadable ones out."""
    calibration = plan.calibration
    comparing = None if plan.comparing is None else plan.comparing.first(pipeline.FIDELITY_IMAGES)
    if not skip_bad:
        for image_set in (plan.refitting or calibration, comparing):
            for path in () if image_set is None or (plan.refitting or calibration) is None else image_set.paths:
                check_readable(path)
        return replace(plan, comparing=comparing)
    calibration = None if calibration is None else calibration.readable(skipped)
    refitting = None if plan.refitting is None else plan.refitting.readable(skipped)
    if comparing is not None:
        try:
            comparing = comparing.readable(skipped)
        except ImageError:
            if calibration is None:
                raise
            comparing = calibration
    return replace(plan, calibration=calibration, comparing=comparing, refitting=refitting)


def _calibrated(
    plan: _Plan, keep_float: int, say: Say, advance: Callable[[int, int], None]
) -> tuple[_Plan, RemedySearchResult | None]:
    """Compensate, find registers and quantize, where asked for, all but the `keep_float` most sensitive sites."""
    if plan.refitting is not None:
        progress = counted(say, advance, len(plan.refitting.paths))
        plan = replace(plan, folded=pipeline.compensate_plan(plan.folded, plan.refitting, progress=progress))
    folded, calibration = plan.folded, plan.calibration
    if calibration is None:
        return plan, None
    progress = counted(say, advance, len(calibration.paths))
    folded, measured = pipeline.find_registers(folded, calibration, progress=progress)
    if keep_float:
        folded = pipeline.keep_float(folded, calibration, keep_float, progress=progress)
    return replace(plan, folded=pipeline.calibrate_plan(folded, calibration, progress=progress)), measured
