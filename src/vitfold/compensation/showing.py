"""The unmerged and the merged program, run from the tokens in front of a block, with what is inside them shown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from vitfold.compensation.streams import Columns
from vitfold.model import Array
from vitfold.ops.run import Run
from vitfold.program import Program, replay
from vitfold.program.queries import linears_of
from vitfold.transforms.merging import stream_name

HELD_OUT = 8
"""One image in so many is held out."""
BATCH = 32
"""Images that are run together; a multiple of `HELD_OUT`."""


def showing(program: Program, layers: Collection[str]) -> Program:
    """Return the program with inputs and outputs of linear layers among its own, as `{layer}.x` and `{layer}.y`."""
    found = {node.site: node for node in linears_of(program)}
    shown = {f"{layer}.x": found[layer].source for layer in layers}
    shown |= {f"{layer}.y": found[layer].outputs[0] for layer in layers}
    return replace(program, outputs={**program.outputs, **shown})


def run(program: Program, params: Mapping[str, Array], given: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    """Return outputs by name, from what is given by name."""
    return dict(zip(names, replay(program, Run(params), given=given, only=names), strict=True))


def named(program: Program, block: int, columns: Columns) -> dict[str, Tensor]:
    """Name columns as outputs of a program in front of a block; those that it does not have are left out."""
    found = {stream_name(block, column): value for column, value in columns.items()}
    return {name: value for name, value in found.items() if name in program.outputs}


def divided(count: int) -> tuple[Int[Tensor, " F"], Int[Tensor, " H"]]:
    """Return which of the images of a batch are fitted to, and which are held out."""
    images = torch.arange(count)
    held = images % HELD_OUT == HELD_OUT - 1
    return images[~held], images[held]


def mean_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Relative squared error of outputs, mean over images, from pairs of exact ones and others."""
    errors = []
    for exact, found in pairs:
        wrong, whole = ((value.flatten(1)).square().sum(1) for value in (found - exact, exact))
        errors.append(wrong / whole.clamp_min(1e-12))
    return float(torch.cat(errors).mean())
