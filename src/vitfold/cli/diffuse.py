"""`vitfold diffuse`: images of a Diffusion Transformer, and what reusing steps gains and costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold.cli import options
from vitfold.cli.drawing import decoder, document, write_drawn
from vitfold.cli.optimize import require_optimize
from vitfold.cli.terminal import command, note, out, print_json, quiet_stdout, steps

if TYPE_CHECKING:
    from vitfold.pipeline.judging import Judge

AUTO = "auto"


@command
def diffuse(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="demo-dit, hf:REPO_OR_FOLDER of diffusers, or a state dict of DiT's own."
        ),
    ],
    reuse: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="none, fora, stack, taylor, chebyshev, first-block, guidance, tokencache, with numbers as taylor:3:2; "
            "several separated by commas; or auto.",
        ),
    ] = "none",
    classes: Annotated[str, typer.Option(metavar="C,C,...", help="One image per class, by number.")] = "0",
    step_count: Annotated[int, typer.Option("--steps", help="Denoising steps.")] = 50,
    sampler: Annotated[str, typer.Option(help="ddim, dpm++ or ddpm.")] = "ddim",
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; 1 for none.")] = 2.5,
    seed: Annotated[int, typer.Option(help="Image i is drawn from seed + i.")] = 0,
    batch: Annotated[int, typer.Option("--batch", help="Images drawn at once.")] = 8,
    engine: Annotated[str, typer.Option(help="onnxruntime, or torch for the reference.")] = "onnxruntime",
    threads: options.Threads = None,
    trials: Annotated[int, typer.Option(min=1, help="Times that every way of sampling is timed, in turn.")] = 3,
    min_psnr: Annotated[
        float, typer.Option(help="What auto allows: decibels to the unaccelerated images at equal seeds.")
    ] = 30.0,
    merge: Annotated[int, typer.Option(help="Tokens merged before every attention and given back behind it.")] = 0,
    quant: Annotated[str, typer.Option(metavar="w8a8", help="8-bit linear layers in the blocks, or none.")] = "none",
    real: Annotated[
        Path | None, typer.Option("--real", metavar="DIR", help="Real images, for a Frechet distance to them.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="The vision transformer whose features that distance takes.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads of a state dict.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Images, a contact sheet and the JSON.")
    ] = None,
    latents: Annotated[
        bool,
        typer.Option("--latents", help="Write latents (latents.npz) instead of images, for models without their VAE."),
    ] = False,
    json: options.Json = False,
) -> None:
    """Draw images, unaccelerated, by --reuse, and by plainly fewer steps, timed in turn at equal seeds."""
    try:
        labels = tuple(int(word) for word in classes.split(","))
    except ValueError:
        raise typer.BadParameter(f"classes are numbers, found {classes!r}", param_hint="--classes") from None
    if (real is None) != (features is None) or (real is not None and latents):
        raise typer.BadParameter("give both --real DIR and --features SOURCE, and images", param_hint="--real")
    require_optimize()
    from vitfold.pipeline import diffusion, step_search
    from vitfold.pipeline.opening import compress
    from vitfold.reuse import find_method
    from vitfold.sources.dit import load_dit

    words = [word.strip() for word in reuse.split(",") if word.strip()]
    methods = [find_method(word) for word in words if word != AUTO]
    with steps("diffuse") as say, quiet_stdout():
        say(f"loading {source}")
        model = load_dit(source, heads=heads)
        decode = None if latents else decoder(model)
        asked = diffusion.Asked(
            labels=labels, seed=seed, steps=step_count, sampler=sampler, guidance=guidance, batch=batch
        )
        diffusion.check_asked(model, asked)
        if merge or quant != "none":
            say("compressing")
        compression = compress(model, r=merge, quant=quant, steps=step_count, guidance=guidance)
        how: dict[str, Any] = {
            "compression": compression,
            "engine": engine,
            "threads": threads,
            "decode": decode,
            "say": say,
        }
        chosen = None
        if AUTO in words:
            few = replace(asked, labels=labels[:batch])
            bounds = step_search.Bounds(min_psnr_db=min_psnr)
            setup = step_search.Setup(engine=engine, threads=threads, decode=decode, say=say)
            tried = step_search.screen(model, few, bounds, [compression], setup, fewer=False)
            chosen = step_search.fastest_method(tried, bounds)
            methods.append(chosen)
        judge = None if real is None or features is None else _judge(features, real, say)
        rows = diffusion.diffuse(model, methods, asked, trials=trials, judge=judge, **how)
        found = document(
            model,
            asked,
            rows,
            merge=merge,
            quant=quant,
            features=features,
            chosen=None if chosen is None else chosen.text,
        )
    if output is not None:
        write_drawn(output, model, labels, rows, decode, found)
    if json:
        print_json(found)
        return
    from vitfold.report.tables import diffusion_table

    out.print(diffusion_table(found))
    if chosen is not None:
        note(f"auto chose {chosen.text} (at least {min_psnr:g} dB to the unaccelerated images)")
    if output is not None:
        note(f"images and sheet.png in {output}")


def _judge(source: str, real: Path, say: Callable[[str], None]) -> Judge:
    from vitfold.images import find_images
    from vitfold.pipeline.judging import open_judge
    from vitfold.sources import load_source

    say(f"features of real images by {source}")
    return open_judge(load_source(source).model, find_images(real))
