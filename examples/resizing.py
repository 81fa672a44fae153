"""How far PyTorch's resizing is from Pillow's, in codes of 8 bits, and what that does to a model's answers.

Usage: python examples/resizing.py IMAGES OUT.json, for a folder of images, of which 120 are drawn. `bytes` is PyTorch's
kernel for uint8 on CPUs, `floats` what it does in float32, rounded and clamped behind both axes, which is all that it
has on GPUs. Pillow rounds to 8 bits between the axes, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitfold.architectures.programs import forward
from vitfold.bench.environment import environment
from vitfold.images import find_images
from vitfold.model import Model, Preprocess
from vitfold.ops.run import Run
from vitfold.recipe import MergeRecipe
from vitfold.sources import load_source

WAYS = ("bytes", "floats")
IMAGES = 120
BATCH = 32


def main() -> None:
    """Measure each way for the usual kinds of preprocessing, and the answers of the demo's model."""
    paths, output = find_images(sys.argv[1]).sample(IMAGES, seed=0).paths, Path(sys.argv[2])
    images = [Image.open(path).convert("RGB") for path in paths]
    demo = load_source("demo").model
    usual = replace(demo.preprocess, resize="shortest", resize_size=(248, 248), crop_size=(224, 224))
    rows = [
        {
            "resize": kind.resize,
            "size": list(kind.resize_size),
            "interpolation": name,
            "way": way,
            **compared(images, one, way),
        }
        for kind in (usual, demo.preprocess)
        for name in ("bilinear", "bicubic")
        for one in (replace(kind, interpolation=name),)
        for way in WAYS
    ]
    answers = [{"way": way, **answered(demo, images, way)} for way in WAYS]
    found = {"images": len(images), "rows": rows, "answers": answers, "environment": environment()}
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"rows": rows, "answers": answers}, indent=1))


def resized(image: Image.Image, preprocess: Preprocess, way: str) -> Image.Image:
    """Return the image in the size that preprocessing asks for, by PyTorch."""
    shape = preprocess.resized_shape(image.height, image.width)
    if shape == (image.height, image.width):
        return image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    given = pixels if way == "bytes" else pixels.float()
    made = torch.nn.functional.interpolate(given, shape, mode=preprocess.interpolation, antialias=True)
    return Image.fromarray(made.round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy())


def compared(images: Sequence[Image.Image], preprocess: Preprocess, way: str) -> Mapping[str, Any]:
    """Return how many bytes equal Pillow's, how many are one code from them, and the largest difference."""
    names = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    counts = np.zeros(256, np.int64)
    for image in images:
        height, width = preprocess.resized_shape(image.height, image.width)
        expected = np.asarray(image.resize((width, height), names[preprocess.interpolation]), np.int16)
        apart = np.abs(np.asarray(resized(image, preprocess, way), np.int16) - expected)
        counts += np.bincount(apart.reshape(-1), minlength=256)
    whole = int(counts.sum())
    return {
        "equal_ratio": int(counts[0]) / whole,
        "within_one_ratio": int(counts[:2].sum()) / whole,
        "largest": int(np.flatnonzero(counts)[-1]),
    }


def answered(model: Model, images: Sequence[Image.Image], way: str) -> Mapping[str, Any]:
    """Return how many answers differ from those for images that Pillow resized, and how far outputs are."""
    ours = [resized(image, model.preprocess, way) for image in images]
    one, other = (logits(model, given) for given in (images, ours))
    error = np.abs(one - other).max(axis=1) / np.abs(one).max(axis=1)
    return {
        "other_answers": int((one.argmax(1) != other.argmax(1)).sum()),
        "median_relative_error": float(np.median(error)),
        "max_relative_error": float(error.max()),
    }


def logits(model: Model, images: Sequence[Image.Image]) -> np.ndarray:
    """Return the outputs (B, C) for images; those of the right size are not resized again."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            pixels = np.stack([model.preprocess(image) for image in images[start : start + BATCH]])
            made = forward(Run(model.params), model.spec, MergeRecipe(r=()), torch.from_numpy(pixels))
            found.append(made.numpy())
    return np.concatenate(found)


if __name__ == "__main__":
    main()
