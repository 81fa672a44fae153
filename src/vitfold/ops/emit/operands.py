"""Quantized operands of products: which sites have quantizers, and the nodes that make their codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vitfold.errors import TargetError
from vitfold.model import Array
from vitfold.ops.emit.chain import Chain
from vitfold.ops.emit.codes import Placed, PlacedWeight, Sign, place, place_weight
from vitfold.ops.emit.writer import Writer
from vitfold.products import computed_type
from vitfold.quantizer import NARROW_BITS, Quantizer, Shifted, Twin, Uniform
from vitfold.target import Target


@dataclass(frozen=True, slots=True)
class Branch:
    """A float value and how its codes are stored; a quantized operand is the sum of its branches."""

    onnx: ir.Value
    placed: Placed


class Operands:
    """Codes of activations and weights on a writer, as one target stores them; equal ones are made once."""

    def __init__(self, writer: Writer, target: Target, quantizers: Mapping[str, Quantizer]) -> None:
        self.target = target
        self.quantizers = quantizers
        self._writer = writer
        self.chain = Chain(writer, quantizers)
        self._weights: dict[tuple[str, int], ir.Value] = {}
        self._codes: dict[tuple[ir.Value, float, str, int], ir.Value] = {}
        self._ready: dict[ir.Value, tuple[str, Placed]] = {}

    def quantized(self, first: str, second: str) -> bool:
        """Say whether a product runs in integers: both operands are quantized.

        Raises:
            TargetError: if only one of them is, unless it is a weight: that is on its grid already.
        """
        found = [site in self.quantizers for site in (first, second)]
        if found == [True, False] or (found == [False, True] and not second.endswith(".w")):
            there, missing = (first, second) if found[0] else (second, first)
            raise TargetError(f"{there} is quantized and {missing} is not; a product needs both operands in integers")
        return all(found)

    def place(self, site: str) -> Placed:
        """How the target stores the codes of numbers of any sign.

        Raises:
            TargetError: if it cannot.
        """
        return place(site, self.quantizers[site], self.target)

    def left(self, site: str, x: ir.Value) -> tuple[Branch, ...]:
        """One branch for a uniform quantizer, two for a twin one or for wide codes.

        Each element is zero in one branch of a twin; wide codes have a coarse and a fine half. The offset of a shifted
        quantizer of a linear layer's input is added here, and taken off in `moved_bias`.

        Raises:
            TargetError: if the branches need zero points that the target has not, and no bias can take their place.
        """
        ready, placed = self._ready.get(_before_moves(x)[0], (site, None))
        if ready != site:
            raise ValueError(f"{site} is given the codes of {ready}")
        if placed is not None:
            self._codes[_key(Branch(x, placed))] = x
            return (Branch(x, placed),)
        quantizer, linear = self.quantizers[site], site.endswith(".x")
        if isinstance(quantizer, Shifted) and linear:
            x = self._writer.node("Add", x, self._writer.constant(quantizer.offset), site=site)
            return (Branch(x, place(site, quantizer.inner, self.target)),)
        if isinstance(quantizer, Uniform) and quantizer.bits > NARROW_BITS and linear:
            return self._halves(site, quantizer, x)
        if not isinstance(quantizer, Twin):
            sign: Sign = "positive" if site.endswith(".softmax") else "any"
            one = Branch(x, place(site, quantizer, self.target, sign=sign))
            return (one,) if linear else (self._unshifted(site, one),)
        branches = self._twins(site, quantizer, x)
        if not linear:
            return tuple(self._unshifted(site, branch) for branch in branches)
        if any(branch.placed.shift for branch in branches):
            raise TargetError(f"{site}: {self.target.name} has no zero points for this twin quantizer")
        return branches

    def _halves(self, site: str, quantizer: Uniform, x: ir.Value) -> tuple[Branch, Branch]:
        """What the coarse codes of a wide quantizer hold, and what they leave.

        Raises:
            TargetError: if the target leaves products to whoever recognizes pairs of Q and DQ, or has no zero points.
        """
        if not self.target.takes_wide:
            raise TargetError(
                f"{site} has {quantizer.bits} bits, which {self.target.name} does not multiply; use --target cpu, or "
                "keep the layer float"
            )
        coarse, fine = (place(site, half, self.target) for half in quantizer.halves())
        first = Branch(x, coarse)
        rest = self._writer.node("Sub", x, self.grid(site, first), site=site)
        return first, Branch(rest, fine)

    def _twins(self, site: str, quantizer: Twin, x: ir.Value) -> tuple[Branch, Branch]:
        node, zero = self._writer.node, self._writer.number
        if quantizer.rule == "sign":
            outer = node("Relu", x, site=site)
            inner = node("Min", x, zero(0.0), site=site)
            lower = place(site, quantizer.inner, self.target, sign="negative")
        else:
            small = node("Less", x, self._writer.number(quantizer.threshold), site=site)
            largest = zero(float(quantizer.inner.scale) * quantizer.inner.high)
            inner = node("Where", small, node("Min", x, largest, site=site), zero(0.0), site=site)
            outer = node("Where", small, zero(0.0), x, site=site)
            lower = place(site, quantizer.inner, self.target, sign="positive")
        return Branch(inner, lower), Branch(outer, place(site, quantizer.outer, self.target, sign="positive"))

    def right(self, site: str, x: ir.Value) -> Branch:
        """Place the codes of k or v, the second operand of a product, which x86 wants signed.

        Where 8-bit signed operands saturate, both sides are unsigned: slower, but exact.
        """
        kind = np.dtype(computed_type(self.target.to_dict()))
        return self._unshifted(site, Branch(x, place(site, self.quantizers[site], self.target, kind.type)))

    def _unshifted(self, site: str, branch: Branch) -> Branch:
        if branch.placed.shift:
            raise TargetError(
                f"{site} has a zero point, which {self.target.name} cannot multiply; quantize it symmetrically"
            )
        return branch

    def codes(self, site: str, branch: Branch) -> ir.Value:
        """Codes that are there, or QuantizeLinear; made once for equal branches."""
        key = _key(branch)
        if key not in self._codes:
            codes = self._handed(site, branch)
            self._codes[key] = self._rounded(site, branch) if codes is None else codes
        return self._codes[key]

    def _rounded(self, site: str, branch: Branch) -> ir.Value:
        """QuantizeLinear, behind the shift that a symmetric target needs.

        Codes are smaller to move than floats: where nothing has to recognize the pairs, quantize first.
        """
        x, placed, moves = branch.onnx, branch.placed, list[ir.Node]()
        if self.target.quantized_product != "qdq":
            x, moves = _before_moves(x)
        if placed.shift:
            x = self._writer.node("Sub", x, self._writer.number(float(placed.shift)), site=site)
        scale = self._writer.number(float(placed.scale))
        codes = self._writer.node("QuantizeLinear", x, scale, self._writer.constant(placed.zero_point), site=site)
        return self._moved(site, codes, moves)

    def _handed(self, site: str, branch: Branch) -> ir.Value | None:
        """Codes that are there, or made of such without a float; they move, and rows of them are picked."""
        x, moves = _before_moves(branch.onnx, "Slice")
        codes = self.chain.codes(site, x, branch.placed)
        return None if codes is None else self._moved(site, codes, moves)

    def _moved(self, site: str, codes: ir.Value, moves: list[ir.Node]) -> ir.Value:
        for move in moves:
            attributes = {name: attribute.value for name, attribute in move.attributes.items()}
            codes = self._writer.node(move.op_type, codes, *move.inputs[1:], site=site, **attributes)
        return codes

    def hand_on(self, site: str, codes: ir.Value, placed: Placed) -> None:
        """Remember that a value holds the codes of `site` already; until that site it may only move."""
        self._ready[codes] = site, placed

    def grid(self, site: str, branch: Branch) -> ir.Value:
        """Quantize and dequantize."""
        codes, placed = self.codes(site, branch), branch.placed
        scale = self._writer.number(float(placed.scale))
        return self._writer.node("DequantizeLinear", codes, scale, self._writer.constant(placed.zero_point), site=site)

    def weight(self, layer: str) -> PlacedWeight:
        """How the target stores a layer's weight.

        Raises:
            TargetError: if it cannot.
        """
        return place_weight(f"{layer}.w", self.quantizers[f"{layer}.w"], self.target)

    def weight_codes(self, layer: str, placed: PlacedWeight, start: int = 0, stop: int | None = None) -> ir.Value:
        """Codes (I, O) of the output channels start:stop as an initializer, computed only while it is written."""
        key = (layer, start)
        if key not in self._weights:
            weight = self._writer.params[f"{layer}.weight"][start:stop]
            label = f"{layer}.weight.codes" if stop is None else f"{layer}.weight.codes.{start}"
            kind = ir.DataType.from_numpy(placed.zero_point.dtype)
            shape = (weight.shape[1], weight.shape[0])
            self._weights[key] = self._writer.lazy(label, shape, kind, lambda: placed.codes(weight).T)
        return self._weights[key]

    def bias(self, layer: str, site: str, weight: PlacedWeight, branches: tuple[Branch, ...]) -> ir.Value | None:
        """The bias, moved for the input `site` or as it is; None where there is nothing to add."""
        moved = self.moved_bias(layer, site, weight, branches)
        return self._writer.bias(layer) if moved is None else self._writer.constant(moved)

    def moved_bias(self, layer: str, site: str, weight: PlacedWeight, branches: tuple[Branch, ...]) -> Array | None:
        """b + W c - W n where a symmetric target shifted the input by c and its quantizer by n; None if neither did.

        Source: NoisyQuant (2211.16056), equation 4, for n.
        """
        quantizer, full = self.quantizers[site], self._writer.params[f"{layer}.weight"]
        shift = np.float64(sum(float(branch.placed.shift) for branch in branches))
        if isinstance(quantizer, Shifted):
            moved = shift - quantizer.offset.astype(np.float64)
        elif shift:
            moved = np.full(full.shape[1], shift)
        else:
            return None
        rounded = weight.quantizer(full).astype(np.float64)
        bias: Array = (self._writer.params.get(f"{layer}.bias", np.float64(0)) + rounded @ moved).astype(np.float32)
        return bias


def _key(branch: Branch) -> tuple[ir.Value, float, str, int]:
    placed = branch.placed
    return branch.onnx, float(placed.scale), placed.zero_point.dtype.str, int(placed.zero_point)


def _before_moves(x: ir.Value, *more: str) -> tuple[ir.Value, list[ir.Node]]:
    """Return the value that Reshape and Transpose nodes, and `more`, moved to `x`, and these nodes in order."""
    moves: list[ir.Node] = []
    node = x.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose", *more) and node.inputs[0] is not None:
        moves.insert(0, node)
        x = node.inputs[0]
        node = x.producer()
    return x, moves
