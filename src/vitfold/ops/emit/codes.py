"""How a quantizer's codes are placed in the type of a target: moving codes and zero points, which is exact."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import ml_dtypes
import numpy as np

from vitfold.errors import TargetError
from vitfold.model import Array
from vitfold.quantizer import Float8, Quantizer, Uniform
from vitfold.target import Target

Sign = Literal["any", "positive", "negative"]
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_RECALIBRATE = "calibrate again for this target"
_SIMULATION = "quantize it per tensor with 8 bits, or keep this recipe for the simulation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Codes that QuantizeLinear computes: saturate(round((x - shift) / scale) + zero_point).

    x ~ scale (code - zero_point) + shift. `zero_point` is a scalar array of the codes' type, an integer or an 8-bit
    float; `shift` is 0 unless the target allows no zero point.
    """

    scale: np.float32
    zero_point: Array
    shift: np.float32


def place(site: str, quantizer: Quantizer, target: Target, dtype: type | None = None, sign: Sign = "any") -> Placed:
    """Move the codes of a uniform quantizer so that the type's own saturation clips them where `quantizer` does.

    Codes and zero point move by the same integer, which changes no value. Of numbers whose sign is
    known only one end is ever clipped, so fewer than 256 codes fit too. Where the target is symmetric
    and the zero point z is not 0 after that, x = shift + scale code with shift = -z scale.

    Raises:
        TargetError: if the quantizer has an axis, other than 256 codes for numbers of any sign, or a type that
            the target does not multiply.
    """
    _check_type(site, quantizer, target)
    if isinstance(quantizer, Float8):
        return Placed(scale=np.float32(quantizer.scale), zero_point=np.zeros((), FLOAT8), shift=np.float32(0))
    if not isinstance(quantizer, Uniform):
        raise TargetError(f"{site}: no runtime executes a {type(quantizer).__name__} quantizer here; {_SIMULATION}")
    if quantizer.axis is not None:
        raise TargetError(
            f"{site} is quantized per channel of axis {quantizer.axis}, which a matrix product cannot undo on "
            f"{target.name}; fold the scales into the layers around it, or quantize it per tensor"
        )
    kind = np.dtype(dtype or target.activation_type)
    least, most = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
    count = quantizer.high - quantizer.low + 1
    if count > 256 or (sign == "any" and count != 256):
        raise TargetError(
            f"{site} has the {count} codes {quantizer.low}..{quantizer.high}, where {target.name} clips at the 256 "
            f"of its type; {_SIMULATION}"
        )
    moved = least - quantizer.low if sign == "negative" else most - quantizer.high
    zero_point = int(quantizer.zero_point) + moved
    scale = np.float32(quantizer.scale)
    if target.symmetric and zero_point != 0:
        return Placed(scale=scale, zero_point=np.array(0, kind), shift=np.float32(-zero_point * scale))
    return Placed(scale=scale, zero_point=np.array(zero_point, kind), shift=np.float32(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedWeight:
    """What stands for a weight (O, I): codes `offset` below the quantizer's own, in int8 or as 8-bit floats.

    `scale` (float32) and `zero_point` (the codes' type) have shape () or (O,).
    """

    quantizer: Uniform | Float8
    offset: int
    zero_point: Array

    def rows(self, start: int, stop: int) -> PlacedWeight:
        """Return what stands for the output channels start:stop alone."""
        if self.quantizer.axis is None:
            return self
        scale, zero_point = self.quantizer.scale[start:stop], self.zero_point[start:stop]
        if isinstance(self.quantizer, Float8):
            return replace(self, quantizer=replace(self.quantizer, scale=scale), zero_point=zero_point)
        part = replace(self.quantizer, scale=scale, zero_point=self.quantizer.zero_point[start:stop])
        return replace(self, quantizer=part, zero_point=zero_point)

    @property
    def scale(self) -> Array:
        """The scales, unchanged."""
        return self.quantizer.scale

    def codes(self, weight: Array) -> Array:
        """Return the codes (O, I) in their type."""
        return (self.quantizer.codes(weight) - self.offset).astype(self.zero_point.dtype)


def place_weight(site: str, quantizer: Quantizer, target: Target) -> PlacedWeight:
    """Move the codes of a weight into the target's signed range of `weight_bits` bits.

    Raises:
        TargetError: if they do not fit there, have another axis than the output channels, or zero points
            that the target does not take.
    """
    _check_type(site, quantizer, target)
    if isinstance(quantizer, Float8):
        return PlacedWeight(quantizer=quantizer, offset=0, zero_point=np.zeros(quantizer.scale.shape, FLOAT8))
    if not isinstance(quantizer, Uniform) or quantizer.axis not in (None, 0):
        raise TargetError(f"{site} needs a uniform quantizer, per tensor or per output channel (axis 0)")
    half = 1 << (target.weight_bits - 1)
    fits = -half <= quantizer.low and quantizer.high < half
    offset = 0 if fits else quantizer.low + half
    if quantizer.high - offset >= half:
        raise TargetError(
            f"{site} has {quantizer.bits}-bit codes, {target.name} multiplies {target.weight_bits}-bit weights "
            "without saturating; quantize for this target, or choose one with wider products"
        )
    zero_point = np.asarray(quantizer.zero_point - offset, np.int8)
    if target.symmetric and zero_point.any():
        raise TargetError(f"{site} has zero points, which {target.name} cannot multiply; quantize it symmetrically")
    return PlacedWeight(quantizer=quantizer, offset=offset, zero_point=zero_point)


def _check_type(site: str, quantizer: Quantizer, target: Target) -> None:
    """Check that integers meet a target of integers, and 8-bit floats one of 8-bit floats."""
    if isinstance(quantizer, Float8) != (target.activation_type == "float8e4m3fn"):
        kind = "8-bit floats" if isinstance(quantizer, Float8) else "integers"
        raise TargetError(f"{site} is quantized to {kind}, which {target.name} does not multiply; {_RECALIBRATE}")
