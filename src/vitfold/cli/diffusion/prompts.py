"""Pipelines of diffusers that draw by prompts: their steps as bundles, their prompts as files of embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold.cli.declaring import command
from vitfold.cli.groups import StepArgs, StepSearchArgs, refuse
from vitfold.cli.making import require_optimize
from vitfold.cli.terminal import note, quiet_stdout, steps
from vitfold.sources.prompts import open_pipeline, read_prompts

if TYPE_CHECKING:
    from vitfold.artifacts.bundle import Bundle

Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Of a pipeline that draws by texts: a prompt per line, or its arguments (prompt_embeds, ...) as "
        "safetensors with a row per prompt. A named --reuse is fitted on them.",
    ),
]


Vae = Annotated[
    bool,
    typer.Option(
        "--vae/--no-vae",
        help="Keep the decoder of a model of latents in the bundle, as a graph: images then need no folder.",
    ),
]


def save_pipeline(
    source: str,
    prompts: Path,
    way: StepSearchArgs,
    stepping: StepArgs,
    place: Path,
    say: Callable[[str], None],
    *,
    vae: bool,
    target: str | None,
) -> Bundle:
    """Write the steps of a pipeline as a bundle, by the method that `--reuse` names."""
    from vitfold.diffusion.exporting import STEPS, export_steps

    refuse(
        (way.reuse == "auto", "a pipeline with prompts takes a method by name, such as --reuse fitted:14", "--reuse"),
        (way.merge is not None, "steps of a pipeline with prompts stay unmerged; leave it out", "--merge"),
        (way.heads is not None, "the folder says its heads itself; leave it out", "--heads"),
        (stepping.sampler is not None, "a pipeline's own scheduler is the sampler; leave it out", "--sampler"),
    )
    found = read_prompts(prompts)
    say(f"loading {source}")
    pipe, call = open_pipeline(source)
    if stepping.guidance is not None:
        call["guidance_scale"] = stepping.guidance
    count = STEPS if stepping.steps is None else stepping.steps
    quantized: dict[str, Any] = {"quant": way.quant, "quant_method": way.method, "target": target}
    return export_steps(
        pipe, way.reuse, found, place, steps=count, vae=vae, source=source, say=say, **quantized, **call
    )


@command(
    examples=("vitfold diffusion embed hf:FOLDER --prompts prompts.txt -o prompts.safetensors",),
)
def embed(
    *,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="hf:REPO_OR_FOLDER of a pipeline of diffusers.")],
    prompts: Prompts = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of guidance; 1 leaves negative embeddings out.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The file of embeddings to write.")],
) -> None:
    """Write prompts as the embeddings that bundles of a pipeline's steps draw by."""
    require_optimize()
    refuse((prompts is None, "give the prompts: --prompts FILE", "--prompts"))
    assert prompts is not None
    from vitfold.diffusion.lifting import embed_prompts

    found = read_prompts(prompts)
    with steps("embed") as say, quiet_stdout():
        say(f"loading {source}")
        pipe, call = open_pipeline(source)
        given: dict[str, Any] = call if guidance is None else {**call, "guidance_scale": guidance}
        bank = embed_prompts(pipe, found, **given)
    bank.save(output)
    note(f"{bank.count} prompts in {output}; draw by them: vitfold diffusion sample OUT.fold --embeddings {output}")
