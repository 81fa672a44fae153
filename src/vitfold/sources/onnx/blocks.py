"""The blocks of a lifted program: attentions with a residual addition behind, and what stands around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vitfold.model import Array
from vitfold.program import Node, Program, Ref
from vitfold.program.queries import Residual, attentions_of, makers, readers, residual_behind


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocks:
    """A program whose nodes know their block and role, with parameters under the names of its layers.

    `streams` are the tokens in front of every block; `even` says whether all blocks have the same tokens and let all
    attend to all, as merging wants them; `why` says why not. `names` are the layers' names of today by earlier ones.
    """

    program: Program
    params: dict[str, Array]
    streams: tuple[Ref, ...]
    even: bool
    why: str
    names: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Stage:
    """A stretch of a program that ends in a value: everything that leads there and to no earlier end."""

    end: Ref
    block: int | None
    role: str
    scope: str


def with_blocks(program: Program, params: Mapping[str, Array]) -> Blocks:
    """Find the blocks of a program, put its nodes in their order, and name its layers by their place."""
    found, even, why = _residuals(program)
    stages = _stages(program, found)
    placed = _placed(program, stages)
    names = _names(placed)
    nodes, held = _renamed(placed, names), _renamed_params(placed, params, names)
    return Blocks(
        program=replace(program, nodes=tuple(nodes)),
        params=held,
        streams=tuple(one.stream for one in found),
        even=even,
        why=why,
        names=names,
    )


def _residuals(program: Program) -> tuple[list[Residual], bool, str]:
    """Return the attentions that make blocks, and whether they are even."""
    read_by = readers(program)
    every = [one for node in attentions_of(program) if (one := residual_behind(program, read_by, node)) is not None]
    if not every:
        every = _loosely(program)
        if every:
            return every, False, "attention sees windows or other tokens than those of the residual stream"
        return [], False, "no attention with a residual addition behind it was found"
    groups: dict[tuple[int, ...], list[Residual]] = {}
    for one in every:
        if _whole(program, one):
            groups.setdefault(program.shapes[one.stream], []).append(one)
    if not groups:
        return every, False, "attention sees windows or other tokens than those of the residual stream"
    largest = max(groups.values(), key=lambda group: (len(group), program.shapes[group[0].stream][1]))
    if len({one.stream for one in largest}) < len(largest):
        return largest, False, "attentions stand side by side in a block"
    if len(largest) < len(every) and program.shapes[largest[0].stream][1] < max(
        program.shapes[one.stream][1] for one in every if len(program.shapes[one.stream]) == 3
    ):
        return every, False, "the number of tokens changes from stage to stage"
    return largest, True, ""


def _loosely(program: Program) -> list[Residual]:
    """Attentions with the first addition behind them of what follows from them and what leads to them."""
    found = []
    for i, attention in enumerate(program.nodes):
        if attention.op != "attention":
            continue
        before = _leading_to(program.nodes[:i], set(attention.reads()))
        following = set(attention.outputs)
        for node in program.nodes[i + 1 :]:
            if not following.intersection(node.reads()):
                continue
            if node.op == "add":
                a, b = node.operand("a"), node.operand("b")
                stream = b if a in following else a
                if (a in following) != (b in following) and stream in before and len(node.shapes[0]) > 2:
                    found.append(Residual(attention=attention, addition=node, stream=stream))
                    break
            following.update(node.outputs)
    return found


def _leading_to(nodes: Sequence[Node], wanted: set[Ref]) -> set[Ref]:
    found = set(wanted)
    for node in reversed(nodes):
        if found.intersection(node.outputs):
            found.update(node.reads())
    return found


def _whole(program: Program, one: Residual) -> bool:
    """Whether all tokens of the stream attend to all."""
    shape, node = program.shapes[one.stream], one.attention
    lengths = {program.shapes[node.operand(name)][2] for name in ("q", "k", "v")}
    return len(shape) == 3 and lengths == {shape[1]}


def _stages(program: Program, found: Sequence[Residual]) -> list[_Stage]:
    stages = []
    for i, one in enumerate(found):
        before = (
            _Stage(one.stream, i - 1, "mlp", f"blocks.{i - 1}.mlp") if i else _Stage(one.stream, None, "embed", "embed")
        )
        stages += [before, _Stage(one.addition.outputs[0], i, "attention", f"blocks.{i}.attn")]
    if found:
        end = _end_of_mlp(program, found[-1].addition.outputs[0])
        stages.append(_Stage(end, len(found) - 1, "mlp", f"blocks.{len(found) - 1}.mlp"))
    return stages


def _end_of_mlp(program: Program, start: Ref) -> Ref:
    """The next addition of two values that both follow from a residual addition; that one if there is none."""
    following = {start}
    for node in program.nodes:
        reads = list(node.reads())
        if node.op == "add" and all(ref in following for ref in reads) and node.shapes[0] == program.shapes[start]:
            return node.outputs[0]
        if following.intersection(reads):
            following.update(node.outputs)
    return start


def _placed(program: Program, stages: Sequence[_Stage]) -> list[Node]:
    """The nodes stage by stage, those that belong to none behind."""
    made_by = makers(program)
    taken: set[int] = set()
    placed: list[Node] = []
    position = {id(node): i for i, node in enumerate(program.nodes)}
    for stage in stages:
        waiting, found = [stage.end], []
        while waiting:
            node = made_by.get(waiting.pop())
            if node is not None and id(node) not in taken:
                taken.add(id(node))
                found.append(node)
                waiting.extend(node.reads())
        found.sort(key=lambda node: position[id(node)])
        placed += [replace(node, scope=stage.scope, block=stage.block, role=stage.role) for node in found]
    rest = [node for node in program.nodes if id(node) not in taken]
    role = "head" if stages else None
    return placed + [replace(node, role=role, block=None) for node in rest]


_PARTS = {"attention": "attn", "mlp": "mlp"}


def _names(nodes: Sequence[Node]) -> dict[str, str]:
    """Names by place for layers and sites of blocks, and for the patch embedding."""
    names: dict[str, str] = {}
    groups: dict[tuple[int, str], list[Node]] = {}
    for node in nodes:
        if node.block is not None and node.role is not None:
            groups.setdefault((node.block, node.role), []).append(node)
    for (block, role), group in groups.items():
        _name_group(names, f"blocks.{block}", role, group)
    patches = [node for node in nodes if node.op == "patch_embed"]
    if len(patches) == 1:
        names[patches[0].site] = "patch_embed"
    return names


def _name_group(names: dict[str, str], block: str, role: str, group: Sequence[Node]) -> None:
    prefix = f"{block}.{_PARTS[role]}"
    taken: set[str] = set()

    def give(node: Node, name: str) -> None:
        while name in taken:
            name = f"{name}_"
        taken.add(name)
        names[node.site] = name

    norms = [node for node in group if node.op in ("layer_norm", "rms_norm")]
    linears = [node for node in group if node.op in ("linear", "heads")]
    attention = next((i for i, node in enumerate(group) if node.op == "attention"), None)
    for i, node in enumerate(group):
        if node.op in ("layer_norm", "rms_norm"):
            outer = len(norms) == 1 or node is norms[0]
            give(node, f"{block}.norm{1 if role == 'attention' else 2}" if outer else f"{prefix}.{_short(node.site)}")
        elif node.op in ("linear", "heads") and role == "attention":
            behind = attention is not None and i > attention
            single = sum((group.index(one) > (attention or 0)) == behind for one in linears) == 1
            give(node, f"{prefix}.{('proj' if behind else 'qkv') if single else _short(node.site)}")
        elif node.op in ("linear", "heads"):
            usual = {2: ("fc1", "fc2"), 3: ("fc1_g", "fc1_x", "fc2")}.get(len(linears))
            give(node, f"{prefix}.{usual[linears.index(node)] if usual else _short(node.site)}")
        elif node.op == "attention":
            give(node, prefix)
        elif node.op == "activation":
            give(node, f"{prefix}.act")
        elif node.attributes.get("site"):
            give(node, f"{prefix}.{_short(node.site)}")


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _renamed(nodes: Sequence[Node], names: Mapping[str, str]) -> list[Node]:
    def attributes(node: Node) -> dict[str, object]:
        return {
            key: names.get(value, value) if key in ("layer", "site") and isinstance(value, str) else value
            for key, value in node.attributes.items()
        }

    return [replace(node, attributes=attributes(node)) for node in nodes]


def _renamed_params(nodes: Sequence[Node], params: Mapping[str, Array], names: Mapping[str, str]) -> dict[str, Array]:
    layers = {node.attributes["layer"] for node in nodes if "layer" in node.attributes}
    held = {}
    for name, array in params.items():
        layer, _, part = name.rpartition(".")
        moves = layer in layers and layer in names and part in ("weight", "bias")
        held[f"{names[layer]}.{part}" if moves else name] = array
    return held
