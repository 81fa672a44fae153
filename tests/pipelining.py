"""Tiny random transformers of diffusers' classes, and calls for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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


def _pair(names: Mapping[str, Callable[[int], Any]]) -> Callable[[int], dict[str, Any]]:
    """Arguments of a prompt and of the negative one, which is the same for all."""
    return lambda i: {
        **{name: value(i) for name, value in names.items()},
        **{f"negative_{name}": value(90) for name, value in names.items()},
    }


def _masked(width: int = 16, count: int = M, dtype: Any = torch.float32) -> Callable[[int], dict[str, Any]]:
    return _pair(
        {
            "prompt_embeds": lambda i: _random(1, count, width, seed=i),
            "prompt_attention_mask": lambda _: torch.ones(1, count, dtype=dtype),
        }
    )


@dataclass(frozen=True, kw_only=True)
class Pipe:
    """A pipeline of diffusers around a family: what it lacks, its prompts and its call."""

    kind: str
    family: str
    prompt: Callable[[int], dict[str, Any]]
    call: Mapping[str, Any]
    lacks: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    scheduler: tuple[str, Mapping[str, Any]] = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    more: Mapping[str, Any] = field(default_factory=dict)


_TWO = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
_IMAGE = {"height": 64, "width": 64}
_VIDEO = {"height": 32, "width": 32, "num_frames": 5}
_EMBEDDED = {"prompt_embeds": lambda i: _random(1, M, 16, seed=i)}
_POOLED = {**_EMBEDDED, "pooled_prompt_embeds": lambda i: _random(1, 8, seed=i)}

PIPES: Mapping[str, Pipe] = {
    "flux": Pipe(
        kind="FluxPipeline",
        family="flux",
        lacks=_TWO,
        prompt=lambda i: {name: value(i) for name, value in _POOLED.items()},
        call={**_IMAGE, "guidance_scale": 3.5},
    ),
    "sd3": Pipe(
        kind="StableDiffusion3Pipeline",
        family="sd3",
        lacks=(*_TWO, "text_encoder_3", "tokenizer_3"),
        prompt=_pair(_POOLED),
        call={**_IMAGE, "guidance_scale": 3.0},
    ),
    "wan": Pipe(
        kind="WanPipeline",
        family="wan",
        prompt=_pair(_EMBEDDED),
        call={**_VIDEO, "guidance_scale": 3.0},
        more={"transformer_2": "wan", "boundary_ratio": 0.8},
    ),
    "qwen-image": Pipe(
        kind="QwenImagePipeline",
        family="qwen-image",
        scheduler=("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        prompt=_pair({**_EMBEDDED, "prompt_embeds_mask": lambda _: torch.ones(1, M, dtype=torch.long)}),
        call={**_IMAGE, "true_cfg_scale": 3.0},
    ),
    "pixart": Pipe(
        kind="PixArtSigmaPipeline",
        family="pixart",
        scheduler=("DPMSolverMultistepScheduler", {}),
        prompt=lambda i: {"negative_prompt": None, **_masked()(i)},
        call={**_IMAGE, "use_resolution_binning": False},
    ),
    "sana": Pipe(
        kind="SanaPipeline",
        family="sana",
        prompt=lambda i: {"negative_prompt": None, **_masked()(i)},
        call={"height": 128, "width": 128, "use_resolution_binning": False},
    ),
    "cogvideox": Pipe(
        kind="CogVideoXPipeline",
        family="cogvideox",
        scheduler=("CogVideoXDDIMScheduler", {}),
        prompt=_pair({"prompt_embeds": lambda i: _random(1, M, 8, seed=i)}),
        call={**_VIDEO, "max_sequence_length": M},
    ),
    "ltx": Pipe(kind="LTXPipeline", family="ltx", prompt=_masked(), call={**_IMAGE, "num_frames": 9}),
    "hunyuan-video": Pipe(
        kind="HunyuanVideoPipeline",
        family="hunyuan-video",
        lacks=_TWO,
        prompt=lambda i: {
            **{name: value(i) for name, value in _POOLED.items()},
            "prompt_attention_mask": torch.ones(1, M),
        },
        call=_VIDEO,
    ),
    "lumina2": Pipe(kind="Lumina2Pipeline", family="lumina2", prompt=_masked(dtype=torch.bool), call=_IMAGE),
    "hunyuan-dit": Pipe(
        kind="HunyuanDiTPipeline",
        family="hunyuan-dit",
        lacks=(*_TWO, "safety_checker", "feature_extractor"),
        scheduler=("DDPMScheduler", {}),
        prompt=_pair(
            {
                name: make
                for end in ("", "_2")
                for name, make in (
                    (f"prompt_embeds{end}", lambda i: _random(1, 4, 16, seed=i)),
                    (f"prompt_attention_mask{end}", lambda _: torch.ones(1, 4)),
                )
            }
        ),
        call={**_IMAGE, "use_resolution_binning": False},
        more={"requires_safety_checker": False},
    ),
}


def tiny_vae(channels: int = 4, shift: float | None = None) -> Any:
    """Return an AutoencoderKL of random weights that halves both sides of an image."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.AutoencoderKL(
            latent_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.5,
            shift_factor=shift,
        ).eval()


def tiny_pipe(name: str, vae: Any = None) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    """Return a pipeline of random weights without text encoders, prompts for it, and arguments that go with them.

    With a `tiny_vae` images are as much smaller as it makes them larger.
    """
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    own = PIPES[name]
    more = {key: FAMILIES[value].build() if isinstance(value, str) else value for key, value in own.more.items()}
    pipe = getattr(diffusers, own.kind)(
        scheduler=getattr(diffusers, own.scheduler[0])(**own.scheduler[1]),
        transformer=FAMILIES[own.family].build(),
        **{**dict.fromkeys(own.lacks), "vae": vae},
        **more,
    )
    pipe.set_progress_bar_config(disable=True)
    sizes = {} if vae is None else {"height": 16, "width": 16}
    return pipe, [own.prompt(i) for i in range(4)], {**own.call, **sizes, "output_type": "latent"}
