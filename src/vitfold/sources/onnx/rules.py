"""What ONNX operators are in the operations of `Ops`: one rule each. A rule that does not fit says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper

from vitfold.ops.protocol import Ops
from vitfold.program.trace import Traced
from vitfold.sources.onnx.lifting import Lift, site_of
from vitfold.sources.onnx.placing import (
    Lifted,
    Place,
    UnliftableError,
    in_front_of,
    reshaped,
    rest_of,
    transposed,
    with_rank,
)

Rule = Callable[[Lift, onnx.NodeProto], None]
_FLOAT = onnx.TensorProto.FLOAT


def apply_rule(lift: Lift, node: onnx.NodeProto) -> None:
    """Record what a node computes.

    Raises:
        UnliftableError: saying why it has no counterpart.
    """
    rule = RULES.get(node.op_type)
    if rule is None:
        raise UnliftableError("is no operation of vitfold's")
    rule(lift, node)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _reals(lift: Lift, name: str) -> Lifted:
    """A value of reals."""
    if lift.plain.types.get(name, _FLOAT) != _FLOAT:
        raise UnliftableError("works on whole numbers")
    return lift.value(name)


def _numbers(lift: Lift, node: onnx.NodeProto, position: int, attribute: str) -> list[int] | None:
    """Whole numbers that newer operators take as an input and older ones as an attribute."""
    if len(node.input) > position and node.input[position]:
        return [int(n) for n in lift.constant(node.input[position]).reshape(-1)]
    found = _attributes(node).get(attribute)
    return None if found is None else [int(n) for n in ([found] if isinstance(found, int) else found)]


def _same(lift: Lift, node: onnx.NodeProto) -> None:
    lift.values[node.output[0]] = lift.value(node.input[0])


def _cast(lift: Lift, node: onnx.NodeProto) -> None:
    if _attributes(node)["to"] != _FLOAT or lift.plain.types.get(node.input[0], _FLOAT) != _FLOAT:
        raise UnliftableError("changes the type of numbers")
    _same(lift, node)


def _reshape(lift: Lift, node: onnx.NodeProto) -> None:
    x = lift.value(node.input[0])
    shape, place = lift.placed(node.output[0], in_front_of(x))
    lift.values[node.output[0]] = reshaped(lift.ops, x, shape, place)


def _transpose(lift: Lift, node: onnx.NodeProto) -> None:
    x = lift.value(node.input[0])
    perm = _attributes(node).get("perm") or list(reversed(range(x.rank)))
    lift.values[node.output[0]] = transposed(lift.ops, x, perm)


def _einsum(lift: Lift, node: onnx.NodeProto) -> None:
    """An equation of one operand that only changes the order of axes."""
    equation = _attributes(node)["equation"].decode().replace(" ", "")
    given, _, made = equation.partition("->")
    if len(node.input) != 1 or sorted(given) != sorted(made) or len(set(given)) < len(given) or "." in given:
        raise UnliftableError(f"computes {equation}")
    lift.values[node.output[0]] = transposed(lift.ops, lift.value(node.input[0]), [given.index(axis) for axis in made])


def _expand(lift: Lift, node: onnx.NodeProto) -> None:
    x = lift.value(node.input[0])
    shapes = lift.shapes_of(node.output[0])
    if lift.shapes_of(node.input[0]) == shapes:
        lift.values[node.output[0]] = x
        return
    x = with_rank(lift.ops, _reals(lift, node.input[0]), len(shapes[0]))
    shape, place = lift.placed(node.output[0], in_front_of(x))
    if place != x.place:
        raise UnliftableError("repeats the batch")
    longer = tuple(n if n != old else 1 for n, old in zip(rest_of(shape, place), x.value.shape[1:], strict=True))
    zeros = lift.known(f"{site_of(node)}.zeros", np.zeros((1, *longer), np.float32))
    lift.values[node.output[0]] = Lifted(lift.ops.add(x.value, zeros), place, shape)


def _elementwise(op: str) -> Rule:
    def rule(lift: Lift, node: onnx.NodeProto) -> None:
        if len(node.input) == 1:
            x = _reals(lift, node.input[0])
            lift.values[node.output[0]] = Lifted(_unary(lift.ops, op, x.value), x.place, x.shape)
            return
        if len(node.input) > 2:
            raise UnliftableError("takes more than two operands")
        lift.values[node.output[0]] = _binary(lift, op, *node.input)

    return rule


def _unary(ops: Ops[Traced], op: str, a: Traced) -> Traced:
    return getattr(ops, op)(a) if op in ("log", "tanh") else ops.elementwise(op, a)


def _binary(lift: Lift, op: str, a: str, b: str) -> Lifted:
    ops = lift.ops
    function = getattr(ops, op) if op in ("add", "multiply", "divide") else lambda x, y: ops.elementwise(op, x, y)
    known = [name for name in (a, b) if lift.is_constant(name)]
    if len(known) == 2:
        raise UnliftableError("works on constants alone")
    if known:
        (constant,) = known
        x = _reals(lift, b if a == constant else a)
        rank = max(x.rank, lift.constant(constant).ndim)
        x = with_rank(ops, x, rank)
        y = lift.known_beside(constant, x)
        value = function(y, x.value) if a == constant else function(x.value, y)
        shape = np.broadcast_shapes(x.shape, _of_one_image(lift.constant(constant).shape, x))
        return Lifted(value, x.place, shape)
    left, right = _reals(lift, a), _reals(lift, b)
    rank = max(left.rank, right.rank)
    left, right = with_rank(ops, left, rank), with_rank(ops, right, rank)
    if left.place != right.place:
        raise UnliftableError("has the batch in two places")
    return Lifted(function(left.value, right.value), left.place, np.broadcast_shapes(left.shape, right.shape))


def _of_one_image(shape: tuple[int, ...], x: Lifted) -> tuple[int, ...]:
    """The shape of a constant with nothing where the batch is."""
    padded = (1,) * (x.rank - len(shape)) + shape
    return (*padded[: x.place.axis], 1, *padded[x.place.axis + 1 :])


def _multiply(lift: Lift, node: onnx.NodeProto) -> None:
    """A product; x sigmoid(a x) is an activation."""
    for one, other in (node.input, reversed(node.input)):
        gate = lift.gates.get(other)
        if gate is not None and gate[0] == one and lift.sole_reader(other) == node:
            x = lift.value(one)
            kind = {1.0: "silu", 1.702: "quick_gelu"}.get(round(gate[1], 4))
            if kind is not None:
                lift.values[node.output[0]] = _activated(lift, node, kind, x)
                return
    _elementwise("multiply")(lift, node)
    for one, other in (node.input, reversed(node.input)):
        if lift.is_constant(other) and lift.constant(other).size == 1:
            lift.scaled[node.output[0]] = (one, float(lift.constant(other).reshape(())))


def _sigmoid(lift: Lift, node: onnx.NodeProto) -> None:
    _elementwise("sigmoid")(lift, node)
    source, factor = lift.scaled.get(node.input[0], (node.input[0], 1.0))
    lift.gates[node.output[0]] = (source, factor)


def _activation(kind: str) -> Rule:
    def rule(lift: Lift, node: onnx.NodeProto) -> None:
        lift.values[node.output[0]] = _activated(lift, node, kind, _reals(lift, node.input[0]))

    return rule


def _activated(lift: Lift, node: onnx.NodeProto, kind: str, x: Lifted) -> Lifted:
    return Lifted(lift.ops.activation(kind, x.value, lift.unique(site_of(node))), x.place, x.shape)


def _gelu(lift: Lift, node: onnx.NodeProto) -> None:
    kind = "gelu_tanh" if _attributes(node).get("approximate") == b"tanh" else "gelu_erf"
    _activation(kind)(lift, node)


def _quick_gelu(lift: Lift, node: onnx.NodeProto) -> None:
    alpha = round(float(_attributes(node).get("alpha", 1.702)), 4)
    if alpha not in (1.0, 1.702):
        raise UnliftableError(f"has another factor, {alpha}")
    _activation("silu" if alpha == 1.0 else "quick_gelu")(lift, node)


def _elu(lift: Lift, node: onnx.NodeProto) -> None:
    if _attributes(node).get("alpha", 1.0) != 1.0:
        raise UnliftableError("has another factor")
    _activation("elu")(lift, node)


def _layer_norm(lift: Lift, node: onnx.NodeProto) -> None:
    x, given = _reals(lift, node.input[0]), _attributes(node)
    _check_last_axis(x, given.get("axis", -1))
    scale = lift.constant(node.input[1]).reshape(-1)
    bias = lift.constant(node.input[2]).reshape(-1) if len(node.input) > 2 and node.input[2] else np.zeros_like(scale)
    layer = lift.unique(site_of(node))
    lift.set_param(f"{layer}.weight", scale)
    lift.set_param(f"{layer}.bias", bias)
    value = lift.ops.layer_norm(layer, x.value, float(given.get("epsilon", 1e-5)))
    lift.values[node.output[0]] = Lifted(value, x.place, x.shape)


def _rms_norm(lift: Lift, node: onnx.NodeProto) -> None:
    x, given = _reals(lift, node.input[0]), _attributes(node)
    _check_last_axis(x, given.get("axis", -1))
    layer = lift.unique(site_of(node))
    lift.set_param(f"{layer}.weight", lift.constant(node.input[1]).reshape(-1))
    value = lift.ops.rms_norm(layer, x.value, float(given.get("epsilon", 1e-5)))
    lift.values[node.output[0]] = Lifted(value, x.place, x.shape)


def _check_last_axis(x: Lifted, axis: int) -> None:
    if axis % x.rank != x.rank - 1 or x.place.axis == x.rank - 1:
        raise UnliftableError("works along another axis than the last")


def _matmul(lift: Lift, node: onnx.NodeProto) -> None:
    a, b = node.input
    if lift.is_constant(b) and lift.constant(b).ndim == 2:
        _linear(lift, node, lift.constant(b).T, None)
        return
    ops, site = lift.ops, lift.unique(site_of(node))
    if lift.is_constant(b) or lift.is_constant(a):
        x = _reals(lift, a if lift.is_constant(b) else b)
        name = b if lift.is_constant(b) else a
        x = with_rank(ops, x, max(x.rank, lift.constant(name).ndim))
        _check_no_product_axis(x)
        known = lift.known_beside(name, x)
        value = ops.matmul(site, x.value, known) if name == b else ops.matmul(site, known, x.value)
        place = x.place
    else:
        left, right = _reals(lift, a), _reals(lift, b)
        rank = max(left.rank, right.rank)
        left, right = with_rank(ops, left, rank), with_rank(ops, right, rank)
        _check_no_product_axis(left)
        if left.place != right.place:
            raise UnliftableError("has the batch in two places")
        value, place = ops.matmul(site, left.value, right.value), left.place
    shape = list(lift.shapes_of(node.output[0])[0])
    shape[place.axis] = place.before * place.after
    lift.values[node.output[0]] = Lifted(value, place, tuple(shape))


def _check_no_product_axis(x: Lifted) -> None:
    if x.rank < 2 or x.place.axis >= x.rank - 2:
        raise UnliftableError("multiplies along the batch")


def _linear(lift: Lift, node: onnx.NodeProto, weight: Any, bias: Any) -> None:
    """Record a linear layer, with the bias that is added right behind it."""
    x = _reals(lift, node.input[0])
    if x.place.axis == x.rank - 1:
        raise UnliftableError("multiplies along the batch")
    made = node.output[0]
    reader = lift.sole_reader(made)
    if bias is None and reader is not None and reader.op_type == "Add":
        other = next(name for name in reader.input if name != made or list(reader.input).count(made) == 2)
        added = lift.plain.constants.get(other)
        if added is not None and added.size == added.shape[-1:].count(len(weight)) * len(weight):
            bias, made = added.reshape(-1), reader.output[0]
            lift.done.add(made)
    layer = lift.unique(_layer_name(node))
    lift.set_param(f"{layer}.weight", weight)
    if bias is not None:
        lift.set_param(f"{layer}.bias", bias)
    value = lift.ops.linear(layer, x.value)
    lift.values[made] = Lifted(value, x.place, (*x.shape[:-1], len(weight)))


def _layer_name(node: onnx.NodeProto) -> str:
    """The path of a linear layer's module: its node's name without that of the operator."""
    name = site_of(node)
    for suffix in (f".{node.op_type}", f"_{node.op_type}"):
        name = name.removesuffix(suffix)
    return name


def _gemm(lift: Lift, node: onnx.NodeProto) -> None:
    given = _attributes(node)
    x = _reals(lift, node.input[0])
    if given.get("transA", 0) or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0 or x.rank != 2:
        raise UnliftableError("scales or turns its operands")
    weight = lift.constant(node.input[1])
    weight = weight if given.get("transB", 0) else weight.T
    bias = None
    if len(node.input) > 2 and node.input[2]:
        bias = np.broadcast_to(lift.constant(node.input[2]).reshape(-1), (len(weight),))
    _linear(lift, node, weight, bias)


def _conv(lift: Lift, node: onnx.NodeProto) -> None:
    """Patches: a convolution whose windows touch and do not overlap."""
    given, x = _attributes(node), _reals(lift, node.input[0])
    weight = lift.constant(node.input[1])
    kernel = list(weight.shape[2:])
    plain = (
        weight.ndim == 4
        and given.get("group", 1) == 1
        and list(given.get("strides", [1, 1])) == kernel
        and not any(given.get("pads", [0]))
        and set(given.get("dilations", [1])) == {1}
        and given.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    )
    if not plain or not x.place.front or x.rank != 4 or kernel == [1, 1]:
        raise UnliftableError("is a convolution whose windows overlap")
    layer = lift.unique(_layer_name(node))
    lift.set_param(f"{layer}.weight", weight)
    if len(node.input) > 2 and node.input[2]:
        lift.set_param(f"{layer}.bias", lift.constant(node.input[2]))
    grid = tuple(length // patch for length, patch in zip(x.shape[2:], kernel, strict=True))
    patches = lift.ops.reshape(lift.ops.patch_embed(layer, x.value), (*grid, len(weight)))
    lift.values[node.output[0]] = Lifted(lift.ops.transpose(patches, (0, 3, 1, 2)), Place(0), (1, len(weight), *grid))


def _softmax(lift: Lift, node: onnx.NodeProto) -> None:
    x, axis = _reals(lift, node.input[0]), _attributes(node).get("axis", -1)
    _check_last_axis(x, axis)
    site = lift.unique(site_of(node))
    lift.values[node.output[0]] = Lifted(lift.ops.softmax(site, x.value), x.place, x.shape)


def _split(lift: Lift, node: onnx.NodeProto) -> None:
    x = lift.value(node.input[0])
    axis = _attributes(node).get("axis", 0) % x.rank
    ours = x.axis_of(axis)
    lengths = [lift.shapes_of(name)[0][axis] for name in node.output]
    if len(set(lengths)) == 1:
        values = list(lift.ops.split(x.value, len(lengths), ours))
    else:
        ends = np.cumsum(lengths).tolist()
        values = [lift.ops.slice(x.value, ours, end - n, end) for n, end in zip(lengths, ends, strict=True)]
    for name, value, length in zip(node.output, values, lengths, strict=True):
        lift.values[name] = Lifted(value, x.place, (*x.shape[:axis], length, *x.shape[axis + 1 :]))


def _slice(lift: Lift, node: onnx.NodeProto) -> None:
    x = lift.value(node.input[0])
    starts, ends = _numbers(lift, node, 1, "starts"), _numbers(lift, node, 2, "ends")
    assert starts is not None
    assert ends is not None
    axes = _numbers(lift, node, 3, "axes") or list(range(len(starts)))
    steps = _numbers(lift, node, 4, "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = _sliced(lift.ops, x, axis % x.rank, start, end, step)
    lift.values[node.output[0]] = x


def _sliced(ops: Ops[Traced], x: Lifted, axis: int, start: int, end: int, step: int) -> Lifted:
    if axis == x.place.axis and (start, step) == (0, 1) and end >= 2**31 - 1:
        return x
    ours, length = x.axis_of(axis), x.shape[axis]
    taken = range(length)[start:end:step]
    if step < 1 or not len(taken):
        raise UnliftableError("takes nothing, or backwards")
    stop = min(taken[-1] + 1, length)
    value = ops.slice(x.value, ours, taken.start, stop, step)
    return Lifted(value, x.place, (*x.shape[:axis], len(taken), *x.shape[axis + 1 :]))


def _gather(lift: Lift, node: onnx.NodeProto) -> None:
    """One row, or a range of rows."""
    x = lift.value(node.input[0])
    axis = _attributes(node).get("axis", 0) % x.rank
    index = lift.constant(node.input[1])
    length = x.shape[axis]
    wanted = [int(i) % length for i in index.reshape(-1)] if axis != x.place.axis else []
    if index.ndim > 1 or wanted != list(range(wanted[0], wanted[0] + len(wanted)) if wanted else [0]):
        raise UnliftableError("picks rows that are no range")
    rows = _sliced(lift.ops, x, axis, wanted[0], wanted[-1] + 1, 1)
    if index.ndim == 0:
        shape, place = lift.placed(node.output[0], in_front_of(rows))
        rows = reshaped(lift.ops, rows, shape, place)
    lift.values[node.output[0]] = rows


def _concat(lift: Lift, node: onnx.NodeProto) -> None:
    parts = [lift.values.get(name) for name in node.input]
    first = next(part for part in parts if part is not None)
    if any(part is not None and part.place != first.place for part in parts):
        raise UnliftableError("has the batch in two places")
    axis = _attributes(node)["axis"] % first.rank
    ours = first.axis_of(axis)
    values = []
    for name, part in zip(node.input, parts, strict=True):
        values.append(part.value if part is not None else _for_every_image(lift, name, first, ours))
    length = sum(value.shape[ours] for value in values)
    shape = (*first.shape[:axis], length, *first.shape[axis + 1 :])
    lift.values[node.output[0]] = Lifted(_joined(lift.ops, values, parts, ours), first.place, shape)


def _for_every_image(lift: Lift, name: str, beside: Lifted, ours: int) -> Traced:
    """Constant rows for a concatenation, with a batch of 1."""
    known = lift.known_beside(name, beside)
    lengths = [
        (a, b) for i, (a, b) in enumerate(zip(known.shape, beside.value.shape, strict=True)) if i not in (0, ours)
    ]
    if any(a != b for a, b in lengths):
        raise UnliftableError("repeats a constant")
    return known


def _joined(ops: Ops[Traced], values: list[Traced], parts: list[Lifted | None], ours: int) -> Traced:
    """Concatenate; constant rows get their batch by standing in front of the others."""
    known = [value for value, part in zip(values, parts, strict=True) if part is None]
    if not known:
        return ops.concat(tuple(values), ours)
    varying = [value for value, part in zip(values, parts, strict=True) if part is not None]
    if ours != len(values[0].shape) - 2:
        zero = ops.scale(ops.slice(varying[0], ours, 0, 1), 0.0)
        whole = [v if p is not None else ops.add(zero, v) for v, p in zip(values, parts, strict=True)]
        return ops.concat(tuple(whole), ours)
    rows = known[0] if len(known) == 1 else ops.concat(tuple(known), ours)
    rest = varying[0] if len(varying) == 1 else ops.concat(tuple(varying), ours)
    joined = ops.prepend_rows(rows, rest)
    order = sorted(range(len(values)), key=lambda i: parts[i] is not None)
    if order == list(range(len(values))):
        return joined
    starts, start = {}, 0
    for i in order:
        starts[i] = start
        start += values[i].shape[ours]
    pieces = [ops.slice(joined, ours, starts[i], starts[i] + values[i].shape[ours]) for i in range(len(values))]
    return ops.concat(tuple(pieces), ours)


def _batch_norm(lift: Lift, node: onnx.NodeProto) -> None:
    """Factors and shifts per channel, which the statistics of training fix."""
    x = _reals(lift, node.input[0])
    if not x.place.front or x.rank < 2:
        raise UnliftableError("has channels along the batch")
    scale, bias, mean, variance = (lift.constant(name).astype(np.float64) for name in node.input[1:5])
    factor = scale / np.sqrt(variance + _attributes(node).get("epsilon", 1e-5))
    shape = (1, -1, *(1,) * (x.rank - 2))
    site = site_of(node)
    factors = lift.known(f"{site}.factor", factor.astype(np.float32).reshape(shape))
    shifts = lift.known(f"{site}.shift", (bias - mean * factor).astype(np.float32).reshape(shape))
    value = lift.ops.add(lift.ops.multiply(x.value, factors), shifts)
    lift.values[node.output[0]] = Lifted(value, x.place, x.shape)


def _reduction(op: str) -> Rule:
    def rule(lift: Lift, node: onnx.NodeProto) -> None:
        x, axes = _reals(lift, node.input[0]), _numbers(lift, node, 1, "axes")
        if axes is None:
            raise UnliftableError("works along the batch")
        keep = bool(_attributes(node).get("keepdims", 1))
        value, shape = x.value, list(x.shape)
        for axis in sorted((one % x.rank for one in axes), reverse=True):
            value = lift.ops.reduce(op, value, x.axis_of(axis), keep=keep)
            shape[axis : axis + 1] = [1] if keep else []
        gone = 0 if keep else sum(one % x.rank < x.place.axis for one in axes)
        place = Place(x.place.axis - gone, x.place.before, x.place.after)
        lift.values[node.output[0]] = Lifted(value, place, tuple(shape))

    return rule


def _mean_of_grid(lift: Lift, node: onnx.NodeProto) -> None:
    x = _reals(lift, node.input[0])
    if not x.place.front or x.rank < 3:
        raise UnliftableError("works along the batch")
    value = lift.ops.mean(lift.ops.reshape(x.value, (x.shape[1], int(np.prod(x.shape[2:])))), 2)
    shape = (1, x.shape[1], *(1,) * (x.rank - 2))
    lift.values[node.output[0]] = Lifted(lift.ops.reshape(value, shape[1:]), Place(0), shape)


def _pad(lift: Lift, node: onnx.NodeProto) -> None:
    if any(_numbers(lift, node, 1, "pads") or [1]):
        raise UnliftableError("pads")
    _same(lift, node)


def _clip(lift: Lift, node: onnx.NodeProto) -> None:
    x = _reals(lift, node.input[0])
    value = x.value
    for position, attribute, op in ((1, "min", "maximum"), (2, "max", "minimum")):
        limit = _attributes(node).get(attribute)
        if len(node.input) > position and node.input[position]:
            limit = float(lift.constant(node.input[position]).reshape(()))
        if limit is not None:
            value = lift.ops.elementwise(op, value, lift.ops.constant(np.array(limit, np.float32)))
    lift.values[node.output[0]] = Lifted(value, x.place, x.shape)


def _is_nan(lift: Lift, node: onnx.NodeProto) -> None:
    """Only of use for what guards a softmax; elsewhere it stays as it is."""
    reader = lift.sole_reader(node.output[0])
    if reader is None or reader.op_type != "Where" or reader.input[2] != node.input[0]:
        raise UnliftableError("asks for numbers that are none")
    if not lift.is_constant(reader.input[1]) or lift.constant(reader.input[1]).any():
        raise UnliftableError("asks for numbers that are none")
    lift.values[reader.output[0]] = lift.value(node.input[0])
    lift.done.add(reader.output[0])


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Identity", "Dropout"), _same),
    "Cast": _cast,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Transpose": _transpose,
    "Einsum": _einsum,
    "Expand": _expand,
    **{name: _elementwise(op) for name, op in (("Add", "add"), ("Sub", "subtract"), ("Div", "divide"))},
    **{name: _elementwise(op) for name, op in (("Pow", "power"), ("Max", "maximum"), ("Min", "minimum"))},
    **{name: _elementwise(name.lower()) for name in ("Log", "Tanh", "Exp", "Sqrt", "Reciprocal", "Abs")},
    **{name: _elementwise(name.lower()) for name in ("Sin", "Cos", "Erf", "Floor")},
    "Neg": _elementwise("negative"),
    "Mul": _multiply,
    "Sigmoid": _sigmoid,
    "Relu": _activation("relu"),
    "Elu": _elu,
    "Gelu": _gelu,
    "FastGelu": _activation("gelu_tanh"),
    "QuickGelu": _quick_gelu,
    "LayerNormalization": _layer_norm,
    **dict.fromkeys(("SimplifiedLayerNormalization", "RMSNormalization"), _rms_norm),
    "IsNaN": _is_nan,
    "Pad": _pad,
    "Clip": _clip,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    "Softmax": _softmax,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Concat": _concat,
    "ReduceMean": _reduction("mean"),
    "ReduceSum": _reduction("sum"),
    "ReduceMax": _reduction("max"),
    "ReduceL2": _reduction("norm"),
    "GlobalAveragePool": _mean_of_grid,
}
"""The rule of every operator that has one."""
