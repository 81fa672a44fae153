"""What a page says first: per comparison that was measured, what is fastest at next to no loss."""

from __future__ import annotations

import math

from vitfold.report.loading import Document, Folder
from vitfold.report.points import Point, baseline, points_of, quality_key
from vitfold.report.samplers import Sampler, chosen, fastest_within, fewer_steps, has_choice, methods, samplers_of
from vitfold.report.tables import drop_text

DROP = 0.01
"""The headline names the fastest recipe that loses at most one point."""
LEAST_DB = 30.0
"""Of samplers, the fastest method whose images come so near to the unaccelerated ones: mean errors below 3.2 %."""


def headlines(folder: Folder) -> list[dict[str, str]]:
    """Return what to say first: per measured comparison, the fastest recipe that loses at most one point."""
    found = []
    for document in (*folder.of("sweep"), *folder.of("bench")):
        points = points_of(document)
        key, start = quality_key(points), baseline(points)
        if key is None or start is None or start.paired_ms is None or getattr(start, key) is None:
            continue
        floor = getattr(start, key) - DROP
        fit = [p for p in points if p.paired_ms is not None and p.r is not None and (getattr(p, key) or 0.0) >= floor]
        best = max(fit, key=lambda p: _ratio(p, start))
        ratio = _ratio(best, start)
        text = f"nothing within one point is faster than {start.name}"
        if best is not start and ratio > 1:
            text = f"{best.name} against {start.name}, {_change(key, best, start)} on {best.images} images"
        found.append({"figure": f"{max(1.0, ratio):.2f}x", "text": f"{document.name}: {text}"})
    return [*found, *map(_of_diffusion, folder.of("diffusion"))]


def _of_diffusion(document: Document) -> dict[str, str]:
    """The method that the document chose, else the fastest that is near enough, beside plainly fewer steps."""
    samplers, choice = samplers_of(document), has_choice(document)
    best = chosen(document) if choice else fastest_within(methods(samplers), LEAST_DB)
    if best is None or best.speed_up <= 1:
        bound = "good enough" if choice else f"within {LEAST_DB:g} dB"
        return {"figure": "1.00x", "text": f"{document.name}: nothing {bound} is faster than the unaccelerated sampler"}
    near = "equal images" if math.isinf(best.psnr_db) else f"{best.psnr_db:.1f} dB to the unaccelerated images"
    if "held_out" in document.content:
        near += f" on {document.content['held_out']['images']} held-out seeds"
    plain = fastest_within(fewer_steps(samplers), min(LEAST_DB, best.psnr_db))
    rival = "no fewer steps measured come so near" if plain is None else f"{plain.speed_up:.2f}x by {_steps(plain)}"
    name = f"{best.name} (chosen)" if choice else best.name
    return {"figure": f"{best.speed_up:.2f}x", "text": f"{document.name}: {name}, {near}; {rival}"}


def _steps(plain: Sampler) -> str:
    return f"{plain.full_steps} plain steps at {plain.psnr_db:.1f} dB"


def _ratio(point: Point, start: Point) -> float:
    """How many times faster than another point: from paired times, where both have one."""
    assert point.paired_ms is not None
    assert start.paired_ms is not None
    return start.paired_ms / point.paired_ms


def _change(key: str, best: Point, start: Point) -> str:
    """What was lost, with its interval where image by image was compared."""
    if best.drop is not None:
        return f"{drop_text(best.drop)} points lost"
    change = getattr(best, key) - getattr(start, key)
    if key == "cosine":
        return f"cosine {change:+.4f}"
    name = {"top1": "top-1", "agreement": "agreement"}[key]
    return f"{name} {100 * change:+.2f} points".replace("-0", "\N{MINUS SIGN}0").replace(" -", " \N{MINUS SIGN}")
