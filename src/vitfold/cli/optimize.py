"""`vitfold optimize`: a model in, a verified bundle out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitfold.cli import options
from vitfold.cli.drawing import default_judge
from vitfold.cli.finishing import check_room, make_bundle, publish
from vitfold.cli.making import Say, given_images, judged_images, load_model, quant_recipe, require_optimize, say_busy
from vitfold.cli.optimized import OptimizeResult, print_solution, report_made
from vitfold.cli.optimizing_steps import Steps, optimize_steps
from vitfold.cli.searching import SearchArgs, run_search
from vitfold.cli.terminal import command, counted, note, quiet_stdout, skipped, steps, working
from vitfold.errors import GateError, ImageError, VitfoldError

if TYPE_CHECKING:
    from vitfold.images import ImageSet
    from vitfold.model import Model
    from vitfold.pipeline import Plan, Solution
    from vitfold.recipe import QuantRecipe
    from vitfold.registers import RemedySearchResult


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be made, the images that its ranges come from, and those that it is compared on."""

    folded: Plan
    calibration: ImageSet | None
    comparing: ImageSet | None


@command
def optimize(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="demo, timm:NAME, hf:REPO_OR_FOLDER, torchvision:NAME, open_clip:NAME, or FILE.safetensors with "
            "--arch; not with --from. With --reuse: what vitfold diffuse takes.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.fold", help="The bundle to write.")
    ] = None,
    merge: options.Merge = None,
    merge_rule: options.MergeRule = "tome",
    quant: options.Quant = None,
    method: options.Method = None,
    registers: options.Registers = None,
    images: options.Images = None,
    exif: options.Exif = None,
    calibration_size: options.CalibrationSize = 128,
    calibration_seed: options.CalibrationSeed = 0,
    keep_float: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Leave the N most sensitive sites float; see vitfold sensitivity.",
            rich_help_panel=options.RECIPE,
        ),
    ] = 0,
    target: Annotated[
        str | None,
        typer.Option(
            help="What the graph is written for: cpu (quantized: this processor's instruction set), portable, "
            "cpu-avx2, cpu-vnni, cpu-amx, cpu-arm, openvino, tensorrt-fp16, tensorrt-int8, tensorrt-fp8, integer or "
            "simulation; fastest: cpu or openvino, whichever runs faster here. "
            "Default: cpu; a search tries cpu and openvino.",
            rich_help_panel=options.RECIPE,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="Every choice in a file.",
            rich_help_panel=options.RECIPE,
        ),
    ] = None,
    repeat: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="BUNDLE",
            help="Make this bundle again, from the same images.",
            rich_help_panel=options.RECIPE,
        ),
    ] = None,
    keep_slower: Annotated[
        bool,
        typer.Option(
            "--keep-slower",
            help="Keep a quantized bundle that is not faster than the float one.",
            rich_help_panel=options.RECIPE,
        ),
    ] = False,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="MIN,OPT,MAX",
            help="Batches that TensorRT builds its engine for, as 1,8,64.",
            rich_help_panel=options.RECIPE,
        ),
    ] = None,
    gpu: Annotated[
        str,
        typer.Option(
            help="The GPU that --merge auto models: H100, A100, L4, T4, ...",
            rich_help_panel=options.RECIPE,
        ),
    ] = "A100",
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="POINTS",
            help="Search the fastest recipe that loses at most so many points of top-1, or, "
            "without class folders, of agreement.",
            rich_help_panel=options.SEARCH,
        ),
    ] = None,
    max_latency_ms: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="MS",
            help="Search the most accurate recipe that takes at most this.",
            rich_help_panel=options.SEARCH,
        ),
    ] = None,
    search_minutes: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="When a search stops trying; the same command goes on.",
            rich_help_panel=options.SEARCH,
        ),
    ] = 20.0,
    reuse: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="For a Diffusion Transformer: how its steps are reused, as for vitfold diffuse; or auto, the fastest "
            "way to draw that keeps --min-psnr (30 dB if no bound is named), --max-psnr-drop and --max-fid-rise.",
            rich_help_panel=options.DIFFUSION,
        ),
    ] = None,
    step_count: options.StepCount = None,
    sampler: options.Sampler = None,
    guidance: options.Guidance = None,
    min_psnr: Annotated[
        float | None,
        typer.Option(
            metavar="DB",
            help="Least PSNR to the unaccelerated images at equal seeds.",
            rich_help_panel=options.DIFFUSION,
        ),
    ] = None,
    max_psnr_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="DB",
            help="How much further from the images of four times the steps than the plain sampler.",
            rich_help_panel=options.DIFFUSION,
        ),
    ] = None,
    max_fid_rise: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How much larger a Frechet distance to --real by --features.",
            rich_help_panel=options.DIFFUSION,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Held-out images that confirm the winner; default: 32, or 256 for a FID.",
            rich_help_panel=options.DIFFUSION,
        ),
    ] = None,
    real: options.Real = None,
    features: options.Features = None,
    heads: options.Heads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    image_size: options.ImageSize = None,
    problem: options.Problem = None,
    weights: options.Weights = "pretrained",
    seed: options.Seed = 0,
    skip_bad: options.SkipBad = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    min_agreement: options.MinAgreement = None,
    json: options.Json = False,
) -> None:
    """Merge tokens, quantize, emit ONNX, verify it in the engine and write a bundle."""
    if reuse is not None:
        _refuse(
            (output is None, "give -o OUT.fold", "-o"),
            (source is None, "give SOURCE", "SOURCE"),
            (
                any((method, registers, images, recipe, repeat, target, batch, max_drop, max_latency_ms, dry_run)),
                "a Diffusion Transformer takes --merge, --quant, --steps, --sampler, --guidance and bounds only",
                "--reuse",
            ),
        )
        require_optimize()
        assert source is not None
        assert output is not None
        if max_fid_rise is not None:
            features, real = default_judge(source, features, real)
        wanted_steps = Steps(
            reuse=reuse,
            steps=step_count,
            sampler=sampler,
            guidance=guidance,
            merge=merge,
            quant=quant,
            min_psnr=min_psnr,
            max_psnr_drop=max_psnr_drop,
            max_fid_rise=max_fid_rise,
            samples=samples,
            real=real,
            features=features,
            minutes=search_minutes,
            heads=heads,
        )
        optimize_steps(source, output, wanted_steps, overwrite=overwrite, json=json)
        return
    chosen = any(option is not None for option in (merge, quant, method, registers))
    _refuse(
        (output is None and not dry_run, "give -o OUT.fold, or --dry-run", "-o"),
        ((source is None) == (repeat is None), "give either SOURCE or --from BUNDLE", "SOURCE"),
        (
            recipe is not None and chosen,
            "give either --recipe or --merge, --quant, --method and --registers",
            "--recipe",
        ),
        (
            merge_rule != "tome" and (recipe is not None or repeat is not None or (merge or "").startswith("auto")),
            "--merge-rule goes with tokens that --merge names",
            "--merge-rule",
        ),
        (min_agreement is not None and images is None, "--min-agreement needs --images", "--min-agreement"),
        (
            method is not None and quant is None and not (target or "").startswith("tensorrt"),
            "--method needs --quant, for example --quant w8a8",
            "--method",
        ),
    )
    searches = max_drop is not None or max_latency_ms is not None
    _refuse(
        (max_drop is not None and max_latency_ms is not None, "give one of both", "--max-drop, --max-latency-ms"),
        (searches and images is None, "a search measures on images: give --images DIR", "--images"),
        (
            searches and (any((merge, method, registers, recipe)) or keep_float > 0 or dry_run),
            "a search chooses --merge, --method, --registers, --keep-float and the recipe itself; leave them out",
            "--max-drop, --max-latency-ms",
        ),
        (searches and source is None, "a search needs SOURCE", "SOURCE"),
        (exif is not None and repeat is not None, "--from reads images as its bundle does; leave it out", "--exif"),
    )
    require_optimize()
    from vitfold import pipeline
    from vitfold.artifacts.digested import check_destination, reserve_bundle
    from vitfold.bench.environment import environment
    from vitfold.pipeline.foreseen import foreseen
    from vitfold.target import find_target

    destination = None if dry_run else output
    if destination is not None:
        check_destination(destination, overwrite=overwrite)
    base = "cpu" if target in (None, "fastest") else str(target)
    find_target(base)
    found = None if images is None else given_images(images)
    if searches:
        assert source is not None
        assert found is not None
        assert output is not None
        with steps("search") as say:
            model = load_model(source, say, arch, num_classes, image_size, weights, seed, exif=exif, problem=problem)
        wanted = SearchArgs(
            points=max_drop,
            latency_ms=max_latency_ms,
            quant=quant,
            target=target,
            calibration_size=calibration_size,
            seed=calibration_seed,
            minutes=search_minutes,
        )
        before = environment()
        run_search(model, found, output, wanted, overwrite=overwrite, json=json)
        say_busy(before)
        return
    solution: Solution | None = None
    measured: RemedySearchResult | None = None
    reserving = nullcontext() if destination is None else reserve_bundle(destination, overwrite=overwrite)
    with reserving as place, working("optimize") as (say, advance):
        if repeat is not None:
            plan = _repeated(repeat, images, found, say)
        else:
            assert source is not None
            model = load_model(source, say, arch, num_classes, image_size, weights, seed, exif=exif, problem=problem)
            found = None if found is None else judged_images(found, model.spec, model.labels)
            read = None if recipe is None else pipeline.read_recipe(recipe, model.spec)
            implied = None if read is not None else find_target(base).implied_quant
            asked = quant_recipe(quant or implied, method, calibration_size, calibration_seed)
            batches = _batch(batch)
            schedule: str | tuple[int, ...] | None = merge
            if merge is not None and merge.partition(":")[0] == "auto":
                solution = _solved(model, found, merge, base, gpu, batches, say, asked)
                schedule = solution.r
            folded = pipeline.optimize(
                model,
                merge=schedule,
                rule=merge_rule,
                quant=asked or quant,
                registers=registers,
                recipe=read,
                target=base,
                batch=batches,
            )
            plan = _divided(folded, found, dry_run=dry_run)
            for remark in foreseen(folded, plan.calibration, keep_float=keep_float):
                note(remark)
        made = OptimizeResult(folded=plan.folded)
        if place is not None:
            check_room(place, plan.folded)
            plan = _decodable(plan, skip_bad=skip_bad)
            plan, measured = _calibrated(plan, keep_float, say, advance)
            if target == "fastest":
                say("racing ONNX Runtime and OpenVINO")
                plan = replace(plan, folded=pipeline.fastest(plan.folded))
            first = plan.calibration is not None and repeat is None
            made = make_bundle(plan.folded, plan.comparing, place, say, race=first, keep_slower=keep_slower)
            made = publish(made, place, min_agreement)
    report_made(made, measured, json=json)
    if solution is not None:
        print_solution(solution)
    for remark in made.folded.remarks:
        note(remark)
    if images is not None and weights == "random":
        note("random weights: no fidelity was measured, since their outputs hardly depend on the image")
    if made.missed is not None:
        raise GateError(made.missed)


def _solved(
    model: Model,
    found: ImageSet | None,
    merge: str,
    target: str,
    gpu: str,
    batch: tuple[int, int, int] | None,
    say: Say,
    quant: QuantRecipe | None,
) -> Solution:
    """Find the schedule of `--merge auto`, or auto:R for the distortion of another constant R."""
    from vitfold import pipeline
    from vitfold.target import find_target

    if found is None:
        raise VitfoldError("--merge auto measures on images what merging does: give --images DIR")
    like = merge.partition(":")[2] or pipeline.LIKE
    if find_target(target).runtime.gpu:
        usual = pipeline.USUAL_BATCH if batch is None else batch[1]
        pipeline.check_forecast(model.spec, target=target, gpu=gpu, batch=usual)
        merging = pipeline.measure_merging(model, found, say=say)
        say("solving")
        return pipeline.solve_merge(merging, target=target, gpu=gpu, batch=usual, like=like)
    plan = pipeline.roughly_calibrated(model, quant, target, found)
    table = pipeline.measure_latency(plan, say=say)
    merging = pipeline.measure_merging(model, found, **pipeline.on_this_machine(plan), say=say)
    say("solving")
    return pipeline.solve_measured(merging, table, like=like)


def _refuse(*mistakes: tuple[bool, str, str]) -> None:
    """Leave with a usage error at the first mistake: (whether it was made, what to do, the option)."""
    for made, message, hint in mistakes:
        if made:
            raise typer.BadParameter(message, param_hint=hint)


def _repeated(path: Path, images: Path | None, found: ImageSet | None, say: Say) -> _Plan:
    """Plan what a bundle was made with: its model, its recipe, its target, its calibration images."""
    from vitfold import pipeline
    from vitfold.artifacts.bundle import open_bundle
    from vitfold.bench.reference import reference_from_origin
    from vitfold.images import find_images

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
    if manifest.calibration is None:
        found = None if found is None else judged_images(found, model.spec, model.labels)
        return _Plan(folded=folded, calibration=None, comparing=found)
    calibration = pipeline.recorded_images(manifest.calibration, images)
    everything = judged_images(found or find_images(calibration.root), model.spec, model.labels)
    return _Plan(folded=folded, calibration=calibration, comparing=everything.without(calibration) or everything)


def _divided(folded: Plan, found: ImageSet | None, *, dry_run: bool) -> _Plan:
    """Divide the images between calibration and comparison.

    Raises:
        VitfoldError: if the recipe quantizes and there are no images.
    """
    from vitfold import pipeline

    if not folded.needs_calibration or (found is None and dry_run):
        return _Plan(folded=folded, calibration=None, comparing=found)
    if found is None:
        raise VitfoldError(
            "quantization calibrates on images: give --images DIR, some hundred pictures like those that "
            "the model will see"
        )
    calibration, comparing = pipeline.split_images(folded, found)
    return _Plan(folded=folded, calibration=calibration, comparing=comparing)


def _decodable(plan: _Plan, *, skip_bad: bool) -> _Plan:
    """Check every image before minutes of calibration, or leave the unreadable ones out."""
    from vitfold.images import read_image
    from vitfold.pipeline import FIDELITY_IMAGES

    calibration = plan.calibration
    comparing = None if plan.comparing is None else plan.comparing.first(FIDELITY_IMAGES)
    if not skip_bad:
        for image_set in (calibration, comparing):
            for path in () if image_set is None or calibration is None else image_set.paths:
                read_image(path)
        return replace(plan, comparing=comparing)
    calibration = None if calibration is None else calibration.readable(skipped)
    if comparing is not None:
        try:
            comparing = comparing.readable(skipped)
        except ImageError:
            if calibration is None:
                raise
            comparing = calibration
    return replace(plan, calibration=calibration, comparing=comparing)


def _calibrated(
    plan: _Plan, keep_float: int, say: Say, advance: Callable[[int, int], None]
) -> tuple[_Plan, RemedySearchResult | None]:
    """Find registers and quantize, where the plan asks for it, all but the `keep_float` most sensitive sites."""
    from vitfold import pipeline

    folded, calibration = plan.folded, plan.calibration
    if calibration is None:
        return plan, None
    progress = counted(say, advance, len(calibration.paths))
    folded, measured = pipeline.find_registers(folded, calibration, progress=progress)
    if keep_float:
        folded = pipeline.keep_float(folded, calibration, keep_float, progress=progress)
    return replace(plan, folded=pipeline.calibrate_plan(folded, calibration, progress=progress)), measured


def _batch(text: str | None) -> tuple[int, int, int] | None:
    """Read MIN,OPT,MAX, or one batch for all three."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdigit() for part in parts):
        raise typer.BadParameter(f"{text!r} is not MIN,OPT,MAX, as 1,8,64", param_hint="--batch")
    least, usual, most = (int(part) for part in (parts if len(parts) == 3 else parts * 3))
    if not 1 <= least <= usual <= most:
        raise typer.BadParameter(f"{text!r} does not rise from MIN to MAX", param_hint="--batch")
    return least, usual, most
