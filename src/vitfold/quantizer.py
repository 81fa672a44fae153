"""Quantizers as values: what each site's numbers are rounded to.

A site is named after its operation: `blocks.3.attn.qkv.x` is the input of a linear layer, `.w` its weight, `.y` its
output before scale and bias (what its normalized weights give); an attention has the sites `blocks.3.attn.q`, `.k`,
`.v` and `.softmax`. Where codes are handed from product to product (target "integer"), `.out` is the output of a linear
layer behind scale and bias, `.logits` what an attention's logits are below their largest, and `.x` of a LayerNorm the
residual stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vitfold.errors import BundleError
from vitfold.model import Array
from vitfold.storage.checked import Range, entry, parse_json, section
from vitfold.storage.ordinary import check_ordinary

NARROW_BITS = 8
"""What kernels multiply; codes of more bits are multiplied in two halves."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Uniform:
    """x ~ scale (q - zero_point) with integer codes q in [low, high].

    `scale` (float32, positive) and `zero_point` (int32, within [low, high]) have shape () per tensor,
    or (C,) per channel of `axis`: 0 for the output channels of a weight (O, I), 1 for the heads of an
    attention operand (B, H, N, K), -1 for the channels of a linear layer's input.

    Source: Jacob et al. (1712.05877), equation 1.
    """

    scale: Array
    zero_point: Array
    low: int
    high: int
    axis: int | None = None

    def __post_init__(self) -> None:
        scale = np.asarray(self.scale, np.float32)
        zero_point = np.asarray(self.zero_point, np.int32)
        if scale.shape != zero_point.shape or scale.ndim != (0 if self.axis is None else 1):
            raise ValueError(f"scale {scale.shape} and zero point {zero_point.shape} do not fit axis {self.axis}")
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError("scales must be positive and finite")
        if self.axis is not None and not isinstance(self.axis, int):
            raise ValueError(f"an axis is a number, found {self.axis!r}")
        if not self.low < self.high or (zero_point < self.low).any() or (zero_point > self.high).any():
            raise ValueError(f"zero points must lie in the codes [{self.low}, {self.high}]")
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero_point)

    @property
    def symmetric(self) -> bool:
        """True if zero is the code 0."""
        return not self.zero_point.any()

    @property
    def bits(self) -> int:
        """Bits that the codes need."""
        return int(self.high - self.low).bit_length()

    def halves(self) -> tuple[Uniform, Uniform]:
        """Return the quantizers of two 8-bit halves of wide codes per tensor, which have the zero point 0.

        Equation: x ~ 256 s round(x / (256 s)) + s round((x - 256 s round(x / (256 s))) / s); a rest of half a coarse
        step saturates by one fine step.
        """
        if self.axis is not None or not self.symmetric or (self.low, self.high) != (-(2**15), 2**15 - 1):
            raise ValueError("only codes of 16 bits per tensor with the zero point 0 have halves")
        zero = np.array(0)
        return (
            Uniform(scale=np.asarray(self.scale * np.float32(256)), zero_point=zero, low=-128, high=127),
            Uniform(scale=self.scale, zero_point=zero, low=-128, high=127),
        )

    def _aligned(self, x: Array) -> tuple[Array, Array]:
        if self.axis is None:
            return self.scale, self.zero_point
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return self.scale.reshape(shape), self.zero_point.reshape(shape)

    def codes(self, x: Array) -> Array:
        """clamp(round(x / scale) + zero_point, low, high) as int32, rounding half to even like QuantizeLinear."""
        scale, zero_point = self._aligned(x)
        codes: Array = np.clip(np.rint(x / scale) + zero_point, self.low, self.high).astype(np.int32)
        return codes

    def values(self, codes: Array) -> Array:
        """Scale * (codes - zero_point) as float32."""
        scale, zero_point = self._aligned(codes)
        values: Array = ((codes - zero_point) * scale).astype(np.float32)
        return values

    def __call__(self, x: Array) -> Array:
        """Quantize and dequantize."""
        return self.values(self.codes(x))


EXPONENTIALS = Uniform(scale=np.array(1 / 255), zero_point=np.array(0), low=0, high=255)
"""What exp(x - max) in (0, 1] is rounded to in a reordered softmax: it needs no calibration."""


EXPONENTS = Uniform(scale=np.array(2.0**-9), zero_point=np.array(0), low=-4095, high=0)
"""What logits below their largest are rounded to, where exponentials come from a table: its end is below 1 / 510."""
STREAM_BITS = 20
STREAM_LIMIT = 1 << 22
"""Bits of the largest magnitude of a residual stream in integers, and where its codes end."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Twin:
    """Two uniform quantizers with disjoint domains, both with zero point 0.

    rule "sign" (post-GELU): negative x go to `inner` (codes low..0), the others to `outer` (codes 0..high).
    rule "magnitude" (post-softmax, x >= 0): x below the upper end of `inner`, (high + 1) scale, goes to `inner`, where
    it gets the code `high` at most, the others to `outer`: with 8 bits both have 128 codes, and 2^7 steps of `inner`
    are below the split.

    Source: PTQ4ViT (2111.12293), section 3.2, in the paper's disjoint form (the released code adds both).
    """

    rule: Literal["sign", "magnitude"]
    inner: Uniform
    outer: Uniform

    def __post_init__(self) -> None:
        if self.rule not in ("sign", "magnitude"):
            raise ValueError(f"unknown rule {self.rule!r} of a twin quantizer")
        if not (self.inner.symmetric and self.outer.symmetric and self.inner.axis is self.outer.axis is None):
            raise ValueError("both ranges of a twin quantizer are per tensor and have the zero point 0")

    @property
    def bits(self) -> int:
        """Bits of a code: one says which range, the others index it."""
        return self.outer.bits + 1

    @property
    def threshold(self) -> float:
        """The value from which on `outer` is used."""
        return 0.0 if self.rule == "sign" else float(self.inner.scale) * (self.inner.high + 1)

    def __call__(self, x: Array) -> Array:
        """Quantize and dequantize."""
        chosen: Array = np.where(x < np.float32(self.threshold), self.inner(x), self.outer(x))
        return chosen


_LEAST_ROOT = 2.0**-7


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Log:
    """x ~ scale base^-q - offset for x >= -offset, base = 2^(1 / root).

    Equation: q = clamp(round(-root log2((x + offset) / scale)), 0, 2^bits - 1).

    No runtime executes it: it exists in the simulation only.

    Source: FQ-ViT (2111.13824), equation 9 (root 1); RepQ-ViT (2212.08254), equation 13 (root 2); AdaLog (2407.12951),
    section 3.2 (root 37 / q for a whole q, and the offset of an activation function's minimum).
    """

    scale: Array
    bits: int
    root: int | float
    offset: float = 0.0

    def __post_init__(self) -> None:
        scale = np.asarray(self.scale, np.float32)
        if scale.ndim != 0 or not np.isfinite(scale) or scale <= 0:
            raise ValueError("the scale of a logarithmic quantizer is one positive number")
        if not _LEAST_ROOT <= self.root <= 1 / _LEAST_ROOT or self.bits < 1:
            raise ValueError(f"no logarithmic quantizer has {self.bits} bits and the root {self.root}")
        if not 0 <= self.offset < np.inf:
            raise ValueError(f"the offset of a logarithmic quantizer is not negative, found {self.offset}")
        object.__setattr__(self, "scale", scale)

    def __call__(self, x: Array) -> Array:
        """Quantize and dequantize; zero counts as 1e-30."""
        tiny = np.float32(1e-30)
        x = np.maximum(x + np.float32(self.offset), tiny)
        codes = np.clip(np.rint(-self.root * np.log2(x / self.scale)), 0, 2**self.bits - 1)
        values: Array = (self.scale * np.exp2(-codes / self.root) - np.float32(self.offset)).astype(np.float32)
        return values


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shifted:
    """x ~ inner(x + offset) - offset, with a fixed offset (C,) per channel of the last axis.

    Source: NoisyQuant (2211.16056), equation 4; W offset is taken off in the bias.
    """

    offset: Array
    inner: Uniform

    def __post_init__(self) -> None:
        offset = np.asarray(self.offset, np.float32)
        if offset.ndim != 1 or not np.isfinite(offset).all() or self.inner.axis is not None:
            raise ValueError("a shifted quantizer has one finite offset per channel and one scale")
        object.__setattr__(self, "offset", offset)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.inner.bits

    def __call__(self, x: Array) -> Array:
        """Shift, quantize, dequantize, shift back."""
        shifted: Array = self.inner(x + self.offset) - self.offset
        return shifted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Float8:
    """x ~ scale e4m3(x / scale): 8-bit floats of 4 exponent and 3 mantissa bits, saturating at 448.

    `scale` (float32, positive) has shape () per tensor, or (O,) with axis 0: the output channels of a weight.

    Source: Micikevicius et al. (2209.05433), the format E4M3 as ONNX's FLOAT8E4M3FN stores it.
    """

    scale: Array
    axis: Literal[0] | None = None

    def __post_init__(self) -> None:
        scale = np.asarray(self.scale, np.float32)
        if scale.ndim != (0 if self.axis is None else 1) or not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError("an 8-bit float has one positive scale, or one per output channel of a weight")
        object.__setattr__(self, "scale", scale)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8

    def codes(self, x: Array) -> Array:
        """x / scale, clamped to what the format holds, as float32 on the format's grid; ties go to even."""
        scale = self.scale if self.axis is None else self.scale.reshape(-1, *[1] * (x.ndim - 1))
        return round_to_e4m3(np.clip(x / scale, -LARGEST_E4M3, LARGEST_E4M3).astype(np.float32))

    def __call__(self, x: Array) -> Array:
        """Quantize and dequantize."""
        scale = self.scale if self.axis is None else self.scale.reshape(-1, *[1] * (x.ndim - 1))
        values: Array = self.codes(x) * scale
        return values


LARGEST_E4M3 = 448.0
_SMALLEST_EXPONENT = -6
_MANTISSA_BITS = 3


def round_to_e4m3(x: Array) -> Array:
    """Round numbers of at most 448 to the nearest that E4M3 holds, subnormals included, ties to even."""
    _, exponent = np.frexp(x)
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1, _SMALLEST_EXPONENT) - _MANTISSA_BITS)
    rounded: Array = (np.rint(x / step) * step).astype(np.float32)
    return rounded


Quantizer = Uniform | Twin | Log | Shifted | Float8


NORMALIZED_EXPONENT = -7
"""Normalized weights are codes times 2^-7: within [-1, 1) as 8-bit integers, within [-3.5, 3.5] as 8-bit floats."""


def normalized_scale(weight: Uniform | Float8) -> Array:
    """Return what is left of a weight's scale, per output channel, once its codes are multiplied by 2^-7."""
    return np.asarray(np.ldexp(weight.scale, -NORMALIZED_EXPONENT), np.float32)


def in_half(quantizer: Quantizer) -> Quantizer:
    """Return the quantizer with every scale rounded to FP16, that of a weight per channel as a normalized one."""
    if isinstance(quantizer, Twin):
        inner, outer = (replace(q, scale=_half(q.scale, 0)) for q in (quantizer.inner, quantizer.outer))
        return replace(quantizer, inner=inner, outer=outer)
    if isinstance(quantizer, Shifted):
        return replace(quantizer, inner=replace(quantizer.inner, scale=_half(quantizer.inner.scale, 0)))
    if isinstance(quantizer, Log):
        return quantizer
    return replace(quantizer, scale=_half(quantizer.scale, -NORMALIZED_EXPONENT if quantizer.axis == 0 else 0))


def _half(scale: Array, exponent: int) -> Array:
    """Round 2^exponent scale to FP16."""
    halves = np.maximum(np.ldexp(scale, exponent).astype(np.float16), np.finfo(np.float16).smallest_subnormal)
    return np.asarray(np.ldexp(halves.astype(np.float32), -exponent))


class QuantParams(Mapping[str, Quantizer]):
    """The quantizer of every quantized site; sites that are not in it stay float."""

    def __init__(self, quantizers: Mapping[str, Quantizer]) -> None:
        self._quantizers = MappingProxyType(dict(sorted(quantizers.items())))

    def __getitem__(self, site: str) -> Quantizer:
        """Return the quantizer of a site."""
        return self._quantizers[site]

    def __iter__(self) -> Iterator[str]:
        """Iterate over sites in sorted order."""
        return iter(self._quantizers)

    def __len__(self) -> int:
        """Return how many sites are quantized."""
        return len(self._quantizers)

    def uniform(self, site: str) -> Uniform | None:
        """Return the uniform quantizer of a site, None if it stays float."""
        found = self._quantizers.get(site)
        if found is not None and not isinstance(found, Uniform):
            raise TypeError(f"{site} has a {type(found).__name__} quantizer where only a uniform one can stand")
        return found

    def digest(self) -> str:
        """Return the sha256 of everything in it, in hexadecimal."""
        head, arrays = _flatten(self._quantizers)
        total = hashlib.sha256(head.encode())
        for name in sorted(arrays):
            total.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
            total.update(arrays[name].tobytes())
        return total.hexdigest()

    def save(self, path: Path) -> None:
        """Write a safetensors file; scalars stand in its metadata."""
        head, arrays = _flatten(self._quantizers)
        save_file(arrays, path, metadata={"quantizers": head})


def load_quant_params(path: Path) -> QuantParams:
    """Read what `QuantParams.save` wrote.

    Raises:
        BundleError: if the file is missing or is something else.
    """
    try:
        check_ordinary(path)
        with safe_open(path, framework="numpy") as file:
            head = section(parse_json((file.metadata() or {}).get("quantizers", "")), "quantizers")
            return QuantParams({site: _restore(values, file.get_tensor, site) for site, values in head.items()})
    except SafetensorError:
        raise BundleError(f"{path} holds no quantizers: it is no file of tensors; make the bundle again") from None
    except (OSError, ValueError, OverflowError) as error:
        raise BundleError(f"{path} holds no quantizers ({error}); make the bundle again") from None
    except TypeError:  # a number type that NumPy lacks
        raise BundleError(f"{path} holds no quantizers of known types; make the bundle again") from None


def _flatten(quantizers: Mapping[str, Quantizer]) -> tuple[str, dict[str, Array]]:
    head: dict[str, Any] = {}
    arrays: dict[str, Array] = {}  # not by ascontiguousarray, which gives a scalar an axis

    def uniform(site: str, q: Uniform) -> dict[str, Any]:
        arrays[f"{site}.scale"] = np.asarray(q.scale, order="C")
        arrays[f"{site}.zero_point"] = np.asarray(q.zero_point, order="C")
        return {"kind": "uniform", "name": site, "low": q.low, "high": q.high, "axis": q.axis}

    for site, q in quantizers.items():
        if isinstance(q, Uniform):
            head[site] = uniform(site, q)
        elif isinstance(q, Twin):
            head[site] = {
                "kind": "twin",
                "rule": q.rule,
                "inner": uniform(f"{site}.inner", q.inner),
                "outer": uniform(f"{site}.outer", q.outer),
            }
        elif isinstance(q, Shifted):
            arrays[f"{site}.offset"] = np.asarray(q.offset, order="C")
            head[site] = {"kind": "shifted", "name": site, "inner": uniform(f"{site}.inner", q.inner)}
        elif isinstance(q, Float8):
            arrays[f"{site}.scale"] = np.asarray(q.scale, order="C")
            head[site] = {"kind": "float8", "name": site, "axis": q.axis}
        else:
            arrays[f"{site}.scale"] = np.asarray(q.scale, order="C")
            head[site] = {"kind": "log", "name": site, "bits": q.bits, "root": q.root}
            if q.offset:
                head[site]["offset"] = q.offset
    return json.dumps(head, sort_keys=True), arrays


_CODES: Range = (-STREAM_LIMIT, STREAM_LIMIT)


def _restore(found: Any, tensor: Callable[[str], Array], site: str, depth: int = 0) -> Quantizer:
    values = section(found, site)
    kind = entry(values, "kind", str, site)
    if kind in ("twin", "shifted") and depth:
        raise ValueError(f"{site} is a {kind} quantizer within another")
    if kind == "twin":
        parts = (entry(values, part, Mapping[str, Any], site) for part in ("inner", "outer"))
        inner, outer = (_restore(part, tensor, site, 1) for part in parts)
        if not (isinstance(inner, Uniform) and isinstance(outer, Uniform)):
            raise ValueError("a twin quantizer holds two uniform ones")
        return Twin(rule=entry(values, "rule", Literal["sign", "magnitude"], site), inner=inner, outer=outer)
    name = entry(values, "name", str, site)
    if kind == "shifted":
        within = _restore(entry(values, "inner", Mapping[str, Any], site), tensor, site, 1)
        if not isinstance(within, Uniform):
            raise ValueError("a shifted quantizer holds a uniform one")
        return Shifted(offset=_real(tensor(f"{name}.offset")), inner=within)
    scale = _real(tensor(f"{name}.scale"))
    if kind == "log":
        bits, root = entry(values, "bits", int, site, (1, 16)), entry(values, "root", float, site)
        offset = entry(values, "offset", float, site) if "offset" in values else 0.0
        return Log(scale=scale, bits=bits, root=int(root) if root in (1, 2) else root, offset=offset)
    axis = entry(values, "axis", int | None, site, (-1, 1))
    if kind == "float8":
        return Float8(scale=scale, axis=axis)
    if kind != "uniform":
        raise ValueError(f"{site} has an unknown quantizer")
    low, high = (entry(values, key, int, site, _CODES) for key in ("low", "high"))
    return Uniform(scale=scale, zero_point=_real(tensor(f"{name}.zero_point")), low=low, high=high, axis=axis)


def _real(array: Array) -> Array:
    """Return real numbers of any type as they are.

    Raises:
        ValueError: if they are none.
    """
    if array.dtype.kind not in "fiu":
        raise ValueError(f"scales are numbers, found {array.dtype}")
    return array
