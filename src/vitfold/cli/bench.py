"""`vitfold bench`: bundles and peers side by side, interleaved in one run."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitfold.artifacts.bundle import holds_steps, open_bundle
from vitfold.bench.comparison import compare, raw_samples
from vitfold.bench.environment import environment
from vitfold.bench.measurement import SCOPES
from vitfold.bench.peers import CALIBRATED, check_peers
from vitfold.bench.timing import PROTOCOLS
from vitfold.cli import options
from vitfold.cli.app import renamed
from vitfold.cli.declaring import command
from vitfold.cli.groups import listed
from vitfold.cli.making import given_images, judged_images, require_optimize, say_busy, turned
from vitfold.cli.table import print_ladders
from vitfold.cli.terminal import counting, note, print_json, skipped, steps, write_samples
from vitfold.errors import VitfoldError
from vitfold.pipeline.subjects import Lineup

if TYPE_CHECKING:
    from vitfold.artifacts.bundle import Bundle
    from vitfold.bench.comparison import Row
    from vitfold.images import ImageSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Beside what bundles are timed, on what and for how long."""

    batch: Annotated[int | None, typer.Option(min=1, help="Images per call; default: the protocol's.")] = None
    images: options.Images = None
    peers: Annotated[
        str | None,
        typer.Option(
            help="Time these beside the bundles (comma-separated): torch, torch-compile, torch-bf16, "
            "onnxruntime, onnxruntime-optimizer, onnxruntime-int8, openvino, openvino-bf16, nncf, nncf-bf16; modelopt "
            "and modelopt-fp8 get a fidelity, but no time."
        ),
    ] = None
    calibration_images: options.CalibrationImages = None
    calibration_size: options.CalibrationSize = 128
    keep_peers: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the files of the peers in this new folder, for instance for audit."),
    ] = None
    baseline: Annotated[
        str | None,
        typer.Option(help="The row that speed-ups refer to; default: the first peer, else the first bundle."),
    ] = None
    protocol: Annotated[
        Literal["quick", "report"],
        typer.Option(
            help="quick: batch 1, 10 rounds, 3 s per subject and scope; report: batch 128, 200 warm-up and 5 x 1000 "
            "recorded iterations, and --decode-ahead."
        ),
    ] = "quick"
    decode_ahead: Annotated[
        bool,
        typer.Option("--decode-ahead", help="Also time images from file to label while threads decode the next ones."),
    ] = False
    trials: Annotated[int | None, typer.Option(min=1, help="Interleaved rounds, if not the protocol's.")] = None
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Recorded seconds per subject and scope, if not the protocol's.")
    ] = None
    limit: options.TimedImages = 200
    skip_bad: options.SkipBad = False
    exif: options.Exif = None
    reference: options.ReferenceBundle = None
    engine: options.Engine = None
    threads: options.Threads = None
    output: options.SamplesFile = None
    gpu_report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Instead of bundles, measure what PyTorch gets from vitfold on the GPU at hand, into gpu-*.json "
            "there, within --seconds (360).",
        ),
    ] = None
    json: options.Json = False


@command(
    brief={"peers": "Time these too, as torch,onnxruntime,openvino.", "baseline": "The row that speed-ups refer to."},
    shown="batch images peers baseline trials seconds engine output json",
    examples=(
        "vitfold bench vit.fold --images PHOTOS --peers torch,onnxruntime",
        "vitfold bench float.fold int8.fold --images VAL -o bench.json",
    ),
)
def bench(
    *,
    bundles: Annotated[
        list[Path] | None, typer.Argument(metavar="BUNDLE", help="Bundles; the first is the baseline.")
    ] = None,
    asked: Timing,
) -> None:
    """Time bundles, engine only and end to end, each with its fidelity."""
    if asked.gpu_report is not None:
        _report_gpu(asked.gpu_report, bundles, asked.seconds)
        return
    if not bundles:
        raise typer.BadParameter("give at least one bundle; vitfold optimize makes them", param_hint="BUNDLE")
    if not any(holds_steps(path) for path in bundles):
        bench_bundles(bundles, asked)
        return
    beside = (asked.images, asked.peers, asked.calibration_images, asked.keep_peers, asked.baseline, asked.reference)
    if any((*beside, asked.engine, asked.seconds)):
        raise VitfoldError(
            "bundles of a diffusion model's steps are timed by drawing images; leave out --images, --peers, "
            "--baseline, --reference, --engine and --seconds, or draw what you like with: vitfold diffusion "
            "sample BUNDLE"
        )
    from vitfold.cli.diffusion.bench import bench_steps

    renamed("vitfold bench with bundles of steps", "vitfold diffusion bench")
    bench_steps(bundles, asked.batch or 8, asked.trials or 5, asked.threads, asked.output, json=asked.json)


def _report_gpu(output: Path, bundles: list[Path] | None, seconds: float | None) -> None:
    """Measure the GPU at hand.

    Raises:
        VitfoldError: if there is none, or a section failed.
    """
    if bundles:
        raise typer.BadParameter("measures models of its own; leave bundles out", param_hint="--gpu-report")
    require_optimize()
    from vitfold.gpu.sections import measure

    if measure(output, seconds=seconds or 360.0) != 0:
        raise VitfoldError("the report on the GPU is not whole; what was measured, and what failed, is said above")


def bench_bundles(bundles: list[Path], asked: Timing) -> None:
    """Time bundles beside peers, print the tables, and say what was not measured.

    Raises:
        VitfoldError: if a bundle, a peer or an image is refused.
    """
    peers = listed(asked.peers)
    check_peers(peers, calibrated=asked.calibration_images is not None)
    if asked.keep_peers is not None:
        _make_empty(asked.keep_peers)
    opened = [turned(open_bundle(path), asked.exif) for path in bundles]
    found, calibration = _images(asked, opened)
    before = environment(threads=asked.threads)
    rows, batch = _rows(asked, peers, opened, found, calibration)
    result: dict[str, Any] = {
        "environment": before,
        "protocol": asked.protocol,
        "rows": [row.to_dict() for row in rows],
    }
    write_samples(asked.output, {**result, "measurements": raw_samples(rows)})
    if asked.json:
        print_json(result)
        say_busy(before)
        return
    print_ladders(result, title=f"batch {batch}")
    _remark(asked, opened, rows)
    if not rows:
        raise VitfoldError("nothing was timed")


def _images(asked: Timing, opened: list[Bundle]) -> tuple[ImageSet | None, ImageSet | None]:
    """Return the images to measure on and those to calibrate peers on."""
    found = None if asked.images is None else given_images(asked.images).first(asked.limit)
    if found is not None:
        for one in opened:
            found = judged_images(found, one.manifest.spec, one.manifest.labels)
        found = found.readable(skipped) if asked.skip_bad else found
    if asked.calibration_images is None:
        return found, None
    calibration = given_images(asked.calibration_images).first(asked.calibration_size)
    return found, calibration.readable(skipped) if asked.skip_bad else calibration


def _rows(
    asked: Timing, peers: list[str], opened: list[Bundle], found: ImageSet | None, calibration: ImageSet | None
) -> tuple[list[Row], int]:
    """Make peers and bundles ready, measure fidelities, then times; return rows and the batch."""
    chosen = PROTOCOLS[asked.protocol]
    batch = asked.batch or chosen.batch
    given = None if asked.reference is None else open_bundle(asked.reference)
    with contextlib.ExitStack() as stack:
        folder = asked.keep_peers or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitfold-")))
        lineup = stack.enter_context(
            Lineup(
                folder=folder,
                images=found,
                engine=asked.engine,
                threads=asked.threads,
                reference=given,
                calibration=calibration,
            )
        )
        with steps("bench") as say:
            for name in peers:
                say(f"preparing {name}")
                lineup.add_peer(name, opened[0])
        with counting("fidelity", lineup.fidelity_images * (len(opened) + len(peers))) as advance:
            for one in opened:
                lineup.add_bundle(one, advance)
            lineup.measure_peers(opened[0], advance)
        subjects = lineup.ordered(asked.baseline)
        with steps("bench") as say:
            rows = compare(
                subjects,
                batch=batch,
                images=found,
                scopes=SCOPES if asked.decode_ahead or chosen.decode_ahead else SCOPES[:2],
                trials=asked.trials or chosen.trials,
                seconds=asked.seconds or chosen.seconds,
                warmup=chosen.warmup,
                iterations=chosen.iterations if asked.seconds is None else None,
                progress=say,
            )
    return rows, batch


def _remark(asked: Timing, opened: list[Bundle], rows: list[Row]) -> None:
    """Say what was not measured, and what to trust less."""
    if asked.calibration_images is not None and not set(listed(asked.peers)) & CALIBRATED:
        note("--calibration-images was not used: no peer of this run is quantized")
    if asked.keep_peers is not None:
        note(f"files of the peers: {asked.keep_peers}; what NVIDIA's compiler makes of one: vitfold audit FILE.onnx")
    if asked.images is None:
        note("no --images: fidelity and end-to-end time were not measured")
    if not all(one.manifest.has_trained_weights for one in opened):
        note("random weights: no fidelity, since their outputs hardly depend on the image")
    for untimed in sorted({f"{row.subject.name}: {row.subject.untimed}" for row in rows if row.subject.untimed}):
        note(f"not timed, {untimed}")
    if any(row.measurement is not None and row.measurement.noisy for row in rows):
        note("noisy rows: the machine was busy; trust speed-ups (paired trials) more than times")


def _make_empty(folder: Path) -> None:
    """Make a folder, which may exist if nothing is in it: peers would take another model's export for theirs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        filled = any(folder.iterdir())
    except OSError as error:
        raise VitfoldError(f"cannot keep peers in {folder}: {error}; give --keep-peers another folder") from None
    if filled:
        raise VitfoldError(f"{folder} is not empty; give --keep-peers a new folder")
