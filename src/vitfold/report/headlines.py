"""What a page says first: per comparison that was measured, what is fastest at next to no loss.

Owns the bounds and the words.
"""

from __future__ import annotations

from vitfold.report.loading import Folder
from vitfold.report.points import Point, baseline, points_of, quality_key
from vitfold.report.tables import drop_text

DROP = 0.01
"""The headline names the fastest recipe that loses at most one point."""


def headlines(folder: Folder) -> list[dict[str, str]]:
    """Return what to say first: per measured comparison, the fastest recipe that loses at most one point."""
    found = []
    for document in (*folder.of("sweep"), *folder.of("bench")):
        points = points_of(document)
        key, start = quality_key(points), baseline(points)
        if key is None or start is None or start.latency_ms is None or getattr(start, key) is None:
            continue
        floor = getattr(start, key) - DROP
        fit = [p for p in points if p.latency_ms is not None and p.r is not None and (getattr(p, key) or 0.0) >= floor]
        best = max(fit, key=lambda p: _ratio(p, start))
        ratio = _ratio(best, start)
        text = f"nothing within one point is faster than {start.name}"
        if best is not start and ratio > 1:
            text = f"{best.name} against {start.name}, {_change(key, best, start)} on {best.images} images"
        found.append({"figure": f"{max(1.0, ratio):.2f}x", "text": f"{document.name}: {text}"})
    return found


def _ratio(point: Point, start: Point) -> float:
    """How many times faster than another point: from paired speed-ups, where both have one."""
    if point.speed_up is not None and start.speed_up:
        return point.speed_up / start.speed_up
    assert point.latency_ms is not None
    assert start.latency_ms is not None
    return start.latency_ms / point.latency_ms


def _change(key: str, best: Point, start: Point) -> str:
    """What was lost, with its interval where image by image was compared."""
    if best.drop is not None:
        return f"{drop_text(best.drop)} points lost"
    change = getattr(best, key) - getattr(start, key)
    if key == "cosine":
        return f"cosine {change:+.4f}"
    name = {"top1": "top-1", "agreement": "agreement"}[key]
    return f"{name} {100 * change:+.2f} points".replace("-0", "\N{MINUS SIGN}0").replace(" -", " \N{MINUS SIGN}")
