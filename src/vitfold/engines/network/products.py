"""Products of codes in torch: integers in `_int_mm`, 8-bit floats in `_scaled_mm`, and attention as one call.

Integer products are exact. A weight's operand is stored once, signed and padded to what the kernels take; zero points
become one number per column behind the product. What scales and adds a bias is left to whoever fuses elementwise
operations: inductor, or nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitfold.engines.network.rules import attended
from vitfold.errors import EngineError
from vitfold.model import Array

if TYPE_CHECKING:
    from vitfold.engines.network.translation import Translation

_LEAST_ROWS = 32
"""`_int_mm` on CUDA wants more than 16 rows."""
_MULTIPLE = 16
"""It wants lengths that are multiples of 8, `_scaled_mm` of 16."""
_EXACT = 2**24
"""Up to here single precision holds every integer."""
_FLOAT8 = "float8_e4m3fn"
_HALVES = (torch.float16, torch.bfloat16)
LEAST_CAPABILITY = (8, 9)
"""Of a GPU that multiplies 8-bit floats."""


def quantized(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """clamp(round(x / scale) + zero_point) as codes of one byte, rounding half to even."""
    codes = torch.round(x.float() / scale).add(zero_point).clamp(low, high)
    return codes.to(torch.int8 if low < 0 else torch.uint8)


def quantized_float8(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3(x / scale), saturating at 448."""
    return (x.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def dequantized(codes: Tensor, scale: Tensor, zero_point: int, axis: int, real: Tensor) -> Tensor:
    """Scale (codes - zero_point), one scale or one per place of an axis."""
    if scale.ndim:
        shape = [1] * codes.ndim
        shape[axis] = -1
        scale = scale.reshape(shape)
    return ((codes.float() - zero_point) * scale).to(real.dtype)


def signed(codes: Tensor) -> Tensor:
    """Codes of a byte as int8: unsigned ones less 128."""
    return codes if codes.dtype == torch.int8 else (codes.to(torch.int16) - 128).to(torch.int8)


def integer_product(codes: Tensor, weight: Tensor, correction: Tensor) -> Tensor:
    """(A - z) W in int32: codes (..., I) with a weight of signed codes (O', I'), padded; (..., O).

    `correction` (O) is what signed codes and their zero point add to a column.
    """
    flat = signed(codes).reshape(-1, codes.shape[-1])
    rows = flat.shape[0]
    across, below = weight.shape[1] - flat.shape[1], _LEAST_ROWS - rows
    if across or below > 0:
        flat = F.pad(flat, (0, across, 0, max(0, below)))
    sums = torch._int_mm(flat, weight.t())[:rows, : correction.shape[0]] + correction
    return sums.reshape(*codes.shape[:-1], correction.shape[0])


def computed_product(a: Tensor, b: Tensor, zeros: tuple[int, int]) -> Tensor:
    """(A - za) (B - zb) in int32 of codes that are both computed, with leading axes.

    No kernel multiplies batches of integers. Single precision does it exactly over as many terms as keep the sum
    within 24 bits, TF32 too, since codes have 9; longer sums are made of such pieces.
    """
    left, right = (codes.float() - zero for codes, zero in zip((a, b), zeros, strict=True))
    most = max(1, _EXACT // (255 * 255))
    pieces = zip(torch.split(left, most, -1), torch.split(right, most, -2), strict=True)
    sums = [(x @ y).to(torch.int32) for x, y in pieces]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0, dtype=torch.int32)


def float8_product(codes: Tensor, weight: Tensor, outputs: int, scale: Tensor, real: Tensor) -> Tensor:
    """Scale A W of 8-bit floats (..., I) with a weight (O', I'), padded: (..., O).

    In half precision where that is the type of `real`, the module's floats, else in single precision.
    """
    flat = codes.reshape(-1, codes.shape[-1])
    kind = real.dtype if real.dtype in _HALVES else torch.float32
    if not flat.is_cuda:
        sums = (flat.float() @ weight[:outputs, : flat.shape[1]].float().t()) * scale
        return sums.to(kind).reshape(*codes.shape[:-1], outputs)
    sums = scaled_product(flat, weight, scale, kind)
    return sums[:, :outputs].reshape(*codes.shape[:-1], outputs)


def scaled_product(codes: Tensor, weight: Tensor, scale: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
    """Scale A W of 8-bit floats (R, I) with a padded weight (O', I'), by the kernel that GPUs have for it: (R, O').

    Sums are kept as `kind`. Tensor cores may add in fewer bits than single precision has (`use_fast_accum`), as is
    usual for inference: unverified here, for a CPU, on which alone this has run, adds in single precision.
    """
    missing = weight.shape[1] - codes.shape[1]
    if missing:  # of bytes: padding has no kernel for 8-bit floats
        codes = F.pad(codes.view(torch.uint8), (0, missing)).view(torch.float8_e4m3fn)
    one = torch.ones((), dtype=torch.float32, device=codes.device)
    return torch._scaled_mm(codes, weight.t(), scale_a=scale, scale_b=one, out_dtype=kind, use_fast_accum=True)


def scaled(sums: Tensor, scale: Tensor, bias: Tensor | None, real: Tensor) -> Tensor:
    """Scale sums + bias, in single precision until the end."""
    y = sums.float() * scale
    return (y if bias is None else y + bias.float()).to(real.dtype)


def check_float8(device: torch.device) -> None:
    """Check that a device multiplies 8-bit floats; the CPU multiplies the floats that they stand for.

    Raises:
        EngineError: if a GPU does not.
    """
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY):
        return
    raise EngineError(
        f"{device} multiplies no 8-bit floats; a GPU of compute capability 8.9 or newer does: make the bundle with "
        "--target torch --quant w8a8, or --target torch-fp16"
    )


def padded(weight: Tensor) -> Tensor:
    """A weight (O, I) filled up with zeros to what the kernels take."""
    rows, columns = (-length % _MULTIPLE for length in weight.shape)
    return F.pad(weight.view(torch.int8), (0, columns, 0, rows)).view(weight.dtype).contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """A value that is codes: its network node or its constant numbers, scale, zero point, and the axis of the scale."""

    value: Any
    constant: Array | None
    scale: Array
    zero_point: Array
    axis: int
    float8: bool


def codes_of(t: Translation, node: Any, value: int = 0, scale: int = 1, zero: int = 2) -> Codes:
    """Return the operand of a product that these inputs of a node describe."""
    scales = np.asarray(t.array(node, scale), np.float32)
    known = len(node.input) > zero and node.input[zero]
    zeros = t.array(node, zero) if known else np.zeros((), np.uint8)
    constant = t.constants.get(node.input[value])
    return Codes(
        None if constant is not None else t.input(node, value),
        constant,
        scales,
        zeros,
        t.attribute(node, "axis", 1),
        "float8" in str(zeros.dtype),
    )


def product(t: Translation, name: str, a: Codes, b: Codes) -> Any:
    """The node that holds (A - za) (B - zb), in int32; for 8-bit floats scaled by A's scale and B's largest."""
    if b.constant is None:
        if a.float8:
            raise ValueError(f"{name} multiplies 8-bit floats that are both computed")
        return t.call(computed_product, a.value, b.value, (_one(a.zero_point), _one(b.zero_point)))
    weight = np.ascontiguousarray(b.constant.T)
    if a.float8:
        t.uses_float8 = True
        held = t.hold(padded(_float8(weight)))
        scale = np.asarray(a.scale.reshape(()) * _largest(b), np.float32)
        return t.call(float8_product, a.value, held, len(weight), t.exact(scale), t.real)
    unsigned = weight.dtype == np.uint8
    codes = (weight.astype(np.int16) - 128 * unsigned).astype(np.int8)
    shift = 128 * (np.asarray(a.zero_point).dtype == np.uint8) - _one(a.zero_point)
    zero = np.asarray(b.zero_point, np.int64) - 128 * unsigned
    if zero.any():
        return _with_zero_points(t, a, codes, shift, zero)
    correction = (shift * codes.sum(1, dtype=np.int64)).astype(np.int32)
    return t.call(integer_product, a.value, t.hold(padded(torch.from_numpy(codes))), t.hold(correction))


def _with_zero_points(t: Translation, a: Codes, codes: Array, shift: int, zero: Array) -> Any:
    """A weight's zero point takes itself times the sum of a row of A from every column."""
    correction = (shift * codes.sum(1, dtype=np.int64)).astype(np.int32)
    sums = t.call(integer_product, a.value, t.hold(padded(torch.from_numpy(codes))), t.hold(correction))
    columns = np.broadcast_to(zero.astype(np.int32), (len(codes),)).copy()
    return t.call(less_row_sums, sums, a.value, t.hold(columns), _one(a.zero_point))


def less_row_sums(sums: Tensor, codes: Tensor, columns: Tensor, zero_point: int) -> Tensor:
    """Sums - (sum of (A - za) along a row) zb."""
    rows = (codes.to(torch.int32) - zero_point).sum(-1, keepdim=True, dtype=torch.int32)
    return sums - rows * columns


def _one(zero_point: Array) -> int:
    return int(np.asarray(zero_point, np.int64).reshape(-1)[0])


def _float8(codes: Array) -> Tensor:
    return torch.from_numpy(codes.view(np.uint8).copy()).view(torch.float8_e4m3fn)


def joint_scale(a: Codes, b: Codes) -> Array:
    """Return the factor behind a product: per column where B has one per column."""
    left = 1 / _largest(b) if a.float8 and b.constant is not None else a.scale.reshape(())
    return np.asarray(left * b.scale, np.float32)


def _largest(b: Codes) -> Array:
    """The largest scale of a weight. With it, sums of 8-bit floats keep to the range of outputs, and fit halves."""
    return np.asarray(np.max(b.scale), np.float32)


def _quantize(t: Translation, node: Any) -> Any:
    scale = t.exact(np.asarray(t.array(node, 1), np.float32).reshape(()))
    zero = t.array(node, 2) if len(node.input) > 2 else np.zeros((), np.uint8)
    if "float8" in str(zero.dtype):
        return t.call(quantized_float8, t.input(node, 0), scale)
    bounds = np.iinfo(zero.dtype)
    return t.call(quantized, t.input(node, 0), scale, int(zero), int(bounds.min), int(bounds.max))


def _dequantize(t: Translation, node: Any) -> Any:
    """Codes that no product of codes reads."""
    codes = codes_of(t, node)
    value = codes.value
    if codes.constant is not None:
        value = t.hold(_float8(codes.constant) if codes.float8 else np.asarray(codes.constant))
    return t.call(
        dequantized, value, t.exact(codes.scale), 0 if codes.float8 else _one(codes.zero_point), codes.axis, t.real
    )


def _matmul_integer(t: Translation, node: Any) -> Any:
    one = np.ones((), np.float32)
    sides = []
    for place in (0, 1):
        given = len(node.input) > place + 2 and node.input[place + 2]
        zero = t.array(node, place + 2) if given else np.zeros((), np.uint8)
        constant = t.constants.get(node.input[place])
        value = None if constant is not None else t.input(node, place)
        sides.append(Codes(value, constant, one, zero, 1, False))
    return product(t, node.name, *sides)


def _matmul_integer_to_float(t: Translation, node: Any) -> Any:
    left, right = codes_of(t, node, 0, 2, 4), codes_of(t, node, 1, 3, 5)
    bias = t.input(node, 6) if len(node.input) > 6 and node.input[6] else None
    return t.call(scaled, product(t, node.name, left, right), t.exact(joint_scale(left, right)), bias, t.real)


def _matmul(t: Translation, node: Any) -> Any:
    """A product of dequantized codes is one of codes, scaled behind it."""
    sides = [t.producer(name, "DequantizeLinear") for name in node.input]
    if all(side is not None for side in sides):
        left, right = (codes_of(t, side) for side in sides)
        fits = left.constant is None and left.scale.ndim == 0 and (right.constant is not None or not left.float8)
        if fits and (right.constant is None or right.constant.ndim == 2):
            sums = product(t, node.name, left, right)
            return t.call(scaled, sums, t.exact(joint_scale(left, right)), None, t.real)
    return t.call(torch.matmul, *t.inputs(node))


PRODUCTS = {
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "MatMul": _matmul,
    "MatMulInteger": _matmul_integer,
    "MatMulIntegerToFloat": _matmul_integer_to_float,
}
"""Rules of operators that make or multiply codes."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The values that an attention reads, and its scale; `bias` may be none."""

    q: str
    k: str
    v: str
    bias: str | None
    scale: float


def find_attention(t: Translation, node: Any) -> Attention | None:
    """Return the attention whose last product this node is, None where it is none, or nothing fuses it."""
    softmax = t.producer(node.input[0], "Softmax", alone=True) if node.op_type == "MatMul" else None
    if softmax is None or t.attribute(softmax, "axis", -1) not in (-1, 3):
        return None
    scores, bias = softmax.input[0], None
    added = t.producer(scores, "Add", alone=True)
    if added is not None:
        scores, bias = added.input
    fused = t.producer(scores, "FusedMatMul", alone=True)
    if fused is not None:
        if not t.attribute(fused, "transB", 0) or t.attribute(fused, "transA", 0):
            return None
        (q, k), scale = fused.input, t.attribute(fused, "alpha", 1.0)
    else:
        plain = t.producer(scores, "MatMul", alone=True)
        turned = None if plain is None else t.producer(plain.input[1], "Transpose", alone=True)
        if plain is None or turned is None or list(t.attribute(turned, "perm", [])) != [0, 1, 3, 2]:
            return None
        q, k, scale = plain.input[0], turned.input[0], 1.0
        times = t.producer(q, "Mul", alone=True)
        factor = None if times is None else t.constants.get(times.input[1])
        if times is not None and factor is not None and factor.ndim == 0:
            q, scale = times.input[0], float(factor)
    return Attention(q, k, node.input[1], bias, scale)


def attention(t: Translation, found: Attention) -> Any:
    """The fused call."""
    q, k, v = (t.value(name) for name in (found.q, found.k, found.v))
    return t.call(attended, q, k, v, None if found.bias is None else t.value(found.bias), found.scale)
