"""Vision Transformers of the package timm.

Files of timm weights are read by `files`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vitfold.errors import SourceError, nearest
from vitfold.model import Architecture, Preprocess, ViTSpec
from vitfold.model.spec import Activation, Mlp, Output, classes_of
from vitfold.sources.failures import load_error
from vitfold.sources.hub import read_config
from vitfold.sources.reader import (
    PLAIN,
    Built,
    Facts,
    Reader,
    Translation,
    activation_name,
    class_name,
    refuse,
    require,
    same,
)

CLASSES = (
    "timm.VisionTransformer",
    "timm.VisionTransformerDistilled",
    "timm.PatchEmbed",
    "timm.Block",
    "timm.Attention",
    "timm.LayerScale",
    "timm.Mlp",
    "timm.GluMlp",
    "timm.SwiGLU",
    "timm.AttentionPoolLatent",
)
POOLS = {"token": "token", "avg": "avg", "map": "map", "": "none"}


def build(
    name: str,
    *,
    num_classes: int | None,
    image_size: int | tuple[int, int] | None,
    pretrained: bool,
    known: bool = False,
) -> Built:
    """Create a model of timm's registry; with `known` refuse other classes before anything is downloaded."""
    import timm
    import torch

    options: dict[str, Any] = {}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if image_size is not None:
        options["img_size"] = image_size
    if ":" not in name:
        _check_name(name)
        if known:
            with torch.device("meta"):
                draft = timm.create_model(name, pretrained=False)
            Reader(draft, classes=CLASSES)
        if pretrained:
            _check_pretrained(name, num_classes)
    if not pretrained:
        return timm.create_model(name, pretrained=False, **options), {}
    if name.startswith("local-dir:"):
        stated = read_config(Path(name.partition(":")[2]))
        _check_head(name, stated.get("num_classes", num_classes), num_classes)
    try:
        module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # the hub's clients raise a dozen unrelated types
        local = name.startswith("local-dir:")
        folder = Path(name.partition(":")[2]) if local else None
        raise load_error(f"hf:{folder}" if local else f"timm:{name}", error, folder=folder) from error
    _check_head(name, module.pretrained_cfg["num_classes"], num_classes)
    return module, {}


def _check_name(name: str) -> None:
    import timm

    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        raise SourceError(f"timm has no model {arch!r}; {nearest(arch, timm.list_models())}")
    known = {full.partition(".")[2] for full in timm.list_pretrained(arch)}
    if tag and tag not in known:
        raise SourceError(f"timm has no weights {tag!r} for {arch}; {nearest(tag, known or {'none'})}")


def _check_pretrained(name: str, num_classes: int | None) -> None:
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise SourceError(
            f"timm has no pretrained weights for {name}; pass your own file with --arch {name}, or use --weights random"
        )
    _check_head(name, config.num_classes, num_classes)


def _check_head(name: str, classes: int | None, num_classes: int | None) -> None:
    if num_classes not in (None, 0, classes):
        raise SourceError(
            f"the pretrained head of timm:{name} has {classes} classes, {num_classes} were asked for, and a "
            "new head would be random; pass your fine-tuned file with --arch, or use --weights random"
        )


def translate(
    module: Any, *, extra_head: nn.Module | None = None, reader: Reader | None = None, tower: bool = False
) -> Translation:
    """Read a timm VisionTransformer; in open_clip's towers an `extra_head` may stand behind it."""
    reader = reader or Reader(module, classes=CLASSES)
    distilled = class_name(module) == "timm.VisionTransformerDistilled"
    shape = _embedding(reader, module, distilled)
    width = shape["embed_dim"]
    heads, head_width, mlp, mlp_width, activation, qk_norm = same(
        (_block(reader, f"blocks.{i}", block) for i, block in enumerate(module.blocks)),
        "heads, head width, MLP, MLP width, activation or QK norm",
    )
    layer_scale = any(class_name(b.ls1) != "torch.Identity" for b in module.blocks)
    if layer_scale:
        for i, block in enumerate(module.blocks):
            reader.layer_scale(f"blocks.{i}.ls1", block.ls1, "gamma", width)
            reader.layer_scale(f"blocks.{i}.ls2", block.ls2, "gamma", width)
    tail = _pooling(reader, module, distilled)
    outputs = _head(reader, module, distilled, extra_head)
    if tail["pool"] == "none" and outputs:
        raise refuse("a head over unpooled tokens", "create it with num_classes=0, or with a pooling")
    output: Output = "logits" if outputs and not tower and not _is_image_tower(module, outputs) else "image_embeds"
    reader.finish()
    spec = ViTSpec(
        **shape,
        **tail,
        num_layers=len(module.blocks),
        num_heads=heads,
        head_dim=head_width,
        mlp=mlp,
        mlp_dim=mlp_width,
        activation=activation,
        qk_norm=qk_norm,
        layer_scale=layer_scale,
        norm_eps=reader.eps(),
        outputs=outputs,
        output="last_hidden_state" if tail["pool"] == "none" else output,
    )
    return Translation(spec=spec, params=reader.params, forward=module, blocks=tuple(module.blocks))


def _embedding(reader: Reader, module: Any, distilled: bool) -> dict[str, Any]:
    patch = module.patch_embed
    require(patch.norm, "a norm in the patch embedding", at="patch_embed.norm")
    reader.patch_embed(patch.proj)
    registers = 0
    for name, token in (("cls_token", module.cls_token), ("reg_token", module.reg_token)):
        if token is not None:
            reader.put(name, token)
    if module.reg_token is not None:
        registers = int(module.reg_token.shape[1])
    if distilled:
        reader.put("dist_token", module.dist_token)
    positions = "none"
    if module.pos_embed is not None:
        reader.put("pos_embed", module.pos_embed)
        positions = "patches" if module.no_embed_class else "all"
    pre_norm = class_name(module.norm_pre) != "torch.Identity"
    if pre_norm:
        reader.norm("pre_norm", module.norm_pre)
    return {
        "image_size": tuple(int(n) for n in patch.img_size),
        "patch_size": tuple(int(n) for n in patch.patch_size),
        "embed_dim": int(module.embed_dim),
        "class_token": module.cls_token is not None,
        "dist_token": distilled,
        "registers": registers,
        "pos_embed": positions,
        "pre_norm": pre_norm,
    }


def _block(reader: Reader, site: str, block: Any) -> tuple[int, int, Mlp, int, Activation, bool]:
    """Store one block; return what has to be the same in all of them."""
    attn = block.attn
    reader.norm(f"{site}.norm1", block.norm1)
    require(getattr(attn, "norm", None), "a norm inside the attention (scale_attn_norm)", at=f"{site}.attn.norm")
    require(getattr(attn, "gate", None), "a gated attention", at=f"{site}.attn.gate")
    reader.linear(f"{site}.attn.qkv", attn.qkv)
    qk_norm = class_name(attn.q_norm) != "torch.Identity"
    if qk_norm:
        reader.norm(f"{site}.attn.q_norm", attn.q_norm)
        reader.norm(f"{site}.attn.k_norm", attn.k_norm)
    reader.linear(f"{site}.attn.proj", attn.proj)
    reader.norm(f"{site}.norm2", block.norm2)
    mlp, mlp_width, activation = _mlp(reader, f"{site}.mlp", block.mlp)
    return int(attn.num_heads), int(attn.head_dim), mlp, mlp_width, activation, qk_norm


def _mlp(reader: Reader, site: str, layer: Any) -> tuple[Mlp, int, Activation]:
    require(layer.norm, "a norm inside the MLP (scale_mlp_norm)", at=f"{site}.norm")
    reader.linear(f"{site}.fc2", layer.fc2)
    name, activation = class_name(layer), activation_name(layer.act)
    if name == "timm.SwiGLU":
        reader.linear(f"{site}.fc1", layer.fc1_g, layer.fc1_x)
    else:
        reader.linear(f"{site}.fc1", layer.fc1)
    if name == "timm.GluMlp" and layer.gate_last:
        for part in ("weight", "bias"):
            rows = reader.params.get(f"{site}.fc1.{part}")
            if rows is not None:
                up, gate = np.split(rows, 2)
                reader.params[f"{site}.fc1.{part}"] = np.concatenate((gate, up))
    return "plain" if name == "timm.Mlp" else "swiglu", int(layer.fc2.in_features), activation


def _pooling(reader: Reader, module: Any, distilled: bool) -> dict[str, Any]:
    final_norm = class_name(module.norm) != "torch.Identity"
    pool_norm = class_name(module.fc_norm) != "torch.Identity"
    if final_norm:
        reader.norm("norm", module.norm)
    if distilled:
        require(module.fc_norm, "a norm that its head skips", at="fc_norm")
        return {"final_norm": final_norm, "pool": "token_dist"}
    if pool_norm:
        reader.norm("pool_norm", module.fc_norm)
    if module.global_pool not in POOLS:
        raise refuse(f"the pooling {module.global_pool!r}", "create it with global_pool 'token', 'avg' or 'map'")
    tail = {
        "final_norm": final_norm,
        "pool_norm": pool_norm,
        "pool": POOLS[module.global_pool],
        "pool_prefix": bool(module.pool_include_prefix) and module.global_pool in ("avg", "map"),
    }
    return {**tail, **_map_pool(reader, module)} if module.attn_pool is not None else tail


def _map_pool(reader: Reader, module: Any) -> dict[str, Any]:
    pool = module.attn_pool
    if pool.latent_len != 1 or pool.pos_embed is not None or class_name(pool.q_norm) != "torch.Identity":
        raise refuse("attention pooling with several queries, positions or QK norm", PLAIN)
    reader.put("pool.latent", pool.latent)
    reader.linear("pool.q", pool.q)
    reader.linear("pool.kv", pool.kv)
    reader.linear("pool.proj", pool.proj)
    width = 0
    if pool.mlp is not None:
        reader.norm("pool.norm", pool.norm)
        _, width, activation = _mlp(reader, "pool.mlp", pool.mlp)
        return {"map_heads": int(pool.num_heads), "map_mlp_width": width, "map_activation": activation}
    require(pool.norm, "a norm without an MLP in the attention pooling", at="attn_pool.norm")
    return {"map_heads": int(pool.num_heads)}


def _head(reader: Reader, module: Any, distilled: bool, extra_head: nn.Module | None) -> int:
    own = class_name(module.head) != "torch.Identity"
    if own and extra_head is not None:
        raise refuse("two heads behind each other", "build the tower with num_classes=0 or without a projection")
    if distilled:
        if extra_head is not None:
            raise refuse("a projection behind a distilled ViT", "use a tower without distillation token")
        if own:
            reader.linear("head_dist", module.head_dist)
    head = extra_head if extra_head is not None else module.head
    if class_name(head) == "torch.Identity":
        return 0
    reader.linear("head", head)
    return int(reader.params["head.weight"].shape[0])


def _is_image_tower(module: Any, outputs: int) -> bool:
    """True for CLIP towers whose `head` is the projection into the space shared with text, not a classifier."""
    config = getattr(module, "pretrained_cfg", None) or {}
    arch, tag = str(config.get("architecture", "")), str(config.get("tag", ""))
    return "clip" in arch and outputs == config.get("num_classes") and "ft_" not in tag and "in1" not in tag


def describe(module: Any, spec: Architecture, _facts: Facts) -> tuple[Preprocess, tuple[str, ...] | None]:
    """Return timm's evaluation transform, at the size that the model has, and the names of its classes."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(module, args={"input_size": (3, *spec.image_size)})
    return preprocess_from_data_config(config), labels_from_timm(module, classes_of(spec))


def preprocess_from_data_config(config: dict[str, Any]) -> Preprocess:
    """Return `timm.data.create_transform(**config)` as data; resize = floor(size / crop_pct), then crop."""
    height, width = config["input_size"][1:]
    scaled = (math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"]))
    mode = config["crop_mode"]
    if mode not in ("center", "squash"):
        raise refuse(f"the crop mode {mode!r} in its preprocessing", "set crop_mode to 'center' or 'squash'")
    resize = "exact" if mode == "squash" else "shortest" if scaled[0] == scaled[1] else "cover"
    return Preprocess(
        resize=resize,  # type: ignore[arg-type]
        resize_size=scaled,
        crop_size=(height, width),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def labels_from_timm(module: Any, outputs: int) -> tuple[str, ...] | None:
    """Return the class names of the pretrained head, where timm knows them."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config = getattr(module, "pretrained_cfg", None) or {}
    if not outputs or outputs != config.get("num_classes"):
        return None
    if config.get("label_names"):
        names = tuple(str(name) for name in config["label_names"])
        return names if len(names) == outputs else None
    subset = infer_imagenet_subset(config)
    if subset is None:
        return None
    return tuple(str(name) for name in ImageNetInfo(subset).label_descriptions())
