"""What work would take in energy, against sums by hand."""

from __future__ import annotations

import pytest

from vitfold.ops.count import SiteCost
from vitfold.ops.energy import energy_of


def test_products_by_their_type_and_bytes_by_where_they_come_from() -> None:
    costs = (
        SiteCost(site="a", kind="linear", macs=1000, activation_bytes=400, weight_bytes=80, integer=True),
        SiteCost(site="b", kind="linear", macs=100, activation_bytes=40, weight_bytes=0),
    )
    found = energy_of(costs)
    assert found.integer_uj == pytest.approx(1e-6 * 1000 * 0.3)
    assert found.float_uj == pytest.approx(1e-6 * 100 * 4.6)
    assert found.weights_uj == pytest.approx(1e-6 * 80 * 162.5)
    assert found.activations_uj == pytest.approx(1e-6 * 440 * 2.5)
    values = found.to_dict()
    assert values["total_uj"] == pytest.approx(1e-6 * (300 + 460 + 13000 + 1100))
    assert "modelled" in str(values["source"])
