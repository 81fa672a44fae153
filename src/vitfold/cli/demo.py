"""`vitfold demo`: the main job on the bundled model, as one table."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from vitfold import pipeline
from vitfold.artifacts.bundle import Bundle
from vitfold.bench.comparison import Row, compare, raw_samples
from vitfold.bench.environment import environment
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.groups import CalibrationArgs, listed
from vitfold.cli.making import quant_recipe, require_optimize, say_busy
from vitfold.cli.table import print_ladders
from vitfold.cli.terminal import counted, counting, note, out, print_json, steps, working, write_json
from vitfold.images import ImageSet, find_images
from vitfold.pipeline.subjects import Lineup
from vitfold.sources import demo_folder, load_source

CALIBRATION_IMAGES = 64


@command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where the bundles go.")] = Path(
        "out/demo"
    ),
    merge: Annotated[str, typer.Option(help="The r of each row, comma-separated.")] = "2,4",
    quant: Annotated[str, typer.Option(metavar="WxAy", help="Quantization of the second half, or none.")] = "w8a8",
    batch: options.Batch = 1,
    trials: options.Trials = 10,
    seconds: options.Seconds = 2.0,
    json_output: Annotated[
        Path | None, typer.Option("--json-output", help="Write the JSON with raw samples here.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Merge and quantize the bundled CIFAR-10 model at several r, and show speed beside accuracy."""
    require_optimize()
    merges = ["none", *(r for r in listed(merge) if r not in ("0", "none"))]
    wanted = quant_recipe(quant, None, CalibrationArgs(calibration_size=CALIBRATION_IMAGES))
    recipes = [(r, None) for r in merges] + ([] if wanted is None else [(r, wanted) for r in merges])
    images = find_images(demo_folder() / "images")
    before = environment()
    bundles: list[Bundle] = []
    with working("demo") as (say, bar):
        say("loading the bundled ViT-S/14")
        model = load_source("demo").model
        # Accuracy is reported on images that no range was taken from.
        calibration = images.sample(CALIBRATION_IMAGES, seed=0)
        images = images.without(calibration) or images
        for r, recipe in recipes:
            name = "r0" if r == "none" else "r" + r.replace(":", "_")
            name += "" if recipe is None else f"-{quant}"
            folded = pipeline.optimize(model, merge=r, quant=recipe)
            if folded.needs_calibration:
                progress = counted(say, bar, CALIBRATION_IMAGES)
                folded = pipeline.calibrate_plan(folded, calibration, progress=progress)
            say(f"{name}: folding, emitting, verifying")
            bundles.append(pipeline.save(folded, output / f"{name}.fold", overwrite=True))
    rows = _timed(bundles, images, batch=batch, trials=trials, seconds=seconds)
    result = {"environment": before, "rows": [row.to_dict() for row in rows]}
    if json_output is not None:
        write_json(json_output, {**result, "measurements": raw_samples(rows)})
    if json:
        print_json(result)
        say_busy(before)
        return
    print_ladders(result, title=f"ViT-S/14, {len(images.paths)} CIFAR-10 images, batch {batch}")
    out.print(f"bundles: {output}", soft_wrap=True)
    example = images.paths[0]
    note(f"next: vitfold predict {bundles[-1].path} {example}")
    note("      vitfold optimize timm:vit_base_patch16_224 --merge 8 --quant w8a8 --images YOUR_PHOTOS -o vit.fold")


def _timed(bundles: list[Bundle], images: ImageSet, *, batch: int, trials: int, seconds: float) -> list[Row]:
    """Measure how faithful the bundles are, then time them beside eager torch."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitfold-")))
        lineup = stack.enter_context(Lineup(folder=folder, images=images))
        with steps("demo") as say:
            say("preparing torch eager")
            lineup.add_peer("torch", bundles[0])
        with counting("accuracy on the bundled images", lineup.fidelity_images * (len(bundles) + 1)) as advance:
            for bundle in bundles:
                lineup.add_bundle(bundle, advance)
            lineup.measure_peers(bundles[0], advance)
        with steps("timing") as say:
            return compare(
                lineup.ordered(None), batch=batch, images=images, trials=trials, seconds=seconds, progress=say
            )
