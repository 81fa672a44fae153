"""Load the architectures that people run, with random weights and few blocks, and write which of them work, and how.

    python examples/check_models.py [NAME ...] [--output docs/models.json]

Every model is read, its program compared with what it came from, merged where it merges, quantized on random pictures,
written, and verified in ONNX Runtime. A model that fails is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import vitfold
from vitfold.model import GraphSpec
from vitfold.pipeline import calibrate_plan
from vitfold.recipe import quant_from_scheme

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
IMAGE = {"image_size": 64, "patch_size": 16}
PICTURES = 16
Make = Callable[[], nn.Module]


def hf(kind: str, config: str, **options: Any) -> Make:
    """Return what makes a model of transformers from a small configuration."""

    def make() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**options))
        return made

    return make


def timm_model(name: str, **options: Any) -> Make:
    """Return what makes a model of timm."""

    def make() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(name, pretrained=False, **options)
        return made

    return make


def clip_model(width: int = 64) -> Make:
    """Return what makes a CLIP of open_clip."""

    def make() -> nn.Module:
        import open_clip

        return open_clip.CLIP(
            embed_dim=32,
            vision_cfg={"image_size": 64, "layers": 2, "width": width, "patch_size": 16, "head_width": 16},
            text_cfg={"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
        )

    return make


_VIT = {**SMALL, **IMAGE}
_TEXT = {**SMALL, "vocab_size": 64, "num_hidden_layers": 1}
_DEPTH = {"reassemble_hidden_size": 64, "neck_hidden_sizes": [16] * 4, "fusion_hidden_size": 16}


def vision_and_text(kind: str, config: str, **vision: Any) -> Make:
    """Return what makes a model of an image and a text tower."""
    return hf(kind, config, vision_config={**_VIT, **vision}, text_config=dict(_TEXT))


def depth_anything() -> nn.Module:
    """Return a small Depth Anything."""
    import transformers as tf

    backbone = tf.Dinov2Config(
        **{**SMALL, "num_hidden_layers": 4}, image_size=56, patch_size=14, out_indices=[1, 2, 3, 4],
        apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    return tf.DepthAnythingForDepthEstimation(
        tf.DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=64, patch_size=14,
                               neck_hidden_sizes=[16] * 4, fusion_hidden_size=16)
    )  # fmt: skip


def encoder_decoder(encoder: str, config: str, **options: Any) -> Make:
    """Return what makes an encoder of images with a decoder of text."""

    def make() -> nn.Module:
        import transformers as tf

        decoder = tf.TrOCRConfig(vocab_size=50, d_model=64, decoder_layers=1, decoder_attention_heads=4,
                                 decoder_ffn_dim=64)  # fmt: skip
        return tf.VisionEncoderDecoderModel(
            encoder=getattr(tf, encoder)(getattr(tf, config)(**options)), decoder=tf.TrOCRForCausalLM(decoder)
        )

    return make


def vitpose() -> nn.Module:
    """Return a small ViTPose."""
    import transformers as tf

    backbone = tf.VitPoseBackboneConfig(image_size=[64, 48], patch_size=[16, 16], hidden_size=64, num_hidden_layers=2,
                                        num_attention_heads=4)  # fmt: skip
    return tf.VitPoseForPoseEstimation(tf.VitPoseConfig(backbone_config=backbone, num_labels=5))


def detr() -> nn.Module:
    """Return a small DETR."""
    import transformers as tf

    backbone = tf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"])
    return tf.DetrForObjectDetection(
        tf.DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
                      d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                      decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=6)
    )  # fmt: skip


def rt_detr() -> nn.Module:
    """Return a small RT-DETR."""
    import transformers as tf

    backbone = tf.RTDetrResNetConfig(embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1],
                                     out_features=["stage2", "stage3", "stage4"], layer_type="basic")  # fmt: skip
    return tf.RTDetrForObjectDetection(
        tf.RTDetrConfig(backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[16, 32, 32], d_model=32,
                        encoder_ffn_dim=64, decoder_ffn_dim=64, decoder_layers=1, num_queries=6,
                        encoder_attention_heads=4,
                        decoder_attention_heads=4, decoder_in_channels=[32, 32, 32], anchor_image_size=[64, 64])
    )  # fmt: skip


MODELS: dict[str, Make] = {
    "google/vit-base-patch16-224": hf("ViTForImageClassification", "ViTConfig", **_VIT),
    "google/vit-base-patch16-224-in21k": hf("ViTModel", "ViTConfig", **_VIT),
    "Falconsai/nsfw_image_detection": hf("ViTForImageClassification", "ViTConfig", **_VIT, num_labels=2),
    "facebook/dino-vitb16": hf("ViTModel", "ViTConfig", **_VIT, qkv_bias=True),
    "facebook/deit-base-distilled-patch16-224": hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", **_VIT),
    "openai/clip-vit-base-patch32": vision_and_text("CLIPModel", "CLIPConfig", patch_size=32),
    "openai/clip-vit-base-patch16": vision_and_text("CLIPModel", "CLIPConfig"),
    "openai/clip-vit-large-patch14": vision_and_text("CLIPModel", "CLIPConfig", patch_size=8),
    "openai/clip-vit-large-patch14-336": vision_and_text("CLIPModel", "CLIPConfig", image_size=96),
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": clip_model(),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": clip_model(80),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": clip_model(96),
    "google/siglip-base-patch16-224": vision_and_text("SiglipModel", "SiglipConfig"),
    "google/siglip-so400m-patch14-384": vision_and_text("SiglipModel", "SiglipConfig", image_size=96),
    "google/siglip2-base-patch16-224": vision_and_text("SiglipModel", "SiglipConfig"),
    "google/siglip2-so400m-patch16-naflex": hf("Siglip2VisionModel", "Siglip2VisionConfig", **SMALL, num_patches=16),
    "facebook/dinov2-small": hf("Dinov2Model", "Dinov2Config", **SMALL, image_size=56, patch_size=14),
    "facebook/dinov2-base": hf("Dinov2Model", "Dinov2Config", **SMALL, image_size=56, patch_size=14),
    "facebook/dinov2-large": hf("Dinov2Model", "Dinov2Config", **SMALL, image_size=70, patch_size=14),
    "facebook/dinov2-with-registers-base": hf(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **SMALL, image_size=56, patch_size=14
    ),
    "facebook/dinov3-vits16": hf("DINOv3ViTModel", "DINOv3ViTConfig", **_VIT, num_register_tokens=4),
    "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k": timm_model("vit_base_patch16_224", img_size=64, depth=2),
    "timm/vit_small_patch14_dinov2.lvd142m": timm_model("vit_small_patch14_dinov2", img_size=56, depth=2),
    "timm/vit_small_patch16_dinov3": timm_model("vit_small_patch16_dinov3", img_size=64, depth=2),
    "timm/eva02_tiny_patch14_224": timm_model("eva02_tiny_patch14_224", img_size=56, depth=2),
    "timm/ViT-B-16-SigLIP": timm_model("vit_base_patch16_siglip_224", img_size=64, depth=2),
    "apple/DFN5B-CLIP-ViT-H-14": clip_model(),
    "apple/MobileCLIP-S2": timm_model("fastvit_mci2"),
    "facebook/PE-Core-S16-384": timm_model("vit_pe_core_small_patch16_384", img_size=64, depth=2),
    "MahmoodLab/UNI": timm_model("vit_large_patch16_224", img_size=64, depth=2, init_values=1e-5),
    "owkin/phikon": hf("ViTModel", "ViTConfig", **_VIT),
    "microsoft/swin-tiny-patch4-window7-224": hf(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=64,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "microsoft/swinv2-tiny-patch4-window8-256": hf(
        "Swinv2ForImageClassification",
        "Swinv2Config",
        image_size=64,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "microsoft/beit-base-patch16-224": hf(
        "BeitForImageClassification", "BeitConfig", **_VIT, use_relative_position_bias=True
    ),
    "facebook/vit-mae-base": hf("ViTMAEModel", "ViTMAEConfig", **_VIT),
    "facebook/ijepa_vith14_1k": hf("IJepaModel", "IJepaConfig", **_VIT),
    "apple/aimv2-large-patch14-224": hf("Aimv2VisionModel", "Aimv2VisionConfig", **_VIT),
    "apple/mobilevit-small": timm_model("mobilevit_s"),
    "nvidia/segformer-b0-finetuned-ade-512-512": hf(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        image_size=64,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 32, 64],
        decoder_hidden_size=32,
    ),
    "depth-anything/Depth-Anything-V2-Small-hf": depth_anything,
    "Intel/dpt-large": hf(
        "DPTForDepthEstimation",
        "DPTConfig",
        **{**_VIT, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16] * 4,
        fusion_hidden_size=16,
    ),
    "facebook/sam-vit-base": hf(
        "SamVisionModel",
        "SamVisionConfig",
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=128,
        patch_size=16,
        window_size=3,
        global_attn_indexes=[2],
        mlp_dim=128,
        output_channels=32,
    ),
    "facebook/sam2.1-hiera-tiny": hf(
        "Sam2VisionModel",
        "Sam2VisionConfig",
        backbone_config={
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 16,
            "image_size": [128, 128],
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [16, 32, 64, 128],
            "num_attention_heads_per_stage": [1, 2, 4, 8],
            "global_attention_blocks": [3],
        },
        backbone_channel_list=[128, 64, 32, 16],
        fpn_hidden_size=32,
    ),
    "Salesforce/blip-image-captioning-base": vision_and_text(
        "BlipForConditionalGeneration", "BlipConfig", initializer_range=0.02
    ),
    "Salesforce/blip2-opt-2.7b": hf("Blip2VisionModel", "Blip2VisionConfig", **_VIT, initializer_range=0.02),
    "google/owlv2-base-patch16": hf("Owlv2VisionModel", "Owlv2VisionConfig", **_VIT),
    "facebook/detr-resnet-50": detr,
    "PekingU/rtdetr_r50vd": rt_detr,
    "hustvl/yolos-small": hf(
        "YolosForObjectDetection", "YolosConfig", **{**_VIT, "image_size": [64, 64]}, num_detection_tokens=5
    ),
    "microsoft/trocr-base-printed": encoder_decoder("DeiTModel", "DeiTConfig", **_VIT),
    "naver-clova-ix/donut-base": encoder_decoder(
        "DonutSwinModel",
        "DonutSwinConfig",
        image_size=[64, 64],
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "usyd-community/vitpose-base-simple": vitpose,
    "jinaai/jina-clip-v2": timm_model("eva02_base_patch14_224", img_size=56, depth=2),
    "llava-hf/llava-1.5-7b-hf": hf("CLIPVisionModel", "CLIPVisionConfig", **_VIT),
    "OpenGVLab/InternVL2-2B": hf(
        "InternVLVisionModel", "InternVLVisionConfig", **{**SMALL, "image_size": [64, 64], "patch_size": [16, 16]}
    ),
    "MCG-NJU/videomae-base": hf("VideoMAEModel", "VideoMAEConfig", **_VIT, num_frames=4),
    "MIT/ast-finetuned-audioset": hf("ASTModel", "ASTConfig", **SMALL, max_length=64, num_mel_bins=32),
    "google/owlvit-base-patch32": hf("OwlViTVisionModel", "OwlViTVisionConfig", **_VIT),
    "google/vivit-b-16x2": hf(
        "VivitModel",
        "VivitConfig",
        **{k: v for k, v in _VIT.items() if k != "patch_size"},
        num_frames=4,
        tubelet_size=[2, 16, 16],
    ),
}
"""Checkpoints that people run, each as a small model of its class."""
SHAPES = {
    "facebook/detr-resnet-50": (3, 64, 64),
    "PekingU/rtdetr_r50vd": (3, 64, 64),
    "MCG-NJU/videomae-base": (4, 3, 64, 64),
    "google/vivit-b-16x2": (4, 3, 64, 64),
    "MIT/ast-finetuned-audioset": (64, 32),
    "facebook/sam2.1-hiera-tiny": (3, 128, 128),
}


def check(name: str, make: Make, pictures: Path) -> dict[str, Any]:
    """Return what works of one model."""
    torch.manual_seed(0)
    started = time.perf_counter()
    found: dict[str, Any] = {"checkpoint": name, "read": None, "error": None, "merges": None, "int8": None}
    try:
        module = randomized(make())
        model = _read(module, SHAPES.get(name))
        spec = model.spec
        found["read"] = "graph" if isinstance(spec, GraphSpec) else "reader"
        found["class"] = type(module).__name__
        if isinstance(spec, GraphSpec):
            found |= {"foreign": dict(Counter(reason.partition(":")[0] for _, reason in spec.foreign))}
            found |= {"why": spec.unmergeable or None, "blocks": spec.num_layers, "tokens": spec.tokens}
        with tempfile.TemporaryDirectory() as folder:
            if model.preprocess.arrays:
                pictures = _arrays(Path(folder), model.preprocess.arrays)
            if not spec.unmergeable:
                plan = vitfold.optimize(model, merge=1)
                found["merges"] = vitfold.save(plan, f"{folder}/merged.fold").manifest.verified["median_relative_error"]
            quant = quant_from_scheme("w8a8")
            assert quant is not None
            plan = vitfold.optimize(model, quant=replace(quant, method="minmax", calibration_size=PICTURES))
            plan = calibrate_plan(plan, vitfold.find_images(pictures))
            found["int8"] = vitfold.save(plan, f"{folder}/int8.fold").manifest.verified["median_relative_error"]
    except vitfold.VitfoldError as error:
        found["error"] = str(error)
    except Exception as error:  # a model that cannot be built here is one that fails
        found["error"] = f"{type(error).__name__}: {error}"
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def _read(module: nn.Module, shape: tuple[int, ...] | None) -> Any:
    if shape is None or len(shape) == 3:
        return vitfold.adapt(module, **({} if shape is None else {"image_size": shape[1:]}))
    return vitfold.adapt(module, input_shape=shape)


def _arrays(folder: Path, shape: tuple[int, ...]) -> Path:
    """Random inputs of a model that takes no pictures."""
    (folder / "arrays").mkdir()
    random = np.random.default_rng(0)
    for i in range(PICTURES):
        np.save(folder / "arrays" / f"{i}.npy", random.standard_normal(shape, dtype=np.float32))
    return folder / "arrays"


def randomized(module: nn.Module) -> nn.Module:
    """Give parameters that are zero, as fresh models have them, small numbers."""
    with torch.no_grad():
        for one in module.parameters():
            if not one.any():
                nn.init.normal_(one, std=0.02)
    return module.eval()


def main() -> None:
    """Check all models, or those whose name holds one of the words given."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("names", nargs="*")
    arguments.add_argument("--output", type=Path)
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        random = np.random.default_rng(0)
        for i in range(PICTURES):
            Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(Path(folder) / f"{i}.png")
        for name, make in MODELS.items():
            if given.names and not any(word in name for word in given.names):
                continue
            rows.append(check(name, make, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
            if given.output is not None:
                given.output.write_text(json.dumps({"models": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
