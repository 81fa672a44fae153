"""Our `Preprocess` against each zoo's own transform, on synthetic images of odd sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torchvision.transforms as tvt
import transformers as hf
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data import create_transform
from torchvision.transforms._presets import ImageClassification
from zoo import tiny_hf, tiny_timm

from vitfold.errors import SourceError
from vitfold.model import ViTSpec
from vitfold.sources import adapt
from vitfold.sources import torchvision as tv_source
from vitfold.sources.open_clip import preprocess_from_cfg
from vitfold.sources.timm import labels_from_timm, preprocess_from_data_config
from vitfold.sources.transformers_preprocess import default_processor, preprocess_from_processor

SIZES = [(97, 131), (131, 97), (64, 64), (33, 250), (40, 47)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image(height: int, width: int) -> Image.Image:
    """A smooth wave with noise on it: resampling errors show."""
    draw = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width]
    wave = 127 + 90 * np.sin(y / 7)[..., None] * np.cos(x / np.array([5, 9, 13])[:, None, None]).transpose(1, 2, 0)
    return Image.fromarray(np.clip(wave + draw.normal(0, 20, wave.shape), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("input_size", "crop_pct", "crop_mode", "interpolation"),
    [
        ((3, 56, 56), 0.875, "center", "bicubic"),
        ((3, 56, 56), 0.9, "center", "bilinear"),
        ((3, 56, 56), 1.0, "squash", "bicubic"),
        ((3, 56, 56), 0.95, "squash", "bicubic"),
        ((3, 48, 64), 0.9, "center", "bicubic"),
    ],
)
def test_timm(size, input_size, crop_pct, crop_mode, interpolation):
    config = {
        "input_size": input_size, "crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation,
        "mean": MEAN, "std": STD,
    }  # fmt: skip
    theirs = create_transform(**config)(image(*size)).numpy()
    np.testing.assert_allclose(preprocess_from_data_config(config)(image(*size)), theirs, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_torchvision(size):
    preset = ImageClassification(crop_size=56, resize_size=64)
    ours = tv_source.preprocess_from_preset(preset, (56, 56))(image(*size))
    np.testing.assert_allclose(ours, preset(image(*size)).numpy(), atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_open_clip(size, resize_mode, interpolation):
    config = PreprocessCfg(size=56, resize_mode=resize_mode, interpolation=interpolation)
    theirs = image_transform_v2(config, is_train=False)(image(*size)).numpy()
    np.testing.assert_allclose(preprocess_from_cfg(config)(image(*size)), theirs, atol=1e-6)


# transformers resizes uint8 tensors in fixed point, Pillow in its own: single pixels differ by a grey level or two.
GREY_LEVELS = 2.01
HF = {
    "vit": ("ViTImageProcessor", {"size": {"height": 56, "width": 56}}),
    "deit": ("DeiTImageProcessor", {"size": {"height": 64, "width": 64}, "crop_size": {"height": 56, "width": 56}}),
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}),
    "siglip": ("SiglipImageProcessor", {"size": {"height": 56, "width": 56}}),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}),
}


# Long sides whose surplus over the crop is even: see the test below for the odd ones.
@pytest.mark.parametrize("size", [(96, 120), (64, 64), (120, 60)])
@pytest.mark.parametrize("family", HF)
def test_transformers(size, family):
    name, options = HF[family]
    processor = getattr(hf, name)(**options)
    theirs = np.asarray(processor(images=image(*size), return_tensors="np")["pixel_values"][0])
    ours = preprocess_from_processor(processor.to_dict(), None)
    tolerance = GREY_LEVELS / 255 / min(ours.std)
    np.testing.assert_allclose(ours(image(*size)), theirs, atol=tolerance)
    assert np.abs(ours(image(*size)) - theirs).mean() < 0.2 * tolerance


def test_transformers_crop_of_an_odd_surplus():
    processor = hf.CLIPImageProcessor(**HF["clip"][1])  # 97 x 131 becomes 56 x 75: offset 9, where torchvision has 10
    theirs = np.asarray(processor(images=image(97, 131), return_tensors="np")["pixel_values"][0])
    ours = preprocess_from_processor(processor.to_dict(), None)
    np.testing.assert_allclose(ours(image(97, 131)), theirs, atol=GREY_LEVELS / 255 / min(ours.std))


def test_transformers_defaults_follow_the_family():
    made = {f: preprocess_from_processor(default_processor(f, (224, 224)), (224, 224)) for f in HF}
    assert {f: (p.resize, p.resize_size[0], p.crop_size[0], p.interpolation) for f, p in made.items()} == {
        "vit": ("exact", 224, 224, "bilinear"),
        "deit": ("exact", 256, 224, "bicubic"),
        "clip": ("shortest", 224, 224, "bicubic"),
        "siglip": ("exact", 224, 224, "bicubic"),
        "dinov2": ("shortest", 256, 224, "bicubic"),
    }


def test_old_transformers_files_have_integer_sizes():
    clip = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "do_center_crop": True}
    vit = {"feature_extractor_type": "ViTFeatureExtractor", "size": 224}
    assert preprocess_from_processor(clip, None).resize == "shortest"
    assert preprocess_from_processor(vit, (384, 384)).resize_size == (384, 384)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"size": {"shortest_edge": 224}}, "without cropping"),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "longest edge"),
        ({"size": 224, "rescale_factor": 1 / 127.5}, "rescales"),
        ({"size": 224, "do_pad": True}, "pads"),
        ({"size": 224, "resample": 4}, "resample"),
        ({"size": {"max_height": 2}}, "height and width"),
    ],
)
def test_processors_that_do_something_else_are_refused(values, match):
    with pytest.raises(SourceError, match=match):
        preprocess_from_processor(values, None)


def test_padding_transforms_are_refused():
    with pytest.raises(SourceError, match="'border'"):
        preprocess_from_data_config({"input_size": (3, 8, 8), "crop_pct": 1.0, "crop_mode": "border"})
    with pytest.raises(SourceError, match="longest"):
        preprocess_from_cfg(PreprocessCfg(size=8, resize_mode="longest"))


def test_labels_come_with_pretrained_heads_only():
    module = tiny_timm(num_classes=1000)
    module.pretrained_cfg = {"num_classes": 1000, "architecture": "vit_tiny_patch16_224"}
    labels = labels_from_timm(module, 1000)
    assert labels is not None
    assert labels[0].startswith("tench")
    assert labels_from_timm(tiny_timm(num_classes=1000), 1000) is None
    module.pretrained_cfg = {"num_classes": 2, "label_names": ["yes", "no"]}
    assert labels_from_timm(module, 2) == ("yes", "no")


def test_placeholder_labels_are_no_labels():
    module = tiny_hf(hf.ViTForImageClassification, hf.ViTConfig, num_labels=3)
    assert adapt(module).labels is None
    assert adapt(module, labels=("a", "b", "c")).labels == ("a", "b", "c")


def test_torchvision_weights_say_preset_and_labels():
    from torchvision.models import ViT_B_16_Weights

    weights = ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1
    spec = ViTSpec(image_size=(384, 384), patch_size=(16, 16), embed_dim=32, num_layers=1, num_heads=2, head_dim=16,
                   mlp_dim=8,
                   outputs=1000)  # fmt: skip
    preprocess, labels = tv_source.describe(tiny_timm(), spec, {"weights": weights})
    assert (preprocess.resize_size, preprocess.crop_size, preprocess.interpolation) == (
        (384, 384),
        (384, 384),
        "bicubic",
    )
    assert labels is not None
    assert labels[0] == "tench"
    theirs = tvt.Compose([weights.transforms()])(image(97, 131)).numpy()
    np.testing.assert_allclose(preprocess(image(97, 131)), theirs, atol=1e-6)
