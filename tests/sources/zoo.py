"""Tiny modules of every supported architecture and feature, with weights that make parity mean something."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import timm.layers as tl
import torch
import torchvision.models.vision_transformer as tv
import transformers as hf
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw norms, biases, tokens and LayerScale away from their neutral values, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "gamma" in name or "lambda1" in name:
                tensor.copy_(0.3 + noise.abs())
            elif tensor.ndim == 1 and name.endswith("weight"):
                tensor.copy_(1.0 + 0.3 * noise)
            elif name.endswith("bias") or tensor.ndim <= 1 or "token" in name or "pos" in name or "latent" in name:
                tensor.copy_(0.4 * noise)
            else:
                tensor.copy_(noise * (1.2 / max(1, tensor[0].numel()) ** 0.5))
    return module.eval()


def tiny_timm(kind: type[nn.Module] = VisionTransformer, **options: Any) -> nn.Module:
    values = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return kind(**{**values, **options})


def tiny_hf(model: Any, config: Any, **options: Any) -> nn.Module:
    values = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
    }
    values.update(options)
    extra = values.pop("model_options", {})
    return model(config(**values), **extra)


def tiny_siglip_classifier() -> nn.Module:
    vision = tiny_hf(hf.SiglipVisionModel, hf.SiglipVisionConfig).config.to_dict()
    config = hf.SiglipConfig(vision_config=vision, num_labels=5)
    return hf.SiglipForImageClassification(config)


def tiny_tv(**options: Any) -> nn.Module:
    values = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
    return tv.VisionTransformer(**{**values, "num_classes": 5, **options})


def tiny_open_clip(**options: Any) -> nn.Module:
    values = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
    return OpenClipViT(**{**values, "output_dim": 12, **options})


def tiny_clip() -> nn.Module:
    vision = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=16, width=32, heads=2, layers=1)
    return open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text)


def tiny_timm_tower(proj: str, pool: str, **trunk: Any) -> nn.Module:
    tower = TimmModel("vit_tiny_patch16_224", embed_dim=12, image_size=32, pool="avg", proj="linear")
    width = 12 if proj == "" else 0
    tower.trunk = tiny_timm(num_classes=width, global_pool=pool, **trunk)
    tower.head = nn.Sequential()
    if proj == "linear":
        tower.head.add_module("drop", nn.Dropout(0.0))
        tower.head.add_module("proj", nn.Linear(32, 12, bias=False))
    return tower


T = tiny_timm
GELU_TANH = {"act_layer": "gelu_tanh"}
CONTRACT: dict[str, Callable[[], nn.Module]] = {
    "timm cls token": T,
    "timm avg, no cls token": partial(T, class_token=False, global_pool="avg"),
    "timm avg, cls token left out": partial(T, global_pool="avg"),
    "timm avg, cls token kept": partial(T, global_pool="avg", pool_include_prefix=True),
    "timm avg without fc_norm": partial(T, global_pool="avg", fc_norm=False),
    "timm token with fc_norm": partial(T, fc_norm=True),
    "timm no final norm": partial(T, final_norm=False),
    "timm dist token": partial(T, VisionTransformerDistilled),
    "timm dist token, no head": partial(T, VisionTransformerDistilled, num_classes=0),
    "timm registers": partial(T, reg_tokens=3),
    "timm registers, no_embed_class": partial(T, reg_tokens=3, no_embed_class=True),
    "timm no_embed_class": partial(T, no_embed_class=True),
    "timm no positions": partial(T, pos_embed="none"),
    "timm pre_norm quick_gelu": partial(T, pre_norm=True, act_layer="quick_gelu"),
    "timm LayerScale": partial(T, init_values=1e-5),
    "timm QK norm": partial(T, qk_norm=True),
    "timm gelu_tanh": partial(T, **GELU_TANH),
    "timm no qkv bias": partial(T, qkv_bias=False),
    "timm no bias": partial(T, qkv_bias=False, proj_bias=False),
    "timm SwiGLU packed": partial(T, mlp_layer=tl.SwiGLUPacked, act_layer=nn.SiLU),
    "timm SwiGLU gate last": partial(T, mlp_layer=tl.GluMlp, act_layer=nn.SiLU),
    "timm SwiGLU split": partial(T, mlp_layer=tl.SwiGLU, act_layer=nn.SiLU),
    "timm map": partial(T, class_token=False, global_pool="map", **GELU_TANH),
    "timm map without prefix": partial(T, global_pool="map", reg_tokens=4),
    "timm pixels beyond the last patch": partial(T, img_size=34),
    "timm map with prefix": partial(T, global_pool="map", pool_include_prefix=True),
    "timm no head": partial(T, num_classes=0),
    "timm no pool": partial(T, num_classes=0, global_pool=""),
    "timm oblong": partial(T, img_size=(32, 48)),
    "timm oblong patches": partial(T, patch_size=(8, 16)),
    "timm dynamic size": partial(T, dynamic_img_size=True),
    "timm eps 1e-5": partial(T, norm_layer=partial(nn.LayerNorm, eps=1e-5)),
    "timm drop path": partial(T, drop_path_rate=0.2, proj_drop_rate=0.1, patch_drop_rate=0.1),
    "hf ViT pooler": partial(tiny_hf, hf.ViTModel, hf.ViTConfig),
    "hf ViT no pooler": partial(tiny_hf, hf.ViTModel, hf.ViTConfig, model_options={"add_pooling_layer": False}),
    "hf ViT mask token": partial(tiny_hf, hf.ViTModel, hf.ViTConfig, model_options={"use_mask_token": True}),
    "hf ViT classifier": partial(tiny_hf, hf.ViTForImageClassification, hf.ViTConfig, num_labels=5),
    "hf ViT no qkv bias": partial(tiny_hf, hf.ViTForImageClassification, hf.ViTConfig, qkv_bias=False),
    "hf ViT no labels": partial(tiny_hf, hf.ViTForImageClassification, hf.ViTConfig, num_labels=0),
    "hf DeiT pooler": partial(tiny_hf, hf.DeiTModel, hf.DeiTConfig),
    "hf DeiT classifier": partial(tiny_hf, hf.DeiTForImageClassification, hf.DeiTConfig, num_labels=5),
    "hf DeiT teacher": partial(tiny_hf, hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig, num_labels=5),
    "hf DINOv2": partial(tiny_hf, hf.Dinov2Model, hf.Dinov2Config),
    "hf DINOv2 SwiGLU": partial(tiny_hf, hf.Dinov2Model, hf.Dinov2Config, use_swiglu_ffn=True),
    "hf DINOv2 classifier": partial(tiny_hf, hf.Dinov2ForImageClassification, hf.Dinov2Config, num_labels=5),
    "hf DINOv2 registers": partial(tiny_hf, hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig),
    "hf DINOv2 registers classifier": partial(
        tiny_hf, hf.Dinov2WithRegistersForImageClassification, hf.Dinov2WithRegistersConfig, num_labels=5
    ),
    "hf CLIP": partial(tiny_hf, hf.CLIPVisionModel, hf.CLIPVisionConfig),
    "hf CLIP projection": partial(tiny_hf, hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig, projection_dim=12),
    "hf SigLIP": partial(tiny_hf, hf.SiglipVisionModel, hf.SiglipVisionConfig),
    "hf SigLIP without pooling": partial(tiny_hf, hf.SiglipVisionModel, hf.SiglipVisionConfig, vision_use_head=False),
    "hf SigLIP classifier": tiny_siglip_classifier,
    "torchvision": tiny_tv,
    "open_clip ViT": tiny_open_clip,
    "open_clip quick_gelu": partial(tiny_open_clip, act_layer=QuickGELU),
    "open_clip avg": partial(tiny_open_clip, pool_type="avg"),
    "open_clip LayerScale": partial(tiny_open_clip, ls_init_value=0.1),
    "open_clip norm after pool": partial(tiny_open_clip, final_ln_after_pool=True, no_ln_pre=True),
    "open_clip sincos, tokens": partial(tiny_open_clip, pos_embed_type="sin_cos_2d", output_tokens=True),
    "open_clip CLIP": tiny_clip,
    "open_clip timm linear": partial(tiny_timm_tower, "linear", "avg"),
    "open_clip timm own head": partial(tiny_timm_tower, "", "token"),
    "open_clip timm map": partial(tiny_timm_tower, "none", "map", class_token=False),
}
