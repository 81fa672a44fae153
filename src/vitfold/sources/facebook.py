"""Diffusion Transformers as state dicts with the names of DiT's own repository (facebookresearch/DiT).

What a state dict does not tell: the noise schedule, which is the one of that repository, and the number of heads,
which follows from the width of the published models.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitfold.errors import SourceError
from vitfold.model import Array, DiTModel, DiTSpec, Origin
from vitfold.model.dit import unit_norm

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Width -> heads of DiT-S, -B, -L and -XL."""
SCHEDULE: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}
_PREFIXES = ("module.", "_orig_mod.", "model.")
_NAMES = (
    "x_embedder.proj.weight, pos_embed, t_embedder.mlp.0.weight, blocks.0.attn.qkv.weight, final_layer.linear.weight"
)


def read_state_dict(path: Path, heads: int | None, origin: Origin) -> DiTModel:
    """Read FILE.pt (without running what a pickle may hold) or FILE.safetensors.

    Raises:
        SourceError: if it cannot be read, or is no state dict of a Diffusion Transformer.
    """
    state = _load(path)
    try:
        spec = _spec(state, heads)
        params = _params(spec, state)
    except KeyError as error:
        raise SourceError(
            f"{path} holds no weight {error.args[0]!r}; a state dict of DiT's own repository has {_NAMES}, ..."
        ) from None
    if state:
        raise SourceError(f"{path} holds weights that the program does not know: {', '.join(sorted(state)[:4])}")
    return DiTModel(
        spec=spec, params=params, schedule=SCHEDULE, labels=None, origin=origin, latent=spec.channels not in (1, 3)
    )


def _load(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:  # DiT's own trainer keeps its arguments beside the weights: plain values, which are not read
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(path, "cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise SourceError(f"{path} cannot be read as weights alone ({reason}); save a state dict of tensors") from None
    for key in ("ema", "model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise SourceError(f"{path} is no state dict: it has to map names to tensors; save model.state_dict()")
    while found and (prefix := next((one for one in _PREFIXES if all(n.startswith(one) for n in found)), None)):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return {name: np.ascontiguousarray(value.float().numpy()) for name, value in found.items()}


def _spec(state: dict[str, Array], heads: int | None) -> DiTSpec:
    width, channels, patch, _ = _shape(state, "x_embedder.proj.weight", 4)
    tokens = _shape(state, "pos_embed", 3)[1]
    grid = round(tokens**0.5)
    if grid * grid != tokens:
        raise SourceError(f"pos_embed holds {tokens} positions, which are no square; vitfold runs square images")
    heads = heads or HEADS.get(width)
    if heads is None:
        raise SourceError(f"a model of width {width} is none of the published ones; say how many heads it has: --heads")
    depth = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
    return DiTSpec(
        image_size=grid * patch,
        patch_size=patch,
        channels=channels,
        outputs=_shape(state, "final_layer.linear.weight", 2)[0] // patch**2,
        embed_dim=width,
        num_layers=depth,
        num_heads=heads,
        mlp_dim=_shape(state, "blocks.0.mlp.fc1.weight", 2)[0],
        classes=_shape(state, "y_embedder.embedding_table.weight", 2)[0] - 1,
        freq_dim=_shape(state, "t_embedder.mlp.0.weight", 2)[1],
    )


def _shape(state: dict[str, Array], name: str, rank: int) -> tuple[int, ...]:
    shape = state[name].shape
    if len(shape) != rank:
        raise SourceError(f"weight {name} has shape {shape}, where {rank} axes belong; the file is damaged")
    return shape


def _params(spec: DiTSpec, state: dict[str, Array]) -> dict[str, Array]:
    params: dict[str, Array] = {"pos_embed": state.pop("pos_embed"), **unit_norm(spec.embed_dim)}

    def linear(name: str, layer: str) -> None:
        params[f"{name}.weight"] = state.pop(f"{layer}.weight")
        if f"{layer}.bias" in state:
            params[f"{name}.bias"] = state.pop(f"{layer}.bias")

    linear("patch_embed", "x_embedder.proj")
    linear("condition.time.fc1", "t_embedder.mlp.0")
    linear("condition.time.fc2", "t_embedder.mlp.2")
    params["condition.label.weight"] = np.ascontiguousarray(state.pop("y_embedder.embedding_table.weight").T)
    for block in range(spec.num_layers):
        here = f"blocks.{block}"
        linear(f"{here}.modulation", f"{here}.adaLN_modulation.1")
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            linear(f"{here}.{layer}", f"{here}.{layer}")
    linear("head.modulation", "final_layer.adaLN_modulation.1")
    linear("head.proj", "final_layer.linear")
    return params
