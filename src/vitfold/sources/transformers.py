"""Vision Transformers of the package transformers.

What their processor files say is `transformers_preprocess`' job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitfold.errors import SourceError
from vitfold.model import Architecture, Preprocess, ViTSpec
from vitfold.model.spec import Activation, Mlp, Problem, classes_of
from vitfold.sources.failures import load_error
from vitfold.sources.hub import architecture
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
    same_body,
    with_register_rows,
)
from vitfold.sources.sizes import pair
from vitfold.sources.transformers_preprocess import default_processor, preprocess_from_processor, read_processor
from vitfold.sources.transformers_weights import base_of, find_adapter, load_adapted, load_weights

# Top-level class -> (family, attribute of the encoder within it, attribute of the head).
MODELS = {
    "transformers.ViTModel": ("vit", "", "pooler"),
    "transformers.ViTForImageClassification": ("vit", "vit", "classifier"),
    "transformers.DeiTModel": ("vit", "", "pooler"),
    "transformers.DeiTForImageClassification": ("vit", "deit", "classifier"),
    "transformers.DeiTForImageClassificationWithTeacher": ("vit", "deit", "cls_classifier"),
    "transformers.Dinov2Model": ("dinov2", "", ""),
    "transformers.Dinov2ForImageClassification": ("dinov2", "dinov2", "classifier"),
    "transformers.Dinov2WithRegistersModel": ("dinov2", "", ""),
    "transformers.Dinov2WithRegistersForImageClassification": ("dinov2", "dinov2_with_registers", "classifier"),
    "transformers.CLIPVisionModel": ("clip", "", ""),
    "transformers.CLIPVisionModelWithProjection": ("clip", "vision_model", "visual_projection"),
    "transformers.SiglipVisionModel": ("siglip", "", "head"),
    "transformers.SiglipForImageClassification": ("siglip", "vision_model", "classifier"),
}
PARTS = {
    "vit": ("Embeddings", "PatchEmbeddings", "Layer", "Attention", "MLP", "Pooler"),
    "dinov2": ("Embeddings", "PatchEmbeddings", "Layer", "Attention", "MLP", "SwiGLUFFN", "LayerScale", "Encoder"),
    "clip": ("VisionEmbeddings", "EncoderLayer", "Attention", "MLP", "Encoder"),
    "siglip": ("VisionEmbeddings", "EncoderLayer", "Attention", "MLP", "Encoder", "MultiheadAttentionPoolingHead"),
}
STEMS = {"vit": ("ViT", "DeiT"), "dinov2": ("Dinov2", "Dinov2WithRegisters"), "clip": ("CLIP",), "siglip": ("Siglip",)}
CLASSES = (
    *MODELS,
    *(f"transformers.{s}{part}" for family, parts in PARTS.items() for s in STEMS[family] for part in parts),
)
PROBLEMS: dict[str, Problem] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}
# Family -> names of the block's first norm, attention, output projection and second norm.
LAYOUT = {
    "vit": ("layernorm_before", "attention", "o_proj", "layernorm_after"),
    "dinov2": ("norm1", "attention", "o_proj", "norm2"),
    "clip": ("layer_norm1", "self_attn", "out_proj", "layer_norm2"),
    "siglip": ("layer_norm1", "self_attn", "out_proj", "layer_norm2"),
}
INSTEAD = {"CLIPModel": "CLIPVisionModelWithProjection", "SiglipModel": "SiglipVisionModel"}


def build(
    name: str,
    *,
    num_classes: int | None,
    image_size: int | tuple[int, int] | None,
    pretrained: bool,
    known: bool = False,
) -> Built:
    """Create a model from a folder or a repository of the hub, with the class that its config names.

    With `known` classes that are not in `MODELS` are refused.
    """
    import transformers

    folder = Path(name)
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise SourceError(f"hf: no folder {name}; pass a folder with config.json or the name of a repository")
    adapter = find_adapter(name) if pretrained else None
    base = name if adapter is None else base_of(adapter)
    try:
        config = transformers.AutoConfig.from_pretrained(base)
    except Exception as error:  # the hub's clients raise a dozen unrelated types
        source = f"hf:{name}" if base == name else f"{base}, the base of hf:{name},"
        raise load_error(source, error, folder=Path(base) if Path(base).is_dir() else None) from error
    if getattr(config, "quantization_config", None):
        raise refuse(
            f"hf:{base}, whose weights are quantized already (quantization_config in its config.json),",
            "give the repository or folder that it was quantized from",
        )
    classifies = adapter is not None and adapter.classes is not None
    kind = _class_of(transformers, config, base, classifies=classifies, known=known)
    family = MODELS.get(f"transformers.{kind.__name__}", ("", "", ""))[0]
    processor = read_processor(name) or (None if base == name else read_processor(base))
    _check_classes(name, kind.__name__, config, num_classes, pretrained)
    if adapter is not None:
        module = load_adapted(kind, base, adapter)
    elif pretrained:
        module = load_weights(kind, name, changed=_projection(kind, config))
    else:
        config = kind.config_class.from_pretrained(name, **_projection(kind, config))
        if num_classes is not None:
            config.num_labels = num_classes
        module = kind(config)
    if image_size is None and family == "dinov2" and processor is not None:
        # DINOv2 interpolates its 518-pixel positions at every forward; its processor names the size in use.
        image_size = preprocess_from_processor(processor, None).crop_size
    if image_size is not None and family:
        set_image_size(module, image_size)
    return module, {"processor": processor}


def _projection(kind: Any, config: Any) -> dict[str, Any]:
    """The width of a whole CLIP's projection, which its towers' own configurations may state otherwise."""
    whole = kind.__name__ == "CLIPVisionModelWithProjection" and hasattr(config, "vision_config")
    return {"projection_dim": config.projection_dim} if whole else {}


def _class_of(transformers: Any, config: Any, name: str, *, classifies: bool = False, known: bool = False) -> Any:
    found = architecture(config, name)
    wanted = INSTEAD.get(found, found)
    if classifies and f"transformers.{wanted.removesuffix('Model')}ForImageClassification" in MODELS:
        wanted = f"{wanted.removesuffix('Model')}ForImageClassification"
    if f"transformers.{wanted}" not in MODELS and not known and isinstance(getattr(transformers, wanted, None), type):
        return getattr(transformers, wanted)
    if f"transformers.{wanted}" not in MODELS:
        names = [full.partition(".")[2] for full in MODELS]
        reason = REFUSED.get(f"transformers.{found}")
        if reason is not None:
            raise refuse(f"{reason} (transformers.{found})", PLAIN)
        raise SourceError(
            f"hf:{name} is a {found or config.model_type}, which vitfold does not run; {same_body(wanted, names)}"
            f"supported: {', '.join(names)}"
        )
    return getattr(transformers, wanted)


def _check_classes(name: str, kind: str, config: Any, num_classes: int | None, pretrained: bool) -> None:
    if num_classes is None:
        return
    if "Classification" not in kind:
        raise SourceError(f"hf:{name} is a {kind}, which has no classifier; leave out --num-classes")
    if pretrained and num_classes != config.num_labels:
        raise SourceError(
            f"the pretrained head of hf:{name} has {config.num_labels} classes, {num_classes} were asked for, and a "
            "new head would be random; leave out --num-classes, or use --weights random"
        )


def set_image_size(module: nn.Module, size: int | tuple[int, int]) -> None:
    """Resample the positions in place to images of `size` pixels, as the model's own forward would."""
    height, width = pair(size)
    _, inner, _ = MODELS[class_name(module)]
    encoder: Any = getattr(module, inner) if inner else module
    embeddings = encoder.embeddings
    grid = pair(embeddings.patch_size)
    if height % grid[0] or width % grid[1]:
        shown = height if height == width else f"{height}x{width}"
        raise SourceError(f"--image-size {shown} is not a multiple of the patch size {grid[0]}; choose one that is")
    if class_name(module).startswith("transformers.CLIP") and height != width:
        raise SourceError(f"transformers' CLIP takes square images, and {height}x{width} was asked for; load it by "
                          "open_clip:, or give one side")  # fmt: skip
    patches = (height // grid[0]) * (width // grid[1])
    clip = hasattr(embeddings, "position_embedding")
    table = embeddings.position_embedding.weight if clip else embeddings.position_embeddings[0]
    prefix = (
        table.shape[0] - embeddings.num_patches if clip else table.shape[0] - embeddings.patch_embeddings.num_patches
    )
    with torch.no_grad():
        rows = embeddings.interpolate_pos_encoding(torch.empty(1, prefix + patches, table.shape[1]), height, width)
    if clip:
        embeddings.position_embedding = nn.Embedding(rows.shape[1], rows.shape[2], _weight=rows[0].clone())
        embeddings.position_ids = torch.arange(prefix + patches).expand((1, -1))
        embeddings.num_patches, embeddings.num_positions = patches, prefix + patches
        embeddings.image_size = height if height == width else (height, width)
    else:
        embeddings.position_embeddings = nn.Parameter(rows.clone())
        embeddings.patch_embeddings.image_size = (height, width)
        embeddings.patch_embeddings.num_patches = patches
        if hasattr(embeddings, "image_size"):
            embeddings.image_size = (height, width)
    encoder.config.image_size = height if height == width else (height, width)


def translate(module: Any) -> Translation:
    """Read one of the classes in `MODELS`."""
    reader = Reader(module, classes=CLASSES)
    family, inner, head = MODELS[class_name(module)]
    encoder = getattr(module, inner) if inner else module
    stack = encoder if family == "vit" else encoder.encoder
    layers = stack.layer if family == "dinov2" else stack.layers
    shape = _embedding(reader, encoder, family)
    heads, head_width, mlp, mlp_width, activation = same(
        (_block(reader, f"blocks.{i}", layer, family) for i, layer in enumerate(layers)),
        "heads, head width, MLP, MLP width or activation",
    )
    if family == "dinov2":
        for i, layer in enumerate(layers):
            reader.layer_scale(f"blocks.{i}.ls1", layer.layer_scale1, "lambda1", shape["embed_dim"])
            reader.layer_scale(f"blocks.{i}.ls2", layer.layer_scale2, "lambda1", shape["embed_dim"])
    tail = _tail(reader, module, encoder, family, head)
    if tail.get("output") == "logits":
        tail["problem"] = _problem(module.config)
    reader.finish()
    spec = ViTSpec(
        **shape,
        **tail,
        num_layers=len(layers),
        num_heads=heads,
        head_dim=head_width,
        mlp=mlp,
        mlp_dim=mlp_width,
        activation=activation,
        layer_scale=family == "dinov2",
        norm_eps=reader.eps(),
    )
    return Translation(spec=spec, params=reader.params, forward=_forward(module, spec), blocks=tuple(layers))


def _problem(config: Any) -> Problem:
    """What the logits stand for, as transformers' own loss and pipeline read it; without a word, one class."""
    found = getattr(config, "problem_type", None)
    if found is None:
        return "single_label"
    if found not in PROBLEMS:
        raise refuse(f"the problem_type {found!r}", f"set one of {', '.join(PROBLEMS)} in config.json")
    return PROBLEMS[found]


def _forward(module: Any, spec: ViTSpec) -> Any:
    """Return a function from images to the one output that the program computes."""

    def forward(image: Tensor) -> Tensor:
        output = module(pixel_values=image)
        for name in ("logits", "image_embeds"):
            if hasattr(output, name):
                found: Tensor = getattr(output, name)
                return found
        if output.pooler_output is not None:
            pooled: Tensor = output.pooler_output
            return pooled
        hidden: Tensor = output.last_hidden_state
        return hidden if spec.pool == "none" else hidden[:, 0]

    return forward


def _embedding(reader: Reader, encoder: Any, family: str) -> dict[str, Any]:
    embeddings = encoder.embeddings
    if family in ("clip", "siglip"):
        return _clip_embedding(reader, encoder, family)
    patch = embeddings.patch_embeddings
    reader.patch_embed(patch.projection)
    reader.put("cls_token", embeddings.cls_token)
    reader.ignore(embeddings.mask_token)
    distilled = hasattr(embeddings, "distillation_token")
    if distilled:
        reader.put("dist_token", embeddings.distillation_token)
    positions = reader.take(embeddings.position_embeddings)
    registers = 0
    if hasattr(embeddings, "register_tokens"):
        registers = int(embeddings.register_tokens.shape[1])
        if registers:
            reader.put("reg_token", embeddings.register_tokens)
            positions = with_register_rows(positions, after=1, registers=registers)
        reader.ignore(embeddings.register_tokens)
    reader.params["pos_embed"] = positions
    return {
        "image_size": pair(patch.image_size),
        "patch_size": pair(patch.patch_size),
        "embed_dim": int(positions.shape[2]),
        "dist_token": distilled,
        "registers": registers,
    }


def _clip_embedding(reader: Reader, encoder: Any, family: str) -> dict[str, Any]:
    embeddings = encoder.embeddings
    reader.patch_embed(embeddings.patch_embedding)
    if family == "clip":
        reader.params["cls_token"] = reader.take(embeddings.class_embedding).reshape(1, 1, -1)
        reader.norm("pre_norm", encoder.pre_layrnorm)
    positions = reader.take(embeddings.position_embedding.weight)
    reader.ignore(embeddings.position_ids)
    reader.params["pos_embed"] = positions[None]
    return {
        "image_size": pair(embeddings.image_size),
        "patch_size": pair(embeddings.patch_size),
        "embed_dim": int(positions.shape[1]),
        "class_token": family == "clip",
        "pre_norm": family == "clip",
    }


def _block(reader: Reader, site: str, layer: Any, family: str) -> tuple[int, int, Mlp, int, Activation]:
    """Store one block; return what has to be the same in all of them."""
    norm1, attention, proj, norm2 = LAYOUT[family]
    attn = getattr(layer, attention)
    reader.norm(f"{site}.norm1", getattr(layer, norm1))
    reader.linear(f"{site}.attn.qkv", attn.q_proj, attn.k_proj, attn.v_proj)
    reader.linear(f"{site}.attn.proj", getattr(attn, proj))
    reader.norm(f"{site}.norm2", getattr(layer, norm2))
    heads = int(getattr(attn, "num_attention_heads", 0) or attn.num_heads)
    mlp = layer.mlp
    if class_name(mlp).endswith("SwiGLUFFN"):
        reader.linear(f"{site}.mlp.fc1", mlp.gate_proj, mlp.up_proj)
        reader.linear(f"{site}.mlp.fc2", mlp.down_proj)
        return heads, int(attn.head_dim), "swiglu", int(mlp.down_proj.in_features), activation_name(mlp.act_fn)
    reader.linear(f"{site}.mlp.fc1", mlp.fc1)
    reader.linear(f"{site}.mlp.fc2", mlp.fc2)
    return heads, int(attn.head_dim), "plain", int(mlp.fc1.out_features), activation_name(mlp.activation_fn)


def _tail(reader: Reader, module: Any, encoder: Any, family: str, head_name: str) -> dict[str, Any]:
    """Store what follows the blocks."""
    head = getattr(module, head_name, None) if head_name else None
    if family == "siglip":
        return _siglip_tail(reader, module, encoder, head)
    pool = "token"
    if family == "clip":
        reader.norm("pool_norm", encoder.post_layernorm)
    else:
        reader.norm("norm", encoder.layernorm)
    extra: dict[str, Any] = {"final_norm": family != "clip", "pool_norm": family == "clip"}
    if head_name == "pooler" and head is not None:
        if class_name(head.activation) != "torch.Tanh":
            raise refuse(f"a pooler with {class_name(head.activation)}", "use the classifier, or a pooler with tanh")
        extra["head_activation"] = "tanh"
        head = head.dense
    elif head_name == "cls_classifier":
        pool = "token_dist"
        if class_name(head) != "torch.Identity":  # type: ignore[arg-type]
            reader.linear("head_dist", module.distillation_classifier)
    elif head_name == "classifier" and family == "dinov2":
        pool = "token_avg"
    return {**extra, **_head(reader, head, logits="classifier" in head_name), "pool": pool}


def _siglip_tail(reader: Reader, module: Any, encoder: Any, head: Any) -> dict[str, Any]:
    reader.norm("norm", encoder.post_layernorm)
    if class_name(module) == "transformers.SiglipForImageClassification":
        reader.ignore(getattr(encoder, "head", None))  # the classifier averages the tokens instead
        return {**_head(reader, head, logits=True), "pool": "avg"}
    if head is None:
        return {"pool": "none", "output": "last_hidden_state"}
    reader.put("pool.latent", head.probe)
    reader.attention(head.attention, qkv=("pool.q", "pool.kv"), proj="pool.proj")
    reader.norm("pool.norm", head.layernorm)
    reader.linear("pool.mlp.fc1", head.mlp.fc1)
    reader.linear("pool.mlp.fc2", head.mlp.fc2)
    return {
        "pool": "map",
        "map_heads": int(head.attention.num_heads),
        "map_mlp_width": int(head.mlp.fc1.out_features),
        "map_activation": activation_name(head.mlp.activation_fn),
        "output": "image_embeds",
    }


def _head(reader: Reader, head: Any, *, logits: bool) -> dict[str, Any]:
    if head is None or class_name(head) == "torch.Identity":
        return {"output": "image_embeds"}
    reader.linear("head", head)
    outputs = int(np.shape(reader.params["head.weight"])[0])
    return {"outputs": outputs, "output": "logits" if logits else "image_embeds"}


def describe(module: Any, spec: Architecture, facts: Facts) -> tuple[Preprocess | None, tuple[str, ...] | None]:
    """Return the processor's transform, or the family's default if it has one, and the names of the classes."""
    family = MODELS.get(class_name(module), ("", "", ""))[0]
    if "DeiT" in class_name(module):
        family = "deit"
    processor = facts.get("processor") or (default_processor(family, spec.image_size) if family else None)
    preprocess = None if processor is None else preprocess_from_processor(processor, spec.image_size)
    names = [module.config.id2label.get(i) for i in range(classes_of(spec))]
    if names and all(isinstance(name, str) and not name.startswith("LABEL_") for name in names):
        return preprocess, tuple(names)
    return preprocess, None
