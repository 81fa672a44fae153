"""What a model's work would take in energy, by a published table: a model, not a measurement.

Source: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9: 45 nm, 0.9 V.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from vitfold.ops.count import SiteCost

SOURCE = "Horowitz, ISSCC 2014 (45 nm): modelled, not measured"
INTEGER_MAC_PJ = 0.2 + 0.1
"""A product of 8 bits and a sum of 32."""
FLOAT_MAC_PJ = 3.7 + 0.9
"""A product and a sum of 32 bits."""
WEIGHT_BYTE_PJ = 1300 / 8
"""From DRAM, the lower of the two figures given for 64 bits."""
ACTIVATION_BYTE_PJ = 20 / 8
"""From a cache of 32 KB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Microjoules for one image: of products by their type, of weights read from DRAM and activations from a cache."""

    integer_uj: float
    float_uj: float
    weights_uj: float
    activations_uj: float

    @property
    def total_uj(self) -> float:
        """Everything that is counted."""
        return self.integer_uj + self.float_uj + self.weights_uj + self.activations_uj

    def to_dict(self) -> dict[str, float | str]:
        """Return plain JSON values."""
        return {**asdict(self), "total_uj": self.total_uj, "source": SOURCE}


def energy_of(costs: Iterable[SiteCost]) -> Energy:
    """Sum up what `Count` found."""
    found = tuple(costs)
    integer = sum(cost.macs * cost.products for cost in found if cost.integer)
    floating = sum(cost.macs for cost in found if not cost.integer)
    return Energy(
        integer_uj=1e-6 * INTEGER_MAC_PJ * integer,
        float_uj=1e-6 * FLOAT_MAC_PJ * floating,
        weights_uj=1e-6 * WEIGHT_BYTE_PJ * sum(cost.weight_bytes for cost in found),
        activations_uj=1e-6 * ACTIVATION_BYTE_PJ * sum(cost.activation_bytes for cost in found),
    )
