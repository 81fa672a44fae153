"""From a plain ONNX graph to a program: every node by a rule of `rules`, or, where none fits, as a foreign piece."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from vitfold.errors import SourceError
from vitfold.model import Array, GraphEnd
from vitfold.ops.protocol import Ops, Port
from vitfold.program import Program
from vitfold.program.trace import Recorder, Traced
from vitfold.sources.onnx.foreign import foreign_piece
from vitfold.sources.onnx.placing import Lifted, Place, UnliftableError, place_in
from vitfold.sources.onnx.reading import Plain, Shape

_SMALL = 16
"""Constants up to so many numbers stand in the program itself, longer ones are parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiftedProgram:
    """A program with its parameters; `values` say which value of the graph each of its values stands for."""

    program: Program
    params: Mapping[str, Array]
    values: Mapping[str, Lifted]
    outputs: Mapping[str, Lifted]
    foreign: Mapping[str, str]
    """Sites of foreign pieces, with the reason."""


@dataclass(slots=True, eq=False)
class Lift:
    """What rules work with: the graph, what was made so far, and the recorder of the program."""

    plain: Plain
    recorder: Recorder
    params: dict[str, Array]
    shapes: dict[str, Shape]
    values: dict[str, Lifted] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    readers: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    scaled: dict[str, tuple[str, float]] = field(default_factory=dict)
    gates: dict[str, tuple[str, float]] = field(default_factory=dict)

    @property
    def ops(self) -> Ops[Traced]:
        """What programs are written over."""
        return self.recorder.ops

    def constant(self, name: str) -> Array:
        """Return a constant of the graph.

        Raises:
            UnliftableError: if the value depends on an input.
        """
        if name not in self.plain.constants:
            raise UnliftableError(f"needs {name} before it runs")
        return self.plain.constants[name]

    def value(self, name: str) -> Lifted:
        """Return a value that depends on an input.

        Raises:
            UnliftableError: if it is a constant.
        """
        if name not in self.values:
            raise UnliftableError(f"works on the constant {name} alone")
        return self.values[name]

    def is_constant(self, name: str) -> bool:
        """Whether a value is known before any input is."""
        return name in self.plain.constants

    def sole_reader(self, name: str) -> onnx.NodeProto | None:
        """Return the only node that reads a value; None if there are others, or it is an output."""
        found = self.readers.get(name, [])
        is_output = any(end.name == name for end in self.plain.outputs)
        return found[0] if len(found) == 1 and not is_output else None

    def unique(self, name: str) -> str:
        """Return a name that no parameter or site has yet."""
        name = _clean(name)
        count = self.names[name] = self.names.get(name, 0) + 1
        return name if count == 1 else f"{name}.{count}"

    def add_param(self, name: str, array: Array) -> str:
        """Keep an array as a parameter under a name like the given one; return that."""
        name = self.unique(name)
        self.set_param(name, array)
        return name

    def set_param(self, name: str, array: Array) -> None:
        """Keep an array as the parameter `name`."""
        self.params[name] = np.array(array, np.float32, order="C")
        self.shapes[name] = self.params[name].shape

    def known(self, name: str, array: Array) -> Traced:
        """Return numbers, whose first axis is a batch of 1, as a value."""
        if array.dtype.kind != "f":
            raise UnliftableError("computes with whole numbers")
        if array.size <= _SMALL:
            return self.ops.constant(np.asarray(array, np.float32))
        return self.ops.param(self.add_param(name, array))

    def known_beside(self, name: str, beside: Lifted, rank: int | None = None) -> Traced:
        """Return a constant so that it broadcasts with a value of `rank` axes that has its batch where `beside` has it.

        Raises:
            UnliftableError: if it has another number for every image.
        """
        array, place = self.constant(name), beside.place
        rank = beside.rank if rank is None else rank
        array = array.reshape((1,) * (rank - array.ndim) + array.shape)
        axis = place.axis + array.ndim - beside.rank
        length = array.shape[axis]
        if length != 1:
            shape = (*array.shape[:axis], place.before, -1, place.after, *array.shape[axis + 1 :])
            if length % (place.before * place.after):
                raise UnliftableError("has a constant along the batch")
            parted = np.moveaxis(array.reshape(shape), axis + 1, 0)
            if not np.array_equal(parted, np.broadcast_to(parted[:1], parted.shape)):
                raise UnliftableError("has a constant along the batch")
            parted = parted[:1]
            drop = tuple(axis + 1 + i for i, n in enumerate((place.before, place.after)) if n == 1)
            return self.known(name, parted.squeeze(drop))
        array = np.moveaxis(array, axis, 0)
        if beside.extra:
            array = array.reshape((*array.shape[: 1 + axis], *(1,) * beside.extra, *array.shape[1 + axis :]))
        return self.known(name, array)

    def shapes_of(self, name: str) -> tuple[Shape, Shape]:
        """Return a value's shape for both batches.

        Raises:
            UnliftableError: if it depends on more than the sizes of inputs.
        """
        if name not in self.plain.shapes:
            raise UnliftableError(f"makes {name}, whose shape depends on the input's numbers")
        return self.plain.shapes[name]

    def placed(self, name: str, in_front: int) -> tuple[Shape, Place]:
        """Return a value's shape for one image, and where its batch is, `in_front` elements behind the beginning."""
        shapes = self.shapes_of(name)
        place = place_in(shapes, self.plain.batches, in_front)
        first = list(shapes[0])
        first[place.axis] = place.before * place.after
        return tuple(first), place


def lift(plain: Plain) -> LiftedProgram:
    """Return the program that computes what a graph computes.

    Raises:
        SourceError: if an input or output has no batch in front, or a value's shape depends on the input's numbers.
    """
    from vitfold.sources.onnx.rules import apply_rule

    ports = tuple(_port(end, plain) for end in plain.inputs)
    params: dict[str, Array] = {}
    shapes: dict[str, Shape] = {}
    recorder = Recorder(shapes, ports)
    lift = Lift(plain=plain, recorder=recorder, params=params, shapes=shapes)
    for node in plain.nodes:
        for name in dict.fromkeys(node.input):
            lift.readers.setdefault(name, []).append(node)
    for port, value in zip(ports, recorder.enter(), strict=True):
        lift.values[port.name] = Lifted(value, Place(0), (1, *port.shape))
    for node in plain.nodes:
        if node.output[0] in lift.done:
            continue
        site = site_of(node)
        recorder.scope(site)
        mark, kept = len(recorder.nodes), dict(lift.params)
        try:
            apply_rule(lift, node)
        except UnliftableError as reason:
            _undo(lift, mark, kept)
            _as_it_is(lift, node, str(reason))
    outputs = {end.name: _output(lift, end.name) for end in plain.outputs}
    return LiftedProgram(
        program=recorder.program({name: one.value for name, one in outputs.items()}),
        params=params,
        values=lift.values,
        outputs=outputs,
        foreign=lift.foreign,
    )


def _undo(lift: Lift, mark: int, kept: Mapping[str, Array]) -> None:
    """Take back what a rule recorded before it gave up."""
    del lift.recorder.nodes[mark:]
    for name in set(lift.params) - set(kept):
        del lift.params[name], lift.shapes[name]


def _as_it_is(lift: Lift, node: onnx.NodeProto, reason: str) -> None:
    """Keep a node as a foreign piece."""
    site = lift.unique(site_of(node))
    try:
        found = foreign_piece(lift, node, site)
    except UnliftableError as worse:
        raise SourceError(
            f"vitfold cannot hold {node.op_type} ({site_of(node)}): it {reason}, and {worse}; export the model without "
            "it, or up to the values in front of it"
        ) from None
    lift.values.update(found)
    lift.foreign[site] = f"{node.op_type}: {reason}"


def _port(end: GraphEnd, plain: Plain) -> Port:
    shapes = plain.shapes[end.name]
    differing = [i for i, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b]
    if not end.shape or differing != ([0] if plain.batch is None else []):
        raise SourceError(f"the input {end.name} has no batch axis in front; export the model with one")
    return Port(name=end.name, shape=shapes[0][1:], batch=end.shape[0])


def _output(lift: Lift, name: str) -> Lifted:
    if name not in lift.values:
        raise SourceError(f"the output {name} does not depend on any input; export the model without it")
    return lift.values[name]


def site_of(node: onnx.NodeProto) -> str:
    """Return a readable name of a node: the path of its module where the exporter kept it."""
    return _clean(node.name or node.output[0])


def _clean(name: str) -> str:
    parts = [part for part in re.split(r"[/:]+", name) if part]
    kept = [p for p, n in zip(parts, [*parts[1:], ""], strict=True) if not n.startswith(f"{p}.")]
    return re.sub(r"[^A-Za-z0-9_.-]", "_", ".".join(kept)).removeprefix("module.") or "unnamed"
