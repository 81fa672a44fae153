"""`vitfold optimize`: a model in, a verified bundle out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold.cli import options
from vitfold.cli.terminal import command, counted, note, out, print_json, quiet_stdout, skipped, working
from vitfold.errors import GateError, ImageError, VitfoldError, missing_extra

if TYPE_CHECKING:
    from vitfold.images import ImageSet
    from vitfold.model import Model
    from vitfold.pipeline import Folded
    from vitfold.recipe import QuantRecipe


_MEASURED = (("agreement", "agree with the unfolded model"), ("top1", "top-1"))


@command
def optimize(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="demo, timm:NAME, hf:REPO_OR_FOLDER, torchvision:NAME, open_clip:NAME, or FILE.safetensors with "
            "--arch; not with --from.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.fold", help="The bundle to write.")
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(metavar="R", help="Tokens merged per block: 8, a list 8,8,4, R:INFLECTION as 8:-1, or none."),
    ] = None,
    quant: options.Quant = None,
    method: options.Method = None,
    images: options.Images = None,
    calibration_size: options.CalibrationSize = 128,
    calibration_seed: options.CalibrationSeed = 0,
    keep_float: Annotated[
        int, typer.Option(min=0, metavar="N", help="Leave the N most sensitive sites float; see vitfold sensitivity.")
    ] = 0,
    target: Annotated[
        str,
        typer.Option(
            help="What the graph is written for: cpu (quantized: this processor's instruction set), portable, "
            "cpu-avx2, cpu-vnni, cpu-amx, cpu-arm, openvino, tensorrt-int8, integer or simulation; fastest: cpu or "
            "openvino, whichever runs faster here."
        ),
    ] = "cpu",
    recipe: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Every choice in a file.")] = None,
    repeat: Annotated[
        Path | None, typer.Option("--from", metavar="BUNDLE", help="Make this bundle again, from the same images.")
    ] = None,
    keep_slower: Annotated[
        bool, typer.Option("--keep-slower", help="Keep a quantized bundle that is not faster than the float one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    image_size: options.ImageSize = None,
    weights: options.Weights = "pretrained",
    seed: options.Seed = 0,
    skip_bad: options.SkipBad = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with 3 if top-1 agreement on --images is lower.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Merge tokens, quantize, emit ONNX, verify it in the engine and write a bundle."""
    if output is None and not dry_run:
        raise typer.BadParameter("give -o OUT.fold, or --dry-run", param_hint="-o")
    if (source is None) == (repeat is None):
        raise typer.BadParameter("give either SOURCE or --from BUNDLE", param_hint="SOURCE")
    if recipe is not None and not (merge is quant is method is None):
        raise typer.BadParameter("give either --recipe or --merge, --quant and --method", param_hint="--recipe")
    if min_agreement is not None and images is None:
        raise typer.BadParameter("--min-agreement needs --images", param_hint="--min-agreement")
    if method is not None and quant is None:
        raise typer.BadParameter("--method needs --quant, for example --quant w8a8", param_hint="--method")
    require_optimize()
    from vitfold import pipeline
    from vitfold.bundle import check_destination
    from vitfold.images import find_images
    from vitfold.target import find_target

    if output is not None and not dry_run:
        check_destination(output.absolute(), overwrite=overwrite)
    base = "cpu" if target == "fastest" else target
    find_target(base)
    found = None if images is None else find_images(images)
    with working("optimize") as (say, advance):
        if repeat is not None:
            model, folded, calibration = _repeated(repeat, images, say)
            comparing = found
            if calibration is not None:
                everything = found or find_images(calibration.root)
                comparing = everything.without(calibration) or everything
        else:
            assert source is not None
            model = load_model(source, say, arch, num_classes, image_size, weights, seed)
            chosen = None if recipe is None else pipeline.read_recipe(recipe, model.spec)
            wanted = quant_recipe(quant, method, calibration_size, calibration_seed)
            folded = pipeline.optimize(model, merge=merge, quant=wanted, recipe=chosen, target=base)
            calibration, comparing = None, found
            if folded.needs_calibration:
                if found is None and not dry_run:
                    raise VitfoldError(
                        "quantization calibrates on images: give --images DIR, some hundred pictures like those that "
                        "the model will see"
                    )
                if found is not None:
                    calibration, comparing = pipeline.split_images(folded, found)
        if comparing is not None:
            comparing = comparing.first(pipeline.FIDELITY_IMAGES)
        if not dry_run:
            calibration, comparing = _decodable(calibration, comparing, skip_bad=skip_bad)
        bundle, race = None, None
        if not dry_run:
            assert output is not None
            if calibration is not None:
                progress = counted(say, advance, len(calibration.paths))
                if keep_float:
                    folded = pipeline.keep_float(folded, calibration, keep_float, progress=progress)
                folded = pipeline.calibrate_folded(folded, calibration, progress=progress)
            if target == "fastest":
                say("racing ONNX Runtime and OpenVINO")
                folded = pipeline.fastest(folded)
            bundle = pipeline.save(folded, output, images=comparing, overwrite=overwrite, step=say)
            if calibration is not None and repeat is None:
                say("racing the float model")
                race = pipeline.race(bundle, folded)
                if race is not None and not race.faster and not keep_slower:
                    folded = pipeline.float_plan(folded)
                    bundle = pipeline.save(folded, output, images=comparing, overwrite=True, step=say)
    values = _plan(folded)
    if bundle is not None:
        values |= {
            "bundle": str(bundle.path),
            "size_bytes": bundle.size_bytes,
            "digest": bundle.digest,
            "verified": dict(bundle.manifest.verified),
            "fidelity": bundle.manifest.fidelity,
            "race": None if race is None else {**race.to_dict(), "kept": "quantized" if folded.quantizers else "float"},
        }
    if json:
        print_json(values)
    else:
        _print(values)
    if race is not None and not race.faster:
        kept = "kept all the same (--keep-slower)" if folded.quantizers else "the float model was kept instead"
        note(f"not faster than float on this machine ({race.median:.2f}x): {race.reason}; {kept}")
    if images is not None and weights == "random":
        note("random weights: no fidelity was measured, since their outputs hardly depend on the image")
    if bundle is not None and min_agreement is not None:
        _gate(bundle.manifest.fidelity, min_agreement)


def quant_recipe(quant: str | None, method: str | None, size: int, seed: int) -> QuantRecipe | None:
    """Return the quantization that options ask for."""
    from vitfold.recipe import QuantRecipe, bits_from_scheme

    if quant is None or quant.lower() == "none":
        return None
    weights, activations = bits_from_scheme(quant)
    return QuantRecipe(
        weights=weights, activations=activations, method=method or "vitfold", calibration_size=size, seed=seed
    )


def _decodable(
    calibration: ImageSet | None, comparing: ImageSet | None, *, skip_bad: bool
) -> tuple[ImageSet | None, ImageSet | None]:
    """Check every image before minutes of calibration, or leave the unreadable ones out."""
    from vitfold.images import read_image

    if not skip_bad:
        for image_set in (calibration, comparing):
            for path in () if image_set is None or calibration is None else image_set.paths:
                read_image(path)
        return calibration, comparing
    calibration = None if calibration is None else calibration.readable(skipped)
    if comparing is not None:
        try:
            comparing = comparing.readable(skipped)
        except ImageError:
            if calibration is None:
                raise
            comparing = calibration
    return calibration, comparing


def load_model(source: str, say: Callable[[str], None], *arguments: Any) -> Model:
    """Load a model by arch, num_classes, image_size, weights and seed; what it prints goes to stderr."""
    from vitfold.sources import load_source

    say(f"loading {source}")
    names = ("arch", "num_classes", "image_size", "weights", "seed")
    with quiet_stdout():
        return load_source(source, **dict(zip(names, arguments, strict=True))).model


def _repeated(path: Path, images: Path | None, say: Callable[[str], None]) -> tuple[Model, Folded, ImageSet | None]:
    """Plan what a bundle was made with: its model, its recipe, its target, its calibration images."""
    from vitfold import pipeline
    from vitfold.bundle import open_bundle
    from vitfold.reference import reference_from_origin

    given = open_bundle(path)
    manifest = given.manifest
    say(f"loading {manifest.origin['source']}")
    with quiet_stdout():
        model = reference_from_origin(given).model
    assert model is not None
    folded = pipeline.optimize(model, recipe=manifest.recipe, target=str(manifest.target["name"]))
    record = manifest.calibration
    return model, folded, None if record is None else pipeline.recorded_images(record, images)


def require_optimize() -> None:
    """Raise if the extra that makes bundles is not installed."""
    import importlib.util

    for package in ("torch", "onnx_ir"):
        if importlib.util.find_spec(package) is None:
            raise VitfoldError(missing_extra(package, "optimize", "making a bundle"))


def _plan(folded: Folded) -> dict[str, Any]:
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
    from vitfold.report.tables import percent

    tokens = values["tokens"]
    out.print(f"[bold]{values['source']}[/] for {values['target']}", highlight=False)
    out.print(f"  merge     {values['schedule']}", highlight=False)
    if values["quantization"]:
        shown = "simulated: no engine executes it" if values["simulated"] else "integer linear layers"
        if not values["simulated"] and values["recipe"]["quant"].get("attention"):
            shown += " and attention"
        out.print(f"  quant     {values['quantization']} ({shown})", highlight=False)
    if values["integer"] is not None:
        out.print(
            f"  integer   {percent(values['integer']['macs_ratio'])} of the multiply-accumulates, "
            f"{values['integer']['dequantized_operands']} operands dequantized before a product",
            highlight=False,
        )
    out.print(f"  tokens    {' '.join(map(str, tokens))}", highlight=False)
    out.print(f"  work      {values['macs'] / 1e9:.3g} GMACs per image", highlight=False)
    if "bundle" not in values:
        out.print("  dry run: nothing was written", highlight=False)
        return
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
    note(f"next: vitfold bench {values['bundle']}, or vitfold predict {values['bundle']} IMAGE")


def _gate(fidelity: Any, least: float) -> None:
    agreement = None if fidelity is None else fidelity["agreement"]
    if agreement is None:
        raise GateError(
            "agreement was not measured: random weights, or a model that gives embeddings; "
            "for embeddings gate on cosine with: vitfold evaluate --min-cosine"
        )
    if agreement < least:
        raise GateError(f"top-1 agreement {agreement:.4f} is below --min-agreement {least}; lower --merge")
