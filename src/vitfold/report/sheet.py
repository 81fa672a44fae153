"""Generated images as files, and side by side on a contact sheet.

What was drawn, and how fast, stands in the table.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from vitfold.errors import ReportError

SHEET = "sheet.png"
COLUMNS = 12
_MARGIN, _LABEL, _SMALLEST = 4, 14, 64
_MOST_BYTES, _MOST_PIXELS = 600_000, 3_000_000
"""Of a sheet within a page; a larger one becomes a JPEG of at most so many pixels, some 800 kB."""

Images = Float[np.ndarray, "B C Y X"]


def write_images(folder: Path, rows: Mapping[str, Images], names: Sequence[str]) -> Path:
    """Write every image in [0, 1] to its row's folder, and a sheet with one line per row; return the sheet's path.

    Raises:
        ReportError: if the folder cannot be written.
    """
    try:
        for row, images in rows.items():
            here = folder / re.sub(r"[^a-z0-9.+]+", "-", row.lower())
            here.mkdir(parents=True, exist_ok=True)
            for number, (image, name) in enumerate(zip(images, names, strict=True)):
                word = re.sub(r"[^A-Za-z0-9]+", "-", name)[:40].strip("-")
                Image.fromarray(_pixels(image)).save(here / f"{number:04d}-{word}.png")
        path = folder / SHEET
        contact_sheet(rows).save(path)
    except OSError as error:
        raise ReportError(f"cannot write images to {folder}: {error}; choose another folder") from None
    return path


def contact_sheet(rows: Mapping[str, Images]) -> Image.Image:
    """Return one line per row, its name above its first twelve images; the same column is the same seed and class."""
    shown = {name: [_pixels(image) for image in images[:COLUMNS]] for name, images in rows.items()}
    height, width = next(iter(shown.values()))[0].shape[:2]
    times = max(1, -(-_SMALLEST // height))
    cell = (width * times + _MARGIN, height * times + _MARGIN + _LABEL)
    most = max(len(images) for images in shown.values())
    sheet = Image.new("RGB", (most * cell[0] + _MARGIN, len(shown) * cell[1] + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for line, (name, images) in enumerate(shown.items()):
        top = _MARGIN + line * cell[1]
        pen.text((_MARGIN, top), name, fill="black")
        for column, pixels in enumerate(images):
            drawn = Image.fromarray(pixels).resize((width * times, height * times), Image.Resampling.NEAREST)
            sheet.paste(drawn.convert("RGB"), (_MARGIN + column * cell[0], top + _LABEL))
    return sheet


def sheet_url(path: Path) -> str:
    """Return a sheet as a data URL: as it is where it is small, else scaled down and as a JPEG.

    Raises:
        ReportError: if the file is no picture that can be read.
    """
    try:
        content, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(content)) as sheet:
            sheet.load()
            ratio = min(1.0, math.sqrt(_MOST_PIXELS / (sheet.width * sheet.height)))
            if ratio < 1 or len(content) > _MOST_BYTES:
                file = io.BytesIO()
                size = (max(1, int(sheet.width * ratio)), max(1, int(sheet.height * ratio)))
                sheet.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=82)
                content, kind = file.getvalue(), "jpeg"
    except (OSError, Image.DecompressionBombError) as error:
        raise ReportError(f"{path} cannot be shown ({error}); write it again, or move it to another folder") from None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _pixels(image: Float[np.ndarray, "C Y X"]) -> UInt8[np.ndarray, "Y X ..."]:
    """Bytes of one image, without a channel axis where it is grey."""
    values = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    pixels: UInt8[np.ndarray, "Y X ..."] = values[:, :, 0] if values.shape[2] == 1 else values
    return pixels
