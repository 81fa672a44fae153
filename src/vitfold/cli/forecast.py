"""`vitfold forecast`: on which GPUs and at which batches merging pays, in a model, before anything is built."""

from __future__ import annotations

from typing import Annotated

import typer

from vitfold import pipeline
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.groups import JsonArgs, ModelArgs, listed
from vitfold.cli.making import given_images, require_optimize
from vitfold.cli.terminal import out, steps
from vitfold.errors import TargetError
from vitfold.report.audits import forecast_table
from vitfold.target import find_target

GPUS = "H100,A100,L40S,L4,T4"
BATCHES = "1,8,32,128"


@command(
    shown="images target gpus batches output json",
    examples=("vitfold forecast timm:vit_base_patch16_224 --images PHOTOS --gpus A100,L4",),
)
def forecast(
    *,
    source: options.Source,
    images: options.NeededImages,
    target: Annotated[str, typer.Option(help="tensorrt-fp16, tensorrt-int8 or tensorrt-fp8.")] = "tensorrt-int8",
    like: Annotated[str, typer.Option(metavar="R", help="The schedule whose distortion is allowed.")] = "8",
    gpus: Annotated[str, typer.Option(help="GPUs, comma-separated.")] = GPUS,
    batches: Annotated[str, typer.Option(help="Batches, comma-separated.")] = BATCHES,
    answer: JsonArgs,
    loading: ModelArgs,
) -> None:
    """Solve a schedule for every GPU and batch: modelled times at a measured distortion. No GPU is needed."""
    names = listed(gpus)
    if not names or not all(part.strip().isdigit() and int(part) > 0 for part in batches.split(",")):
        raise typer.BadParameter("give GPUs and batches as lists, as H100,L4 and 1,64", param_hint="--gpus, --batches")
    sizes = [int(part) for part in batches.split(",")]
    require_optimize()
    found = given_images(images)
    with steps("forecast") as say:
        model = loading.load(source, say)
        able = [name for name in names if _runs(name, target)]
        if not able:
            raise TargetError(f"none of {gpus} runs {target}; choose others")
        merging = pipeline.measure_merging(model, found, say=say)
        solutions = []
        for name in able:
            for size in sizes:
                say(f"solving: {name}, batch {size}")
                solutions.append(pipeline.solve_merge(merging, target=target, gpu=name, batch=size, like=like))
    document = {
        "source": source,
        "target": target,
        "weights": loading.weights,
        "prediction": "roofline model of the transformer blocks, not a measurement",
        "left_out": [name for name in names if name not in able],
        "rows": [solution.to_dict() for solution in solutions],
    }
    if answer.write(document):
        return

    out.print(forecast_table(document))


def _runs(gpu: str, target: str) -> bool:
    """Say whether a GPU multiplies the target's type.

    Raises:
        TargetError: if the GPU is unknown, or the target is not TensorRT's.
    """
    from vitfold.audit.gpus import find_gpu

    peak = find_gpu(gpu).peak
    return find_target(target).implied_quant != "fp8" or "fp8" in peak
