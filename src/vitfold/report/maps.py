"""Pictures of maps: the original's beside a bundle's, and where they differ."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from plotly.colors import get_colorscale, sample_colorscale, unlabel_rgb

from vitfold.bench.fidelity import measure_fidelity
from vitfold.model.spec import Head
from vitfold.report.mosaic import Strip, Tile, enlarged, picture_url
from vitfold.report.tables import fidelity_lines

_GOLDEN = 0.618034
_SHADES = 256
Picture = UInt8[np.ndarray, "_ _ 3"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mapped:
    """What pictures are drawn from: photos, and the first outputs of the original and of a bundle for them.

    Outputs are (B, H, W) or (B, 1, H, W) where `head` is "map", (B, C, H, W) of a "segmentation".
    """

    title: str
    names: tuple[str, ...]
    photos: UInt8[np.ndarray, "B H W 3"]
    expected: Float[np.ndarray, "B ..."]
    found: Float[np.ndarray, "B ..."]
    head: Head


def map_strips(mapped: Mapped) -> list[Strip]:
    """Draw every photo with both maps and their difference; colours of both maps are the same."""
    draw = _segmentation if mapped.head == "segmentation" else _map
    strips = []
    for place, name in enumerate(mapped.names):
        expected, found = mapped.expected[place], mapped.found[place]
        theirs, ours, apart = draw(expected, found)
        fidelity = measure_fidelity(
            found[None], targets=None, reference=expected[None], reference_name="original", head=mapped.head
        ).to_dict()
        lines = tuple(f"{word} {figure}" for word, figure in fidelity_lines(fidelity, head=mapped.head))
        tiles = [
            Tile(title="the model's input", lines=(), url=picture_url(enlarged(mapped.photos[place]))),
            Tile(title="the original", lines=(), url=picture_url(_as_large(theirs, mapped.photos[place]))),
            Tile(title="the bundle", lines=lines, url=picture_url(_as_large(ours, mapped.photos[place]))),
            Tile(title="difference", lines=(), url=picture_url(_as_large(apart, mapped.photos[place]))),
        ]
        strips.append(Strip(name=name, tiles=tuple(tiles)))
    return strips


def _map(expected: Float[np.ndarray, ...], found: Float[np.ndarray, ...]) -> tuple[Picture, Picture, Picture]:
    """Both maps on the scale of the original, and their difference on that scale, from nothing to all of it."""
    theirs, ours = (one.reshape(one.shape[-2:]).astype(np.float64) for one in (expected, found))
    low, high = float(theirs.min()), float(theirs.max())
    span = (high - low) or 1.0
    return _shaded((theirs - low) / span), _shaded((ours - low) / span), _shaded(np.abs(ours - theirs) / span)


def _segmentation(
    expected: Float[np.ndarray, "C H W"], found: Float[np.ndarray, "C H W"]
) -> tuple[Picture, Picture, Picture]:
    """Both maps with a colour per class, and the pixels whose classes differ."""
    theirs, ours = expected.argmax(0), found.argmax(0)
    return _coloured(theirs), _coloured(ours), _shaded((theirs != ours).astype(np.float64))


def _shaded(values: Float[np.ndarray, "H W"]) -> Picture:
    """Viridis, which keeps its order in grey and for colour-blind readers."""
    shades = sample_colorscale(get_colorscale("Viridis"), list(np.linspace(0, 1, _SHADES)))
    table = np.array([unlabel_rgb(shade) for shade in shades])
    colours: Picture = np.round(table[np.round(np.clip(values, 0, 1) * (_SHADES - 1)).astype(int)]).astype(np.uint8)
    return colours


def _coloured(classes: Int[np.ndarray, "H W"]) -> Picture:
    """Hues that are far from each other for neighbouring numbers."""
    count = int(classes.max()) + 1
    table = [colorsys.hls_to_rgb((i * _GOLDEN) % 1.0, 0.35 + 0.15 * (i % 3), 0.65) for i in range(count)]
    colours: Picture = np.round(255 * np.array(table))[classes].astype(np.uint8)
    return colours


def _as_large(picture: Picture, photo: Picture) -> Picture:
    """A map as large as its photo is drawn."""
    height, width = enlarged(photo).shape[:2]
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST))
