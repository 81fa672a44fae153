"""Image towers of the package open_clip.

Text towers are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from vitfold.errors import SourceError, nearest
from vitfold.model import Architecture, Preprocess, ViTSpec
from vitfold.model.spec import Activation
from vitfold.sources import timm as timm_source
from vitfold.sources.failures import load_error
from vitfold.sources.reader import (
    PLAIN,
    REFUSED,
    Built,
    Facts,
    Reader,
    Translation,
    activation_name,
    class_name,
    refuse,
    same,
)

CLASSES = (
    "open_clip.VisionTransformer",
    "open_clip.Transformer",
    "open_clip.ResidualAttentionBlock",
    "open_clip.LayerScale",
)
MODELS = ("open_clip.VisionTransformer", "open_clip.TimmModel", "open_clip.CLIP", "open_clip.CustomTextCLIP")


def build(
    name: str,
    *,
    num_classes: int | None,
    image_size: int | tuple[int, int] | None,
    pretrained: bool,
    known: bool = False,  # noqa: ARG001
) -> Built:
    """Create NAME or NAME/PRETRAINED_TAG and keep its image tower."""
    import open_clip

    if num_classes is not None:
        raise SourceError("open_clip's image towers have no classifier; leave out --num-classes")
    arch, tag = (name, "") if ":" in name else (name.partition("/")[0], name.partition("/")[2])
    if ":" not in arch:
        if arch not in open_clip.list_models():
            raise SourceError(f"open_clip has no model {arch!r}; {nearest(arch, open_clip.list_models())}")
        if pretrained:
            tag = _tag(arch, tag)
    try:
        model = open_clip.create_model(
            arch, pretrained=tag if pretrained and tag else None, load_weights=pretrained, pretrained_text=False,
            force_image_size=image_size,
        )  # fmt: skip
    except Exception as error:  # the hub's clients raise a dozen unrelated types
        raise load_error(f"open_clip:{name}", error) from error
    return model.visual, {}


def _tag(arch: str, tag: str) -> str:
    import open_clip

    known = open_clip.list_pretrained_tags_by_model(arch)
    if not known:
        raise SourceError(f"open_clip has no pretrained weights for {arch}; use --weights random")
    if not tag and len(known) > 1:
        raise SourceError(
            f"open_clip has several weights for {arch}: {', '.join(known)}; pick one as open_clip:{arch}/{known[0]}"
        )
    tag = tag or known[0]
    if tag not in known:
        raise SourceError(f"open_clip has no weights {tag!r} for {arch}; {nearest(tag, known)}")
    return tag


def tower(module: Any) -> nn.Module:
    """Return the image tower of a CLIP, or the module itself."""
    visual: nn.Module = module.visual if class_name(module) in MODELS[2:] else module
    if class_name(visual) not in MODELS:
        raise refuse(f"{REFUSED.get(class_name(visual), 'an unknown image tower')} ({class_name(visual)})", PLAIN)
    return visual


def translate(module: Any) -> Translation:
    """Read an open_clip image tower."""
    visual: Any = tower(module)
    if class_name(visual) == "open_clip.TimmModel":
        return _timm_tower(visual)
    if visual.attn_pool is not None:
        raise refuse("an attentional pooler (CoCa)", PLAIN)
    if visual.pool_type not in ("tok", "avg"):
        raise refuse(f"the pooling {visual.pool_type!r}", "use an image tower with pool_type 'tok' or 'avg'")
    reader = Reader(visual, classes=CLASSES)
    reader.patch_embed(visual.conv1)
    reader.params["cls_token"] = reader.take(visual.class_embedding).reshape(1, 1, -1)
    reader.params["pos_embed"] = reader.take(visual.positional_embedding)[None]
    pre_norm = class_name(visual.ln_pre) != "torch.Identity"
    if pre_norm:
        reader.norm("pre_norm", visual.ln_pre)
    blocks = tuple(visual.transformer.resblocks)
    width = int(visual.transformer.width)
    heads, mlp_width, activation = same(
        (_block(reader, f"blocks.{i}", block) for i, block in enumerate(blocks)), "heads, MLP width or activation"
    )
    layer_scale = any(class_name(block.ls_1) != "torch.Identity" for block in blocks)
    if layer_scale:
        for i, block in enumerate(blocks):
            reader.layer_scale(f"blocks.{i}.ls1", block.ls_1, "gamma", width)
            reader.layer_scale(f"blocks.{i}.ls2", block.ls_2, "gamma", width)
    pool_norm = bool(visual.final_ln_after_pool)
    reader.norm("pool_norm" if pool_norm else "norm", visual.ln_post)
    outputs = 0
    if visual.proj is not None:
        reader.params["head.weight"] = np.ascontiguousarray(reader.take(visual.proj).T)
        outputs = int(visual.proj.shape[1])
    reader.finish()
    spec = ViTSpec(
        image_size=tuple(visual.image_size),
        patch_size=tuple(visual.patch_size),
        embed_dim=width,
        num_layers=len(blocks),
        num_heads=heads,
        head_dim=width // heads,
        mlp_dim=mlp_width,
        activation=activation,
        pre_norm=pre_norm,
        layer_scale=layer_scale,
        norm_eps=reader.eps(),
        final_norm=not pool_norm,
        pool_norm=pool_norm,
        pool="token" if visual.pool_type == "tok" else "avg",
        outputs=outputs,
        output="image_embeds",
    )
    return Translation(spec=spec, params=reader.params, forward=_pooled(visual), blocks=blocks)


def _pooled(visual: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the tower's forward without the tokens that some towers return beside the pooled vector."""

    def forward(image: Tensor) -> Tensor:
        output = visual(image)
        pooled: Tensor = output[0] if isinstance(output, tuple) else output
        return pooled

    return forward


def _block(reader: Reader, site: str, block: Any) -> tuple[int, int, Activation]:
    """Store one block; return what has to be the same in all of them."""
    reader.norm(f"{site}.norm1", block.ln_1)
    reader.attention(block.attn, qkv=(f"{site}.attn.qkv",), proj=f"{site}.attn.proj")
    reader.norm(f"{site}.norm2", block.ln_2)
    reader.linear(f"{site}.mlp.fc1", block.mlp.c_fc)
    reader.linear(f"{site}.mlp.fc2", block.mlp.c_proj)
    return int(block.attn.num_heads), int(block.mlp.c_fc.out_features), activation_name(block.mlp.gelu)


def _timm_tower(visual: Any) -> Translation:
    """Read a timm trunk with the projection that open_clip puts behind it."""
    reader = Reader(visual, classes=(*timm_source.CLASSES, "open_clip.TimmModel"))
    layers = [part for name, part in visual.head.named_children() if name != "drop"]
    if len(layers) > 1 or any(class_name(layer) != "torch.Linear" for layer in layers):
        raise refuse("an MLP or attention pooling behind a timm trunk", "use a tower with a linear projection")
    found = timm_source.translate(visual.trunk, extra_head=layers[0] if layers else None, reader=reader, tower=True)
    return Translation(spec=found.spec, params=found.params, forward=visual, blocks=found.blocks)


def describe(module: Any, spec: Architecture, _facts: Facts) -> tuple[Preprocess, tuple[str, ...] | None]:
    """Return the tower's evaluation transform; it has no classes."""
    from open_clip.transform import PreprocessCfg

    visual = tower(module)
    values = dict(getattr(visual, "preprocess_cfg", None) or {})
    for name, attribute in (("mean", "image_mean"), ("std", "image_std")):
        if name not in values and getattr(visual, attribute, None) is not None:
            values[name] = getattr(visual, attribute)
    return preprocess_from_cfg(PreprocessCfg(**{**values, "size": spec.image_size})), None


def preprocess_from_cfg(config: Any) -> Preprocess:
    """Return an open_clip PreprocessCfg as data."""
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    if config.resize_mode == "longest":
        raise refuse("a preprocessing that pads the short side (resize_mode 'longest')", "use 'shortest' or 'squash'")
    square = height == width
    if not square and config.resize_mode == "shortest":
        raise refuse("oblong images with resize_mode 'shortest'", "use 'squash' or a square image size")
    return Preprocess(
        resize="exact" if config.resize_mode == "squash" else "shortest",
        resize_size=(height, width),
        crop_size=(height, width),
        interpolation="bilinear" if config.interpolation == "bilinear" else "bicubic",
        mean=_triple(config.mean),
        std=_triple(config.std),
    )


def _triple(value: Any) -> tuple[float, float, float]:
    values = [value] * 3 if isinstance(value, int | float) else list(value)
    return float(values[0]), float(values[1]), float(values[2])
