"""Retrieval between images and captions: recall of the right ones among the nearest.

What embeds the captions: `sources.text_towers`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from vitfold.bench.statistics import paired_drop, share_interval
from vitfold.errors import VitfoldError
from vitfold.storage.ordinary import read_text

TOPS = (1, 5)
_ROWS = 256
_RESAMPLES = 1000
_COLUMNS = ("image", "caption")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Captions of images: `captions[j]` belongs to `images[owner[j]]`; images in the order in which they are named."""

    images: tuple[str, ...]
    captions: tuple[str, ...]
    owner: tuple[int, ...]


def read_pairs(path: Path) -> Pairs:
    """Read a CSV file with the columns image (a path) and caption; an image may have several rows.

    Raises:
        VitfoldError: if it cannot be read or has no such columns, on a row without image or caption, on a row that
            stands there twice, and on fewer than two images, naming the line.
    """
    try:
        lines = csv.DictReader(io.StringIO(read_text(path).removeprefix("\ufeff"), newline=""))
        rows = [(lines.line_num, row) for row in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise VitfoldError(f"cannot read {path}: {error}; give a CSV file with the columns image,caption") from None
    missing = [name for name in _COLUMNS if name not in (lines.fieldnames or ())]
    if missing:
        raise VitfoldError(f"{path} has no column {missing[0]}; its first line must be image,caption")
    images: dict[str, int] = {}
    seen: dict[tuple[str, str], int] = {}
    for line, row in rows:
        image, caption = ((row[name] or "").strip() for name in _COLUMNS)
        if not image or not caption:
            raise VitfoldError(
                f"{path}, line {line}: no {'caption' if image else 'image'}; complete the row or leave it out"
            )
        first = seen.setdefault((image, caption), line)
        if first != line:
            raise VitfoldError(f"{path}, line {line}: {image} has this caption in line {first} already; leave one out")
        images.setdefault(image, len(images))
    if len(images) < 2:
        raise VitfoldError(f"{path} names {len(images)} images; retrieval needs at least two")
    return Pairs(
        images=tuple(images),
        captions=tuple(caption for _, caption in seen),
        owner=tuple(images[image] for image, _ in seen),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranks:
    """How many wrong ones are at least as near as the right one: captions of each image, images of each caption."""

    of_images: Int[np.ndarray, " I"]
    of_captions: Int[np.ndarray, " J"]


def rank(images: Float[np.ndarray, "I D"], captions: Float[np.ndarray, "J D"], owner: Sequence[int]) -> Ranks:
    """Rank by cosine; of an image's captions the nearest counts, and a tie counts against it.

    Equation: r_i = #{j, o_j != i: s_ij >= max over o_m = i of s_im}; r_j = #{i != o_j: s_ij >= s_(o_j) j}.

    Source: CLIP (2103.00020), section 3.1.3 and appendix E: zero-shot retrieval.
    """
    left, right = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (
        images.astype(np.float64), captions.astype(np.float64)
    ))  # fmt: skip
    owners, own = np.asarray(owner), np.empty(len(right))
    for part in _parts(len(right)):
        own[part] = (left[owners[part]] * right[part]).sum(1)
    nearest = np.full(len(left), -np.inf)
    np.maximum.at(nearest, owners, own)
    of_images, of_captions = np.zeros(len(left), np.int64), np.zeros(len(right), np.int64)
    for part in _parts(len(left)):
        scores = left[part] @ right.T
        wrong = owners[None] != np.arange(len(left))[part, None]
        of_images[part] = ((scores >= nearest[part, None]) & wrong).sum(1)
        of_captions += ((scores >= own[None]) & wrong).sum(0)
    return Ranks(of_images=of_images, of_captions=of_captions)


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))


def recalls(found: Ranks, owner: Sequence[int], unfolded: Ranks | None = None) -> dict[str, Any]:
    """Return recall at 1 and 5 of both directions with 95 % intervals, and the drop from the unfolded model's.

    Images are what is drawn: captions of one image are alike, so the interval of captions resamples images. Plain JSON
    values.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.2, on groups.
    """
    said: dict[str, Any] = {}
    for name, ranks, before in (
        ("image_to_text", found.of_images, None if unfolded is None else unfolded.of_images),
        ("text_to_image", found.of_captions, None if unfolded is None else unfolded.of_captions),
    ):
        groups = np.arange(len(ranks)) if name == "image_to_text" else np.asarray(owner)
        said[name] = {f"recall_at_{top}": _recall(ranks < top, groups, before, top) for top in TOPS}
    return said


def _recall(
    right: Bool[np.ndarray, " R"], groups: Int[np.ndarray, " R"], before: Int[np.ndarray, " R"] | None, top: int
) -> dict[str, Any]:
    """One recall; intervals are Wilson's and Agresti's where every row is a group by itself, else of resamples."""
    single = len(np.unique(groups)) == len(right)
    values: dict[str, Any] = {
        "recall": float(right.mean()),
        **(share_interval(right) if single else _resampled(right.astype(float), groups)),
    }
    if before is not None:
        was = before < top
        values["unfolded"] = float(was.mean())
        lost = was.astype(float) - right
        interval = paired_drop(was, right).to_dict() if single else _resampled(lost, groups)
        values["drop"] = {"drop": float(lost.mean()), "low": interval["low"], "high": interval["high"]}
    return values


def _resampled(values: Float[np.ndarray, " R"], groups: Int[np.ndarray, " R"]) -> dict[str, float]:
    """The 95 % interval of a mean over resamples of whole groups."""
    counts = np.bincount(groups)
    totals = np.bincount(groups, weights=values)
    drawn = np.random.default_rng(0).integers(0, len(counts), (_RESAMPLES, len(counts)))
    means = totals[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}
