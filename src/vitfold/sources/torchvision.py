"""Vision Transformers of the package torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitfold.errors import SourceError, nearest
from vitfold.model import Architecture, Preprocess, ViTSpec
from vitfold.model.spec import Activation
from vitfold.sources.failures import load_error
from vitfold.sources.reader import (
    PLAIN,
    Built,
    Facts,
    Reader,
    Translation,
    activation_name,
    class_name,
    refuse,
    same,
)

CLASSES = ("torchvision.VisionTransformer", "torchvision.Encoder", "torchvision.EncoderBlock", "torchvision.MLPBlock")


def build(
    name: str,
    *,
    num_classes: int | None,
    image_size: int | tuple[int, int] | None,
    pretrained: bool,
    known: bool = False,
) -> Built:
    """Create a model of torchvision's registry; NAME/WEIGHTS picks other than the default weights."""
    from torchvision import models

    arch, _, tag = name.partition("/")
    if arch not in models.list_models():
        raise SourceError(f"torchvision has no model {arch!r}; {nearest(arch, models.list_models())}")
    if known:
        with torch.device("meta"):
            Reader(models.get_model(arch, weights=None), classes=CLASSES)
    options: dict[str, Any] = {}
    if isinstance(image_size, tuple):
        height, width = image_size
        raise SourceError(
            f"torchvision's models take square images, and {height}x{width} was asked for; give one side, or take the "
            "architecture from timm"
        )
    if image_size is not None:
        options["image_size"] = image_size
    if not pretrained:
        if num_classes is not None:
            options["num_classes"] = num_classes
        module = models.get_model(arch, weights=None, **options)
        if hasattr(module, "heads"):
            nn.init.trunc_normal_(module.heads.head.weight, std=0.02)  # its own init is zero: logits say nothing
        return module, {}
    held = models.get_model_weights(arch)
    if tag and tag not in held.__members__:
        raise SourceError(f"torchvision has no weights {tag!r} for {arch}; {nearest(tag, held.__members__)}")
    weights = held[tag] if tag else held.DEFAULT
    classes = len(weights.meta["categories"])
    if num_classes not in (None, classes):
        raise SourceError(
            f"the pretrained head of torchvision:{name} has {classes} classes, {num_classes} were asked for, and a new "
            "head would be random; leave out --num-classes, or use --weights random"
        )
    return _pretrained(arch, weights, image_size), {"weights": weights}


def _pretrained(arch: str, weights: Any, image_size: int | None) -> nn.Module:
    from torchvision import models
    from torchvision.models.vision_transformer import interpolate_embeddings

    try:
        state = weights.get_state_dict(check_hash=True)
    except Exception as error:  # urllib, ssl and the hash check raise unrelated types
        raise load_error(f"torchvision:{arch}", error) from error
    size = image_size or int(weights.meta["min_size"][0])
    module: Any = models.get_model(arch, weights=None, image_size=size, num_classes=len(weights.meta["categories"]))
    module.load_state_dict(interpolate_embeddings(size, module.patch_size, state))
    result: nn.Module = module
    return result


def translate(module: Any) -> Translation:
    """Read a torchvision VisionTransformer."""
    reader = Reader(module, classes=CLASSES)
    reader.patch_embed(module.conv_proj)
    reader.put("cls_token", module.class_token)
    reader.put("pos_embed", module.encoder.pos_embedding)
    blocks = tuple(module.encoder.layers)
    heads, mlp_width, activation = same(
        (_block(reader, f"blocks.{i}", block) for i, block in enumerate(blocks)), "heads, MLP width or activation"
    )
    reader.norm("norm", module.encoder.ln)
    outputs = _head(reader, module.heads)
    reader.finish()
    width = int(module.hidden_dim)
    spec = ViTSpec(
        image_size=(int(module.image_size), int(module.image_size)),
        patch_size=(int(module.patch_size), int(module.patch_size)),
        embed_dim=width,
        num_layers=len(blocks),
        num_heads=heads,
        head_dim=width // heads,
        mlp_dim=mlp_width,
        activation=activation,
        norm_eps=reader.eps(),
        outputs=outputs,
        output="logits" if outputs else "image_embeds",
    )
    return Translation(spec=spec, params=reader.params, forward=module, blocks=blocks)


def _block(reader: Reader, site: str, block: Any) -> tuple[int, int, Activation]:
    """Store one block; return what has to be the same in all of them."""
    reader.norm(f"{site}.norm1", block.ln_1)
    reader.attention(block.self_attention, qkv=(f"{site}.attn.qkv",), proj=f"{site}.attn.proj")
    reader.norm(f"{site}.norm2", block.ln_2)
    first, activation, _, second, _ = block.mlp
    reader.linear(f"{site}.mlp.fc1", first)
    reader.linear(f"{site}.mlp.fc2", second)
    return int(block.self_attention.num_heads), int(first.out_features), activation_name(activation)


def _head(reader: Reader, heads: nn.Module) -> int:
    layers = [part for part in heads.modules() if class_name(part) not in ("torch.Sequential", "torch.Identity")]
    if len(layers) > 1:
        raise refuse("a head with a representation layer (representation_size)", PLAIN)
    if not layers:
        return 0
    reader.linear("head", layers[0])
    return int(reader.params["head.weight"].shape[0])


def describe(_module: Any, spec: Architecture, facts: Facts) -> tuple[Preprocess, tuple[str, ...] | None]:
    """Return the weights' preset, or the default 256 / 224 of ImageClassification, and the classes' names."""
    from torchvision.transforms._presets import ImageClassification

    weights = facts.get("weights")
    preset = weights.transforms() if weights is not None else ImageClassification(crop_size=224)
    names = tuple(weights.meta["categories"]) if weights is not None else None
    return preprocess_from_preset(preset, spec.image_size), names


def preprocess_from_preset(preset: Any, image_size: tuple[int, int]) -> Preprocess:
    """Return an ImageClassification preset as data, scaled to `image_size` where its crop differs."""
    crop, resize = int(preset.crop_size[0]), int(preset.resize_size[0])
    if (crop, crop) != image_size:
        resize = round(resize * image_size[0] / crop)
    return Preprocess(
        resize="shortest",
        resize_size=(resize, resize),
        crop_size=image_size,
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
