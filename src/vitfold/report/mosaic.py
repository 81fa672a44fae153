"""Pictures of merged tokens: every merged group in the mean colour of its patches, with a border.

Which patches are merged comes in as arrays.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

LIGHT, DARK = (255, 255, 255), (30, 34, 42)
_LUMA = np.array([0.299, 0.587, 0.114])
_BRIGHT = 160
"""Where the picture is brighter than this, of 255, borders are dark."""
LEAST_SIDE = 224
"""Pixels; smaller inputs are drawn larger, so that borders stay thin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One picture as a data URL, with the lines of its caption."""

    title: str
    lines: tuple[str, ...]
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """One photo, block by block: first as the model sees it, then behind every block that merges."""

    name: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What pictures are drawn from: photos, the row that holds each patch behind every block, tokens and work.

    `tokens` are those that enter each block and leave the last, `flops` the operations of each block for one image.
    """

    title: str
    names: tuple[str, ...]
    photos: UInt8[np.ndarray, "B H W 3"]
    groups: Int[np.ndarray, "L B patches"]
    grid: tuple[int, int]
    tokens: tuple[int, ...]
    flops: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.groups.shape[2] != self.grid[0] * self.grid[1] or len(self.names) != len(self.photos):
            raise ValueError(f"groups {self.groups.shape} and photos {self.photos.shape} do not fit {self.grid}")


def rgb_from_pixels(
    pixels: Float[np.ndarray, "B 3 H W"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[np.ndarray, "B H W 3"]:
    """Undo the normalization of model inputs."""
    scaled = pixels.transpose(0, 2, 3, 1) * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    colours: UInt8[np.ndarray, "B H W 3"] = np.round(np.clip(scaled, 0, 1) * 255).astype(np.uint8)
    return colours


def strips(traced: Traced) -> list[Strip]:
    """Draw every photo, behind every block whose merge changed something."""
    found = []
    for image, name in enumerate(traced.names):
        photo = traced.photos[image]
        before = (f"{traced.tokens[0]} tokens",)
        tiles = [Tile(title="the model's input", lines=before, url=picture_url(enlarged(photo)))]
        previous = traced.tokens[0]
        for block in range(len(traced.groups)):
            left = traced.tokens[block + 1]
            if left != previous:
                drawn = draw_groups(photo, traced.groups[block, image].reshape(traced.grid))
                lines = (f"{left} tokens", f"{traced.flops[block] / 1e9:.2f} GFLOPs")
                tiles.append(Tile(title=f"block {block}", lines=lines, url=picture_url(drawn)))
            previous = left
        found.append(Strip(name=name, tiles=tuple(tiles)))
    return found


def draw_groups(photo: UInt8[np.ndarray, "H W 3"], groups: Int[np.ndarray, "Y X"]) -> UInt8[np.ndarray, "A B 3"]:
    """Fill every group of several patches with its mean colour and draw a border around it; others stay as they are."""
    photo = enlarged(photo)
    down, across = photo.shape[0] // groups.shape[0], photo.shape[1] // groups.shape[1]
    drawn = photo[: down * groups.shape[0], : across * groups.shape[1]].copy()
    labels, flat = np.unique(groups, return_inverse=True)
    members = np.bincount(flat.ravel(), minlength=len(labels))
    index = np.repeat(np.repeat(flat.reshape(groups.shape), down, 0), across, 1)
    sums = np.stack([np.bincount(index.ravel(), drawn[..., c].ravel(), len(labels)) for c in range(3)], 1)
    means = sums / (members * down * across)[:, None]
    merged = members[index] > 1
    drawn[merged] = np.round(means[index[merged]]).astype(np.uint8)
    for axis in (0, 1):
        other = np.roll(index, -1, axis)
        edge = (index != other) & (merged | np.roll(merged, -1, axis))
        edge[(-1, slice(None)) if axis == 0 else (slice(None), -1)] = False
        drawn[edge] = np.where((drawn[edge] @ _LUMA > _BRIGHT)[:, None], [DARK], [LIGHT])
    return drawn


def enlarged(photo: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "A B 3"]:
    """Draw every pixel of a small photo as a square of pixels."""
    factor = max(1, -(-LEAST_SIDE // min(photo.shape[:2])))
    return photo if factor == 1 else np.repeat(np.repeat(photo, factor, 0), factor, 1)


def picture_url(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    """Return a picture as a data URL."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=82, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
