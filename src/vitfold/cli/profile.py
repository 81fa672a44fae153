"""`vitfold profile`: where the time of a bundle goes, and what limits it."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from vitfold.architectures.programs import spec_in, whole_in
from vitfold.artifacts.bundle import open_bundle
from vitfold.bench.comparison import pixels_for
from vitfold.bench.environment import environment
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.groups import JsonArgs
from vitfold.cli.making import given_images, say_busy
from vitfold.cli.terminal import out, steps
from vitfold.engines import open_session
from vitfold.errors import VitfoldError
from vitfold.pipeline import count_costs
from vitfold.recipe import MergeRecipe
from vitfold.report.profiles import block_table, kind_table, profile_heading


@command()
def profile(
    *,
    bundle: options.BundlePath,
    batch: options.Batch = 1,
    images: options.Images = None,
    runs: Annotated[int, typer.Option(min=1, help="Profiled runs; as many run without the profiler, in turn.")] = 20,
    ceiling: Annotated[
        bool, typer.Option("--ceiling/--no-ceiling", help="Measure what this machine reaches at best, to compare.")
    ] = True,
    engine: options.Engine = None,
    threads: options.Threads = None,
    answer: JsonArgs,
) -> None:
    """Time every block and every kind of operation by the engine's own profiler."""
    from vitfold.profile import advise, ceiling_of, join, probes

    opened = open_bundle(bundle)
    manifest = opened.manifest
    if manifest.simulated:
        raise VitfoldError(
            f"{bundle} is simulated: no engine executes it, so it has no time to profile; make one with --quant w8a8"
        )
    found = None if images is None else given_images(images)
    before = environment(threads=threads)
    with steps("profile") as say, open_session(opened, engine=engine, threads=threads) as session:
        session.bind({session.input: pixels_for(manifest.preprocess, batch, found)})
        name = session.engine.split()[0]
        say(f"{runs} runs with and without the profiler of {session.engine}")
        with contextlib.ExitStack() as stack:
            target = str(manifest.target["name"])
            calls = stack.enter_context(probes(name, target=target, threads=threads)) if ceiling else {}
            measured = session.profile(runs, calls)
        merge, whole, spec = manifest.recipe.merge, whole_in(manifest), spec_in(manifest)
        joined = join(
            measured,
            count_costs(spec, merge, whole=whole),
            batch=batch,
            unmerged=count_costs(spec, MergeRecipe(r=()), whole=whole) if any(merge.r) else None,
            ceiling=ceiling_of(measured.beside_ns) if ceiling else None,
        )
        result: dict[str, Any] = {
            "bundle": opened.name,
            "engine": session.engine,
            "recipe": manifest.recipe.to_dict(),
            "tokens": list(manifest.tokens),
            **joined.to_dict(),
            "advice": list(advise(joined)),
            "environment": before,
        }
    answer.say("profile")
    say_busy(before)
    if answer.write(result):
        return

    out.print(profile_heading(result))
    out.print(kind_table(result))
    out.print(block_table(result))
    for sentence in result["advice"]:
        out.print(sentence)
