"""Recipes as points: accuracy, speed and size of one row of a sweep or of a bench, in one form."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from vitfold.bench.measurement import SCOPES
from vitfold.errors import ReportError
from vitfold.report.loading import Document

_RUNG = re.compile(r"^r(\d+(?:\.\d+)?)(?:-(.+))?$")
OTHERS = "others"
"""The family of rows with names of their own: peers, mostly."""
FLOAT = "float"
P = TypeVar("P")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One recipe as it was measured; None where it was not.

    `r` is the mean over blocks, `family` what it quantizes and by which rule it merges. `speed_range` and `drop` (of
    accuracy against the float model, image by image) are 95 % intervals of paired data. `paired_ms` and `paired_ips`
    are what plots compare: the baseline's time over the paired speed-up, since rows are timed at different moments of a
    shared machine; where there is no speed-up they are what was measured.
    """

    name: str
    family: str
    r: float | None
    images: int | None
    top1: float | None
    agreement: float | None
    cosine: float | None
    latency_ms: float | None
    spread_ms: float | None
    throughput_ips: float | None
    speed_up: float | None
    size_bytes: int | None
    integer_ratio: float | None = None
    moved_bytes: int | None = None
    energy_uj: float | None = None
    paired_ms: float | None = None
    paired_ips: float | None = None
    speed_range: tuple[float, float] | None = None
    drop: Mapping[str, Any] | None = None
    noisy: bool = False
    error: str | None = None


def points_of(document: Document) -> list[Point]:
    """Translate a sweep or a bench.

    Raises:
        ReportError: as `points_of_bench`.
    """
    if document.kind == "sweep":
        return points_of_sweep(document.content["rows"])
    return points_of_bench(document.content, document.name)


def points_of_sweep(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Translate the rows of a sweep."""
    return _paired([_of_sweep(row) for row in rows])


def _paired(points: Sequence[Point]) -> list[Point]:
    """Place every point at the median time of the baseline, as the points have it, over its own speed-up."""
    times = [p.latency_ms * p.speed_up for p in points if p.latency_ms is not None and p.speed_up]
    reference = statistics.median(times) if times else None
    found = []
    for p in points:
        ms, ips = p.latency_ms, p.throughput_ips
        if reference is not None and ms is not None and p.speed_up:
            ms = reference / p.speed_up
            ips = None if ips is None or p.latency_ms is None else ips * p.latency_ms / ms
        found.append(replace(p, paired_ms=ms, paired_ips=ips))
    return found


def _of_sweep(row: Mapping[str, Any]) -> Point:
    latency, speed_up = row.get("latency_ns"), row.get("speedup")
    merge = row["merge"]
    return Point(
        name=str(row["recipe"]),
        family=_family_of_sweep(row),
        r=sum(merge) / len(merge) if merge else 0.0,
        images=row.get("images"),
        top1=row.get("top1"),
        agreement=row.get("top1_agreement"),
        cosine=row.get("cosine"),
        latency_ms=None if latency is None else latency["median"] / 1e6,
        spread_ms=None if latency is None else _spread_ms(latency),
        throughput_ips=row.get("throughput_ips"),
        speed_up=None if speed_up is None else speed_up["median"],
        size_bytes=row.get("size_bytes"),
        **_work(row.get("work")),
        speed_range=None if speed_up is None else _range(speed_up),
        drop=row.get("drop"),
        noisy=bool(row.get("noisy", False)),
        error=row.get("error"),
    )


def _family_of_sweep(row: Mapping[str, Any]) -> str:
    """Bits, the method and the merging rule unless they are the default, the target unless it is this processor's."""
    quantized = row["quant"] not in (None, "none")
    words = [str(row["quant"]) if quantized else FLOAT]
    if quantized and row.get("method") not in (None, "vitfold"):
        words.append(str(row["method"]))
    if row.get("rule") not in (None, "tome"):
        words.append(str(row["rule"]))
    if not str(row.get("target") or "cpu").startswith("cpu"):
        words.append(str(row["target"]))
    return ", ".join(words)


def _work(work: Mapping[str, Any] | None) -> dict[str, Any]:
    """What one image takes; nothing of peers, and of rows of versions before."""
    if work is None:
        return {}
    integer = work["integer"]
    return {
        "integer_ratio": None if integer is None else integer["macs_ratio"],
        "moved_bytes": work["bytes"],
        "energy_uj": work["energy"]["total_uj"],
    }


def _range(speed_up: Mapping[str, Any]) -> tuple[float, float] | None:
    low, high = speed_up.get("low"), speed_up.get("high")
    return None if low is None or high is None else (low, high)


def _spread_ms(latency: Mapping[str, Any]) -> float | None:
    """Half the range of the trials, each a number or its list of samples."""
    middles = []
    for trial in latency.get("trials") or ():
        samples = sorted(trial) if isinstance(trial, list) else [trial]
        if samples:
            middles.append(samples[len(samples) // 2])
    return (max(middles) - min(middles)) / 2e6 if middles else None


def points_of_bench(document: Mapping[str, Any], name: str) -> list[Point]:
    """Translate the rows of `bench` or `demo`, engine only where that was timed.

    Raises:
        ReportError: if a row lacks what every row has.
    """
    rows = document["rows"]
    scopes = [scope for scope in SCOPES if any(row.get("scope") == scope for row in rows)]
    try:
        return _paired([_of_bench(row) for row in rows if row["scope"] == scopes[0]])
    except (KeyError, TypeError, IndexError) as error:
        raise ReportError(f"{name} is not what vitfold bench writes ({error!r}); measure again") from None


def _of_bench(row: Mapping[str, Any]) -> Point:
    fidelity = row["fidelity"] or {}
    latency, rate, speed_up = row["latency_ms"], row["throughput_ips"], row["speed_up"]
    found = _RUNG.match(row["bundle"])
    return Point(
        name=row["bundle"],
        family=_family(row["bundle"]),
        r=None if found is None else float(found[1]),
        images=fidelity.get("images"),
        top1=fidelity.get("top1"),
        agreement=fidelity.get("agreement"),
        cosine=fidelity.get("cosine"),
        latency_ms=None if latency is None else latency["median"],
        spread_ms=None if latency is None else latency["iqr"] / 2,
        throughput_ips=None if rate is None else rate["median"],
        speed_up=None if speed_up is None else speed_up["median"],
        size_bytes=row["size_bytes"],
        **_work(row.get("work")),
        speed_range=None if speed_up is None else _range(speed_up),
        noisy=bool(row["noisy"]),
        error=row.get("untimed"),
    )


def _family(name: str) -> str:
    """What a row of a bench stands for, by its name: bundles are called r4-w8a8 and the like."""
    found = _RUNG.match(name)
    return OTHERS if found is None else found[2] or FLOAT


def quality_key(points: Sequence[Point]) -> str | None:
    """Return what measures these points: top-1, else agreement, else cosine; None if nothing was measured."""
    for key in ("top1", "agreement", "cosine"):
        if any(getattr(point, key) is not None for point in points):
            return key
    return None


def front(points: Sequence[P], time: str, quality: str) -> list[P]:
    """Return the points that no other beats in both time and quality, the fastest first; both are names of fields."""
    known = [point for point in points if getattr(point, time) is not None and getattr(point, quality) is not None]
    best, kept = float("-inf"), []
    for point in sorted(known, key=lambda point: (getattr(point, time), -getattr(point, quality))):
        if getattr(point, quality) > best:
            best = getattr(point, quality)
            kept.append(point)
    return kept


def baseline(points: Sequence[Point]) -> Point | None:
    """Return the float model without merging, if it is among the points."""
    return next((point for point in points if point.family == FLOAT and point.r == 0), None)
