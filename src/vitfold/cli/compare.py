"""`vitfold compare`: a bundle beside everything that a user could run instead, in one run."""

from __future__ import annotations

from typing import Annotated

import typer

from vitfold.bench.peers import PEERS, check_peers
from vitfold.cli import options
from vitfold.cli.bench import Timing, bench_bundles
from vitfold.cli.declaring import command
from vitfold.cli.groups import listed
from vitfold.cli.terminal import note, out
from vitfold.errors import EngineError

TIMED = "torch,torch-compile,torch-bf16,onnxruntime,onnxruntime-int8,openvino,openvino-bf16,nncf,nncf-bf16"


@command(
    shown="images calibration_images peers batch output json",
    examples=("vitfold compare vit.fold --images PHOTOS --calibration-images TRAIN",),
)
def compare(
    bundle: options.BundlePath,
    peers: Annotated[
        str, typer.Option(help="Compare with these (comma-separated), each at its best settings.")
    ] = TIMED,
    images: options.Images = None,
    calibration_images: options.CalibrationImages = None,
    batch: options.Batch = 1,
    trials: options.Trials = 10,
    seconds: options.Seconds = 3.0,
    limit: options.TimedImages = 200,
    skip_bad: options.SkipBad = False,
    reference: options.ReferenceBundle = None,
    threads: options.Threads = None,
    output: options.SamplesFile = None,
    json: options.Json = False,
) -> None:
    """Time a bundle beside its peers, with fidelities on the same images; say what is missing and how to get it."""
    names = listed(peers)
    missing = missing_peers(names, calibrated=calibration_images is not None)
    bench_bundles(
        [bundle],
        Timing(
            batch=batch,
            images=images,
            peers=",".join(name for name in names if name not in missing),
            calibration_images=calibration_images,
            trials=trials,
            seconds=seconds,
            limit=limit,
            skip_bad=skip_bad,
            reference=reference,
            threads=threads,
            output=output,
            json=json,
        ),
    )
    say = note if json else lambda line: out.print(line, soft_wrap=True)
    for name, reason in missing.items():
        say(f"not compared: {name}; {reason}")


def missing_peers(names: list[str], *, calibrated: bool) -> dict[str, str]:
    """Return the peers that cannot run here, with the reason, which names the cure.

    Raises:
        EngineError: for a name that is not a peer.
    """
    missing = {}
    for name in names:
        try:
            check_peers([name], calibrated=calibrated)
        except EngineError as error:
            if name not in PEERS:
                raise
            missing[name] = str(error)
    return missing
