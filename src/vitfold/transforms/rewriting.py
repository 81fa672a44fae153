"""Local changes of a program: single nodes computed otherwise, everything else as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from vitfold.ops.protocol import Ops
from vitfold.program import Node, Operand, Program, Ref
from vitfold.program.program import Shape
from vitfold.program.trace import Recorder, Traced, call

Given = Mapping[str, "Traced | tuple[Traced, ...] | None"]
Change = Callable[[Ops[Traced], Node, Given], "tuple[Traced, ...] | None"]
"""Records other operations for a node, given its operands by name, and returns its results; None leaves it as it is."""


def rewrite(program: Program, shapes: Mapping[str, Shape], change: Change) -> Program:
    """Return the program in which `change` was asked at every node.

    Args:
        shapes: those of the parameters.
    """
    recorder = Recorder(shapes, program.inputs)
    values: dict[Ref, Traced] = {value.ref: value for value in recorder.enter()}
    for node in program.nodes:
        recorder.scope(node.scope, node.block, node.role)
        results = change(recorder.ops, node, {name: _given(values, ref) for name, ref in node.inputs.items()})
        if results is None:
            results = call(recorder.ops, node, values)
        values.update(zip(node.outputs, results, strict=True))
    return recorder.program({name: values[ref] for name, ref in program.outputs.items()})


def only_outputs(program: Program, *names: str) -> Program:
    """Return the program with some of its outputs."""
    return replace(program, outputs={name: program.outputs[name] for name in names})


def _given(values: Mapping[Ref, Traced], operand: Operand) -> Traced | tuple[Traced, ...] | None:
    if isinstance(operand, tuple):
        return tuple(values[ref] for ref in operand)
    return None if operand is None else values[operand]
