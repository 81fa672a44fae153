"""Questions about a program: who makes a value, who reads it, what stands where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vitfold.errors import ProgramError
from vitfold.program.program import Node, Operand, Program, Ref


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


def attentions_of(program: Program) -> tuple[Node, ...]:
    """Return all attentions, in order."""
    return tuple(node for node in program.nodes if node.op == "attention")


def attention_of(program: Program, block: int) -> Node | None:
    """Return the attention of a block, None if it has none.

    Raises:
        ProgramError: if it has several.
    """
    found = [node for node in attentions_of(program) if node.block == block]
    if len(found) > 1:
        raise ProgramError(f"block {block} has {len(found)} attentions; only blocks of one can be changed")
    return found[0] if found else None


def linears_of(program: Program) -> tuple[Node, ...]:
    """Return the linear layers, those that part their outputs into heads too, in order."""
    return tuple(node for node in program.nodes if node.op in ("linear", "heads"))


def params_read(program: Program) -> frozenset[str]:
    """Return the names of the parameters that a program may read: a layer's bias, too, where it has one."""
    names: set[str] = set()
    for node in program.nodes:
        layer = node.attributes.get("layer")
        names.update((f"{layer}.weight", f"{layer}.bias") if layer else ())
        names.update(node.attributes.get("weights", ()))
        if node.op == "param":
            names.add(node.attributes["name"])
    return frozenset(names)


def depending_on(program: Program, refs: Iterable[Ref]) -> set[Ref]:
    """Return these values and all that are computed from one of them."""
    found = set(refs)
    for node in program.nodes:
        if found.intersection(node.reads()):
            found.update(node.outputs)
    return found


def norm_before(program: Program, node: Node) -> Node | None:
    """Return the LayerNorm whose output alone feeds a linear layer and feeds nothing else; None if none does."""
    maker = makers(program).get(node.source)
    if maker is None or maker.op != "layer_norm" or node.source in program.outputs.values():
        return None
    return maker if readers(program)[node.source] == (node,) else None


def attention_before(made_by: Mapping[Ref, Node], node: Node) -> Node | None:
    """Return the attention whose result a layer reads, through nothing but a change of shape; None if none is."""
    before = made_by.get(node.source)
    while before is not None and before.op in ("reshape", "transpose"):
        before = made_by.get(before.source)
    return before if before is not None and before.op == "attention" else None


def projections_of(program: Program) -> Mapping[str, str]:
    """Return, by the site of every attention, the linear layer that reads its result, where one does."""
    made_by = makers(program)
    found = ((attention_before(made_by, node), node) for node in linears_of(program))
    return {attention.site: node.site for attention, node in found if attention is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """A block's attention, the addition that puts its result onto the residual stream, and that stream (B, N, D)."""

    attention: Node
    addition: Node
    stream: Ref


def residuals(program: Program) -> tuple[Residual, ...]:
    """Return the attention of every block with the residual addition behind it.

    Raises:
        ProgramError: if a block has none.
    """
    read_by, found = readers(program), []
    for block in range(blocks_of(program)):
        attention = attention_of(program, block)
        one = None if attention is None else residual_behind(program, read_by, attention)
        if one is None:
            raise ProgramError(f"block {block} has no attention with a residual addition behind it")
        found.append(one)
    return tuple(found)


def residual_behind(program: Program, read_by: Mapping[Ref, tuple[Node, ...]], attention: Node) -> Residual | None:
    """Return an attention with the residual addition behind it, None if there is none.

    What stands between them works on single rows: the projection, a scale, a norm.
    """
    (value,) = attention.outputs
    while True:
        following = read_by[value]
        if len(following) != 1:
            return None
        (node,) = following
        if node.op == "add":
            other = next((Ref(ref) for ref in node.reads() if ref != value), None)
            shape = node.shapes[0]
            if other is not None and len(shape) == 3 and program.shapes[other] == shape:
                return Residual(attention=attention, addition=node, stream=other)
        if node.op not in _ROWWISE or len(node.outputs) != 1:
            return None
        (value,) = node.outputs


def closing_linears(program: Program) -> tuple[tuple[str | None, str | None], ...]:
    """Return, for every block, the linear layers whose results its attention and its MLP add to the residual stream.

    None where something stands between a layer and the stream, as a scale or a norm, or where others read it, too.

    Raises:
        ProgramError: if a block has no attention with a residual addition behind it.
    """
    made_by, read_by, found = makers(program), readers(program), []
    for block, residual in enumerate(residuals(program)):
        last = [node for node in program.nodes if node.block == block][-1]
        mlp = None if last is residual.addition else _added_linear(made_by, read_by, last)
        found.append((_added_linear(made_by, read_by, residual.addition), mlp))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenRows:
    """A layer whose outputs are hidden units: `parts` times all of them, one after another."""

    layer: str
    parts: int


def hidden_rows(program: Program, layer: str) -> tuple[HiddenRows, ...] | None:
    """Return the layers that make the inputs of a linear layer, unit by unit.

    Between them stand activations, and products and sums of values of the same units. None where anything else does,
    or where others read what stands there, too.
    """
    made_by, read_by = makers(program), readers(program)
    last = next(node for node in linears_of(program) if node.site == layer)
    units = program.shapes[last.source][-1]
    found: dict[str, HiddenRows] = {}
    between, seen, waiting = [last], set[Ref](), [last.source]
    while waiting:
        ref = waiting.pop()
        if ref in seen:
            continue
        seen.add(ref)
        maker, shape = made_by.get(ref), program.shapes[ref]
        if maker is None or ref in program.outputs.values():
            return None
        if maker.op == "linear":
            found[maker.site] = HiddenRows(layer=maker.site, parts=shape[-1] // units)
            continue
        halves = maker.op == "split" and maker.attributes["axis"] % len(shape) == len(shape) - 1
        if not halves and (maker.op not in _UNITWISE or shape[-1] != units):
            return None
        between.append(maker)
        waiting += [ref for ref in maker.reads() if not _is_number(program, made_by, ref)]
    alone = all(node in between for ref in seen for node in read_by[ref])
    return tuple(found.values()) if alone and found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRows:
    """The layers that make the heads of an attention: how many heads, and how wide each is for the layer behind."""

    rows: tuple[HiddenRows, ...]
    heads: int
    width: int


def head_rows(program: Program, layer: str) -> HeadRows | None:
    """Return the layers that make the heads whose results a linear layer reads.

    Between them and attention stand operations that treat heads alike. None where heads share keys, have biases of
    their own, or are not parted straight from linear layers.
    """
    made_by, read_by = makers(program), readers(program)
    last = next(node for node in linears_of(program) if node.site == layer)
    attention = attention_before(made_by, last)
    if attention is None or not _is_alike(program, attention.inputs.get("bias")):
        return None
    _, heads, _, width = attention.shapes[0]
    found: dict[str, HiddenRows] = {}
    between, waiting = [attention], [Ref(ref) for ref in (attention.operand(name) for name in ("q", "k", "v"))]
    seen: set[Ref] = set()
    while waiting:
        ref = waiting.pop()
        if ref in seen:
            continue
        seen.add(ref)
        maker = made_by.get(ref)
        if maker is None or ref in program.outputs.values():
            return None
        if maker.op == "heads":
            if maker.attributes["heads"] != heads:
                return None
            found[maker.site] = HiddenRows(layer=maker.site, parts=maker.attributes["parts"])
            continue
        if maker.op not in _HEADWISE or maker.attributes.get("axis", -1) % 4 != 3:
            return None
        between.append(maker)
        waiting += [ref for ref in maker.reads() if not _is_alike(program, ref)]
    alone = all(node in between for ref in seen for node in read_by[ref])
    return HeadRows(rows=tuple(found.values()), heads=heads, width=width) if alone and found else None


def _is_alike(program: Program, operand: Operand) -> bool:
    """Whether an operand is a value that is the same for every head."""
    if operand is None:
        return True
    shape = program.shapes[Ref(operand)] if isinstance(operand, int) else ()
    return isinstance(operand, int) and (len(shape) < 3 or shape[-3] == 1)


def _is_number(program: Program, made_by: Mapping[Ref, Node], ref: Ref) -> bool:
    """Whether a value is a constant that is the same for every unit."""
    maker, shape = made_by.get(ref), program.shapes[ref]
    return maker is not None and maker.op in ("param", "constant") and (not shape or shape[-1] == 1)


def output_linear(program: Program) -> str | None:
    """Return the linear layer whose result is the first output of a program, None if another operation makes it."""
    ref = next(iter(program.outputs.values()))
    maker = makers(program).get(ref)
    return maker.site if maker is not None and maker.op == "linear" else None


def _added_linear(made_by: Mapping[Ref, Node], read_by: Mapping[Ref, tuple[Node, ...]], addition: Node) -> str | None:
    """The linear layer whose result an addition takes and nothing else does."""
    if addition.op != "add":
        return None
    for ref in addition.reads():
        maker = made_by.get(Ref(ref))
        if maker is not None and maker.op == "linear" and read_by[Ref(ref)] == (addition,):
            return maker.site
    return None


_UNITWISE = {"activation", "elementwise", "add", "add_scalar", "multiply", "scale", "divide", "log", "tanh"}
_HEADWISE = _UNITWISE | {"layer_norm", "rms_norm", "split", "concat", "slice"}
_ROWWISE = {
    *("transpose", "reshape", "linear", "multiply", "divide", "layer_norm", "rms_norm", "scale", "add", "add_scalar"),
    "elementwise",
}
