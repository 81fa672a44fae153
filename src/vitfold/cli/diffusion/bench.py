"""`vitfold diffusion bench`: bundles of steps, by drawing the same images with each, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vitfold.artifacts.bundle import open_bundle
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.diffusion.drawing import Embeddings, SamplingArgs, draw_bundles
from vitfold.cli.groups import listed
from vitfold.cli.making import say_busy
from vitfold.cli.terminal import out, print_json, steps, write_samples
from vitfold.report.tables import diffusion_table


@command()
def bench(
    *,
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles; the first is the baseline.")],
    peers: Annotated[
        str | None,
        typer.Option(metavar="PEER,...", help="Beside them what others do on the same weights: diffusers, cache-dit."),
    ] = None,
    embeddings: Embeddings = None,
    batch: Annotated[int, typer.Option(min=1, help="Images drawn at once.")] = 8,
    trials: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    threads: options.Threads = None,
    output: options.SamplesFile = None,
    json: options.Json = False,
) -> None:
    """Time bundles of a diffusion model's steps by drawing one batch with each."""
    bench_steps(bundles, batch, trials, threads, output, json=json, peers=listed(peers), embeddings=embeddings)


def bench_steps(
    bundles: list[Path],
    batch: int,
    trials: int,
    threads: int | None,
    output: Path | None,
    *,
    json: bool,
    peers: Sequence[str] = (),
    embeddings: Path | None = None,
) -> None:
    """Draw one batch by every bundle; a model of latents is not decoded."""
    latent = open_bundle(bundles[0], steps=True).manifest.steps.latent
    asking = SamplingArgs(
        classes="all",
        count=batch,
        batch=batch,
        threads=threads,
        trials=trials,
        latents=latent,
        embeddings=embeddings,
    )
    with steps("bench") as say:
        found = draw_bundles(bundles, asking, None, None, say, peers).document
    write_samples(output, found)
    if json:
        print_json(found)
    else:
        out.print(diffusion_table(found))
    say_busy(found["environment"])
