"""Weights in a safetensors file, with the name of the timm architecture that they belong to.

The architecture is built and translated by `timm`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vitfold.errors import SourceError, nearest
from vitfold.model import preprocess_from_dict
from vitfold.sources import timm as timm_source
from vitfold.sources.reader import Built, class_name
from vitfold.sources.sizes import parse_size
from vitfold.sources.states import plain_names

SIDECAR_KEYS = ("arch", "num_classes", "image_size", "labels", "preprocess", "problem")


def build(path: Path, *, arch: str | None, num_classes: int | None, image_size: int | tuple[int, int] | None) -> Built:
    """Create `arch` with the weights of `path`; what is not given comes from the sidecar, then from the file.

    Raises:
        SourceError: if the file is missing, damaged, or does not hold this architecture's weights.
    """
    state = plain_names(read_state(path), path=path)
    sidecar = read_sidecar(path.with_suffix(".json"))
    arch = arch or sidecar.get("arch")
    if arch is None:
        raise SourceError(f"{path} does not say which architecture it holds; pass --arch with a timm name, such as "
                          "--arch vit_small_patch14_dinov2")  # fmt: skip
    if num_classes is None:
        num_classes = sidecar.get("num_classes", len(state["head.weight"]) if "head.weight" in state else 0)
    image_size = image_size or parse_size(sidecar.get("image_size")) or _image_size(state)
    module, _ = timm_source.build(arch, num_classes=num_classes, image_size=image_size, pretrained=False)
    load_state(module, state, path=path, arch=arch)
    facts: dict[str, Any] = {}
    if sidecar.get("labels") is not None:
        facts["labels"] = tuple(str(label) for label in sidecar["labels"])
    if sidecar.get("preprocess") is not None:
        facts["preprocess"] = preprocess_from_dict(sidecar["preprocess"])
    if sidecar.get("problem") is not None:
        facts["problem"] = sidecar["problem"]
    return module, facts


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file as float32."""
    if not path.is_file():
        raise SourceError(f"no file {path}; check the path")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise SourceError(
            f"{path} is not a readable safetensors file ({error}); it is damaged or of another format: fetch it again, "
            "or save the weights with safetensors.torch.save_file"
        ) from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def read_sidecar(path: Path) -> dict[str, Any]:
    """Return the sidecar's values, or nothing where there is no sidecar."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SourceError(f"{path} is not valid JSON: {error}; mend or remove it") from None
    if not isinstance(values, dict):
        raise SourceError(f"{path} must hold a JSON object with the keys {', '.join(SIDECAR_KEYS)}")
    for key in values:
        if key not in SIDECAR_KEYS:
            raise SourceError(f"{path} has an unknown key {key!r}; {nearest(key, SIDECAR_KEYS)}")
    return values


def _image_size(state: dict[str, Tensor]) -> int | None:
    """Return the square image size that the file's positions were saved for, or None for the architecture's own."""
    positions, patch = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if positions is None or patch is None or positions.ndim != 3 or patch.ndim != 4 or patch.shape[2] != patch.shape[3]:
        return None
    prefix = sum(state[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in state)
    for rows in (positions.shape[1] - prefix, positions.shape[1]):
        side = math.isqrt(max(rows, 0))
        if side and side * side == rows:
            return side * int(patch.shape[2])
    return None


def load_state(module: Any, state: dict[str, Tensor], *, path: Path, arch: str) -> None:
    """Put the file's tensors into the module; positions of another grid are resampled.

    Raises:
        SourceError: naming missing, unexpected and misshapen tensors.
    """
    from timm.layers import resample_abs_pos_embed

    wanted = module.state_dict()
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or extra:
        cure = f"check --arch {arch}"
        if any("head" in name for name in (*missing, *extra)):
            cure += " and --num-classes (0 for weights without a head)"
        raise SourceError(
            f"{path.name} does not hold the weights of {arch}: missing {missing[:4] or 'none'} ({len(missing)}), "
            f"unexpected {extra[:4] or 'none'} ({len(extra)}); {cure}"
        )
    positions = state.get("pos_embed")
    if positions is not None and positions.shape != wanted["pos_embed"].shape:
        prefix = 0 if module.no_embed_class else module.num_prefix_tokens
        rows = positions.shape[1] - prefix
        if positions.shape[2] == wanted["pos_embed"].shape[2] and math.isqrt(max(rows, 0)) ** 2 == rows:
            grid = list(module.patch_embed.grid_size)
            state = {**state, "pos_embed": resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)}
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            cure = "check --num-classes" if name.startswith("head") else f"check --arch {arch} and --image-size"
            raise SourceError(
                f"{path.name}: {name} has shape {tuple(tensor.shape)}, {arch} needs {tuple(wanted[name].shape)}; {cure}"
            )
    assert class_name(module) in timm_source.CLASSES
    with torch.no_grad():
        module.load_state_dict(state, assign=True)
