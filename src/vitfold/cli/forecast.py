"""`vitfold forecast`: what GPUs that are not here would take, in a model, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitfold import pipeline
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.groups import JsonArgs, ModelArgs, listed, numbers_of, refuse
from vitfold.cli.making import given_images, require_optimize
from vitfold.cli.terminal import out, steps
from vitfold.errors import EngineError, TargetError
from vitfold.images import ImageSet
from vitfold.model import Architecture, Model
from vitfold.progress import Say
from vitfold.report.audits import forecast_table
from vitfold.report.gpu_lengths import LENGTHS_SENTENCE, lengths_tables, measured_table
from vitfold.storage.checked import parse_json, section
from vitfold.storage.ordinary import read_text
from vitfold.target import find_target

GPUS = "H100,A100,L40S,L4,T4"
BATCHES = "1,8,32,128"
_LENGTHS = "A:B|N,N,..."


@command(
    shown="images target gpus batches lengths measured output json",
    examples=(
        "vitfold forecast timm:vit_base_patch16_224 --images PHOTOS --gpus A100,L4",
        "vitfold forecast timm:vit_base_patch16_224 --lengths 197,192,176,160,144,128 --gpus H100 --batches 1,8,64,128",
        "vitfold forecast --measured results/gpu-lengths.json",
    ),
)
def forecast(
    *,
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="A model as `vitfold optimize` takes it; not with --measured."),
    ] = None,
    images: options.Images = None,
    target: Annotated[str, typer.Option(help="tensorrt-fp16, tensorrt-int8 or tensorrt-fp8.")] = "tensorrt-int8",
    like: Annotated[str, typer.Option(metavar="R", help="The schedule whose distortion is allowed.")] = "8",
    gpus: Annotated[str, typer.Option(help="GPUs, comma-separated.")] = GPUS,
    batches: Annotated[str, typer.Option(help="Batches, comma-separated.")] = BATCHES,
    lengths: Annotated[
        str | None,
        typer.Option(metavar=_LENGTHS, help="Model a block at these numbers of tokens instead; needs no images."),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with gpu-lengths.json or gpu-vit-b16.json of `make gpu`."),
    ] = None,
    answer: JsonArgs,
    loading: ModelArgs,
) -> None:
    """Solve a schedule for every GPU and batch: modelled times at a measured distortion. No GPU is needed."""
    if measured is not None:
        others = (source, images, lengths)
        refuse((any(one is not None for one in others), "give no SOURCE, --images or --lengths with it", "--measured"))
        _compare(measured, answer)
        return
    refuse(
        (source is None, "give a model, or --measured FILE", "SOURCE"),
        (images is None and lengths is None, "give --images DIR, or --lengths, which needs none", "--images"),
        (images is not None and lengths is not None, "lengths need no images; give one of both", "--lengths"),
    )
    names, sizes = listed(gpus), _sizes(batches)
    refuse((not names, "name GPUs, as H100,L4", "--gpus"))
    wanted = None if lengths is None else numbers_of(lengths)
    require_optimize()
    found = None if images is None or wanted is not None else given_images(images)
    able = [name for name in names if _runs(name, target)]
    if not able:
        raise TargetError(f"none of {gpus} runs {target}; choose others")
    with steps("forecast") as say:
        model = loading.load(str(source), say)
        combinations = [(name, size) for name in able for size in sizes]
        if found is None:
            rows = _at_lengths(model.spec, wanted or [], combinations, target)
        else:
            rows = _solved(model, found, combinations, target, like, say)
    document = {"source": source, "target": target, "weights": loading.weights, **_labels(able)}
    document["left_out"] = [name for name in names if name not in able]
    document["rows" if found is not None else "lengths"] = rows
    if answer.write(document):
        return
    if found is not None:
        out.print(forecast_table(document))
        return
    for table in lengths_tables(document):
        out.print(table)
    out.print(LENGTHS_SENTENCE.format(**document), soft_wrap=True)


def _sizes(batches: str) -> list[int]:
    if not all(part.strip().isdigit() and int(part) > 0 for part in batches.split(",")):
        raise typer.BadParameter("give batches as a list, as 1,64", param_hint="--batches")
    return [int(part) for part in batches.split(",")]


def _labels(gpus: list[str]) -> dict[str, Any]:
    """Say what the figures are, and what they rest on."""
    from vitfold.audit.gpus import constants
    from vitfold.audit.pricing import OF_BLOCKS

    return {"prediction": OF_BLOCKS, "model": constants(gpus)}


def _solved(
    model: Model, images: ImageSet, combinations: list[tuple[str, int]], target: str, like: str, say: Say
) -> list[dict[str, Any]]:
    """Solve a schedule for every GPU and batch."""
    merging = pipeline.measure_merging(model, images, **pipeline.ON_GPUS, say=say)
    rows = []
    for name, size in combinations:
        say(f"solving: {name}, batch {size}")
        rows.append(pipeline.solve_merge(merging, target=target, gpu=name, batch=size, like=like).to_dict())
    return rows


def _at_lengths(
    spec: Architecture, lengths: list[int], combinations: list[tuple[str, int]], target: str
) -> list[dict[str, Any]]:
    """Model a block at every length, on every GPU and at every batch."""
    return [
        row.to_dict()
        for name, size in combinations
        for row in pipeline.forecast_lengths(spec, lengths, target=target, gpu=name, batch=size)
    ]


def _compare(path: Path, answer: JsonArgs) -> None:
    """Print what was measured on a GPU beside what the model says of it."""
    from vitfold.audit.measured import compare_measured

    try:
        found = section(parse_json(read_text(path)), path.name)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"cannot read {path} ({error}); give gpu-lengths.json or gpu-vit-b16.json of `make gpu`"
        ) from None
    document = compare_measured(found)
    if not answer.write(document):
        out.print(measured_table(document))


def _runs(gpu: str, target: str) -> bool:
    """Say whether a GPU multiplies the target's type.

    Raises:
        TargetError: if the GPU is unknown, or the target is not TensorRT's.
    """
    from vitfold.audit.gpus import find_gpu

    peak = find_gpu(gpu).peak
    return find_target(target).implied_quant != "fp8" or "fp8" in peak
