"""Bundles of a PixArt of random weights at a medium size, in float and in 8 bits, to compare what a step takes.

Usage: python examples/random_pixart.py FOLDER, then vitfold diffusion bench FOLDER/float.fold FOLDER/int8.fold
--embeddings FOLDER/prompts.safetensors --batch 1 --threads 1. Images say nothing: the weights are random.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

import vitfold

WIDTH, TEXT, STEPS = 384, 32, 20
CALL = {"height": 256, "width": 256, "use_resolution_binning": False, "guidance_scale": 4.5}
"""32 x 32 latents, 256 tokens."""


def build() -> Any:
    """Return a pipeline of twelve blocks without encoder and VAE."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=WIDTH // 64,
        attention_head_dim=64,
        num_layers=12,
        sample_size=32,
        patch_size=2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        norm_elementwise_affine=False,
        use_additional_conditions=False,
    ).eval()
    scheduler = DPMSolverMultistepScheduler()
    pipe = PixArtSigmaPipeline(
        scheduler=scheduler, transformer=transformer, vae=None, text_encoder=None, tokenizer=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(seed: int) -> dict[str, Any]:
    """Return random embeddings as arguments of the pipeline."""
    mask = torch.ones(1, TEXT)
    given, negative = (torch.randn((1, TEXT, WIDTH), generator=torch.Generator().manual_seed(s)) for s in (seed, 90))
    return {
        "negative_prompt": None,
        "prompt_embeds": given,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": mask,
    }


def main() -> None:
    """Write embeddings and both bundles."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    pipe, prompts = build(), [prompt(i) for i in range(4)]
    vitfold.embed_prompts(pipe, prompts, **CALL).save(folder / "prompts.safetensors")
    for name, quant in (("float", "none"), ("int8", "w8a8")):
        path = folder / f"{name}.fold"
        bundle = vitfold.export_steps(pipe, "none", prompts, path, steps=STEPS, quant=quant, overwrite=True, **CALL)
        print(path, f"{bundle.size_bytes / 1e6:.1f} MB", bundle.manifest.steps.fidelity)


if __name__ == "__main__":
    main()
