"""Preprocessing: sizes, crops, pixel formats and values, against hand calculations and Pillow."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vitfold.errors import ImageError, SourceError
from vitfold.model import Preprocess, preprocess_from_dict


def preprocess(**overrides: object) -> Preprocess:
    values = {
        "resize": "shortest",
        "resize_size": (32, 32),
        "crop_size": (24, 24),
        "interpolation": "bicubic",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.5, 0.25, 0.2),
    }
    return Preprocess(**{**values, **overrides})


PLAIN = {"resize": "none", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("resize", "size", "image", "expected"),
    [
        ("shortest", (32, 32), (100, 50), (64, 32)),
        ("shortest", (32, 32), (50, 100), (32, 64)),
        ("shortest", (32, 32), (50, 50), (32, 32)),
        ("shortest", (32, 32), (333, 500), (32, 48)),  # 32 * 500 / 333 = 48.05, truncated
        ("shortest", (256, 256), (375, 500), (256, 341)),  # 341.33
        ("shortest", (248, 248), (500, 333), (372, 248)),  # 372.37
        ("shortest", (32, 32), (36, 100), (32, 88)),  # 88.89
        ("shortest", (32, 32), (3, 101), (32, 1077)),  # 1077.33
        ("cover", (24, 40), (100, 100), (40, 40)),
        ("cover", (40, 24), (100, 100), (40, 40)),
        ("cover", (32, 32), (333, 500), (32, 48)),
        ("cover", (248, 248), (375, 500), (248, 331)),  # 330.67, rounded
        ("exact", (24, 40), (100, 7), (24, 40)),
        ("none", (24, 40), (100, 7), (100, 7)),
    ],
)
def test_resized_shape(resize, size, image, expected):
    assert preprocess(resize=resize, resize_size=size).resized_shape(*image) == expected


@pytest.mark.parametrize("resize", ["shortest", "cover", "exact", "none"])
@pytest.mark.parametrize("image", [(100, 50), (50, 100), (24, 24), (10, 200), (1, 1)])
@pytest.mark.parametrize("crop", [(24, 24), (16, 40)])
def test_the_output_has_the_crop_size_whatever_comes_in(resize, image, crop):
    found = preprocess(resize=resize, crop_size=crop)(noise(*image))
    assert found.shape == (3, *crop)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert np.isfinite(found).all()


def test_values_are_scaled_normalized_and_channels_first():
    image = Image.new("RGB", (24, 24), (255, 51, 0))
    found = preprocess(resize="none")(image)
    np.testing.assert_allclose(found[:, 5, 7], [(1 - 0.5) / 0.5, (0.2 - 0.4) / 0.25, (0 - 0.3) / 0.2], atol=1e-6)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_resizing_is_that_of_pillow(interpolation):
    image = noise(70, 50)
    found = preprocess(**{**PLAIN, "resize": "exact", "interpolation": interpolation, "crop_size": (32, 32)})(image)
    expected = np.asarray(image.resize((32, 32), getattr(Image.Resampling, interpolation.upper())))
    np.testing.assert_array_equal(np.rint(found * 255).astype(np.uint8).transpose(1, 2, 0), expected)


def test_interpolations_differ():
    image = noise(70, 50)
    outputs = [preprocess(interpolation=kind)(image) for kind in ("nearest", "bilinear", "bicubic", "lanczos")]
    assert len({output.tobytes() for output in outputs}) == 4


@pytest.mark.parametrize(("height", "top"), [(8, 0), (9, 0), (10, 1), (11, 2), (12, 2), (13, 2)])
def test_the_crop_is_central_with_halves_rounded_to_even(height, top):
    # Row y has the value y; torchvision's rule: round((height - 8) / 2).
    image = Image.fromarray(np.arange(height, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 3), np.uint8))
    found = preprocess(**{**PLAIN, "crop_size": (8, 8)})(image)
    assert np.rint(found[0, :, 0] * 255).tolist() == list(range(top, top + 8))


@pytest.mark.parametrize(("size", "before"), [((4, 8), (2, 0)), ((5, 8), (1, 0)), ((8, 3), (0, 2)), ((2, 2), (3, 3))])
def test_small_images_are_padded_with_black(size, before):
    image = Image.new("RGB", (size[1], size[0]), (255, 255, 255))
    found = preprocess(**{**PLAIN, "crop_size": (8, 8)})(image)
    expected = np.zeros((8, 8))
    expected[before[0] : before[0] + size[0], before[1] : before[1] + size[1]] = 1
    for channel in found:
        np.testing.assert_array_equal(channel, expected)


def test_an_image_smaller_one_way_and_larger_the_other_is_padded_and_cropped():
    image = Image.new("RGB", (20, 4), (255, 255, 255))
    found = preprocess(**{**PLAIN, "crop_size": (8, 8)})(image)
    assert found[0].sum(1).tolist() == [0, 0, 8, 8, 8, 8, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "CMYK", "1", "YCbCr", "HSV", "RGBX"])
def test_other_formats_become_rgb_as_pillow_does(mode):
    image = noise(24, 24, mode)
    found = preprocess(**PLAIN)(image)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.rint(found * 255).astype(np.uint8).transpose(1, 2, 0), expected)


def test_transparency_is_dropped_and_not_blended():
    image = Image.new("RGBA", (24, 24), (200, 100, 50, 0))
    assert np.rint(preprocess(**PLAIN)(image)[:, 0, 0] * 255).tolist() == [200, 100, 50]


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_grey_is_scaled_and_not_saturated(order):
    values = np.linspace(0, 65535, 24 * 24).reshape(24, 24).astype(order)
    image = Image.frombytes("I;16" if order == "<u2" else "I;16B", (24, 24), values.tobytes())
    found = preprocess(**PLAIN)(image)
    np.testing.assert_allclose(found, np.broadcast_to(values / 65535, found.shape), atol=1 / 255)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_defined_white_are_refused(mode):
    with pytest.raises(ImageError, match=f"pixels of mode {mode} have no defined white"):
        preprocess()(Image.new(mode, (24, 24)))


def test_the_caller_s_image_is_not_changed():
    image = noise(50, 40, "RGBA")
    before = image.tobytes()
    preprocess()(image)
    assert (image.mode, image.size, image.tobytes()) == ("RGBA", (40, 50), before)


def test_survives_json():
    values = preprocess(resize="cover", resize_size=(24, 40))
    assert preprocess_from_dict(json.loads(json.dumps(values.to_dict()))) == values


def test_unknown_and_missing_keys_are_refused():
    values = preprocess().to_dict()
    with pytest.raises(SourceError, match=r"unknown preprocessing key 'crop' \(did you mean crop_size.*upgrade"):
        preprocess_from_dict(values | {"crop": 3})
    del values["std"]
    with pytest.raises(SourceError, match="preprocessing key 'std' is missing"):
        preprocess_from_dict(values)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"resize_size": (0, 32)}, "sizes must be positive"),
        ({"crop_size": (24, -1)}, "sizes must be positive"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive"),
    ],
)
def test_values_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(SourceError, match=message):
        replace(preprocess(), **overrides)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(("key", "word"), [("resize", "stretch"), ("interpolation", "cubic")])
def test_unknown_words_in_a_file_are_refused(key, word):
    with pytest.raises(SourceError, match=f"unsupported .* '{word}'; supported: "):
        preprocess_from_dict(preprocess().to_dict() | {key: word})
