"""`vitfold diffusion sample`: images of a Diffusion Transformer, and what reusing steps gains and costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vitfold.artifacts.bundle import open_bundle
from vitfold.artifacts.digested import MANIFEST
from vitfold.bench.environment import environment
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.diffusion.drawing import Drawing, SamplingArgs, default_judge, document, draw_bundles, open_features
from vitfold.cli.groups import JudgeArgs, listed, refuse
from vitfold.cli.making import require_optimize, say_busy
from vitfold.cli.terminal import note, out, print_json, quiet_stdout, steps
from vitfold.report.tables import diffusion_table
from vitfold.sources.dit import REAL, load_dit

if TYPE_CHECKING:
    from vitfold.diffusion.judge import Judge

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWay:
    """What becomes of a model before it draws; a bundle has all of it settled."""

    reuse: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="none, fitted, dpcache, solved, stack, taylor, first-block, tokencache, ... (docs/diffusion.md), with "
            "numbers as taylor:3:2; several separated by commas; or auto. A bundle has its own.",
        ),
    ] = None
    engine: Annotated[
        Literal["onnxruntime", "torch"], typer.Option(help="onnxruntime, or torch for the reference.")
    ] = "onnxruntime"
    min_psnr: Annotated[
        float, typer.Option(help="What auto allows: decibels to the unaccelerated images at equal seeds.")
    ] = 30.0
    merge: Annotated[int, typer.Option(help="Tokens merged before every attention and given back behind it.")] = 0
    quant: Annotated[str, typer.Option(metavar="w8a8", help="8-bit linear layers in the blocks, or none.")] = "none"
    method: options.StepMethod = None
    heads: options.Heads = None

    def __post_init__(self) -> None:
        methodless = self.method is not None and self.quant == "none"
        refuse((methodless, "a method says how --quant rounds; give --quant w8a8", "--method"))


@command(
    brief={
        "reuse": "How steps are reused, as fitted:18 or taylor:3:1; or auto.",
        "latents": "Write latents, not images.",
    },
    shown="reuse classes count steps seed output latents json",
    examples=(
        "vitfold diffusion sample demo-dit --reuse fitted:18 --classes all -o images",
        "vitfold diffusion sample fast.fold --classes sneaker,bag -o images",
    ),
)
def sample(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="demo-dit, hf:REPO_OR_FOLDER of diffusers, a state dict of DiT's own, or a bundle of steps.",
        ),
    ],
    how: ModelWay,
    asking: SamplingArgs,
    judging: JudgeArgs,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Images, a contact sheet and the JSON.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Draw images, unaccelerated, by --reuse, and by plainly fewer steps, timed in turn at equal seeds."""
    if _names_a_bundle(source):
        open_bundle(source, steps=True)  # says what is wrong before anything is loaded
    features, real = judging.features, judging.real
    if not asking.latents:
        features, real = default_judge(source, features, real)
    if (real is None) != (features is None) or (real is not None and asking.latents):
        raise typer.BadParameter("give both --real DIR and --features SOURCE, and images", param_hint="--real")
    require_optimize()
    with steps("diffuse") as say, quiet_stdout():
        judge = None if real is None or features is None else open_features(features, real, say)
        if (Path(source) / MANIFEST).is_file():
            if how != ModelWay(min_psnr=how.min_psnr):
                raise typer.BadParameter(
                    "a bundle has its own method and graphs; leave out --reuse, --merge, --quant, --engine and --heads",
                    param_hint="SOURCE",
                )
            drawing = draw_bundles([Path(source)], asking, judge, features, say)
        else:
            drawing = _draw_model(source, asking, how, judge, features, say)
    if output is not None:
        drawing.write(output)
        if judge is not None and real is not None and real.is_dir():
            judge.save(output / REAL)
    say_busy(drawing.document["environment"])
    if json:
        print_json(drawing.document)
        return
    out.print(diffusion_table(drawing.document))
    if AUTO in (how.reuse or ""):
        note(f"auto chose {drawing.document['chosen']} (at least {how.min_psnr:g} dB to the unaccelerated images)")
    if output is not None:
        note(f"images and sheet.png in {output}")


def _names_a_bundle(source: str) -> bool:
    """Whether a source can be nothing but a bundle, also where there is none."""
    path = Path(source)
    return (path / MANIFEST).is_file() or (path.suffix == ".fold" and ":" not in source)


def _draw_model(
    source: str,
    asking: SamplingArgs,
    how: ModelWay,
    judge: Judge | None,
    features: str | None,
    say: Callable[[str], None],
) -> Drawing:
    from vitfold.diffusion import compare as comparing
    from vitfold.diffusion import find_method
    from vitfold.diffusion import search as searching
    from vitfold.diffusion.compression import compress

    words = listed(how.reuse or "none")
    methods = [find_method(word) for word in words if word != AUTO]
    before = environment()
    say(f"loading {source}")
    model = load_dit(source, heads=how.heads)
    decode = asking.decoder(model)
    asked = asking.asked(model)
    comparing.check_asked(model, asked)
    if how.merge or how.quant != "none":
        say("compressing")
    compression = compress(
        model, r=how.merge, quant=how.quant, method=how.method, steps=asked.steps, guidance=asked.guidance
    )
    chosen = None
    if AUTO in words:
        few = replace(asked, labels=asked.labels[: asked.batch])
        bounds = searching.Bounds(min_psnr_db=how.min_psnr)
        setup = searching.Setup(engine=how.engine, threads=asking.threads, decode=decode, say=say)
        tried = searching.screen(model, few, bounds, [compression], setup, fewer=False)
        chosen = searching.fastest_method(tried, bounds)
        methods.append(chosen)
    rows = comparing.diffuse(
        model,
        methods,
        asked,
        compression=compression,
        engine=how.engine,
        threads=asking.threads,
        trials=asking.trials,
        decode=decode,
        judge=judge,
        say=say,
    )
    found = document(model, asked, rows, compression.to_dict(), features=features, chosen=chosen, before=before)
    return Drawing(model=model, asked=asked, rows=rows, decode=decode, document=found)
