"""From a written program to a value, and from the value to any interpreter.

A written program runs once under `Recorder`, which is the interpreter that keeps what is asked of it; shapes come
from `ops.count`. Replaying asks another interpreter for the same, in the same order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from vitfold.ops.count import Count
from vitfold.ops.protocol import Ops, Port
from vitfold.program.program import Literal, Node, Operand, Program, Ref, Shape, resolved

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Traced:
    """A value of a program that is being recorded."""

    ref: Ref
    shape: Shape


VOCABULARY: Mapping[str, inspect.Signature] = {
    name: inspect.signature(method)
    for name, method in vars(Ops).items()
    if callable(method) and not name.startswith("_") and name not in ("scope", "shape")
}
"""Every operation of `Ops`, with its signature."""
_SEVERAL = {name for name, one in VOCABULARY.items() if str(one.return_annotation).startswith("tuple")}


@Ops.register
class Recorder:
    """The interpreter whose result is a program; any of `VOCABULARY` may be called, as on every interpreter."""

    def __init__(self, shapes: Mapping[str, Shape], inputs: Sequence[Port]) -> None:
        self._count = Count(shapes)
        self._inputs = tuple(inputs)
        self._made = len(self._inputs)
        self._scope = ""
        self._block: int | None = None
        self._role: str | None = None
        self.nodes: list[Node] = []

    @property
    def ops(self) -> Ops[Traced]:
        """What programs are written over."""
        return cast("Ops[Traced]", self)

    def enter(self) -> tuple[Traced, ...]:
        """Return the program's inputs."""
        return tuple(Traced(Ref(i), (1, *port.shape)) for i, port in enumerate(self._inputs))

    def scope(self, site: str, block: int | None = None, role: str | None = None) -> None:
        """Name the operations that follow."""
        self._count.scope(site)
        self._scope = site
        if role is not None:
            self._block, self._role = block, role

    def shape(self, a: Traced) -> Shape:
        """Return the shape of a value."""
        return a.shape

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in VOCABULARY:
            raise AttributeError(op)
        return lambda *args, **kwargs: self._record(op, *args, **kwargs)

    def _record(self, op: str, /, *args: Any, **kwargs: Any) -> Any:
        bound = VOCABULARY[op].bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        inputs = {name: _refs(value) for name, value in given.items() if _is_operand(value)}
        attributes = {name: _kept(value) for name, value in given.items() if not _is_operand(value)}
        shapes = getattr(self._count, op)(**{name: _shapes(value) for name, value in given.items()})
        several = op in _SEVERAL
        found: tuple[Shape, ...] = shapes if several else (shapes,)
        results = tuple(Traced(Ref(self._made + i), shape) for i, shape in enumerate(found))
        self._made += len(results)
        self.nodes.append(
            Node(
                op=op,
                inputs=inputs,
                attributes=attributes,
                outputs=tuple(result.ref for result in results),
                shapes=found,
                scope=self._scope,
                block=self._block,
                role=self._role,
            )
        )
        return results if several else results[0]

    def program(self, outputs: Mapping[str, Traced]) -> Program:
        """Return what was recorded."""
        return Program(
            inputs=self._inputs,
            nodes=tuple(self.nodes),
            outputs={name: value.ref for name, value in outputs.items()},
        )


def trace(
    written: Callable[..., Any],
    shapes: Mapping[str, Shape],
    *,
    inputs: Sequence[Port],
    outputs: Sequence[str],
) -> Program:
    """Record a written program, `written(ops, *values)`, over parameters of these shapes.

    Args:
        outputs: a name for each result; one result need not be a tuple.
    """
    recorder = Recorder(shapes, inputs)
    results = written(recorder.ops, *recorder.enter())
    named = results if isinstance(results, tuple) else (results,)
    return recorder.program(dict(zip(outputs, named, strict=True)))


Observe = Callable[[str, T], None]


def replay(
    program: Program,
    ops: Ops[T],
    *inputs: T,
    given: Mapping[str, T] | None = None,
    only: Sequence[str] | None = None,
    observe: Observe[T] | None = None,
) -> tuple[T, ...]:
    """Run a program under an interpreter; return its outputs in order.

    Args:
        given: outputs of the program that are known already: what they follow from is not computed again.
        only: the outputs to return, all if None.
        observe: is shown every output, `observe(name, value)`, returned or not, as soon as it is there; none that what
            is given follows from.

    Raises:
        ValueError: if there are more or fewer inputs than the program has.
    """
    given = given or {}
    if len(inputs) != len(program.inputs) and not given:
        raise ValueError(f"the program takes {len(program.inputs)} inputs, found {len(inputs)}")
    values: dict[Ref, Any] = {Ref(i): value for i, value in enumerate(inputs)}
    values.update({program.outputs[name]: value for name, value in given.items()})
    returned = [program.outputs[name] for name in (program.outputs if only is None else only)]
    watched: dict[Ref, list[str]] = {}
    if observe is not None:
        passed = _needed(program, {program.outputs[name] for name in given}, {})
        before = {ref for node in passed for ref in node.outputs}
        for name, ref in program.outputs.items():
            if name not in given and ref not in before:
                watched.setdefault(ref, []).append(name)
    nodes = _needed(program, {*returned, *watched}, values)
    last_use = {ref: number for number, node in enumerate(nodes) for ref in (*node.reads(), *node.outputs)}
    where = None
    for number, node in enumerate(nodes):
        here = (node.scope, node.block, node.role)
        if here != where:
            ops.scope(*here)
            where = here
        results = call(ops, node, values)
        values.update(zip(node.outputs, results, strict=True))
        for ref in node.outputs:
            for name in watched.get(ref, ()):
                assert observe is not None
                observe(name, values[ref])
        for ref in {*node.reads(), *node.outputs}:
            if last_use[ref] == number and ref not in returned:
                del values[ref]
    return tuple(values[ref] for ref in returned)


def _needed(program: Program, wanted: set[Ref], known: Mapping[Ref, Any]) -> list[Node]:
    """The nodes that lead from what is known to what is wanted, in order."""
    needed = {ref for ref in wanted if ref not in known}
    kept = []
    for node in reversed(program.nodes):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(ref for ref in node.reads() if ref not in known)
    return kept[::-1]


def call(ops: Ops[T], node: Node, values: Mapping[Ref, T]) -> tuple[T, ...]:
    """Ask an interpreter for one node; return its results, also where there is one only."""
    attributes = {
        name: value.array() if isinstance(value, Literal) else value for name, value in node.attributes.items()
    }
    inputs = {name: resolved(operand, values) for name, operand in node.inputs.items()}
    results = getattr(ops, node.op)(**inputs, **attributes)
    return tuple(results) if node.op in _SEVERAL else (results,)


def _is_operand(value: Any) -> bool:
    return value is None or isinstance(value, Traced) or (isinstance(value, tuple) and _traced(value))


def _traced(values: tuple[Any, ...]) -> bool:
    return bool(values) and all(isinstance(value, Traced) for value in values)


def _refs(value: Any) -> Operand:
    if isinstance(value, tuple):
        return tuple(one.ref for one in value)
    return None if value is None else value.ref


def _shapes(value: Any) -> Any:
    if isinstance(value, Traced):
        return value.shape
    return tuple(one.shape for one in value) if isinstance(value, tuple) and _traced(value) else value


def _kept(value: Any) -> Any:
    return Literal.of(value) if isinstance(value, np.ndarray) else value
