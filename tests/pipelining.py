"""Tiny random transformers of diffusers' classes, and calls for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

N, M, B = 16, 5, 2
"""Image tokens, text tokens, batch."""


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of diffusers at a tiny size: how a latent becomes the arguments of a call, and its lists of blocks."""

    kind: str
    config: Mapping[str, Any]
    latent: tuple[int, ...]
    given: Callable[[], dict[str, Any]]
    blocks: tuple[str, ...]
    streams: tuple[tuple[str, ...], ...]
    count: int
    learned_sigma: bool = False

    def build(self) -> Any:
        """Return a transformer none of whose parameters is zero."""
        diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = getattr(diffusers, self.kind)(**self.config).eval()
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        return module

    def call(self, module: Any, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return what a transformer predicts of latents at one timestep."""
        given = self.given()
        rows = t.reshape(1).expand(len(latents)).to(latents.dtype)
        cast = {
            name: value.to(latents.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in given.items()
        }
        found = module(latents, timestep=rows, return_dict=False, **cast)[0]
        return found.chunk(2, dim=1)[0] if self.learned_sigma else found


_DUAL = {"attention_head_dim": 8, "num_attention_heads": 2}
_TEXT = ("text", "image")
_BOTH = ("image", "text")
_ONE = ("image",)

FAMILIES: Mapping[str, Family] = {
    "flux": Family(
        kind="FluxTransformer2DModel",
        config={
            **_DUAL,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 3,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (2, 2, 4),
        },
        latent=(B, N, 4),
        given=lambda: {
            "encoder_hidden_states": _random(B, N, 16),  # as many as the image has: shapes do not tell them apart
            "pooled_projections": _random(B, 8),
            "img_ids": torch.zeros(N, 3),
            "txt_ids": torch.zeros(N, 3),
        },
        blocks=("transformer_blocks", "single_transformer_blocks"),
        streams=(_TEXT, _TEXT),
        count=5,
    ),
    "sd3": Family(
        kind="SD3Transformer2DModel",
        config={
            **_DUAL,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 8,
            "out_channels": 4,
            "pos_embed_max_size": 8,
        },
        latent=(B, 4, 8, 8),
        given=lambda: {"encoder_hidden_states": _random(B, M, 16), "pooled_projections": _random(B, 8)},
        blocks=("transformer_blocks",),
        streams=(_TEXT,),
        count=3,
    ),
    "pixart": Family(
        kind="PixArtTransformer2DModel",
        config={
            **_DUAL,
            "sample_size": 8,
            "num_layers": 3,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "in_channels": 4,
            "out_channels": 8,
            "norm_elementwise_affine": False,
            "use_additional_conditions": False,
        },
        latent=(B, 4, 8, 8),
        given=lambda: {"encoder_hidden_states": _random(B, M, 16), "added_cond_kwargs": {}},
        blocks=("transformer_blocks",),
        streams=(_ONE,),
        count=3,
        learned_sigma=True,
    ),
    "sana": Family(
        kind="SanaTransformer2DModel",
        config={
            **_DUAL,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 4,
            "patch_size": 1,
        },
        latent=(B, 4, 4, 4),
        given=lambda: {"encoder_hidden_states": _random(B, M, 16)},
        blocks=("transformer_blocks",),
        streams=(_ONE,),
        count=3,
    ),
    "wan": Family(
        kind="WanTransformer3DModel",
        config={
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 3,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        latent=(B, 4, 2, 4, 4),
        given=lambda: {"encoder_hidden_states": _random(B, M, 16)},
        blocks=("blocks",),
        streams=(_ONE,),
        count=3,
    ),
    "hunyuan-video": Family(
        kind="HunyuanVideoTransformer3DModel",
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 2,
            "patch_size": 1,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        latent=(B, 4, 1, 4, 4),
        given=lambda: {
            "encoder_hidden_states": _random(B, M, 16),
            "pooled_projections": _random(B, 8),
            "encoder_attention_mask": torch.ones(B, M),
            "guidance": torch.full((B,), 6.0),
        },
        blocks=("transformer_blocks", "single_transformer_blocks"),
        streams=(_BOTH, _BOTH),
        count=4,
    ),
    "qwen-image": Family(
        kind="QwenImageTransformer2DModel",
        config={
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        latent=(B, N, 16),
        given=lambda: {
            "encoder_hidden_states": _random(B, M, 16),
            "encoder_hidden_states_mask": torch.ones(B, M, dtype=torch.long),
            "img_shapes": [[(1, 4, 4)]] * B,
        },
        blocks=("transformer_blocks",),
        streams=(_TEXT,),
        count=3,
    ),
    "cogvideox": Family(
        kind="CogVideoXTransformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": 8,
            "num_layers": 3,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 5,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": M,
        },
        latent=(B, 2, 4, 4, 4),
        given=lambda: {"encoder_hidden_states": _random(B, M, 8)},
        blocks=("transformer_blocks",),
        streams=(_BOTH,),
        count=3,
    ),
    "ltx": Family(
        kind="LTXVideoTransformer3DModel",
        config={
            **_DUAL,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "num_layers": 3,
            "caption_channels": 16,
        },
        latent=(B, N, 4),
        given=lambda: {
            "encoder_hidden_states": _random(B, M, 16),
            "encoder_attention_mask": torch.ones(B, M),
            "num_frames": 1,
            "height": 4,
            "width": 4,
        },
        blocks=("transformer_blocks",),
        streams=(_ONE,),
        count=3,
    ),
    "lumina2": Family(
        kind="Lumina2Transformer2DModel",
        config={
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 16,
        },
        latent=(B, 4, 8, 8),
        given=lambda: {
            "encoder_hidden_states": _random(B, M, 16),
            "encoder_attention_mask": torch.ones(B, M, dtype=torch.bool),
        },
        blocks=("layers",),
        streams=(_ONE,),
        count=3,
    ),
    "hunyuan-dit": Family(
        kind="HunyuanDiT2DModel",
        config={
            **_DUAL,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 16,
            "num_layers": 4,
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 8,
            "text_len": 4,
            "text_len_t5": 4,
            "activation_fn": "gelu-approximate",
        },
        latent=(B, 4, 8, 8),
        given=lambda: {
            "encoder_hidden_states": _random(B, 4, 16),
            "text_embedding_mask": torch.ones(B, 4),
            "encoder_hidden_states_t5": _random(B, 4, 16),
            "text_embedding_mask_t5": torch.ones(B, 4),
            "image_meta_size": torch.ones(B, 6),
            "style": torch.zeros(B, dtype=torch.long),
            "image_rotary_emb": [torch.ones(N, 8), torch.zeros(N, 8)],
        },
        blocks=("blocks",),
        streams=(_ONE,),
        count=4,
        learned_sigma=True,
    ),
    "dit": Family(
        kind="DiTTransformer2DModel",
        config={
            **_DUAL,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "num_layers": 3,
            "num_embeds_ada_norm": 10,
        },
        latent=(B, 4, 8, 8),
        given=lambda: {"class_labels": torch.tensor([3, 7])},
        blocks=("transformer_blocks",),
        streams=(_ONE,),
        count=3,
    ),
}


def tiny_pipe(name: str) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    """Return a pipeline of random weights without text encoders, prompts for it, and arguments that go with them."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    if name == "flux":
        pipe = diffusers.FluxPipeline(scheduler=scheduler, transformer=FAMILIES["flux"].build(), **none)
        prompts = [
            {"prompt_embeds": _random(1, M, 16, seed=i), "pooled_prompt_embeds": _random(1, 8, seed=i)}
            for i in range(4)
        ]
        call = {"height": 64, "width": 64, "guidance_scale": 3.5}
    elif name == "sd3":
        more = dict.fromkeys(("text_encoder_3", "tokenizer_3"))
        pipe = diffusers.StableDiffusion3Pipeline(
            scheduler=scheduler, transformer=FAMILIES["sd3"].build(), **none, **more
        )
        prompts = [
            {
                "prompt_embeds": _random(1, M, 16, seed=i),
                "negative_prompt_embeds": _random(1, M, 16, seed=90),
                "pooled_prompt_embeds": _random(1, 8, seed=i),
                "negative_pooled_prompt_embeds": _random(1, 8, seed=90),
            }
            for i in range(4)
        ]
        call = {"height": 64, "width": 64, "guidance_scale": 3.0}
    else:
        first, second = (FAMILIES["wan"].build() for _ in range(2))
        pipe = diffusers.WanPipeline(
            scheduler=scheduler,
            transformer=first,
            transformer_2=second,
            boundary_ratio=0.8,
            **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
        )
        prompts = [
            {"prompt_embeds": _random(1, M, 16, seed=i), "negative_prompt_embeds": _random(1, M, 16, seed=90)}
            for i in range(4)
        ]
        call = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0}
    pipe.set_progress_bar_config(disable=True)
    return pipe, prompts, {**call, "output_type": "latent"}
