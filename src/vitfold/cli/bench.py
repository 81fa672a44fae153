"""`vitfold bench`: bundles and peers side by side, interleaved in one run."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from vitfold.cli import options
from vitfold.cli.terminal import command, counting, note, out, print_json, steps, write_json
from vitfold.errors import VitfoldError


@command
def bench(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles; the first is the baseline.")],
    batch: options.Batch = 1,
    images: options.Images = None,
    peers: Annotated[
        str | None,
        typer.Option(help="Time these beside the bundles: torch, torch-compile, onnxruntime (comma-separated)."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="The row that speed-ups refer to; default: the first peer, else the first bundle."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 10,
    seconds: Annotated[float, typer.Option(min=0.1, help="Recorded seconds per subject and scope.")] = 3.0,
    limit: Annotated[int, typer.Option(min=1, help="Images for fidelity, spread evenly over --images.")] = 200,
    reference: options.ReferenceBundle = None,
    threads: options.Threads = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the JSON with every raw sample to this file.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Time bundles, engine only and end to end, each with its fidelity."""
    from vitfold.bench.comparison import compare
    from vitfold.bench.environment import environment
    from vitfold.bundle import open_bundle
    from vitfold.images import find_images
    from vitfold.peers import check_peers
    from vitfold.report.tables import environment_line, ladder
    from vitfold.subjects import Lineup

    names = [name.strip() for name in (peers or "").split(",") if name.strip()]
    check_peers(names)
    opened = [open_bundle(path) for path in bundles]
    given = None if reference is None else open_bundle(reference)
    found = None if images is None else find_images(images)
    before = environment(threads=threads)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitfold-")))
        lineup = stack.enter_context(Lineup(folder=folder, images=found, limit=limit, threads=threads, reference=given))
        with steps("bench") as say:
            for name in names:
                say(f"preparing {name}")
                lineup.add_peer(name, opened[0])
        with counting("fidelity", lineup.fidelity_images * (len(opened) + len(names))) as advance:
            for one in opened:
                lineup.add_bundle(one, advance)
            lineup.measure_peers(opened[0], advance)
        subjects = lineup.ordered(baseline)
        with steps("bench") as say:
            rows = compare(subjects, batch=batch, images=found, trials=trials, seconds=seconds, progress=say)
    result: dict[str, Any] = {"environment": before, "rows": [row.to_dict() for row in rows]}
    if output is not None:
        write_json(output, {**result, "measurements": [row.measurement.to_dict() for row in rows]})
        note(f"raw samples: {output}")
    if json:
        print_json(result)
        return
    out.print(environment_line(before), highlight=False)
    for scope, title in (("engine", "engine only"), ("end_to_end", "end to end: file to label")):
        chosen = [row for row in rows if row.measurement.scope == scope]
        if chosen:
            out.print(ladder(chosen, title=f"{title}, batch {batch}, median ± half IQR, against {chosen[0].baseline}"))
    if found is None:
        note("no --images: fidelity and end-to-end time were not measured")
    if any(row.measurement.noisy for row in rows):
        note("noisy rows: the machine was busy; trust speed-ups (paired trials) more than times")
    if not rows:
        raise VitfoldError("nothing was timed")
