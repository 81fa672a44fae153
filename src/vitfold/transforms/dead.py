"""Nodes whose results nothing reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vitfold.program import Node, Program, Ref
from vitfold.program.program import resolved


def without_dead_nodes(program: Program) -> Program:
    """Return the program without the nodes that contribute to no output, its values numbered anew."""
    needed: set[Ref] = set(program.outputs.values())
    kept = []
    for node in reversed(program.nodes):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(node.reads())
    return _numbered(replace(program, nodes=tuple(reversed(kept))))


def _numbered(program: Program) -> Program:
    """Number values in the order in which they are made, without gaps."""
    order = [Ref(i) for i in range(len(program.inputs))] + [ref for node in program.nodes for ref in node.outputs]
    number = {ref: Ref(i) for i, ref in enumerate(order)}
    return replace(
        program,
        nodes=tuple(_renamed(node, number) for node in program.nodes),
        outputs={name: number[ref] for name, ref in program.outputs.items()},
    )


def _renamed(node: Node, number: Mapping[Ref, Ref]) -> Node:
    return replace(
        node,
        inputs={name: resolved(given, number) for name, given in node.inputs.items()},
        outputs=tuple(number[ref] for ref in node.outputs),
    )
