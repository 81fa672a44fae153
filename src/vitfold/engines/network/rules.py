"""What each ONNX operator that vitfold writes does in torch: functions of tensors, static in everything but values.

A rule is handed a node of the graph while it is translated and returns what computes its outputs. Functions that the
translated network calls stand at module level, so that its code names them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from vitfold.engines.network.translation import Translation

RuleResult = Any
"""What a rule returns: a node of the network per output of the ONNX node, or the only one."""
Rule = Callable[["Translation", Any], RuleResult]

_FLOATS = (1, 10, 11, 16)
_DOUBLE = 11
_INTEGERS = {2: torch.uint8, 3: torch.int8, 6: torch.int32, 7: torch.int64, 9: torch.bool}
"""Types by TensorProto.DataType; all floats of a graph are those of the module."""


def as_real(x: Tensor, real: Tensor) -> Tensor:
    """The numbers in the module's float type."""
    return x.to(real.dtype)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of every image: x (B, N, D), index (B, R, 1)."""
    return x.gather(1, index.expand(-1, -1, x.shape[2]))


def take_along(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """Elements along an axis."""
    return x.gather(axis, index)


def take_table(table: Tensor, index: Tensor, axis: int) -> Tensor:
    """Slices of a table: along `axis`, those that the index names."""
    axis %= table.ndim
    found = table.index_select(axis, index.reshape(-1))
    return found.reshape(*table.shape[:axis], *index.shape, *table.shape[axis + 1 :])


def patches(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution with stride = kernel, as one product: (B, C, H, W) -> (B, D, rows, columns).

    A product obeys torch's setting of TF32 for products, which is off unless asked for; that of convolutions is on.
    """
    count, _, height, width = image.shape
    outputs, channels, y, x = weight.shape
    rows, columns = height // y, width // x
    image = image[:, :, : rows * y, : columns * x].reshape(count, channels, rows, y, columns, x)
    flat = image.permute(0, 2, 4, 1, 3, 5).reshape(count, rows * columns, channels * y * x)
    made = F.linear(flat, weight.reshape(outputs, -1), bias)
    return made.transpose(1, 2).reshape(count, outputs, rows, columns)


def reshaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape; 0 copies the length of that axis."""
    return x.reshape([x.shape[axis] if length == 0 else length for axis, length in enumerate(shape)])


def sliced(x: Tensor, bounds: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """start:stop:step of axes."""
    index = [slice(None)] * x.ndim
    for axis, start, stop, step in bounds:
        index[axis] = slice(start, stop, step)
    return x[tuple(index)]


def ranked(x: Tensor, count: int, axis: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The `count` first in order, and where they are; of equal ones the smaller index comes first."""
    if count == 1:
        found = x.max(axis, keepdim=True) if largest else x.min(axis, keepdim=True)
        return found.values, found.indices
    values, order = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, count), order.narrow(axis, 0, count)


def normalized(x: Tensor, axis: int) -> Tensor:
    """Vectors of length 1, in single precision; vectors of zeros stay."""
    return F.normalize(x.float(), dim=axis)


def rms_normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) times the weight, in single precision within."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def gated(x: Tensor, alpha: float) -> Tensor:
    """x sigmoid(alpha x)."""
    return x * torch.sigmoid(alpha * x)


def multiplied(a: Tensor, b: Tensor, turned: tuple[bool, bool], alpha: float) -> Tensor:
    """Alpha a b, either side turned in its last two axes."""
    left, right = (x.transpose(-1, -2) if turn else x for x, turn in zip((a, b), turned, strict=True))
    product = left @ right
    return product if alpha == 1.0 else product * alpha


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
    """X W + b."""
    return F.linear(x, weight if turned else weight.t(), bias)


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + bias) v, fused; k is (B, H, M, K)."""
    if q.shape[0] != k.shape[0]:
        q = q.expand(k.shape[0], -1, -1, -1)
    mask = None if bias is None else bias.expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def attended_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, heads: int) -> Tensor:
    """The same of rows (B, N, H K), to rows."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    return attended(q, k, v, bias, scale).transpose(1, 2).flatten(2)


def expanded(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeated along axes of length 1; a length of 1 asks for nothing."""
    return x.expand(*(-1 if length == 1 else length for length in shape))


def divided(a: Any, b: Any) -> Tensor:
    """a / b; of integers towards zero."""
    whole = all(isinstance(x, int) or (isinstance(x, Tensor) and not x.is_floating_point()) for x in (a, b))
    made: Tensor = torch.div(a, b, rounding_mode="trunc") if whole else a / b
    return made


def at_least(a: Any, b: Any) -> Tensor:
    """The larger of two, one of which may be a number."""
    return torch.clamp_min(b, a) if isinstance(a, float | int) else _bounded(torch.clamp_min, torch.maximum, a, b)


def at_most(a: Any, b: Any) -> Tensor:
    """The smaller of two, one of which may be a number."""
    return torch.clamp_max(b, a) if isinstance(a, float | int) else _bounded(torch.clamp_max, torch.minimum, a, b)


def _bounded(by_number: Callable[..., Tensor], by_tensor: Callable[..., Tensor], a: Tensor, b: Any) -> Tensor:
    return by_number(a, b) if isinstance(b, float | int) else by_tensor(a, b)


def chosen(condition: Tensor, a: Any, b: Any) -> Tensor:
    """One of two where a condition holds, the other elsewhere; the type is that of the tensor among them."""
    if isinstance(a, float | int) and isinstance(b, Tensor):
        return torch.where(condition, torch.full_like(b, a), b)
    if isinstance(b, float | int) and isinstance(a, Tensor):
        return torch.where(condition, a, torch.full_like(a, b))
    return torch.where(condition, a, b)


def reduced(op: str, x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
    """A sum, a mean, a maximum or a norm over axes."""
    if op == "ReduceL2":
        return x.square().sum(list(axes), keepdim=keep).sqrt()
    if op == "ReduceSum":
        return x.sum(list(axes), keepdim=keep, dtype=x.dtype)
    return x.mean(list(axes), keepdim=keep) if op == "ReduceMean" else x.amax(list(axes), keepdim=keep)


def _function(function: Callable[..., Any]) -> Rule:
    """The rule of a function of all inputs."""
    return lambda t, node: t.call(function, *t.inputs(node))


def _attribute(function: Callable[..., Any], name: str, default: Any) -> Rule:
    """The rule of a function of all inputs and one attribute."""
    return lambda t, node: t.call(function, *t.inputs(node), t.attribute(node, name, default))


def _cast(t: Translation, node: Any) -> RuleResult:
    kind = t.attribute(node, "to", 1)
    x = t.input(node, 0)
    if kind in _INTEGERS:
        return t.call(Tensor.to, x, _INTEGERS[kind])
    if kind not in _FLOATS:
        return t.refuse(node, f"a cast to the type {kind}")
    if not t.holds_integers(node.input[0]):
        return t.call(as_real, x, t.real)
    # Integers become single precision at least, whatever the module's type is: sums of products fit no narrower one.
    wide = t.call(Tensor.double if kind == _DOUBLE else Tensor.float, x)
    t.widen(wide)
    return wide


def _clip(t: Translation, node: Any) -> RuleResult:
    low, high = (t.number(node, place) for place in (1, 2))
    return t.call(torch.clamp, t.input(node, 0), low, high)


def _conv(t: Translation, node: Any) -> RuleResult:
    weight = t.array(node, 1)
    kernel = list(weight.shape[2:])
    strides, pads, groups = (t.attribute(node, name, d) for name, d in (("strides", []), ("pads", []), ("group", 1)))
    if len(kernel) != 2 or any(one != 1 for one in t.attribute(node, "dilations", [])):
        return t.refuse(node, "a convolution of this kind")
    inputs = t.inputs(node)
    if strides == kernel and not any(pads) and groups == 1:
        return t.call(patches, *inputs, *([None] if len(inputs) == 2 else []))
    strides, pads = strides or [1, 1], pads or [0, 0, 0, 0]
    if pads[:2] != pads[2:]:
        return t.refuse(node, "uneven padding")
    bias = inputs[2] if len(inputs) > 2 else None
    return t.call(F.conv2d, inputs[0], inputs[1], bias, tuple(strides), tuple(pads[:2]), 1, groups)


def _split(t: Translation, node: Any) -> RuleResult:
    axis, count = t.attribute(node, "axis", 0), len(node.output)
    if len(node.input) > 1 and node.input[1]:
        parts = t.call(torch.split, t.input(node, 0), t.integers(node, 1), axis)
    else:
        parts = t.call(torch.chunk, t.input(node, 0), count, axis)
    return t.items(parts, count)


def _slice(t: Translation, node: Any) -> RuleResult:
    starts, stops = t.integers(node, 1), t.integers(node, 2)
    axes = t.integers(node, 3) if len(node.input) > 3 else range(len(starts))
    steps = t.integers(node, 4) if len(node.input) > 4 else [1] * len(starts)
    bounds = tuple(zip(axes, starts, (min(stop, 2**62) for stop in stops), steps, strict=True))
    return t.call(sliced, t.input(node, 0), bounds)


def _pad(t: Translation, node: Any) -> RuleResult:
    pads = t.integers(node, 1)
    rank = len(pads) // 2
    flat = [pads[side * rank + axis] for axis in reversed(range(rank)) for side in (0, 1)]
    return t.call(F.pad, t.input(node, 0), flat)


def _topk(t: Translation, node: Any) -> RuleResult:
    (count,) = t.integers(node, 1)
    found = t.call(
        ranked, t.input(node, 0), count, t.attribute(node, "axis", -1), bool(t.attribute(node, "largest", 1))
    )
    return t.items(found, 2)


def _reduce(t: Translation, node: Any) -> RuleResult:
    axes = t.integers(node, 1) if len(node.input) > 1 else t.attribute(node, "axes", [])
    return t.call(reduced, node.op_type, t.input(node, 0), axes, bool(t.attribute(node, "keepdims", 1)))


def _gather(t: Translation, node: Any) -> RuleResult:
    return t.call(take_table, *t.inputs(node), t.attribute(node, "axis", 0))


def _gather_nd(t: Translation, node: Any) -> RuleResult:
    if t.attribute(node, "batch_dims", 0) != 1:
        return t.refuse(node, "its batch axes")
    return t.call(take_rows, *t.inputs(node))


def _gather_elements(t: Translation, node: Any) -> RuleResult:
    """Along axis 1, an index that is only widened to the rows is a view."""
    axis = t.attribute(node, "axis", 0)
    widened = t.producer(node.input[1], "Mul")
    ones = None if widened is None else t.constants.get(widened.input[1])
    if axis == 1 and widened is not None and ones is not None and ones.ndim == 3 and (ones == 1).all():
        return t.call(take_rows, t.input(node, 0), t.value(widened.input[0]))
    return t.call(take_along, *t.inputs(node), axis)


def _scatter(t: Translation, node: Any) -> RuleResult:
    if t.attribute(node, "reduction", b"none") != b"add":
        return t.refuse(node, "a scatter that does not add")
    x, index, rows = t.inputs(node)
    return t.call(Tensor.scatter_add, x, t.attribute(node, "axis", 0), index, rows)


def _layer_norm(t: Translation, node: Any) -> RuleResult:
    if t.attribute(node, "axis", -1) != -1:
        return t.refuse(node, "another axis than the last")
    inputs = t.inputs(node)
    width = tuple(t.array(node, 1).shape)
    bias = inputs[2] if len(inputs) > 2 else None
    return t.call(F.layer_norm, inputs[0], width, inputs[1], bias, t.attribute(node, "epsilon", 1e-5))


def _gemm(t: Translation, node: Any) -> RuleResult:
    plain = all(t.attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if not plain or t.attribute(node, "transA", 0):
        return t.refuse(node, "a scaled or turned operand")
    inputs = t.inputs(node)
    bias = inputs[2] if len(inputs) > 2 else None
    return t.call(gemm, inputs[0], inputs[1], bias, bool(t.attribute(node, "transB", 0)))


def _attention(t: Translation, node: Any) -> RuleResult:
    q, k, v, *bias = t.inputs(node)
    scale, heads = t.attribute(node, "scale", None), t.attribute(node, "q_num_heads", 0)
    if scale is None or not heads or heads != t.attribute(node, "kv_num_heads", 0) or len(bias) > 1:
        return t.refuse(node, "an attention of heads that are shared, or without its scale")
    return t.call(attended_rows, q, k, v, bias[0] if bias else None, float(scale), int(heads))


def _fused_matmul(t: Translation, node: Any) -> RuleResult:
    turned = tuple(bool(t.attribute(node, name, 0)) for name in ("transA", "transB"))
    return t.call(multiplied, *t.inputs(node), turned, t.attribute(node, "alpha", 1.0))


def _gelu(t: Translation, node: Any) -> RuleResult:
    how = t.attribute(node, "approximate", b"none").decode()
    return t.call(F.gelu, t.input(node, 0), approximate=how)


def _unsqueeze(t: Translation, node: Any) -> RuleResult:
    x = t.input(node, 0)
    for axis in t.integers(node, 1):
        x = t.call(torch.unsqueeze, x, axis)
    return x


def _normalize(t: Translation, node: Any) -> RuleResult:
    made = t.call(normalized, t.input(node, 0), t.attribute(node, "axis", -1))
    t.widen(made)
    return made


def _constant(t: Translation, node: Any) -> RuleResult:
    return t.hold(np.asarray(t.constant_of(node)))


RULES: dict[str, Rule] = {
    **{"Add": _function(operator.add), "Sub": _function(operator.sub), "Mul": _function(operator.mul)},
    **{"Div": _function(divided), "Pow": _function(operator.pow), "Max": _function(at_least)},
    **{"Min": _function(at_most), "Equal": _function(operator.eq), "Less": _function(operator.lt)},
    **{"Greater": _function(operator.gt), "LessOrEqual": _function(operator.le), "Round": _function(torch.round)},
    **{"Where": _function(chosen), "Neg": _function(operator.neg), "Abs": _function(torch.abs)},
    **{"Exp": _function(torch.exp), "Log": _function(torch.log), "Sqrt": _function(torch.sqrt)},
    **{"Sin": _function(torch.sin), "Cos": _function(torch.cos), "Tanh": _function(torch.tanh)},
    **{"Erf": _function(torch.erf), "Sigmoid": _function(torch.sigmoid), "Floor": _function(torch.floor)},
    **{"Sign": _function(torch.sign), "Reciprocal": _function(torch.reciprocal), "Relu": _function(F.relu)},
    **{"Elu": _attribute(F.elu, "alpha", 1.0), "Identity": lambda t, node: t.input(node, 0)},
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda t, node: t.call(torch.cat, t.inputs(node), t.attribute(node, "axis", 0)),
    "Constant": _constant,
    "Conv": _conv,
    "ArgMax": lambda t, node: t.call(
        torch.argmax, t.input(node, 0), t.attribute(node, "axis", 0), bool(t.attribute(node, "keepdims", 1))
    ),
    "Attention": _attention,
    "Expand": lambda t, node: t.call(expanded, t.input(node, 0), t.integers(node, 1)),
    "FusedMatMul": _fused_matmul,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "LpNormalization": _normalize,
    "MatMul": _function(torch.matmul),
    "Pad": _pad,
    "QuickGelu": _attribute(gated, "alpha", 1.702),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2"), _reduce),
    "Reshape": lambda t, node: t.call(reshaped, t.input(node, 0), t.integers(node, 1)),
    "ScatterElements": _scatter,
    "SimplifiedLayerNormalization": _attribute(rms_normalized, "epsilon", 1e-5),
    "Slice": _slice,
    "Softmax": _attribute(torch.softmax, "axis", -1),
    "Split": _split,
    "TopK": _topk,
    "Transpose": lambda t, node: t.call(Tensor.permute, t.input(node, 0), tuple(t.attribute(node, "perm", []))),
    "Unsqueeze": _unsqueeze,
}
"""By operator; quantized products and attention, which are several nodes, stand in `products`."""
