"""`vitfold bench`: bundles and peers side by side, interleaved in one run."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vitfold.cli import options
from vitfold.cli.drawing import SamplingArgs, draw_bundles
from vitfold.cli.making import given_images, judged_images, say_busy, turned
from vitfold.cli.terminal import command, counting, note, out, print_json, skipped, steps, write_json
from vitfold.errors import VitfoldError
from vitfold.storage.ordinary import read_text


@command
def bench(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles; the first is the baseline.")],
    batch: Annotated[int | None, typer.Option(min=1, help="Images per call; default: the protocol's.")] = None,
    images: options.Images = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="Time these beside the bundles (comma-separated): torch, torch-compile, onnxruntime, "
            "onnxruntime-int8, openvino, nncf; modelopt and modelopt-fp8 get a fidelity, but no time."
        ),
    ] = None,
    calibration_images: options.CalibrationImages = None,
    calibration_size: options.CalibrationSize = 128,
    keep_peers: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the files of the peers in this new folder, for instance for audit."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="The row that speed-ups refer to; default: the first peer, else the first bundle."),
    ] = None,
    protocol: Annotated[
        Literal["quick", "report"],
        typer.Option(
            help="quick: batch 1, 10 rounds, 3 s per subject and scope; report: batch 128, 200 warm-up and 5 x 1000 "
            "recorded iterations."
        ),
    ] = "quick",
    trials: Annotated[int | None, typer.Option(min=1, help="Interleaved rounds, if not the protocol's.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Recorded seconds per subject and scope, if not the protocol's.")
    ] = None,
    limit: options.TimedImages = 200,
    skip_bad: options.SkipBad = False,
    exif: options.Exif = None,
    reference: options.ReferenceBundle = None,
    engine: options.Engine = None,
    threads: options.Threads = None,
    output: options.SamplesFile = None,
    json: options.Json = False,
) -> None:
    """Time bundles, engine only and end to end, each with its fidelity; bundles of steps by drawing images."""
    from vitfold.artifacts.bundle import holds_steps

    if any(holds_steps(path) for path in bundles):
        if any((images, peers, calibration_images, keep_peers, baseline, reference, engine, seconds)):
            raise VitfoldError(
                "bundles of a diffusion model's steps are timed by drawing images; leave out --images, --peers, "
                "--baseline, --reference, --engine and --seconds, or draw what you like with: vitfold diffuse BUNDLE"
            )
        _bench_steps(bundles, batch or 8, trials or 5, threads, output, json=json)
        return
    from vitfold.artifacts.bundle import open_bundle
    from vitfold.bench.comparison import compare, raw_samples
    from vitfold.bench.environment import environment
    from vitfold.bench.peers import CALIBRATED, check_peers
    from vitfold.bench.timing import PROTOCOLS
    from vitfold.pipeline.subjects import Lineup

    names = [name.strip() for name in (peers or "").split(",") if name.strip()]
    check_peers(names, calibrated=calibration_images is not None)
    if keep_peers is not None:
        _make_empty(keep_peers)
    opened = [turned(open_bundle(path), exif) for path in bundles]
    given = None if reference is None else open_bundle(reference)
    found = None if images is None else given_images(images).first(limit)
    if found is not None:
        for one in opened:
            found = judged_images(found, one.manifest.spec, one.manifest.labels)
    if found is not None and skip_bad:
        found = found.readable(skipped)
    calibration = None if calibration_images is None else given_images(calibration_images).first(calibration_size)
    if calibration is not None and skip_bad:
        calibration = calibration.readable(skipped)
    before = environment(threads=threads)
    with contextlib.ExitStack() as stack:
        folder = keep_peers or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitfold-")))
        lineup = stack.enter_context(
            Lineup(
                folder=folder, images=found, engine=engine, threads=threads, reference=given, calibration=calibration
            )
        )
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
            chosen = PROTOCOLS[protocol]
            batch = batch or chosen.batch
            rows = compare(
                subjects,
                batch=batch,
                images=found,
                trials=trials or chosen.trials,
                seconds=seconds or chosen.seconds,
                warmup=chosen.warmup,
                iterations=chosen.iterations if seconds is None else None,
                progress=say,
            )
    result: dict[str, Any] = {"environment": before, "protocol": protocol, "rows": [row.to_dict() for row in rows]}
    if output is not None:
        write_json(output, {**result, "measurements": raw_samples(rows)})
        note(f"raw samples: {output}")
    if json:
        print_json(result)
        say_busy(before)
        return
    print_ladders(result, title=f"batch {batch}")
    if calibration is not None and not set(names) & CALIBRATED:
        note("--calibration-images was not used: no peer of this run is quantized")
    if keep_peers is not None:
        note(f"files of the peers: {keep_peers}; what NVIDIA's compiler makes of one: vitfold audit FILE.onnx")
    if found is None:
        note("no --images: fidelity and end-to-end time were not measured")
    if not all(one.manifest.has_trained_weights for one in opened):
        note("random weights: no fidelity, since their outputs hardly depend on the image")
    for untimed in sorted({f"{row.subject.name}: {row.subject.untimed}" for row in rows if row.subject.untimed}):
        note(f"not timed, {untimed}")
    if any(row.measurement is not None and row.measurement.noisy for row in rows):
        note("noisy rows: the machine was busy; trust speed-ups (paired trials) more than times")
    if not rows:
        raise VitfoldError("nothing was timed")


def _bench_steps(
    bundles: list[Path], batch: int, trials: int, threads: int | None, output: Path | None, *, json: bool
) -> None:
    """Draw one batch by every bundle; a model of latents is not decoded."""
    from vitfold.artifacts.bundle import open_bundle
    from vitfold.report.tables import diffusion_table

    latent = open_bundle(bundles[0], steps=True).manifest.steps.latent
    asking = SamplingArgs(classes="all", count=batch, batch=batch, threads=threads, trials=trials, latents=latent)
    with steps("bench") as say:
        found = draw_bundles(bundles, asking, None, None, say).document
    if output is not None:
        write_json(output, found)
        note(f"raw samples: {output}")
    if json:
        print_json(found)
    else:
        out.print(diffusion_table(found))
    say_busy(found["environment"])


def _make_empty(folder: Path) -> None:
    """Make a folder, which may exist if nothing is in it: peers would take another model's export for theirs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        filled = any(folder.iterdir())
    except OSError as error:
        raise VitfoldError(f"cannot keep peers in {folder}: {error}; give --keep-peers another folder") from None
    if filled:
        raise VitfoldError(f"{folder} is not empty; give --keep-peers a new folder")


def print_ladders(result: Mapping[str, Any], *, title: str) -> None:
    """Print the environment and one table per scope."""
    from vitfold.bench.environment import busy_remark
    from vitfold.report.tables import SCOPES, environment_line, ladder

    out.print(environment_line(result["environment"]))
    busy = busy_remark(result["environment"])
    if busy is not None:
        out.print(busy, style="yellow", soft_wrap=True)
    for scope, name in SCOPES.items():
        chosen = [row for row in result["rows"] if row["scope"] == scope]
        if chosen:
            baseline = chosen[0]["speed_up"]["baseline"]
            out.print(ladder(chosen, title=f"{title}, {name}; median ± half IQR, speed-up against {baseline}"))


@command
def table(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="JSON of bench or demo.")],
    scope: Annotated[Literal["engine", "end_to_end"] | None, typer.Option(help="Only this scope.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown instead of a terminal table.")] = False,
) -> None:
    """Print the tables of a JSON file that bench or demo wrote."""
    import json

    from vitfold.report import tables

    try:
        result = json.loads(read_text(file))
        rows = [row for row in result["rows"] if scope in (None, row["scope"])]
        batch = {row["batch"] for row in rows}
        if markdown:
            for one in tables.SCOPES:
                chosen = [row for row in rows if row["scope"] == one]
                if chosen:
                    for line in tables.markdown(chosen).splitlines():
                        out.print(line, soft_wrap=True)
            return
        print_ladders({**result, "rows": rows}, title=f"batch {', '.join(map(str, sorted(batch)))}")
    except OSError as error:
        raise VitfoldError(f"cannot read {file}: {error}; write one with: vitfold bench BUNDLE -o FILE.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise VitfoldError(f"{file} is not the JSON of bench or demo ({error!r}); write it again") from None
