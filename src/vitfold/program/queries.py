"""Questions about a program: who makes a value, who reads it, what stands where."""

from __future__ import annotations

from collections.abc import Mapping

from vitfold.program.program import Node, Program, Ref


def makers(program: Program) -> Mapping[Ref, Node]:
    """Return the node that makes each value; inputs have none."""
    return {ref: node for node in program.nodes for ref in node.outputs}


def readers(program: Program) -> Mapping[Ref, tuple[Node, ...]]:
    """Return the nodes that read each value, in order, each once; outputs of the program are not among them."""
    found: dict[Ref, list[Node]] = {ref: [] for ref in program.shapes}
    for node in program.nodes:
        for ref in dict.fromkeys(node.reads()):
            found[ref].append(node)
    return {ref: tuple(nodes) for ref, nodes in found.items()}


def blocks_of(program: Program) -> int:
    """Return how many blocks a program has."""
    return 1 + max((node.block for node in program.nodes if node.block is not None), default=-1)


def attention_of(program: Program, block: int) -> tuple[Node, ...]:
    """Return the attentions of a block."""
    return tuple(node for node in program.nodes if node.op == "attention" and node.block == block)


def linears_of(program: Program) -> tuple[Node, ...]:
    """Return the linear layers, those that part their outputs into heads too, in order."""
    return tuple(node for node in program.nodes if node.op in ("linear", "heads"))


def norm_before(program: Program, node: Node) -> Node | None:
    """Return the LayerNorm whose output alone feeds a linear layer and feeds nothing else; None if none does."""
    (source,) = dict.fromkeys(node.reads())
    maker = makers(program).get(source)
    if maker is None or maker.op != "layer_norm" or source in program.outputs.values():
        return None
    return maker if readers(program)[source] == (node,) else None
