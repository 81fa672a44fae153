"""`vitfold diffusion ablate`: what each piece of TokenCache is worth on a model."""

from __future__ import annotations

from typing import Annotated

import typer

from vitfold.bench.environment import environment
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.diffusion.drawing import SamplingArgs, document
from vitfold.cli.making import require_optimize, say_busy
from vitfold.cli.terminal import out, print_json, quiet_stdout, steps, write_samples
from vitfold.report.tables import diffusion_table, number
from vitfold.sources.dit import load_dit


@command(
    shown="reuse classes count steps seed batch trials output json",
    examples=("vitfold diffusion ablate demo-dit --classes all --count 20 -o ablation.json",),
)
def ablate(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="demo-dit, hf:REPO_OR_FOLDER of diffusers, or a state dict of DiT's own."
        ),
    ],
    reuse: Annotated[
        str, typer.Option(metavar="METHOD", help="What is taken apart: tokencache-blocks with its numbers.")
    ] = "tokencache-blocks",
    heads: options.Heads = None,
    asking: SamplingArgs,
    output: options.SamplesFile = None,
    json: options.Json = False,
) -> None:
    """Draw by TokenCache's scores, by chance and by norms, with and without its choice of blocks, by each schedule."""
    require_optimize()
    from vitfold.diffusion import find_method
    from vitfold.diffusion.ablation import ablations, main_effects
    from vitfold.diffusion.compare import check_asked, diffuse
    from vitfold.diffusion.compression import compress

    variants = ablations(find_method(reuse))
    before = environment()
    with steps("ablate") as say, quiet_stdout():
        say(f"loading {source}")
        model = load_dit(source, heads=heads)
        decode, asked = asking.decoder(model), asking.asked(model)
        check_asked(model, asked)
        methods = [one.method for one in variants]
        rows = diffuse(model, methods, asked, threads=asking.threads, trials=asking.trials, decode=decode, say=say)
        found = document(model, asked, rows, compress(model).to_dict(), features=None, chosen=None, before=before)
    found["effects"] = main_effects(variants, {row.name: row.psnr_db for row in rows})
    write_samples(output, found)
    if json:
        print_json(found)
    else:
        called = {one.method.text: ", ".join(one.factors.values()) for one in variants}
        shown = [{**row, "name": called.get(row["name"], row["name"])} for row in found["rows"]]
        out.print(diffusion_table({**found, "rows": shown}))
        for factor, values in found["effects"].items():
            said = ", ".join(f"{value} {number(db, '.1f')}" for value, db in values.items())
            out.print(f"  {factor:9} {said} (mean dB)")
    say_busy(found["environment"])
