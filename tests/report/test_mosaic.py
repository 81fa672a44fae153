"""Pictures of merged tokens against a slow drawing."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from vitfold.report.mosaic import DARK, LIGHT, Traced, draw_groups, rgb_from_pixels, strips


def photo(side: int = 224, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)


def test_nothing_merged_leaves_the_photo() -> None:
    picture = photo()
    np.testing.assert_array_equal(draw_groups(picture, np.arange(16).reshape(4, 4)), picture)


def test_merged_patches_have_their_mean_colour_and_a_border() -> None:
    picture, groups = photo(), np.arange(16).reshape(4, 4)
    groups[0, 0] = groups[0, 1] = groups[3, 3] = 40
    drawn = draw_groups(picture, groups)
    members = np.concatenate([picture[:56, :112].reshape(-1, 3), picture[168:, 168:].reshape(-1, 3)])
    mean = np.round(members.mean(0))
    for inside in (drawn[5, 5], drawn[5, 60], drawn[200, 200], drawn[5, 55]):
        np.testing.assert_array_equal(inside, mean)
    borders = {tuple(LIGHT), tuple(DARK)}
    assert tuple(drawn[55, 20]) in borders, "below the group"
    assert tuple(drawn[20, 111]) in borders, "right of it"
    assert tuple(drawn[167, 200]) in borders, "above its other part"
    np.testing.assert_array_equal(drawn[60:160, 60:160], picture[60:160, 60:160])


def test_borders_stand_out_from_what_lies_below() -> None:
    for shade, border in ((250, DARK), (20, LIGHT)):
        drawn = draw_groups(np.full((224, 224, 3), shade, np.uint8), np.array([[0, 0], [1, 2]]))
        assert tuple(drawn[111, 50]) == border


def test_normalization_is_undone() -> None:
    picture = photo(8)[None]
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    pixels = ((picture / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_array_equal(rgb_from_pixels(pixels, mean, std), picture)


def test_strips_show_blocks_that_merge() -> None:
    groups = np.stack([np.arange(16)[None], np.arange(16)[None], np.minimum(np.arange(16), 14)[None]])
    traced = Traced(
        title="x", names=("a.jpg",), photos=photo(56)[None], groups=groups, grid=(4, 4), tokens=(17, 17, 17, 16),
        flops=(10**9, 10**9, 2 * 10**9),
    )  # fmt: skip
    (strip,) = strips(traced)
    assert [(tile.title, *tile.lines) for tile in strip.tiles] == [
        ("the model's input", "17 tokens"),
        ("block 2", "16 tokens", "2.00 GFLOPs"),
    ]
    picture = Image.open(io.BytesIO(base64.b64decode(strip.tiles[1].url.partition(",")[2])))
    assert picture.size == (224, 224), "small inputs are drawn larger"
    with pytest.raises(ValueError, match="do not fit"):
        Traced(title="x", names=(), photos=photo(56)[None], groups=groups, grid=(4, 4), tokens=(), flops=())
