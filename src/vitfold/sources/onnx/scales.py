"""Factors per channel behind a linear layer (LayerScale) as part of its weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vitfold.model import Array
from vitfold.program import Node, Program, Ref
from vitfold.program.program import Shape
from vitfold.program.queries import makers, readers
from vitfold.program.trace import Recorder, Traced, call
from vitfold.sources.onnx.views import known_numbers


def with_folded_scales(program: Program, params: Mapping[str, Array]) -> tuple[Program, dict[str, Array]]:
    """Return the program without factors that the weights of a linear layer can hold: g (W x + b) = (g W) x + g b."""
    made_by, read_by = makers(program), readers(program)
    held = dict(params)
    uses: dict[str, int] = {}
    for node in program.nodes:
        if "layer" in node.attributes:
            uses[node.attributes["layer"]] = uses.get(node.attributes["layer"], 0) + 1
    shapes: dict[str, Shape] = {name: array.shape for name, array in held.items()}
    recorder = Recorder(shapes, program.inputs)
    values: dict[Ref, Traced] = {value.ref: value for value in recorder.enter()}
    for node in program.nodes:
        recorder.scope(node.scope, node.block, node.role)
        found = _scaled(program, held, made_by, read_by, uses, node)
        if found is None:
            values.update(zip(node.outputs, call(recorder.ops, node, values), strict=True))
            continue
        layer, ref, factors = found
        held[f"{layer}.weight"] = held[f"{layer}.weight"] * factors[:, None]
        if f"{layer}.bias" in held:
            held[f"{layer}.bias"] = held[f"{layer}.bias"] * factors
        values[node.outputs[0]] = values[ref]
    return recorder.program({name: values[ref] for name, ref in program.outputs.items()}), held


def _scaled(
    program: Program,
    params: Mapping[str, Array],
    made_by: Mapping[Ref, Node],
    read_by: Mapping[Ref, tuple[Node, ...]],
    uses: Mapping[str, int],
    node: Node,
) -> tuple[str, Ref, Array] | None:
    """The layer, its result and the factors, where a node multiplies what only it reads of a linear layer."""
    if node.op != "multiply":
        return None
    a, b = node.operand("a"), node.operand("b")
    for one, other in ((a, b), (b, a)):
        linear, factors = made_by.get(one), known_numbers(params, made_by.get(other))
        if linear is None or linear.op != "linear" or factors is None:
            continue
        width = program.shapes[one][-1]
        alone = (
            read_by[one] == (node,) and one not in program.outputs.values() and uses[linear.attributes["layer"]] == 1
        )
        if alone and factors.size in (1, width) and factors.shape[-1:] in ((), (1,), (width,)):
            return linear.attributes["layer"], one, np.broadcast_to(factors.reshape(-1), (width,)).astype(np.float32)
    return None
