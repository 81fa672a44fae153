"""`vitfold sensitivity`: what each site's quantization costs alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vitfold import pipeline
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.groups import CalibrationArgs, ModelArgs
from vitfold.cli.making import given_images, judged_images, needed_quant, require_optimize
from vitfold.cli.terminal import counted, note, out, print_json, skipped, working
from vitfold.report.tables import sensitivity_table


@command(
    shown="images quant method merge json",
    examples=("vitfold sensitivity demo --images PHOTOS",),
)
def sensitivity(
    *,
    source: options.Source,
    images: options.NeededImages,
    quant: options.Quant = "w8a8",
    method: options.Method = None,
    merge: options.Merge = None,
    target: options.QuantTarget = "cpu",
    drawing: CalibrationArgs,
    limit: Annotated[int, typer.Option(min=1, help="Images to measure on, not used for calibration.")] = 32,
    skip_bad: options.SkipBad = False,
    json: options.Json = False,
    loading: ModelArgs,
) -> None:
    """Quantize one site at a time and rank them: what to put back to float first (optimize --keep-float N)."""
    wanted = needed_quant(quant, method, drawing)
    require_optimize()
    found = given_images(images)
    with working("sensitivity") as (say, advance):
        model = loading.load(source, say)
        found = judged_images(found, model.spec, model.labels)
        folded = pipeline.optimize(model, merge=merge, quant=wanted, target=target)
        calibration, others = pipeline.split_images(folded, found)
        others = others.first(limit)
        if skip_bad:
            calibration, others = calibration.readable(skipped), others.readable(skipped)
        progress = counted(say, advance, len(calibration.paths))
        ranked = pipeline.rank_sites(folded, calibration, others, progress=progress)
    costs = {cost.site: cost.macs for cost in folded.costs()}
    total = sum(costs.values())
    rows: list[dict[str, Any]] = []
    for one in ranked:
        macs = costs.get(one.site) or sum(costs.get(f"{one.site}.{part}", 0) for part in ("qk", "av"))
        rows.append({**one.to_dict(), "macs_ratio": macs / total})
    if json:
        print_json({"source": source, "images": len(others.paths), "recipe": folded.recipe.to_dict(), "sites": rows})
        return

    title = f"{source}, {wanted.scheme} by {wanted.method}: one site quantized at a time, {len(others.paths)} images"
    out.print(sensitivity_table(rows, title=title))
    if loading.weights == "random":
        note("random weights: the order says little about the trained model")
