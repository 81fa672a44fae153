"""`vitfold ladder`: the accuracy of methods and bit widths over calibration seeds, resumable."""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold.bench.environment import environment
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.groups import ModelArgs, listed
from vitfold.cli.making import given_images, judged_images, require_optimize
from vitfold.cli.terminal import counted, note, out, print_json, working, write_json
from vitfold.errors import VitfoldError
from vitfold.pipeline.plan import registers_from_name
from vitfold.recipe import MergeRecipe, QuantRecipe
from vitfold.report.tables import accuracy_table
from vitfold.schedule import resolve_r
from vitfold.storage.ordinary import read_text

if TYPE_CHECKING:
    from vitfold.pipeline.ladder import Cell

METHODS = "vitfold,ptq4vit,repq,erq,adalog,noisy,smooth,mse,percentile,minmax"


@dataclass(frozen=True, slots=True, kw_only=True)
class CellArgs:
    """What is measured: every method at every bit width, for every seed, remedy and time of training."""

    methods: Annotated[str, typer.Option(help="Methods, comma-separated.")] = METHODS
    quant: Annotated[str, typer.Option(help="Bit widths, comma-separated.")] = "w8a8,w6a6,w4a4"
    seeds: Annotated[str, typer.Option(help="Seeds that draw calibration images, comma-separated.")] = "0,1,2"
    registers: Annotated[
        str, typer.Option(help="What to do about sink tokens, comma-separated, as none,regcache; see optimize.")
    ] = "none"
    polish: Annotated[
        str, typer.Option(help="Minutes of training behind calibration, comma-separated, as 0,6; see optimize.")
    ] = "0"
    both: Annotated[str, typer.Option(help="Methods to simulate too where an engine executes them.")] = "vitfold"

    def cells(self) -> list[Cell]:
        """Return what is measured, one cell a row.

        Raises:
            RecipeError: if a method or a remedy is not known.
        """
        from vitfold.pipeline.ladder import plan_cells
        from vitfold.quant import find_method

        for name in listed(self.methods):
            find_method(name)
        for name in listed(self.registers):
            registers_from_name(name)
        try:
            seeds = [int(seed) for seed in self.seeds.split(",")]
        except ValueError:
            raise typer.BadParameter(f"seeds are integers, found {self.seeds!r}", param_hint="--seeds") from None
        schemes, both, remedies = listed(self.quant), listed(self.both), listed(self.registers)
        minutes = [QuantRecipe(polish_minutes=one).polish_minutes for one in self._minutes()]
        return plan_cells(listed(self.methods), schemes, seeds, both=both, registers=remedies, polish=minutes)

    def _minutes(self) -> list[float]:
        try:
            return [float(one) for one in self.polish.split(",")]
        except ValueError:
            raise typer.BadParameter(f"minutes are numbers, found {self.polish!r}", param_hint="--polish") from None


@command(
    shown="images calibration_images methods quant seeds output json",
    examples=("vitfold ladder demo --images VAL --calibration-images TRAIN -o ladder.json",),
)
def ladder(
    *,
    source: options.Source,
    images: options.NeededImages,
    calibration_images: Annotated[
        Path, typer.Option(metavar="DIR", help="Images from which quantization takes ranges; measure on others.")
    ],
    cells: CellArgs,
    merge: options.Merge = None,
    calibration_size: options.CalibrationSize = 128,
    limit: options.Limit = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.json", help="Rows; an existing file is gone on with.")
    ] = None,
    json: options.Json = False,
    loading: ModelArgs,
) -> None:
    """Measure every method at every bit width on --images, calibrated on --calibration-images."""
    require_optimize()
    from vitfold.pipeline.ladder import cell_from_dict, run_cells

    planned = cells.cells()
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
        rows = [row for row in _kept(output, head) if row["error"] is None]
        done = {cell_from_dict(row) for row in rows}
        result: dict[str, Any] = {**head, "environment": environment(), "rows": rows}
        progress, calibration = counted(say, bar, len(chosen.paths)), given_images(calibration_images)
        left = [cell for cell in planned if cell not in done]
        for row in run_cells(model, plan, left, chosen, calibration, size=calibration_size, progress=progress):
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
