"""A node that no rule takes, as a piece of ONNX of its own: batch in front on both sides."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vitfold.model import Array
from vitfold.sources.onnx.placing import Lifted, Place, UnliftableError, place_in, rest_of
from vitfold.sources.onnx.reading import Shape

if TYPE_CHECKING:
    from vitfold.sources.onnx.lifting import Lift

_LARGE = 256
"""Constants of so many reals and more are parameters, which half precision and digests see."""
_IR_VERSION = 10


def foreign_piece(lift: Lift, node: onnx.NodeProto, site: str) -> dict[str, Lifted]:
    """Record a node as it is; return its results.

    Raises:
        UnliftableError: if its results' shapes depend on the input's numbers, or the batch is not where it was.
    """
    given = [name for name in dict.fromkeys(node.input) if name in lift.values]
    if not given:
        raise UnliftableError("depends on no input")
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []
    inputs = [_entering(lift, name, nodes, initializers) for name in given]
    weights: dict[str, str] = {}
    for name in dict.fromkeys(node.input):
        if not name or name in lift.values:
            continue
        if name in lift.plain.varying and lift.constant(name).dtype.kind in "iu":
            nodes += _with_batch(lift, name, inputs[0].name, initializers)
            continue
        array = lift.constant(name)
        if array.dtype.kind == "f" and array.size >= _LARGE:
            weights[name] = lift.add_param(name, array)
            inputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape))
        else:
            initializers.append(numpy_helper.from_array(array, name))
    nodes.append(node)
    made: dict[str, tuple[Shape, Place]] = {}
    outputs = []
    for name in node.output:
        if name and (lift.readers.get(name) or any(end.name == name for end in lift.plain.outputs)):
            made[name] = _leaving(lift, name, given)
            outputs.append(_exit(lift, name, *made[name], nodes, initializers))
    graph = helper.make_graph(nodes, "piece", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", lift.plain.opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSION)
    shapes = tuple((1, *rest_of(*one)) for one in made.values())
    results = lift.ops.foreign(
        site,
        tuple(lift.values[name].value for name in given),
        np.frombuffer(model.SerializeToString(), np.uint8),
        tuple(weights.values()),
        shapes,
        _products(lift, node),
    )
    return {
        name: Lifted(value, place, shape) for value, (name, (shape, place)) in zip(results, made.items(), strict=True)
    }


def _entering(
    lift: Lift, name: str, nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto]
) -> onnx.ValueInfoProto:
    """An input with the batch in front, and the nodes that bring it where the graph has it."""
    lifted = lift.values[name]
    place, shape = lifted.place, lifted.shape
    kind = lift.plain.types.get(name, onnx.TensorProto.FLOAT)
    rest = rest_of(shape, place)
    if place.front:
        return helper.make_tensor_value_info(name, kind, ["B", *rest])
    entered, moved = f"{name}/entered", f"{name}/moved"
    ahead = place.axis + (place.before > 1)
    perm = [*range(1, 1 + ahead), 0, *range(1 + ahead, 1 + len(rest))]
    nodes.append(helper.make_node("Transpose", [entered], [moved], perm=perm))
    target = np.array([*shape[: place.axis], -1, *shape[place.axis + 1 :]], np.int64)
    initializers.append(numpy_helper.from_array(target, f"{name}/shape"))
    nodes.append(helper.make_node("Reshape", [moved, f"{name}/shape"], [name]))
    return helper.make_tensor_value_info(entered, kind, ["B", *rest])


def _leaving(lift: Lift, name: str, given: list[str]) -> tuple[Shape, Place]:
    """The shape of a result for one image, and where its batch is: in front as in what it is made of, if possible."""
    shapes = lift.shapes_of(name)
    differing = [i for i, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b]
    if lift.plain.batch is not None and shapes[0] and shapes[0][0] % lift.plain.batch == 0:
        differing = [0]
    if not differing:
        raise UnliftableError(f"makes {name} without a batch")
    ahead = math.prod(shapes[0][: differing[0]])
    befores = {lift.values[one].place.before for one in given if lift.values[one].place.axis == differing[0]}
    for before in (*befores, 1):
        try:
            place = place_in(shapes, lift.plain.batches, ahead * before)
        except UnliftableError:
            continue
        shape = list(shapes[0])
        shape[place.axis] = place.before * place.after
        return tuple(shape), place
    raise UnliftableError(f"has the batch of {name} in several axes")


def _exit(
    lift: Lift, name: str, shape: Shape, place: Place, nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto]
) -> onnx.ValueInfoProto:
    """An output with the batch in front, and the nodes that bring it there."""
    kind = lift.plain.types.get(name, onnx.TensorProto.FLOAT)
    rest = rest_of(shape, place)
    if place.front:
        return helper.make_tensor_value_info(name, kind, ["B", *rest])
    parted, left = f"{name}/parted", f"{name}/left"
    before = (place.before,) if place.before > 1 else ()
    after = (place.after,) if place.after > 1 else ()
    target = np.array([*shape[: place.axis], *before, -1, *after, *shape[place.axis + 1 :]], np.int64)
    initializers.append(numpy_helper.from_array(target, f"{name}/apart"))
    nodes.append(helper.make_node("Reshape", [name, f"{name}/apart"], [parted]))
    at = place.axis + len(before)
    perm = [at, *(i for i in range(1 + len(rest)) if i != at)]
    nodes.append(helper.make_node("Transpose", [parted], [left], perm=perm))
    return helper.make_tensor_value_info(left, kind, ["B", *rest])


def _with_batch(lift: Lift, name: str, entry: str, initializers: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
    """Nodes that compute whole numbers which grow with the batch: base + step * batch."""
    first, second = lift.plain.varying[name]
    if first.shape != second.shape:
        raise UnliftableError("has as many numbers as images")
    few, more = lift.plain.batches
    step = (second - first) // (more - few)
    base = first - step * few
    if not np.array_equal(base + step * more, second):
        raise UnliftableError("has numbers that do not grow with the batch evenly")
    for suffix, array in (("step", step), ("base", base)):
        initializers.append(numpy_helper.from_array(_like(array, first), f"{name}/{suffix}"))
    return [
        helper.make_node("Shape", [entry], [f"{name}/batch"], start=0, end=1),
        helper.make_node("Mul", [f"{name}/batch", f"{name}/step"], [f"{name}/grown"]),
        helper.make_node("Add", [f"{name}/grown", f"{name}/base"], [name]),
    ]


def _like(array: Array, model: Array) -> Array:
    return np.asarray(array, np.int64).reshape(model.shape)


def _products(lift: Lift, node: onnx.NodeProto) -> int:
    """Multiply-accumulates of a node for one image."""
    if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
        return 0
    made, weight = lift.plain.shapes[node.output[0]][0], _shape(lift, node.input[1])
    read = _shape(lift, node.input[0])
    work = {"Conv": math.prod(made) * math.prod(weight[1:]), "ConvTranspose": math.prod(read) * math.prod(weight[1:])}
    return work.get(node.op_type, math.prod(made) * read[-1]) // lift.plain.batches[0]


def _shape(lift: Lift, name: str) -> Shape:
    return lift.plain.shapes[name][0] if name in lift.plain.shapes else lift.constant(name).shape
