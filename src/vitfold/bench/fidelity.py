"""How faithful outputs are to a reference, and how accurate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vitfold.model.spec import Head, sigmoid


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Agreement with a reference and accuracy over `images` images; ratios in [0, 1], None if not measured.

    `agreement` is the share of images with the same top-1 class; where every label is a yes or no of its own, the share
    of labels that are answered alike, and `probability_error` the mean absolute difference of their probabilities.
    `relative_error` of a regression or a map is sum |ref - out| / sum |ref|. Of a segmentation (B, C, H, W) `agreement`
    is the share of pixels with the same class, and `miou` the mean over the reference's classes of intersection over
    union with it. `cosine` is the mean cosine of the output vectors
    (None of single numbers), `sqnr_db` 10 log10(sum ref^2 / sum (ref - out)^2) in decibels (None if exact).
    """

    images: int
    top1: float | None
    top5: float | None
    agreement: float | None
    cosine: float | None
    sqnr_db: float | None
    reference: str | None
    probability_error: float | None = None
    relative_error: float | None = None
    miou: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def accuracy(outputs: Float[np.ndarray, "B C"], targets: Sequence[int], *, top: int) -> float:
    """Return the share of rows whose target is among the `top` largest outputs."""
    best = np.argpartition(-outputs, min(top, outputs.shape[1]) - 1, axis=1)[:, :top]
    return float(np.mean([target in row for target, row in zip(targets, best, strict=True)]))


def answers(outputs: Float[np.ndarray, "B C"], head: Head) -> Bool[np.ndarray, "B C"]:
    """Return what a head decides of every class: the largest output alone, or every output above one half."""
    if head == "multi_label":
        above: Bool[np.ndarray, "B C"] = outputs > 0
        return above
    best: Bool[np.ndarray, "B C"] = np.arange(outputs.shape[1]) == outputs.argmax(1)[:, None]
    return best


def measure_fidelity(
    outputs: Float[np.ndarray, "B ..."],
    *,
    targets: Sequence[int] | None,
    reference: Float[np.ndarray, "B ..."] | None,
    reference_name: str | None,
    head: Head,
) -> Fidelity:
    """Compare outputs with targets and with a reference on the same images, row by row, as their `head` asks for."""
    flat = outputs.reshape(len(outputs), -1).astype(np.float64)
    top1 = top5 = agreement = cosine = sqnr = probability_error = relative_error = miou = None
    if targets is not None and head == "single_label":
        top1 = accuracy(flat, targets, top=1)
        top5 = accuracy(flat, targets, top=5) if flat.shape[1] > 5 else None
    if reference is not None:
        ref = reference.reshape(len(reference), -1).astype(np.float64)
        if head == "single_label":
            agreement = float(np.mean(flat.argmax(1) == ref.argmax(1)))
        elif head == "multi_label":
            agreement = float(np.mean((flat > 0) == (ref > 0)))
            probability_error = float(np.mean(np.abs(sigmoid(flat) - sigmoid(ref))))
        elif head == "segmentation":
            agreement, miou = overlap(outputs, reference)
        elif head in ("regression", "map"):
            relative_error = float(np.abs(flat - ref).sum() / max(np.abs(ref).sum(), 1e-30))
        if flat.shape[1] > 1:
            norms = np.linalg.norm(flat, axis=1) * np.linalg.norm(ref, axis=1)
            cosines = np.sum(flat * ref, axis=1) / np.maximum(norms, 1e-30)
            cosine = float(np.mean(np.where(norms > 0, cosines, np.all(flat == ref, axis=1))))
        noise = float(np.sum((flat - ref) ** 2))
        sqnr = None if noise == 0.0 else float(10.0 * np.log10(np.sum(ref**2) / noise))
    return Fidelity(
        images=len(outputs),
        top1=top1,
        top5=top5,
        agreement=agreement,
        cosine=cosine,
        sqnr_db=sqnr,
        reference=reference_name if reference is not None else None,
        probability_error=probability_error,
        relative_error=relative_error,
        miou=miou,
    )


def overlap(outputs: Float[np.ndarray, "B C H W"], reference: Float[np.ndarray, "B C H W"]) -> tuple[float, float]:
    """Return the share of pixels with the reference's class, and the mean intersection over union of its classes."""
    found, wanted = outputs.argmax(1), reference.argmax(1)
    ratios = []
    for kind in np.unique(wanted):
        ours, theirs = found == kind, wanted == kind
        ratios.append(np.logical_and(ours, theirs).sum() / np.logical_or(ours, theirs).sum())
    return float(np.mean(found == wanted)), float(np.mean(ratios))
