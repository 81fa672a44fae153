"""How many images a search for remedies goes through: as many as minutes allow, the same ones when it goes on."""

from __future__ import annotations

import pytest

from vitfold.registers.sampling import SECONDS, affordable, estimated_seconds, sample_size


@pytest.mark.parametrize(
    ("seconds", "labelled", "count"),
    [(1e-6, False, 128), (0.03, False, 128), (0.05, False, 64), (0.2, False, 8), (60.0, False, 8), (0.05, True, 16)],
)
def test_slow_models_get_fewer_images(seconds, labelled, count):
    assert affordable(400, seconds, labelled=labelled) == count
    assert affordable(5, seconds, labelled=labelled) == 5
    assert count == 8 or estimated_seconds(count, seconds, labelled=labelled) <= SECONDS


def test_a_search_that_goes_on_keeps_its_images(tiny_model, photos, own_cache):
    first = sample_size(tiny_model(), photos)
    assert first == len(photos.paths)
    kept = list(own_cache.rglob("*.json"))
    assert len(kept) == 1
    kept[0].write_text("3")
    assert sample_size(tiny_model(), photos) == 3
