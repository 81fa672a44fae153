"""Half precision: every value rounded, an overflow found where it happens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quantizing import quantized
from vitfold import pipeline
from vitfold.architectures.programs import forward
from vitfold.errors import EngineError, TargetError
from vitfold.ops.half import LARGEST, Half
from vitfold.ops.run import Run
from vitfold.pipeline.verifying import IMAGES
from vitfold.recipe import MergeRecipe


def outputs(ops, model, images, r=()):
    with torch.inference_mode():
        return forward(ops, model.spec, MergeRecipe(r=r), torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("feature", [{}, {"mlp": "swiglu"}, {"pool": "map", "map_heads": 2, "map_mlp_width": 24}])
@pytest.mark.parametrize("r", [(), (5, 3)])
def test_every_output_is_a_half_and_near_the_reference(tiny_model, random_images, feature, r):
    model = tiny_model(outputs=40, **feature)
    images = random_images(model.spec, 8)
    ops = Half(model.params, {})
    found, expected = outputs(ops, model, images, r), outputs(Run(model.params), model, images, r)
    np.testing.assert_array_equal(found, found.astype(np.float16).astype(np.float32))
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert 1e-5 < np.median(errors) < 5e-3
    assert ops.overflow is None
    assert 1.0 < ops.peak[0] < LARGEST


@pytest.mark.parametrize("quantize", [False, True])
def test_an_overflow_is_found_at_its_layer(tiny_model, random_images, quantize):
    model = tiny_model()
    images = random_images(model.spec, 2)
    params = {**model.params, "blocks.1.mlp.fc1.weight": model.params["blocks.1.mlp.fc1.weight"] * np.float32(3e4)}
    params["blocks.1.mlp.fc2.weight"] = model.params["blocks.1.mlp.fc2.weight"] * np.float32(1 / 3e4)
    model = model.with_params(model.spec, params)
    quantizers = {}
    if quantize:
        model, quantizers = quantized(model, images, attention_zero_points=False)
    ops = Half(model.params, quantizers)
    found = outputs(ops, model, images)
    assert ops.overflow is not None
    value, site = ops.overflow
    assert value > LARGEST
    assert site.startswith("blocks.1.mlp.fc1") or site == "blocks.1.mlp.act"
    assert not np.isfinite(found).all()
    assert np.isfinite(outputs(Run(model.params), model, images)).all(), "single precision holds it"


def hot_model(tiny_model):
    """Single precision runs it, half precision overflows in the second block's MLP."""
    model = tiny_model()
    params = dict(model.params)
    params["blocks.1.mlp.fc1.weight"] = params["blocks.1.mlp.fc1.weight"] * np.float32(3e4)
    params["blocks.1.mlp.fc2.weight"] = params["blocks.1.mlp.fc2.weight"] * np.float32(1 / 3e4)
    return model.with_params(model.spec, params)


@pytest.mark.parametrize("target", ["tensorrt-fp16", "tensorrt-int8"])
def test_a_graph_that_overflows_never_becomes_a_bundle(tiny_model, photos, tmp_path, target):
    quant = None if target == "tensorrt-fp16" else "w8a8"
    folded = pipeline.optimize(hot_model(tiny_model), target=target, quant=quant)
    if folded.needs_calibration:
        folded = pipeline.calibrate_plan(folded, photos)
    with pytest.raises((EngineError, TargetError), match=r"half precision .*blocks\.1\.mlp.*--target portable"):
        pipeline.save(folded, tmp_path / "a.fold", images=photos)
    assert not (tmp_path / "a.fold").exists()
    bundle = pipeline.save(pipeline.optimize(hot_model(tiny_model), target="portable"), tmp_path / "b.fold")
    assert bundle.manifest.verified["median_relative_error"] < 1e-4


def test_one_image_of_many_that_overflows_is_enough(tiny_model, tmp_path):
    """The four images that are verified hold, one of those that are compared does not: it may not become a bundle."""
    from PIL import Image

    from vitfold.images import find_images

    model = tiny_model()
    params = dict(model.params)
    # A pixel difference that only the last image has: stripes, which the others lack.
    weight = np.zeros_like(params["patch_embed.weight"])
    weight[:, :, :, 0::2], weight[:, :, :, 1::2] = 4e3, -4e3
    params["patch_embed.weight"] = weight
    model = model.with_params(model.spec, params)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(9):
        Image.new("RGB", (32, 32), (25 * i,) * 3).save(folder / f"{i}.png")
    images = find_images(folder)
    folded = pipeline.optimize(model, target="tensorrt-fp16")
    assert pipeline.save(folded, tmp_path / "a.fold", images=images).manifest.verified["largest_value"] < LARGEST
    left = next(path for path in images.paths if path not in images.first(IMAGES).paths)
    striped = np.full((32, 32, 3), 255, np.uint8)
    striped[:, 1::2] = 0
    Image.fromarray(striped).save(left)
    with pytest.raises(EngineError, match="half precision overflows at patch_embed"):
        pipeline.save(folded, tmp_path / "b.fold", images=find_images(folder))


def test_the_largest_value_stands_in_the_manifest(tiny_model, photos, tmp_path):
    bundle = pipeline.save(pipeline.optimize(tiny_model(), target="tensorrt-fp16"), tmp_path / "a.fold", images=photos)
    verified = bundle.manifest.verified
    assert math.isfinite(verified["largest_value"])
    assert 0 < verified["largest_value"] < LARGEST
    assert isinstance(verified["largest_site"], str)
    assert 0 < verified["rounding_relative_error"] < 0.05
