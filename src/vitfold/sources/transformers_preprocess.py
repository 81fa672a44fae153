"""What transformers' image processor files say, as `Preprocess`.

Runs no processor.
"""

from __future__ import annotations

import math
import re
from typing import Any

from vitfold.errors import SourceError
from vitfold.model import Preprocess
from vitfold.sources.reader import refuse

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Family -> (resize keeps the aspect, resize / crop, resample, mean, std), as the families' reference processors do.
DEFAULTS = {
    "vit": (False, 1.0, 2, HALF, HALF),
    "deit": (False, 256 / 224, 3, IMAGENET_MEAN, IMAGENET_STD),
    "dinov2": (True, 256 / 224, 3, IMAGENET_MEAN, IMAGENET_STD),
    "clip": (True, 1.0, 3, CLIP_MEAN, CLIP_STD),
    "siglip": (False, 1.0, 3, HALF, HALF),
}


def read_processor(name: str) -> dict[str, Any] | None:
    """Return the processor file beside a model, or None where it has none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return None
    return dict(values)


def default_processor(family: str, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return a processor file for a family, for a model that came without one."""
    keep_aspect, ratio, resample, mean, std = DEFAULTS[family]
    height, width = (round(n * ratio) for n in image_size)
    return {
        "size": {"shortest_edge": min(height, width)} if keep_aspect else {"height": height, "width": width},
        "crop_size": {"height": image_size[0], "width": image_size[1]},
        "do_center_crop": keep_aspect or ratio != 1.0,
        "resample": resample,
        "image_mean": list(mean),
        "image_std": list(std),
    }


# Processors that do what their file's keys say and nothing else; "" for a file that does not name one.
KINDS = ("", "ViT", "DeiT", "Bit", "CLIP", "Siglip", "Beit", "MobileNetV1", "MobileNetV2", "Pvt")
_READ = frozenset({
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_pad", "default_to_square", "image_processor_type", "feature_extractor_type",
})  # fmt: skip
# Keys that change nothing of what a model is given: images are always RGB here, labels are no segmentations.
_HARMLESS = frozenset({
    "do_convert_rgb", "do_reduce_labels", "reduce_labels", "data_format", "input_data_format", "return_tensors",
    "processor_class", "_processor_class", "_valid_processor_keys", "model_input_names", "device", "disable_grouping",
    "use_fast", "image_seq_length", "_name_or_path", "_commit_hash", "patch_size", "num_channels",
})  # fmt: skip


def _check_keys(values: dict[str, Any], kind: str) -> None:
    """Refuse what would be left undone: a processor of another kind, or a key that nobody here reads."""
    stem = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)
    if stem not in KINDS:
        raise refuse(f"the processor {kind}", "use a model with one of: " + ", ".join(name for name in KINDS if name))
    others = sorted(name for name, value in values.items() if value and name not in _READ | _HARMLESS)
    if others:
        name = others[0]
        raise refuse(
            f"a processor with {name} = {values[name]!r}",
            "set it to false in preprocessor_config.json if the model was not trained so",
        )


def preprocess_from_processor(values: dict[str, Any], image_size: tuple[int, int] | None) -> Preprocess:
    """Return a processor file as data, scaled to the model's `image_size` where the file's differs.

    Raises:
        SourceError: if the file asks for something that `Preprocess` does not do, such as padding.
    """
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
    _check_keys(values, kind)
    resize, size = _resize(values, kind)
    crop = size
    if values.get("do_center_crop", False):
        crop = _size(values.get("crop_size", 224))
    elif resize == "shortest":
        raise refuse("a processor that keeps the aspect without cropping", "set do_center_crop in its file")
    if image_size is not None and crop != image_size:
        size = (round(size[0] * image_size[0] / crop[0]), round(size[1] * image_size[1] / crop[1]))
        crop = image_size
        if resize == "shortest" and crop[0] != crop[1]:
            resize = "cover"  # the short side says nothing of an oblong crop
    if values.get("do_pad"):
        raise refuse("a processor that pads", "set do_pad to false in its file")
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    if not math.isclose(factor, 1 / 255, rel_tol=1e-4):
        raise refuse(f"a processor that rescales by {factor:g}", "use one that rescales by 1/255")
    normalize = values.get("do_normalize", True)
    mean = values.get("image_mean", HALF) if normalize else (0.0, 0.0, 0.0)
    std = values.get("image_std", HALF) if normalize else (1.0, 1.0, 1.0)
    resample = values.get("resample", 2)
    if resample not in RESAMPLE:
        raise refuse(f"a processor with resample {resample!r}", f"known: {RESAMPLE}")
    return Preprocess(
        resize=resize,  # type: ignore[arg-type]
        resize_size=size,
        crop_size=crop,
        interpolation=RESAMPLE[resample],  # type: ignore[arg-type]
        mean=_triple(mean),
        std=_triple(std),
        crop_offset="floor",
        exif="apply",
    )


def _resize(values: dict[str, Any], kind: str) -> tuple[str, tuple[int, int]]:
    if not values.get("do_resize", True):
        return "none", _size(values.get("crop_size", 224))
    size = values.get("size", 224)
    if isinstance(size, dict) and "shortest_edge" in size:
        if size.get("longest_edge"):
            raise refuse("a processor that bounds the longest edge", "use one with a crop")
        edge = int(size["shortest_edge"])
        return "shortest", (edge, edge)
    square = values.get("default_to_square", not any(stem in kind for stem in ("CLIP", "Bit")))
    if isinstance(size, int) and not square:
        return "shortest", (size, size)
    return "exact", _size(size)


def _size(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, dict) and {"height", "width"} <= set(value):
        return int(value["height"]), int(value["width"])
    raise SourceError(f"preprocessor_config.json has a size {value!r}; it must be an integer or have height and width")


def _triple(value: Any) -> tuple[float, float, float]:
    values = [value] * 3 if isinstance(value, int | float) else list(value)
    if len(values) != 3:
        raise SourceError(f"preprocessor_config.json has {len(values)} means or deviations; RGB needs three")
    return float(values[0]), float(values[1]), float(values[2])
