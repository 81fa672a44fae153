"""Outliers in words, tables and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vitfold.report.sinks import advise, draw_sinks, remedy_cells, remedy_columns


def document(**changes: Any) -> dict[str, Any]:
    blocks = [
        {"block": b, "max_norm": m, "mean_norm": 2.0, "max_prefix_norm": p, "max_patch_norm": m if m > p else 1.0}
        for b, m, p in ((0, 3.0, 1.0), (1, 40.0, 5.0))
    ]

    def row(name: str, norm: float, db: float, sure: float | None = None) -> dict[str, Any]:
        recipe = None if name == "none" else {"remedy": name, "site": "s", "tau": 4.0, "layers": ["a", "b"]}
        return {
            "name": name,
            "max_norm": norm,
            "sqnr_db": db,
            "cosine": 0.9,
            "top1": None,
            "confirmed_db": sure,
            "recipe": recipe,
        }

    base = {
        "blocks": blocks,
        "sensitive_site": "blocks.1.mlp.fc2",
        "sink_site": "blocks.1.mlp.fc2",
        "remedies": [row("none", 40.0, 10.0), row("prefix", 4.0, 20.0)],
        "chosen": "prefix",
        "method": None,
    }
    return {**base, **changes}


def test_the_advice_names_the_option_and_the_gain():
    said = advise(document(), prefix=1)
    assert "Behind block 1 the largest token norm, of a patch, is 20.0 times the mean." in said
    assert "Use --registers prefix: it takes SQNR from 10.0 dB to 20.0 dB under plain ranges" in said


def test_the_advice_says_where_nothing_helps_and_where_the_class_token_is_the_outlier():
    assert "leave --registers out" in advise(document(chosen="none"), prefix=0)
    found = document()
    found["blocks"][1] |= {"max_prefix_norm": 40.0, "max_patch_norm": 3.0}
    assert "registers have nothing to replace" in advise(found, prefix=1)
    found["blocks"] = found["blocks"][:1]
    assert "No block has outliers" in advise(found, prefix=1)


def test_confirmed_figures_come_first():
    found = document(method="repq")
    found["remedies"][0]["confirmed_db"], found["remedies"][1]["confirmed_db"] = 12.0, 13.0
    assert "from 12.0 dB to 13.0 dB under repq" in advise(found, prefix=1)


def test_cells_compare_norms_with_doing_nothing():
    first, second = remedy_cells(document())
    assert first[:3] == ["none", "40.00", "100.00"]
    assert second[:3] == ["prefix *", "4.00", "10.00"]
    assert second[-1] == "tau 4, layers 2"
    assert len(first) == len(remedy_columns())


@pytest.mark.parametrize("count", [1, 3])
def test_sinks_are_framed_where_they_lie(count):
    photos = [np.full((32, 32, 3), 200, np.uint8)] * count
    norms = np.ones((4, 4), np.float32)
    norms[1, 2] = 50.0
    picture = np.asarray(draw_sinks(photos, [norms] * count, title="t"))
    red = (picture[..., 0] > 200) & (picture[..., 1] < 100)
    rows, columns = np.nonzero(red[: 26 + 224, : 8 + 224])
    assert rows.min() >= 26 + 56
    assert rows.max() < 26 + 112
    assert columns.min() >= 8 + 112
    assert columns.max() < 8 + 168
    assert picture.shape[1] == (1 if count == 1 else 2) * (2 * 224 + 24)
