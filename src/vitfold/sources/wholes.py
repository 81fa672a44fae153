"""Modules that take more than images, as ones that take images: all patches seen, in their order.

SigLIP 2's towers of any number of patches (NaFlex) at one size, MAE's encoder without its random mask, and CLIP's text
tower, whose pooling picks a row of each text by its words.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from vitfold.errors import SourceError
from vitfold.sources.reader import class_name

NAFLEX = ("transformers.Siglip2VisionModel", "transformers.Siglip2ForImageClassification")
MASKED = ("transformers.ViTMAEModel",)
TEXTS = ("transformers.CLIPTextModel", "transformers.CLIPTextModelWithProjection")
_EARLIER_EOS, _TWICE = 2, 1.5
"""What configurations of old called the end of a text, whose end is its largest number then."""
_INNER = {"transformers.Siglip2Model": "vision_model", "transformers.ViTMAEForPreTraining": "vit"}


def fed_by_one_array(module: nn.Module, size: tuple[int, int] | None) -> nn.Module:
    """Return a module that is fed by one array and shares its weights with this one, or this one.

    Raises:
        SourceError: if the size holds no whole patches.
    """
    module = module.get_submodule(_INNER.get(class_name(module), ""))
    if class_name(module) in NAFLEX:
        return FixedGrid(module, size)
    if class_name(module) in TEXTS:
        return PooledText(module)
    if class_name(module) in MASKED:
        embeddings = copy.copy(module.get_submodule("embeddings"))
        embeddings.random_masking = _unmasked  # type: ignore[assignment]
        return _sharing(module, "embeddings", embeddings)
    return module


def _unmasked(sequence: Tensor, noise: Tensor | None = None) -> tuple[Tensor, None, None]:  # noqa: ARG001
    return sequence, None, None


class FixedGrid(nn.Module):
    """A tower of SigLIP 2 for images of one size (height, width): its positions resized once, no patch padded."""

    size: tuple[int, int]

    def __init__(self, tower: nn.Module, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        config: Any = tower.config
        config = getattr(config, "vision_config", config)
        self.side = int(config.patch_size)
        height, width = size or (math.isqrt(int(config.num_patches)) * self.side,) * 2
        if height % self.side or width % self.side:
            raise SourceError(
                f"{height} x {width} pixels are no whole patches of {self.side}; give multiples, as --image-size "
                f"{height // self.side * self.side or self.side}x{width // self.side * self.side or self.side}"
            )
        grid = height // self.side, width // self.side
        self.tower, self.size = _with_positions(tower, grid), (height, width)
        self.grid = grid

    def forward(self, pixel_values: Tensor) -> Any:
        """Return the tower's outputs for images (B, 3, H, W).

        A patch is flattened as its processor does: rows, columns, channels.
        """
        (down, across), side = self.grid, self.side
        parted = pixel_values.reshape(-1, pixel_values.shape[1], down, side, across, side)
        patches = parted.permute(0, 2, 4, 3, 5, 1).reshape(-1, down * across, side * side * pixel_values.shape[1])
        return self.tower(pixel_values=patches, pixel_attention_mask=None, spatial_shapes=None)


class PooledText(nn.Module):
    """A text tower of CLIP that weighs rows by 0 and 1 where the original picks one by a computed index."""

    main_input_name = "input_ids"

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.config: Any = tower.config

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return embeddings and tokens for texts (B, N): the row of the first end of a text is pooled."""
        x: Tensor = self.tower(input_ids=input_ids).last_hidden_state
        end = input_ids.amax(1, keepdim=True) if self.config.eos_token_id == _EARLIER_EOS else self.config.eos_token_id
        ends = (input_ids == end).float()
        first = ends * (ends.cumsum(1) < _TWICE).float()
        pooled = (x * first[:, :, None]).sum(1)
        projection = getattr(self.tower, "text_projection", None)
        name = "pooler_output" if projection is None else "text_embeds"
        return {name: pooled if projection is None else projection(pooled), "last_hidden_state": x}


class _Embedded(nn.Module):
    """The embeddings of a tower at one grid."""

    def __init__(self, patch_embedding: nn.Module, positions: Tensor) -> None:
        super().__init__()
        self.patch_embedding = patch_embedding
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, pixel_values: Tensor, _: Tensor | None = None) -> Tensor:
        """Return embedded patches (B, N, D)."""
        embedded: Tensor = self.patch_embedding(pixel_values) + self.positions
        return embedded


def _with_positions(tower: nn.Module, grid: tuple[int, int]) -> nn.Module:
    """A tower that shares its weights with the given one, which is left as it is."""
    name = "vision_model" if hasattr(tower, "vision_model") else ""
    inner: Any = tower.get_submodule(name)
    embeddings = inner.embeddings
    table = embeddings.position_embedding.weight.detach().reshape(*(embeddings.position_embedding_size,) * 2, -1)
    count = grid[0] * grid[1]
    positions = embeddings.resize_positional_embeddings(table, torch.tensor([grid]), max_length=count)
    changed = _sharing(inner, "embeddings", _Embedded(embeddings.patch_embedding, positions))
    return _sharing(tower, name, changed) if name else changed


def _sharing(module: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """A copy of a module with another part; all others are shared."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, name: part}
    return changed
