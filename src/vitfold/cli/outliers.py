"""`vitfold outliers`: where a model's sinks are, what they cost, and which remedy helps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold import pipeline
from vitfold.bench.environment import environment
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.groups import CalibrationArgs, JsonArgs, ModelArgs
from vitfold.cli.making import given_images, judged_images, needed_quant, require_optimize
from vitfold.cli.terminal import counted, heading, note, out, skipped, working
from vitfold.decoding import prepared
from vitfold.errors import VitfoldError
from vitfold.model import block_layers
from vitfold.report.sinks import advise, draw_sinks, norms_table, remedies_table, remedy_settings

if TYPE_CHECKING:
    from vitfold.images import ImageSet
    from vitfold.model import Model
    from vitfold.registers import Norms, RemedySearchResult

SHOWN = 6
Picture = Annotated[
    Path | None, typer.Option(metavar="FILE.png", help="Draw where the sinks lie on some of the photos.")
]
Sample = Annotated[
    int | None,
    typer.Option(min=2, help="Use so many of the calibration images; default: as many as take about three minutes."),
]
Confirm = Annotated[
    str | None, typer.Option(help="Confirm the best remedies under this method too; default: plain ranges only.")
]


@command(
    shown="images quant merge picture output json",
    examples=("vitfold outliers timm:vit_base_patch16_224 --images PHOTOS",),
)
def outliers(
    *,
    source: options.Source,
    images: options.NeededImages,
    quant: options.Quant = "w8a8",
    method: Confirm = None,
    merge: options.Merge = None,
    target: options.QuantTarget = "cpu",
    drawing: CalibrationArgs,
    limit: Sample = None,
    picture: Picture = None,
    skip_bad: options.SkipBad = False,
    answer: JsonArgs,
    loading: ModelArgs,
) -> None:
    """Measure token norms, what each layer's quantization costs, and every remedy against sink tokens."""
    wanted = needed_quant(quant, method, drawing)
    require_optimize()
    from vitfold.registers import explain, measure_likeness, measure_norms, measure_remedies

    found = given_images(images)
    with working("outliers") as (say, bar):
        model = loading.load(source, say)
        found = judged_images(found, model.spec, model.labels)
        folded = pipeline.optimize(model, merge=merge, quant=wanted, target=target)
        pool, _ = pipeline.split_images(folded, found)
        pool = pool.readable(skipped) if skip_bad else pool
        pool = _limited(folded.folded, pool, limit)
        progress = counted(say, bar, len(pool.paths))
        confirm = None if method is None else pipeline.constraints_of(folded.target)
        merged = folded.recipe.merge
        measured = measure_remedies(folded.folded, merged, wanted, pool, confirm=confirm, progress=progress)
        progress.step("token norms")
        norms = measure_norms(folded.folded, pool, advance=progress.advance)
        progress.step("likeness of outlier tokens")
        likeness = measure_likeness(folded.folded, pool, measured.site, advance=progress.advance)
        if picture is not None:
            progress.step("picture")
            _draw(picture, pool, norms, folded.model.spec.grid, folded.model.preprocess)
    values = {
        "source": source,
        "images": len(pool.paths),
        "quantization": f"{wanted.scheme}, plain ranges",
        "method": method,
        "merge": list(merged.r),
        **_measured(measured, norms, block_layers(folded.model.spec)),
        "likeness": asdict(likeness),
        "environment": environment(),
    }
    values["advice"] = f"{advise(values, prefix=model.spec.prefix)} In figures: {explain(measured)}."
    if answer.write(values):
        return
    _print(values)
    if loading.weights == "random":
        note("random weights: sinks are made by training, so these say nothing about the trained model")
    if picture is not None:
        note(f"sinks are drawn in {picture}")


def _limited(model: Model, pool: ImageSet, limit: int | None) -> ImageSet:
    """Take as many images as were asked for, or as answer within some three minutes, and say so."""
    from vitfold.registers.sampling import sample_size

    count = sample_size(model, pool) if limit is None else limit
    if limit is None and count < len(pool.paths):
        note(
            f"measured on {count} of {len(pool.paths)} images, to answer within about three minutes here; "
            f"--limit {len(pool.paths)} takes all, and an interrupted run goes on by the same command"
        )
    return pool.first(count)


def _measured(measured: RemedySearchResult, norms: Norms, owners: Mapping[str, int]) -> dict[str, Any]:
    """Norms behind every block, the noise that its layers make, each quantized alone, and what remedies do."""
    blocks = [
        {
            "block": block,
            "max_norm": float(norms.max_norm[block]),
            "mean_norm": float(norms.mean_norm[block]),
            "max_prefix_norm": float(norms.prefix_norm[block]),
            "max_patch_norm": float(norms.patch_norm[block]),
            "noise_to_signal": sum(one for site, one in measured.case.noise if owners.get(site) == block),
        }
        for block in range(len(norms.max_norm))
    ]
    return {
        "blocks": blocks,
        "sensitive_site": measured.case.noisiest_site,
        "sink_site": measured.site,
        "layers": [{"layer": layer, "noise_to_signal": noise} for layer, noise in measured.case.noise],
        "remedies": [one.to_dict() for one in measured.remedies],
        "chosen": measured.chosen.name,
    }


def _draw(picture: Path, pool: ImageSet, norms: Norms, grid: tuple[int, int], preprocess: Any) -> None:
    """Draw the photos with the largest sinks, behind the block where those stand out most.

    Raises:
        VitfoldError: if the picture cannot be written.
    """
    import numpy as np

    def seen(path: Path) -> Any:
        """What the model sees of a photo, as pixels (H, W, 3)."""
        pixels = prepared(path, preprocess).transpose(1, 2, 0)
        return (255 * (pixels * preprocess.std + preprocess.mean)).clip(0, 255).round().astype(np.uint8)

    block = norms.rarest
    patches = norms.patches[:, block]
    order = np.argsort(-patches.max(1), kind="stable")[:SHOWN]
    photos = [seen(pool.paths[i]) for i in order]
    maps = [patches[i].reshape(grid) for i in order]
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_sinks(photos, maps, title=f"largest |x| of each patch behind block {block}").save(picture)
    except (OSError, ValueError) as error:
        raise VitfoldError(f"cannot write {picture}: {error}; name a .png file in a writable folder") from None


def _print(values: dict[str, Any]) -> None:
    heading(f"{values['source']}, token norms over {values['images']} images")
    out.print(norms_table(values))
    out.print(f"most sensitive {values['sensitive_site']}, outlier tokens at {values['sink_site']}", soft_wrap=True)
    alike = values["likeness"]
    out.print(
        f"cosine between images there: {alike['outliers']:.2f} of the largest patches, {alike['others']:.2f} of others",
        soft_wrap=True,
    )
    out.print()
    heading(f"{values['source']}, {values['quantization']}: what helps (* chosen)")
    out.print(remedies_table(values))
    for line in remedy_settings(values):
        out.print(f"  {line}", style="dim", soft_wrap=True)
    out.print()
    out.print(values["advice"])
