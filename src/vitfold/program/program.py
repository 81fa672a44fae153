"""A program as plain data: nodes in static single assignment over the operations of `ops.protocol`."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NewType

import numpy as np

from vitfold.errors import ProgramError
from vitfold.model import Array
from vitfold.ops.protocol import Port

Shape = tuple[int, ...]
Ref = NewType("Ref", int)
"""The number of a value: inputs first, then results in the order in which nodes make them."""
Operand = Ref | None | tuple[Ref, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Literal:
    """Numbers that a program holds: an array that compares by its content."""

    dtype: str
    shape: Shape
    data: bytes

    @staticmethod
    def of(values: Array) -> Literal:
        """Keep an array."""
        kept = np.ascontiguousarray(values)
        return Literal(dtype=kept.dtype.str, shape=tuple(np.shape(values)), data=kept.tobytes())

    def array(self) -> Array:
        """Return it as an array of its own."""
        return np.frombuffer(self.data, self.dtype).reshape(self.shape).copy()


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operation.

    `op` is a method of `Ops`; `inputs` are its values by parameter, `attributes` its other arguments. `outputs` and
    `shapes` (those of one image, with a batch axis of 1) belong to its results. `scope` is the site that unnamed
    operations are charged to, `block` the block that it belongs to, if any, and `role` its part there: "attention",
    "merge", "mlp", or outside of blocks "embed", "pool", "head".
    """

    op: str
    inputs: Mapping[str, Operand]
    attributes: Mapping[str, Any]
    outputs: tuple[Ref, ...]
    shapes: tuple[Shape, ...]
    scope: str
    block: int | None = None
    role: str | None = None

    @property
    def site(self) -> str:
        """The name that people know it by: its layer, its site, else its scope."""
        return str(self.attributes.get("layer") or self.attributes.get("site") or self.scope)

    def operand(self, name: str) -> Ref:
        """Return the value that a parameter takes, which has to be a single one."""
        ref = self.inputs[name]
        assert isinstance(ref, int)
        return Ref(ref)

    @property
    def source(self) -> Ref:
        """The value that it reads, which has to be the only one."""
        (ref,) = dict.fromkeys(self.reads())
        return ref

    def reads(self) -> Iterator[Ref]:
        """Return the values that it reads, in order; one that it reads twice comes twice."""
        for operand in self.inputs.values():
            if isinstance(operand, tuple):
                yield from operand
            elif operand is not None:
                yield operand


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a model computes: ends with names, nodes in an order in which they can run, results by name.

    Raises:
        ValueError: if a node reads what no earlier one made, or a value is made twice.
    """

    inputs: tuple[Port, ...]
    nodes: tuple[Node, ...]
    outputs: Mapping[str, Ref]
    shapes: Mapping[Ref, Shape] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        shapes: dict[Ref, Shape] = {Ref(i): (1, *port.shape) for i, port in enumerate(self.inputs)}
        for node in self.nodes:
            missing = [ref for ref in node.reads() if ref not in shapes]
            if missing:
                raise ValueError(f"{node.op} at {node.site} reads %{missing[0]}, which nothing before it makes")
            for ref, shape in zip(node.outputs, node.shapes, strict=True):
                if ref in shapes:
                    raise ValueError(f"{node.op} at {node.site} makes %{ref} a second time")
                shapes[ref] = shape
        for name, ref in self.outputs.items():
            if ref not in shapes:
                raise ValueError(f"the output {name} is %{ref}, which nothing makes")
        object.__setattr__(self, "shapes", shapes)

    def __str__(self) -> str:
        """Return a readable listing."""
        ends = [f"%{i} = input {port.name} {_shown((1, *port.shape))}" for i, port in enumerate(self.inputs)]
        scope, lines = None, []
        for node in self.nodes:
            if node.scope != scope:
                scope = node.scope
                lines.append(f"# {scope}")
            lines.append(_line(node))
        return "\n".join([*ends, *lines, *(f"output {name} = %{ref}" for name, ref in self.outputs.items())])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "inputs": [_port_to_dict(port) for port in self.inputs],
            "nodes": [_node_to_dict(node) for node in self.nodes],
            "outputs": dict(self.outputs),
        }


def program_from_dict(values: Mapping[str, Any]) -> Program:
    """Rebuild a program from `Program.to_dict`.

    Raises:
        ProgramError: if the values are no program.
    """
    try:
        return Program(
            inputs=tuple(
                Port(
                    name=end["name"],
                    shape=tuple(end["shape"]),
                    batch=end["batch"],
                    dtype=end.get("dtype", "float32"),
                )
                for end in values["inputs"]
            ),
            nodes=tuple(_node_from_dict(node) for node in values["nodes"]),
            outputs={name: Ref(ref) for name, ref in values["outputs"].items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ProgramError(f"this is no program ({error}); write it anew with: vitfold inspect --program") from None


def _line(node: Node) -> str:
    made = ", ".join(f"%{ref}" for ref in node.outputs)
    given = [_operand(operand) for operand in node.inputs.values()]
    given += [f"{name}={_attribute(value)}" for name, value in node.attributes.items()]
    return f"{made} = {node.op}({', '.join(given)}) {', '.join(map(_shown, node.shapes))}"


def resolved(operand: Operand, table: Mapping[Ref, Any]) -> Any:
    """Return what a table holds for an operand: a value, one for each of several, or None for none."""
    if isinstance(operand, tuple):
        return tuple(table[ref] for ref in operand)
    return None if operand is None else table[operand]


def _operand(operand: Operand) -> str:
    if isinstance(operand, tuple):
        return f"[{', '.join(f'%{ref}' for ref in operand)}]"
    return "none" if operand is None else f"%{operand}"


def _attribute(value: Any) -> str:
    return f"constant {_shown(value.shape)}" if isinstance(value, Literal) else repr(value)


def _shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _port_to_dict(port: Port) -> dict[str, Any]:
    values = {"name": port.name, "shape": list(port.shape), "batch": port.batch}
    return values if port.dtype == "float32" else {**values, "dtype": port.dtype}


def _node_to_dict(node: Node) -> dict[str, Any]:
    values: dict[str, Any] = {
        "op": node.op,
        "inputs": {name: list(ref) if isinstance(ref, tuple) else ref for name, ref in node.inputs.items()},
        "attributes": {name: _plain(value) for name, value in node.attributes.items()},
        "outputs": list(node.outputs),
        "shapes": [list(shape) for shape in node.shapes],
        "scope": node.scope,
    }
    return values | {name: getattr(node, name) for name in ("block", "role") if getattr(node, name) is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Literal):
        data = base64.b64encode(value.data).decode("ascii")
        return {"dtype": value.dtype, "shape": list(value.shape), "data": data}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _node_from_dict(values: Mapping[str, Any]) -> Node:
    return Node(
        op=values["op"],
        inputs={
            name: tuple(map(Ref, ref)) if isinstance(ref, list) else None if ref is None else Ref(ref)
            for name, ref in values["inputs"].items()
        },
        attributes={name: _restored(value) for name, value in values["attributes"].items()},
        outputs=tuple(map(Ref, values["outputs"])),
        shapes=tuple(tuple(shape) for shape in values["shapes"]),
        scope=values["scope"],
        block=values.get("block"),
        role=values.get("role"),
    )


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_restored, value))
    if isinstance(value, Mapping) and "range" in value:
        return range(*value["range"])
    if isinstance(value, Mapping):
        data = base64.b64decode(value["data"], validate=True)
        return Literal(dtype=value["dtype"], shape=tuple(value["shape"]), data=data)
    return value
