"""`vitfold optimize`: a model in, a verified bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold.cli import options
from vitfold.cli.terminal import command, note, out, print_json, quiet_stdout, skipped, steps
from vitfold.errors import GateError, VitfoldError, missing_extra

if TYPE_CHECKING:
    from vitfold.pipeline import Folded


_MEASURED = (("agreement", "agree with the unfolded model"), ("top1", "top-1"))


@command
def optimize(
    source: options.Source,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.fold", help="The bundle to write.")
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(metavar="R", help="Tokens merged per block: 8, a list 8,8,4, R:INFLECTION as 8:-1, or none."),
    ] = None,
    images: options.Images = None,
    target: Annotated[str, typer.Option(help="What the graph is written for: cpu or portable.")] = "cpu",
    recipe: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Every choice in a file.")] = None,
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
    """Merge tokens, emit ONNX, verify it in the engine and write a bundle."""
    if output is None and not dry_run:
        raise typer.BadParameter("give -o OUT.fold, or --dry-run", param_hint="-o")
    if merge is not None and recipe is not None:
        raise typer.BadParameter("give either --merge or --recipe", param_hint="--merge")
    if min_agreement is not None and images is None:
        raise typer.BadParameter("--min-agreement needs --images", param_hint="--min-agreement")
    require_optimize()
    from vitfold import pipeline
    from vitfold.images import find_images
    from vitfold.sources import load_source
    from vitfold.target import find_target

    find_target(target)
    image_set = None if images is None else find_images(images).first(pipeline.FIDELITY_IMAGES)
    if image_set is not None and skip_bad:
        image_set = image_set.readable(skipped)
    with steps("optimize") as say:
        say(f"loading {source}")
        with quiet_stdout():
            loaded = load_source(
                source, arch=arch, num_classes=num_classes, image_size=image_size, weights=weights, seed=seed
            )
        model = loaded.model
        del loaded
        chosen = None if recipe is None else pipeline.read_recipe(recipe, model.spec)
        folded = pipeline.optimize(model, merge=merge, recipe=chosen, target=target)
        if dry_run:
            bundle = None
        else:
            assert output is not None
            bundle = pipeline.save(folded, output, images=image_set, overwrite=overwrite, step=say)
    values = _plan(folded)
    if bundle is not None:
        values |= {
            "bundle": str(bundle.path),
            "size_bytes": bundle.size_bytes,
            "digest": bundle.digest,
            "verified": dict(bundle.manifest.verified),
            "fidelity": bundle.manifest.fidelity,
        }
    if json:
        print_json(values)
    else:
        _print(values)
    if images is not None and weights == "random":
        note("random weights: no fidelity was measured, since their outputs hardly depend on the image")
    if bundle is not None and min_agreement is not None:
        _gate(bundle.manifest.fidelity, min_agreement)


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
    return {
        "source": folded.model.origin.source,
        "target": folded.target.name,
        "recipe": folded.recipe.to_dict(),
        "schedule": describe_r(base.r),
        "tokens": list(folded.tokens),
        "macs": macs,
        "weight_bytes": folded.model.size_bytes,
    }


def _print(values: dict[str, Any]) -> None:
    from vitfold.report.tables import percent

    tokens = values["tokens"]
    out.print(f"[bold]{values['source']}[/] for {values['target']}", highlight=False)
    out.print(f"  merge     {values['schedule']}", highlight=False)
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
