"""`vitfold lengths`: what single tokens cost on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vitfold import pipeline
from vitfold.bench.environment import environment
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.groups import JsonArgs, ModelArgs, numbers_of
from vitfold.cli.making import given_images, judged_images, require_optimize, say_busy
from vitfold.cli.terminal import out, steps
from vitfold.pipeline.lengths import ROUNDS
from vitfold.recipe import quant_from_scheme
from vitfold.report.lengths import lengths_sentence, lengths_table


@command(
    shown="lengths quant target images batch json",
    examples=("vitfold lengths timm:vit_base_patch16_224 --weights random --lengths 176:196 --images PHOTOS",),
)
def lengths(
    *,
    source: options.Source,
    lengths: Annotated[str, typer.Option(metavar="A:B|N,N,...", help="Tokens: from A to B, or those named.")],
    images: options.NeededImages,
    quant: options.Quant = "w8a8",
    target: options.QuantTarget = "cpu",
    batch: options.Batch = 1,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds, each with sessions of its own.")] = ROUNDS,
    answer: JsonArgs,
    loading: ModelArgs,
) -> None:
    """Time a model at many numbers of tokens: which are worth merging to? Without a GPU: `forecast --lengths`."""
    wanted = numbers_of(lengths)
    require_optimize()
    found = given_images(images)
    before = environment()
    with steps("lengths") as say:
        model = loading.load(source, say)
        found = judged_images(found, model.spec, model.labels)
        pipeline.check_lengths(model.spec, wanted)
        plan = pipeline.roughly_calibrated(model, quant_from_scheme(quant or "none"), target, found)
        rows = pipeline.measure_lengths(plan, wanted, batch=batch, rounds=rounds, say=say)
    result: dict[str, Any] = {
        "source": source,
        "quant": quant,
        "target": plan.target.name,
        "batch": batch,
        "rounds": rounds,
        "lengths": [row.to_dict() for row in rows],
        "environment": before,
    }
    answer.say("lengths")
    say_busy(before)
    if answer.write(result):
        return
    out.print(lengths_table(result))
    out.print(lengths_sentence(result))
