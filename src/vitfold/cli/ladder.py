"""`vitfold ladder`: the accuracy of methods and bit widths over calibration seeds, resumable."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from vitfold.bench.environment import environment
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.groups import ModelArgs
from vitfold.cli.making import given_images, judged_images, require_optimize
from vitfold.cli.terminal import note, out, print_json, working, write_json
from vitfold.errors import VitfoldError
from vitfold.pipeline.plan import registers_from_name
from vitfold.recipe import MergeRecipe
from vitfold.report.tables import accuracy_table
from vitfold.schedule import resolve_r
from vitfold.storage.ordinary import read_text

METHODS = "vitfold,ptq4vit,repq,noisy,smooth,mse,percentile,minmax"


@command(
    shown="images calibration_images methods quant seeds output json",
    examples=("vitfold ladder demo --images VAL --calibration-images TRAIN -o ladder.json",),
)
def ladder(
    *,
    source: options.Source,
    images: options.Images = None,
    calibration_images: options.CalibrationImages = None,
    methods: Annotated[str, typer.Option(help="Methods, comma-separated.")] = METHODS,
    quant: Annotated[str, typer.Option(help="Bit widths, comma-separated.")] = "w8a8,w6a6,w4a4",
    seeds: Annotated[str, typer.Option(help="Seeds that draw calibration images, comma-separated.")] = "0,1,2",
    merge: options.Merge = None,
    registers: Annotated[
        str, typer.Option(help="What to do about sink tokens, comma-separated, as none,regcache; see optimize.")
    ] = "none",
    calibration_size: options.CalibrationSize = 128,
    both: Annotated[str, typer.Option(help="Methods to simulate too where an engine executes them.")] = "vitfold",
    limit: options.Limit = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.json", help="Rows; an existing file is gone on with.")
    ] = None,
    json: options.Json = False,
    loading: ModelArgs,
) -> None:
    """Measure every method at every bit width on --images, calibrated on --calibration-images."""
    if images is None or calibration_images is None:
        raise typer.BadParameter("give --images DIR and --calibration-images DIR", param_hint="--images")
    require_optimize()
    from vitfold.pipeline.ladder import cell_from_dict, plan_cells, run_cells
    from vitfold.quant import find_method

    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        find_method(name)
    remedies = [name.strip() for name in registers.split(",") if name.strip()]
    for name in remedies:
        registers_from_name(name)
    schemes = [scheme.strip() for scheme in quant.split(",") if scheme.strip()]
    try:
        drawn = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise typer.BadParameter(f"seeds are integers, found {seeds!r}", param_hint="--seeds") from None
    found = given_images(images)
    chosen = found if limit is None else found.first(limit)
    with working("ladder") as (say, bar):
        model = loading.load(source, say)
        chosen = judged_images(chosen, model.spec, model.labels)
        plan = MergeRecipe(r=resolve_r(merge, model.spec))
        head = {
            "source": source,
            "model_digest": model.digest(),
            "merge": list(plan.r),
            "images": len(chosen.paths),
            "images_digest": chosen.digest(),
            "calibration_size": calibration_size,
        }
        rows = _kept(output, head)
        done = {cell_from_dict(row) for row in rows if row["error"] is None}
        rows = [row for row in rows if row["error"] is None]
        cells = [
            cell
            for cell in plan_cells(names, schemes, drawn, both=both.split(","), registers=remedies)
            if cell not in done
        ]
        seen = [0]

        def step(text: str) -> None:
            seen[0] = 0
            say(text)

        def advance(count: int) -> None:
            seen[0] += count
            bar(seen[0], len(chosen.paths))

        result: dict[str, Any] = {**head, "environment": environment(), "rows": rows}
        for row in run_cells(
            model,
            plan,
            cells,
            chosen,
            given_images(calibration_images),
            size=calibration_size,
            step=step,
            advance=advance,
        ):
            rows.append(row)
            if output is not None:
                write_json(output, result)
    if json:
        print_json(result)
        return
    out.print(accuracy_table(result))
    for row in rows:
        if row["error"] is not None:
            note(f"{row['method']} {row['scheme']}, seed {row['seed']}: {row['error']}")


def _kept(output: Path | None, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an earlier run of the same ladder."""
    if output is None or not output.exists():
        return []
    try:
        before = json_module.loads(read_text(output))
        rows: list[dict[str, Any]] = before["rows"]
        same = all(before[key] == value for key, value in head.items())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VitfoldError(f"{output} is not the JSON of a ladder ({error!r}); give another file") from None
    if not same:
        raise VitfoldError(f"{output} holds a ladder of another model, merging or image folder; give another file")
    return rows
