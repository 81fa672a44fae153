"""What `vitfold outliers` found, shown: norms, remedies, advice in words, sinks on the photos.

Everything shown was measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from rich.table import Table

from vitfold.report.tables import number, percent, terminal_table

RARE = 4.0
"""From this ratio of largest to mean norm on, a block has outliers."""
_SIDE, _GAP, _HEAD = 224, 8, 26
_HOT = (226, 59, 46)


def outlier_ratio(values: Mapping[str, Any]) -> float:
    """Return how many times the mean token norm the largest is, in the block where that is most."""
    return max(float(row["max_norm"]) / max(float(row["mean_norm"]), 1e-12) for row in values["blocks"])


def advise(values: Mapping[str, Any], *, prefix: int) -> str:
    """Return in words what the measurements say: which remedy helps most, why, and the option that applies it."""
    rows = {row["name"]: row for row in values["remedies"]}
    chosen, nothing = rows[values["chosen"]], rows["none"]
    worst = max(values["blocks"], key=lambda row: row["max_norm"] / max(row["mean_norm"], 1e-12))
    ratio = outlier_ratio(values)
    if ratio < RARE:
        where = f"No block has outliers (the largest token norm is {ratio:.1f} times the mean)."
    else:
        inside = prefix and worst["max_prefix_norm"] > worst["max_patch_norm"]
        whose = "a prefix token" if inside else "a patch"
        where = f"Behind block {worst['block']} the largest token norm, of {whose}, is {ratio:.1f} times the mean."
        if inside:
            where += " Prefix tokens are never deleted and no patch stands for them: registers have nothing to replace."
    where += f" Quantization costs most at {values['sensitive_site']}"
    other = values["sink_site"] != values["sensitive_site"]
    where += f", among layers that outlier tokens reach at {values['sink_site']}." if other else "."
    if chosen is nothing:
        return f"{where} No remedy is worth it: leave --registers out."
    key = "sqnr_db" if chosen["confirmed_db"] is None or nothing["confirmed_db"] is None else "confirmed_db"
    under = values["method"] if key == "confirmed_db" else "plain ranges"
    gain = f"{nothing[key]:.1f} dB to {chosen[key]:.1f} dB"
    return f"{where} Use --registers {chosen['name']}: it takes SQNR from {gain} under {under}; auto finds the same."


def remedy_columns() -> list[str]:
    """Return the header of the table of remedies."""
    return ["remedy", "max norm", "of none", "SQNR dB", "cosine", "top-1 %", "by method dB", "setting"]


def remedy_cells(values: Mapping[str, Any]) -> list[list[str]]:
    """Return one line per remedy; the chosen one is starred, `max norm` is that at the sensitive layer's input."""
    rows = values["remedies"]
    before = rows[0]["max_norm"]
    return [
        [
            row["name"] + (" *" if row["name"] == values["chosen"] else ""),
            number(row["max_norm"], ".2f"),
            percent(row["max_norm"] / before, unit=""),
            number(row["sqnr_db"], ".2f"),
            number(row["cosine"], ".5f"),
            percent(row["top1"], unit=""),
            number(row["confirmed_db"], ".2f"),
            _settings(row["recipe"]),
        ]
        for row in rows
    ]


def _settings(recipe: Mapping[str, Any] | None) -> str:
    hidden = {"remedy", "site"}
    shown = {name: value for name, value in (recipe or {}).items() if name not in hidden}
    return ", ".join(f"{name} {_setting(value)}" for name, value in shown.items())


def _setting(value: list[str] | str | int | float) -> str:
    """How many layers, the name of one, or a number."""
    return str(len(value)) if isinstance(value, list) else value if isinstance(value, str) else f"{value:g}"


def remedies_table(values: Mapping[str, Any]) -> Table:
    """Return the terminal table of remedies, without their settings, which are wider than a terminal."""
    rows = [row[:-1] for row in remedy_cells(values)]
    return terminal_table(remedy_columns()[:-1], rows, words=("remedy",))


def remedy_settings(values: Mapping[str, Any]) -> list[str]:
    """Return one line per remedy that has settings."""
    return [f"{row[0]}: {row[-1]}" for row in remedy_cells(values) if row[-1]]


def norms_table(values: Mapping[str, Any]) -> Table:
    """Return the terminal table of blocks."""
    header = ("block", "max", "mean", "max prefix", "max patch", "noise of its layers dB")
    norms = ("max_norm", "mean_norm", "max_prefix_norm", "max_patch_norm")
    rows = []
    for row in values["blocks"]:
        noise = row["noise_to_signal"]
        shown = "-" if noise <= 0 else f"{10 * np.log10(noise):.1f}"
        rows.append([str(row["block"]), *(number(row[name], ".2f") for name in norms), shown])
    return terminal_table(header, rows)


def draw_sinks(
    photos: Sequence[UInt8[np.ndarray, "H W 3"]], maps: Sequence[Float[np.ndarray, "Y X"]], *, title: str
) -> Image.Image:
    """Draw each photo with its norms beside it: the redder a patch, the larger; sinks are framed on the photo.

    A patch is framed where its norm is at least half of the largest and four times the photo's median. All maps share
    one scale, from the median of all patches to the largest, which the title names.
    """
    most, least = max(float(one.max()) for one in maps), float(np.median(np.concatenate(maps)))
    wide = 2 * _SIDE + 3 * _GAP
    columns = 2 if len(photos) > 1 else 1
    lines = -(-len(photos) // columns)
    canvas = Image.new("RGB", (columns * wide, _HEAD + lines * (_SIDE + _GAP) + _GAP), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((_GAP, 7), f"{title}; full red {most:.1f}, grey {least:.1f} and less", fill=(36, 41, 47))
    for number_, (pixels, norms) in enumerate(zip(photos, maps, strict=True)):
        left = (number_ % columns) * wide + _GAP
        top = _HEAD + (number_ // columns) * (_SIDE + _GAP)
        photo = Image.fromarray(pixels).resize((_SIDE, _SIDE))
        canvas.paste(_framed(photo, norms), (left, top))
        canvas.paste(
            _tinted(photo, ((norms - least) / max(most - least, 1e-12)).clip(0.0, 1.0)), (left + _SIDE + _GAP, top)
        )
    return canvas


def _framed(photo: Image.Image, norms: Float[np.ndarray, "Y X"]) -> Image.Image:
    framed = photo.copy()
    pen = ImageDraw.Draw(framed)
    down, across = _SIDE / norms.shape[0], _SIDE / norms.shape[1]
    sinks = (norms >= norms.max() / 2) & (norms >= RARE * np.median(norms))
    for y, x in zip(*np.nonzero(sinks), strict=True):
        corners = (x * across, y * down, (x + 1) * across - 1, (y + 1) * down - 1)
        pen.rectangle(corners, outline=_HOT, width=2)
    return framed


def _tinted(photo: Image.Image, heat: Float[np.ndarray, "Y X"]) -> Image.Image:
    """The photo in grey, mixed with red by the heat in [0, 1]."""
    grey = np.asarray(photo.convert("L"), np.float32)[..., None].repeat(3, -1) * 0.6 + 90
    mask = Image.fromarray((heat * 255).astype(np.uint8)).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    share = np.asarray(mask, np.float32)[..., None] / 255
    return Image.fromarray((grey * (1 - share) + np.array(_HOT, np.float32) * share).clip(0, 255).astype(np.uint8))
