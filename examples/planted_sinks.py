"""CLIP and SigLIP vision towers of the true architecture with sink tokens planted in a middle block.

Usage: python examples/planted_sinks.py clip|siglip OUT_FOLDER [CLASS_FOLDERS]; then
`vitfold outliers hf:OUT_FOLDER --images DIR`. With class folders of images, OUT_FOLDER/prototypes.npy gets the mean
embedding of every class, in place of text embeddings, for `vitfold evaluate --zero-shot`.

Trained towers can't be had everywhere, and random weights have no outliers. So random weights get a circuit that
makes them as they are described (2510.04547, section 3): patches at a few positions, the more so if bright, are
candidates. In the middle block a head measures how much attention candidates get in all; the MLP of that block turns a
candidate into a sink, with scaled channels and enormous norm, unless they get enough. Copies of a candidate's keys and
values thus keep the others from becoming sinks; deletion removes the candidates.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import vitfold
from vitfold.architectures.programs import forward
from vitfold.images import batches
from vitfold.ops.run import Run

WIDTH, DEPTH, HEADS, MLP, IMAGE, PATCH = 192, 8, 6, 768, 128, 16
PATCHES = (IMAGE // PATCH) ** 2
MIDDLE = 3
CANDIDATE, FLAG, SINK = range(3)
RESERVED = 3
POSITIONS = 2
ENOUGH = {"clip": 1750.0, "siglip": 1400.0}
"""How strongly attention to candidates holds the sinks down: between what they get alone and with a register."""


def plant(family: str) -> nn.Module:
    """Return a tower with random weights and the circuit, seeded."""
    import transformers as hf

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": MLP,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
    if family == "clip":
        config = hf.CLIPVisionConfig(**sizes, projection_dim=128)
        module: Any = hf.CLIPVisionModelWithProjection(config)
    else:
        module = hf.SiglipVisionModel(hf.SiglipVisionConfig(**sizes))
    with torch.no_grad():
        _randomize(module)
        tower = module.vision_model if hasattr(module, "vision_model") else module
        _candidates(tower.embeddings)
        for layer in tower.encoder.layers:
            _keep_reserved_channels(layer)
        _circuit(tower.encoder.layers[MIDDLE], ENOUGH[family])
        for layer in tower.encoder.layers[MIDDLE + 1 :]:
            _attend_to_sinks(layer.self_attn)
    return module.eval()


def _randomize(module: nn.Module) -> None:
    """Weights of variance 1 / inputs, queries and keys sharper, so that outputs depend on the image."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and "embedding" not in name:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.normal_(0.0, gain / parameter.shape[1] ** 0.5)
        elif name.endswith("bias") and "norm" not in name:
            parameter.normal_(0.0, 0.1)


def _candidates(embeddings: Any) -> None:
    """The first channel says how much a patch looks like a sink: bright, at one of a few positions."""
    patch = embeddings.patch_embedding.weight
    patch.normal_(0.0, 1.5 / patch[0].numel() ** 0.5)
    patch[:RESERVED] = 0.0
    patch[CANDIDATE] = 0.6 / patch[0].numel()
    positions: Tensor = embeddings.position_embedding.weight
    positions.normal_(0.0, 0.5)
    positions[:, :RESERVED] = 0.0
    first = len(positions) - PATCHES
    chosen = torch.randperm(PATCHES)[:POSITIONS] + first
    positions[chosen, CANDIDATE] = 12.0
    if hasattr(embeddings, "class_embedding"):
        embeddings.class_embedding.normal_(0.0, 1.0)
        embeddings.class_embedding[:RESERVED] = 0.0


def _keep_reserved_channels(layer: Any) -> None:
    """Random layers neither read nor write the channels of the circuit."""
    attention, mlp = layer.self_attn, layer.mlp
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1):
        linear.weight[:, :RESERVED] = 0.0
    for linear in (attention.out_proj, mlp.fc2):
        linear.weight[:RESERVED] = 0.0
        linear.bias[:RESERVED] = 0.0


def _circuit(layer: Any, enough: float) -> None:
    """Head 0 measures the attention that candidates get; hidden unit 0 fires on candidates where that is little."""
    attention, mlp = layer.self_attn, layer.mlp
    width = WIDTH // HEADS
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        linear.weight[:width] = 0.0
        linear.bias[:width] = 0.0
    attention.out_proj.weight[:, :width] = 0.0
    attention.q_proj.bias[0] = 0.68 * width**0.5
    attention.k_proj.weight[0, CANDIDATE] = 1.0
    attention.v_proj.weight[0, CANDIDATE] = 1.0
    attention.out_proj.weight[FLAG, 0] = 1.0
    unit = mlp.fc1.weight[0]
    unit.zero_()
    unit[CANDIDATE], unit[FLAG], mlp.fc1.bias[0] = 500.0, -enough, 0.0
    mlp.fc2.weight[:, 0] = 0.0
    mlp.fc2.weight[SINK, 0] = 0.5


def _attend_to_sinks(attention: Any) -> None:
    """One dimension of every head answers to sinks: a little more of the attention goes there."""
    width = WIDTH // HEADS
    for head in range(HEADS):
        row = head * width
        attention.q_proj.weight[row] = 0.0
        attention.k_proj.weight[row] = 0.0
        attention.q_proj.bias[row] = 1.0
        attention.k_proj.bias[row] = 0.0
        attention.k_proj.weight[row, SINK] = 0.02 * width**0.5


def prototypes(folder: Path, images: Path) -> np.ndarray:
    """Return the mean unit embedding of every class folder, one row each."""
    model, found = vitfold.load(f"hf:{folder.absolute()}"), vitfold.find_images(images)
    if found.class_index is None or found.classes is None:
        raise SystemExit(f"{images} has no class folders")
    total = torch.zeros(len(found.classes), model.spec.output_width)
    ops, merge = Run(model.params), vitfold.MergeRecipe(r=())
    for group in batches(found, model.preprocess, batch=32):
        with torch.inference_mode():
            embeds = forward(ops, model.spec, merge, torch.from_numpy(group.pixel_values))
        index = torch.tensor([found.class_index[i] for i in group.index])
        total.index_add_(0, index, torch.nn.functional.normalize(embeds, dim=-1))
    return torch.nn.functional.normalize(total, dim=-1).numpy()


def main() -> None:
    """Write a tower in transformers' format, and prototypes of classes where there are images."""
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in ("clip", "siglip"):
        raise SystemExit(__doc__)
    folder = Path(sys.argv[2])
    plant(sys.argv[1]).save_pretrained(folder)  # type: ignore[operator]
    if len(sys.argv) == 4:
        np.save(folder / "prototypes.npy", prototypes(folder, Path(sys.argv[3])))
    print(folder)


if __name__ == "__main__":
    main()
