"""What a graph's work comes to: how much of it is integer, the bytes that it moves and the energy of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vitfold.ops.count import IntegerWork, SiteCost, integer_work
from vitfold.ops.energy import Energy, energy_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Multiply-accumulates of one image, bytes of weights and activations, modelled energy.

    `integer` is None where nothing is quantized.
    """

    macs: int
    bytes: int
    integer: IntegerWork | None
    energy: Energy

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        integer = self.integer
        return {
            "integer": None
            if integer is None
            else {"macs_ratio": integer.integer_ratio, "dequantized_operands": integer.dequantized_operands},
            "macs": self.macs,
            "bytes": self.bytes,
            "energy": self.energy.to_dict(),
        }


def work_of(costs: Iterable[SiteCost], *, quantized: bool) -> Work:
    """Sum up what `Count` found of a graph as its target executes it."""
    found = tuple(costs)
    return Work(
        macs=sum(cost.macs for cost in found),
        bytes=sum(cost.activation_bytes + cost.weight_bytes for cost in found),
        integer=integer_work(found) if quantized else None,
        energy=energy_of(found),
    )
