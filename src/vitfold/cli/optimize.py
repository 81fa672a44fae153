"""`vitfold optimize`: a model in, a verified bundle out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold.cli import options
from vitfold.cli.drawing import default_judge
from vitfold.cli.optimizing_steps import Steps, optimize_steps
from vitfold.cli.searching import Wanted, run_search
from vitfold.cli.terminal import command, counted, note, out, print_json, quiet_stdout, skipped, steps, working
from vitfold.errors import GateError, ImageError, VitfoldError, missing_extra

if TYPE_CHECKING:
    from vitfold.bundle import Bundle
    from vitfold.images import ImageSet
    from vitfold.model import Model
    from vitfold.pipeline import Folded, Race, Solution
    from vitfold.recipe import QuantRecipe
    from vitfold.registers import Found


Say = Callable[[str], None]
_MEASURED = (("agreement", "agree with the unfolded model"), ("top1", "top-1"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be made, the images that its ranges come from, and those that it is compared on."""

    folded: Folded
    calibration: ImageSet | None
    comparing: ImageSet | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What was made: no bundle by a dry run, no race where nothing was to be decided by one."""

    folded: Folded
    bundle: Bundle | None = None
    race: Race | None = None


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
    calibration_size: options.CalibrationSize = 128,
    calibration_seed: options.CalibrationSeed = 0,
    keep_float: Annotated[
        int, typer.Option(min=0, metavar="N", help="Leave the N most sensitive sites float; see vitfold sensitivity.")
    ] = 0,
    target: Annotated[
        str | None,
        typer.Option(
            help="What the graph is written for: cpu (quantized: this processor's instruction set), portable, "
            "cpu-avx2, cpu-vnni, cpu-amx, cpu-arm, openvino, tensorrt-fp16, tensorrt-int8, tensorrt-fp8, integer or "
            "simulation; fastest: cpu or openvino, whichever runs faster here. "
            "Default: cpu; a search tries cpu and openvino."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Every choice in a file.")] = None,
    repeat: Annotated[
        Path | None, typer.Option("--from", metavar="BUNDLE", help="Make this bundle again, from the same images.")
    ] = None,
    keep_slower: Annotated[
        bool, typer.Option("--keep-slower", help="Keep a quantized bundle that is not faster than the float one.")
    ] = False,
    batch: Annotated[
        str | None,
        typer.Option(metavar="MIN,OPT,MAX", help="Batches that TensorRT builds its engine for, as 1,8,64."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="The GPU that --merge auto models: H100, A100, L4, T4, ...")] = "A100",
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="POINTS",
            help="Search the fastest recipe that loses at most so many points of top-1, or, "
            "without class folders, of agreement.",
        ),
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(min=0, metavar="MS", help="Search the most accurate recipe that takes at most this.")
    ] = None,
    search_minutes: Annotated[
        float, typer.Option(min=0.1, help="When a search stops trying; the same command goes on.")
    ] = 20.0,
    reuse: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="For a Diffusion Transformer: how its steps are reused, as for vitfold diffuse; or auto, the fastest "
            "way to draw that keeps --min-psnr (30 dB if no bound is named), --max-psnr-drop and --max-fid-rise.",
        ),
    ] = None,
    step_count: options.StepCount = None,
    sampler: options.Sampler = None,
    guidance: options.Guidance = None,
    min_psnr: Annotated[
        float | None, typer.Option(metavar="DB", help="Least PSNR to the unaccelerated images at equal seeds.")
    ] = None,
    max_psnr_drop: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="DB", help="How much further from the images of four times the steps than the plain sampler."
        ),
    ] = None,
    max_fid_rise: Annotated[
        float | None, typer.Option(min=0, help="How much larger a Frechet distance to --real by --features.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Held-out images that confirm the winner; default: 32, or 256 for a FID.")
    ] = None,
    real: options.Real = None,
    features: options.Features = None,
    heads: options.Heads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    image_size: options.ImageSize = None,
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
    )
    require_optimize()
    from vitfold import pipeline
    from vitfold.images import find_images
    from vitfold.sealed import check_destination
    from vitfold.target import find_target

    destination = None if dry_run else output
    if destination is not None:
        check_destination(destination.absolute(), overwrite=overwrite)
    base = "cpu" if target in (None, "fastest") else str(target)
    find_target(base)
    found = None if images is None else find_images(images)
    if searches:
        assert source is not None
        assert found is not None
        assert output is not None
        with steps("search") as say:
            model = load_model(source, say, arch, num_classes, image_size, weights, seed)
        wanted = Wanted(
            points=max_drop,
            latency_ms=max_latency_ms,
            quant=quant,
            target=target,
            calibration_size=calibration_size,
            seed=calibration_seed,
            minutes=search_minutes,
        )
        run_search(model, found, output, wanted, overwrite=overwrite, json=json)
        return
    solution: Solution | None = None
    measured: Found | None = None
    with working("optimize") as (say, advance):
        if repeat is not None:
            plan = _repeated(repeat, images, found, say)
        else:
            assert source is not None
            model = load_model(source, say, arch, num_classes, image_size, weights, seed)
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
        made = _Made(folded=plan.folded)
        if destination is not None:
            plan = _decodable(plan, skip_bad=skip_bad)
            plan, measured = _calibrated(plan, keep_float, say, advance)
            if target == "fastest":
                say("racing ONNX Runtime and OpenVINO")
                plan = replace(plan, folded=pipeline.fastest(plan.folded))
            first = plan.calibration is not None and repeat is None
            made = _saved(plan, destination, say, overwrite=overwrite, race=first, keep_slower=keep_slower)
    _report(made, measured, json=json)
    if solution is not None:
        _print_solution(solution)
    for remark in made.folded.remarks:
        note(remark)
    if images is not None and weights == "random":
        note("random weights: no fidelity was measured, since their outputs hardly depend on the image")
    if made.bundle is not None and min_agreement is not None:
        _gate(made.bundle.manifest.fidelity, min_agreement)


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
    from vitfold.engines import TENSORRT
    from vitfold.target import find_target

    if found is None:
        raise VitfoldError("--merge auto measures on images what merging does: give --images DIR")
    like = merge.partition(":")[2] or pipeline.LIKE
    if find_target(target).engine == TENSORRT:
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


def _print_solution(found: Solution) -> None:
    from vitfold.schedule import describe_r

    model = f"on {found.gpu} at batch {found.batch}, in a roofline model of the blocks, not a measurement"
    where = "by a table measured here at batch 1" if found.gpu is None else model
    plain, like = f"{found.ms_none:.3f} ms without merging", f"{found.ms_like:.3f} ms with r = {found.like}"
    if not any(found.r):
        note(f"merging cannot pay: {plain}, {like} {where}")
        return
    kept = f"distortion {found.distortion:.4f} of {found.distortion_like:.4f} allowed, on {found.images} images"
    note(f"r = {describe_r(found.r)}: {found.ms:.3f} ms, {plain}, {like} {where}; {kept}")


def _refuse(*mistakes: tuple[bool, str, str]) -> None:
    """Leave with a usage error at the first mistake: (whether it was made, what to do, the option)."""
    for made, message, hint in mistakes:
        if made:
            raise typer.BadParameter(message, param_hint=hint)


def _repeated(path: Path, images: Path | None, found: ImageSet | None, say: Say) -> _Plan:
    """Plan what a bundle was made with: its model, its recipe, its target, its calibration images."""
    from vitfold import pipeline
    from vitfold.bundle import open_bundle
    from vitfold.images import find_images
    from vitfold.reference import reference_from_origin

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
        return _Plan(folded=folded, calibration=None, comparing=found)
    calibration = pipeline.recorded_images(manifest.calibration, images)
    everything = found or find_images(calibration.root)
    return _Plan(folded=folded, calibration=calibration, comparing=everything.without(calibration) or everything)


def _divided(folded: Folded, found: ImageSet | None, *, dry_run: bool) -> _Plan:
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
) -> tuple[_Plan, Found | None]:
    """Find registers and quantize, where the plan asks for it, all but the `keep_float` most sensitive sites."""
    from vitfold import pipeline

    folded, calibration = plan.folded, plan.calibration
    if calibration is None:
        return plan, None
    progress = counted(say, advance, len(calibration.paths))
    folded, measured = pipeline.find_registers(folded, calibration, progress=progress)
    if keep_float:
        folded = pipeline.keep_float(folded, calibration, keep_float, progress=progress)
    return replace(plan, folded=pipeline.calibrate_folded(folded, calibration, progress=progress)), measured


def _saved(plan: _Plan, destination: Path, say: Say, *, overwrite: bool, race: bool, keep_slower: bool) -> _Made:
    """Write the bundle; after a race that it lost, and unless told to keep it, the float one in its place."""
    from vitfold import pipeline

    folded = plan.folded
    bundle = pipeline.save(folded, destination, images=plan.comparing, overwrite=overwrite, step=say)
    if not race:
        return _Made(folded=folded, bundle=bundle)
    say("racing the float model")
    result = pipeline.race(bundle, folded)
    if result is not None and not result.faster and not keep_slower:
        folded = pipeline.float_plan(folded)
        bundle = pipeline.save(folded, destination, images=plan.comparing, overwrite=True, step=say)
    return _Made(folded=folded, bundle=bundle, race=result)


def require_optimize() -> None:
    """Raise if the extra that makes bundles is not installed."""
    import importlib.util

    for package in ("torch", "onnx_ir"):
        if importlib.util.find_spec(package) is None:
            raise VitfoldError(missing_extra(package, "optimize", "making a bundle"))


def load_model(source: str, say: Say, *arguments: Any) -> Model:
    """Load a model by arch, num_classes, image_size, weights and seed; what it prints goes to stderr."""
    from vitfold.sources import load_source

    say(f"loading {source}")
    names = ("arch", "num_classes", "image_size", "weights", "seed")
    with quiet_stdout():
        return load_source(source, **dict(zip(names, arguments, strict=True))).model


def quant_recipe(quant: str | None, method: str | None, size: int, seed: int) -> QuantRecipe | None:
    """Return the quantization that options ask for."""
    from vitfold.recipe import quant_from_scheme

    found = None if quant is None else quant_from_scheme(quant.lower())
    if found is None:
        return None
    return replace(found, method=method or "vitfold", calibration_size=size, seed=seed)


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


def _report(made: _Made, measured: Found | None, *, json: bool) -> None:
    """Print what was made, and why quantization was given up or should have been."""
    values = _planned(made.folded)
    if measured is not None:
        values["remedies"] = {
            "sensitive_site": measured.site,
            "chosen": measured.chosen.name,
            "remedies": [one.to_dict() for one in measured.remedies],
        }
    kept = "quantized" if made.folded.quantizers else "float"
    if made.bundle is not None:
        values |= {
            "bundle": str(made.bundle.path),
            "size_bytes": made.bundle.size_bytes,
            "digest": made.bundle.digest,
            "verified": dict(made.bundle.manifest.verified),
            "fidelity": made.bundle.manifest.fidelity,
            "race": None if made.race is None else {**made.race.to_dict(), "kept": kept},
        }
    if json:
        print_json(values)
    else:
        _print(values)
    if made.race is not None and not made.race.faster:
        ending = "kept all the same (--keep-slower)" if kept == "quantized" else "the float model was kept instead"
        note(f"not faster than float on this machine ({made.race.median:.2f}x): {made.race.reason}; {ending}")


def _planned(folded: Folded) -> dict[str, Any]:
    from vitfold.schedule import describe_r

    macs = sum(cost.macs for cost in folded.costs())
    base = folded.recipe.merge
    quant = folded.recipe.quant
    return {
        "source": folded.model.origin.source,
        "target": folded.target.name,
        "recipe": folded.recipe.to_dict(),
        "schedule": describe_r(base.r),
        "quantization": None if quant is None else f"{quant.scheme} by {quant.method}",
        "simulated": folded.simulated,
        "integer": _integer(folded),
        "tokens": list(folded.tokens),
        "macs": macs,
        "weight_bytes": folded.model.size_bytes,
    }


def _integer(folded: Folded) -> dict[str, Any] | None:
    if folded.quantizers is None:
        return None
    work = folded.integer_work()
    return {"macs_ratio": work.integer_ratio, "dequantized_operands": work.dequantized_operands}


def _print(values: dict[str, Any]) -> None:
    _print_plan(values)
    if "bundle" in values:
        _print_bundle(values)
    else:
        out.print("  dry run: nothing was written", highlight=False)


def _print_plan(values: dict[str, Any]) -> None:
    from vitfold.report.tables import percent

    out.print(f"[bold]{values['source']}[/] for {values['target']}", highlight=False)
    out.print(f"  merge     {values['schedule']}", highlight=False)
    if values["quantization"]:
        shown = "simulated: no engine executes it" if values["simulated"] else "integer linear layers"
        if not values["simulated"] and values["recipe"]["quant"].get("attention"):
            shown += " and attention"
        out.print(f"  quant     {values['quantization']} ({shown})", highlight=False)
    if "registers" in values["recipe"] or "remedies" in values:
        out.print(f"  registers {_registers(values)}", highlight=False)
    if values["integer"] is not None:
        out.print(
            f"  integer   {percent(values['integer']['macs_ratio'])} of the multiply-accumulates, "
            f"{values['integer']['dequantized_operands']} operands dequantized before a product",
            highlight=False,
        )
    out.print(f"  tokens    {' '.join(map(str, values['tokens']))}", highlight=False)
    out.print(f"  work      {values['macs'] / 1e9:.3g} GMACs per image", highlight=False)


def _registers(values: dict[str, Any]) -> str:
    """What is done about sinks, and what it measured against doing nothing."""
    from vitfold.report.tables import describe_registers

    shown = describe_registers(values["recipe"].get("registers"))
    found = values.get("remedies")
    if found is None:
        return shown
    rows = {row["name"]: row for row in found["remedies"]}
    chosen, nothing = rows[found["chosen"]], rows["none"]
    sure = chosen["confirmed_db"] is not None and nothing["confirmed_db"] is not None
    key = "confirmed_db" if sure else "sqnr_db"
    gain = "" if chosen is nothing else f": {chosen[key]:.1f} dB instead of {nothing[key]:.1f} without"
    return f"{shown}{gain}, the best of {len(rows)} measured at {found['sensitive_site']}"


def _print_bundle(values: dict[str, Any]) -> None:
    from vitfold.report.tables import percent

    error = values["verified"]["median_relative_error"]
    out.print(f"  verified  {values['verified']['engine']} within {error:.1e} of the reference", highlight=False)
    fidelity = values["fidelity"]
    if fidelity is not None:
        parts = [f"{percent(fidelity[key])} {name}" for key, name in _MEASURED if fidelity[key] is not None]
        if fidelity["cosine"] is not None:
            parts.append(f"cosine {fidelity['cosine']:.4f}")
        out.print(f"  fidelity  {', '.join(parts)}, on {fidelity['images']} images", highlight=False)
    if values["race"] is not None:
        ratio = values["race"]["speed_up"]
        out.print(
            f"  race      {ratio['median']:.2f}x ± {ratio['iqr'] / 2:.2f} over the float graph, batch 1",
            highlight=False,
        )
    out.print(f"  bundle    {values['bundle']} ({values['size_bytes'] / 1e6:.1f} MB)", highlight=False, soft_wrap=True)
    following = "audit" if values["target"].startswith("tensorrt") else "bench"
    note(f"next: vitfold {following} {values['bundle']}, or vitfold predict {values['bundle']} IMAGE")


def _gate(fidelity: Any, least: float) -> None:
    agreement = None if fidelity is None else fidelity["agreement"]
    if agreement is None:
        raise GateError(
            "agreement was not measured: random weights, or a model that gives embeddings; "
            "for embeddings gate on cosine with: vitfold evaluate --min-cosine"
        )
    if agreement < least:
        raise GateError(f"top-1 agreement {agreement:.4f} is below --min-agreement {least}; lower --merge")
