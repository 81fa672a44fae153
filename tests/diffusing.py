"""Tiny random Diffusion Transformers of diffusers, in memory and as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vitfold.model import DiTModel, Origin

CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "patch_size": 4,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_embeds_ada_norm": 3,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
}
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
ORIGIN = Origin(source="tests:dit", loader="tests", arguments={})


def build_module(**overrides: Any) -> Any:
    """Return a module whose parameters all matter: none is zero, gates included."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = diffusers.DiTTransformer2DModel(**{**CONFIG, **overrides}).eval()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    return module


def build_tiny_dit(**overrides: Any) -> DiTModel:
    from vitfold.sources.diffusers import translate

    return translate(build_module(**overrides), SCHEDULE, origin=ORIGIN)


def write_folder(folder: Path, **overrides: Any) -> Path:
    """Write a pipeline's folder without a VAE: pixels come out."""
    folder.mkdir(parents=True, exist_ok=True)
    build_module(**overrides).save_pretrained(folder / "transformer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULE), encoding="utf-8")
    return folder
