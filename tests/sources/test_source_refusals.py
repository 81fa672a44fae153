"""What the program can't run is refused by name, with a way out."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import timm.layers as tl
import torch
import torchvision
import transformers as hf
from timm.models import vision_transformer as vits
from torch import nn
from zoo import tiny_hf, tiny_open_clip, tiny_timm, tiny_tv

from vitfold.errors import SourceError
from vitfold.sources import adapt, load_source


def with_eps(module: nn.Module, eps: float) -> nn.Module:
    module.blocks[1].norm2.eps = eps
    return module


def gated(module: nn.Module) -> nn.Module:
    module.blocks[1].attn = tl.Attention(32, num_heads=2, qkv_bias=True, gated=True)
    return module


def tied(module: nn.Module) -> nn.Module:
    module.blocks[1].attn = module.blocks[0].attn
    return module


def with_extra(module: nn.Module) -> nn.Module:
    module.blocks[0].temperature = nn.Parameter(torch.ones(1))
    return module


def with_part(module: nn.Module) -> nn.Module:
    class Adapter(nn.Linear):
        pass

    module.blocks[1].mlp.fc2 = Adapter(128, 32)
    return module


REFUSALS = {
    "ResPostBlock": (partial(tiny_timm, block_fn=vits.ResPostBlock), "ResPostBlock"),
    "ParallelScalingBlock": (partial(tiny_timm, block_fn=vits.ParallelScalingBlock), "parallel"),
    "ParallelThingsBlock": (partial(tiny_timm, block_fn=vits.ParallelThingsBlock), "parallel"),
    "DiffAttention": (partial(tiny_timm, attn_layer="diff"), "differential attention"),
    "gated": (lambda: gated(tiny_timm()), "gated attention"),
    "scale_attn_norm": (partial(tiny_timm, scale_attn_norm=True), "scale_attn_norm"),
    "scale_mlp_norm": (partial(tiny_timm, scale_mlp_norm=True), "scale_mlp_norm"),
    "RmsNorm": (partial(tiny_timm, norm_layer=tl.RmsNorm), "RMSNorm"),
    "pool max": (partial(tiny_timm, global_pool="max"), "pooling 'max'"),
    "pool avgmax": (partial(tiny_timm, global_pool="avgmax"), "pooling 'avgmax'"),
    "pool prr": (partial(tiny_timm, global_pool="prr"), "prr"),
    "head over tokens": (partial(tiny_timm, global_pool=""), "unpooled"),
    "sigmoid GLU": (partial(tiny_timm, mlp_layer=tl.GluMlp, act_layer=nn.Sigmoid), "sigmoid"),
    "embedding norm": (partial(tiny_timm, embed_norm_layer=nn.LayerNorm), "norm in the patch embedding"),
    "grayscale": (partial(tiny_timm, in_chans=1), "1 input channels"),
    "two eps": (lambda: with_eps(tiny_timm(), 1e-3), "different eps"),
    "tied weights": (lambda: tied(tiny_timm()), "share"),
    "extra parameter": (lambda: with_extra(tiny_timm()), r"blocks\.0\.temperature"),
    "unknown part": (lambda: with_part(tiny_timm()), r"Adapter at blocks\.1\.mlp\.fc2"),
    "relu6": (partial(tiny_timm, act_layer=nn.ReLU6), "ReLU6"),
    "Swin": (partial(timm.create_model, "swin_tiny_patch4_window7_224"), "windowed attention"),
    "BEiT": (partial(timm.create_model, "beit_base_patch16_224", depth=1), "relative position bias"),
    "Eva": (partial(timm.create_model, "eva02_tiny_patch14_224", depth=1), "RoPE"),
    "hf activation": (partial(tiny_hf, hf.ViTModel, hf.ViTConfig, hidden_act="mish"), "Mish"),
    "hf pooler": (partial(tiny_hf, hf.ViTModel, hf.ViTConfig, pooler_act="relu"), "pooler"),
    "hf masked": (partial(tiny_hf, hf.ViTForMaskedImageModeling, hf.ViTConfig), "ViTForMaskedImageModeling"),
    "torchvision representation": (partial(tiny_tv, representation_size=16), "representation"),
    "torchvision resnet": (torchvision.models.resnet18, "does not read torchvision.ResNet"),
    "open_clip CoCa": (partial(tiny_open_clip, attentional_pool=True, output_dim=16), "CoCa"),
    "open_clip custom": (partial(tiny_open_clip, scale_attn=True), "custom"),
    "open_clip pool none": (partial(tiny_open_clip, pool_type="none"), "pooling 'none'"),
    "plain torch": (partial(nn.Linear, 2, 2), "supported: .*VisionTransformer"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_name(name):
    make, match = REFUSALS[name]
    with pytest.raises(SourceError, match=match):
        adapt(make(), graph=False)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("timm:swin_tiny_patch4_window7_224", "windowed attention"),
        ("timm:vit_base_patch16_dinov3", "RoPE"),
        ("timm:vit_tiny_r_s16_p8_224", "hybrid"),
        ("torchvision:resnet18", "ResNet"),
        ("torchvision:swin_t", "SwinTransformer"),
    ],
)
def test_zoo_models_are_refused_before_a_download(source, match):
    with pytest.raises(SourceError, match=match):
        load_source(source, graph=False)


def test_modules_without_data_are_refused():
    with torch.device("meta"):
        module = tiny_timm()
    with pytest.raises(SourceError, match="meta"):
        adapt(module)
