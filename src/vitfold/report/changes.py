"""Images whose label changed, as pictures with both labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vitfold.decoding import read_image
from vitfold.errors import ImageError
from vitfold.model.preprocess import rgb_from_image
from vitfold.report.mosaic import LEAST_SIDE, Strip, Tile, picture_url

MOST_PICTURES = 24
_GREY = (128, 128, 128)


def change_strip(rows: Sequence[Mapping[str, Any]]) -> Strip:
    """Draw the first images, those that the original was surest of: its label, the new one, that of the folder."""
    return Strip(name="original label \u2192 new label", tiles=tuple(_tile(row) for row in rows[:MOST_PICTURES]))


def _tile(row: Mapping[str, Any]) -> Tile:
    lines = [f"{row['original_probability']:.0%} \u2192 {row['now_probability']:.0%}"]
    if row["truth"] is not None:
        lines.append(f"folder: {row['truth']}")
    try:
        picture = rgb_from_image(read_image(Path(row["image"]), exif="apply"))
    except ImageError:
        picture = Image.new("RGB", (1, 1), _GREY)
        lines.append(f"cannot be read here: {row['image']}")
    side = (LEAST_SIDE, LEAST_SIDE)
    drawn = np.asarray(ImageOps.pad(picture, side, color=_GREY))
    return Tile(title=f"{row['original']} \u2192 {row['now']}", lines=tuple(lines), url=picture_url(drawn))
