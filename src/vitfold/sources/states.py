"""Names in a state dict: what trainers put before them, and the names of other repositories.

What is not exactly that is refused with the cure.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vitfold.errors import SourceError

State = dict[str, Tensor]

PREFIXES = (
    "teacher.backbone.", "teacher.", "module.", "_orig_mod.", "model.", "backbone.", "encoder.", "net.", "network.",
    "state_dict.", "model_ema.", "ema.",
)  # fmt: skip
"""What DataParallel, torch.compile, Lightning and self-supervised trainers put before every name."""
_BACKBONE = "teacher.backbone."
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+\..*)$")
_log = logging.getLogger("vitfold")

# Signs of a repository's own names -> what to do, with {path}, {folder}.
_OTHERS = (
    (
        re.compile(r"(^|\.)embeddings\.(patch_embeddings\.projection|patch_embedding)\."),
        "those are the names of transformers, whose configuration says what they compute: put its config.json beside "
        "the file and write hf:{folder}",
    ),
    (
        re.compile(r"(^|\.)transformer_blocks\.\d+\."),
        "those are the names of diffusers; write hf:FOLDER for the folder that save_pretrained wrote",
    ),
    (
        re.compile(r"^(x_embedder|y_embedder|t_embedder)\."),
        "that is a Diffusion Transformer; make it faster: vitfold diffusion optimize {path}, or draw with it: vitfold "
        "diffusion sample {path}",
    ),
    (
        re.compile(r"^encoder\.layers\.encoder_layer_\d+\."),
        "those are the names of torchvision; load them into its model and pass that to vitfold.adapt in Python",
    ),
    (
        re.compile(r"(^|\.)visual\.(conv1|transformer|trunk)\.|^(conv1\.weight|transformer\.resblocks\.)"),
        "those are the names of open_clip; load them into its model and pass model.visual to vitfold.adapt in Python",
    ),
    (
        re.compile(r"\.lora_[AB]\."),
        "that is a LoRA adapter alone; write hf:FOLDER for its folder, with adapter_config.json and the base beside it",
    ),
)  # fmt: skip


def plain_names(state: Mapping[str, Tensor], *, path: Path) -> State:
    """Return the weights under timm's names, where they only carry a prefix or DINOv2's own names.

    Raises:
        SourceError: if they are another repository's, saying how to load those.
    """
    found = dict(state)
    if not found:
        raise SourceError(f"{path} holds no tensor; save the weights with safetensors.torch.save_file")
    found = _without_prefixes(found, path)
    _refuse_others(found, path)
    return _without_chunks(_dinov2(found))


def _without_prefixes(state: State, path: Path) -> State:
    inside = {name: tensor for name, tensor in state.items() if name.startswith(_BACKBONE)}
    if inside and len(inside) < len(state):
        left = sorted(name for name in state if name not in inside)
        _log.warning(
            "%s: the teacher's backbone is taken, and %d other tensors are left out (%s, ...)",
            path.name, len(left), left[0],
        )  # fmt: skip
        state = inside
    while True:
        prefix = next((one for one in PREFIXES if all(name.startswith(one) for name in state)), None)
        if prefix is None:
            return state
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _refuse_others(state: State, path: Path) -> None:
    for sign, cure in _OTHERS:
        name = next((name for name in sorted(state) if sign.search(name)), None)
        if name is not None:
            shown = cure.format(path=path, folder=path.parent)
            raise SourceError(f"{path.name} holds {name}, which is none of timm's names; {shown}")


def _dinov2(state: State) -> State:
    """DINOv2's own names; its registers follow the class token, whose position is added to it, as timm does."""
    if "mask_token" not in state or "cls_token" not in state or "pos_embed" not in state:
        return state
    state = {name: tensor for name, tensor in state.items() if name != "mask_token"}
    if "register_tokens" in state:
        positions = state["pos_embed"]
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    return {re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", k)): v for k, v in state.items()}


def _without_chunks(state: State) -> State:
    """Blocks in chunks, as DINOv2's trainer writes them (blocks.1.7.norm1), in one row (blocks.7.norm1)."""
    blocks = [name for name in state if name.startswith("blocks.")]
    if not blocks or not all(_CHUNK.match(name) for name in blocks):
        return state
    return {(f"blocks.{found[1]}" if (found := _CHUNK.match(name)) else name): one for name, one in state.items()}
