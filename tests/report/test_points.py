"""Rows as points, and which of them nothing beats."""

from __future__ import annotations

import documents
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitfold.errors import ReportError
from vitfold.report.points import Point, baseline, front, points_of_bench, points_of_sweep, quality_key


def point(ms: float, top1: float) -> Point:
    return Point(
        name=f"{ms}-{top1}", family="float", r=None, images=1, top1=top1, agreement=None, cosine=None, latency_ms=ms,
        spread_ms=None, throughput_ips=None, speed_up=None, size_bytes=None,
    )  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=30))
def test_the_front_is_what_nothing_beats(pairs: list[tuple[int, int]]) -> None:
    points = [point(float(ms), top1 / 20) for ms, top1 in pairs]
    kept = front(points, "latency_ms", "top1")
    times = [p.latency_ms for p in kept]
    assert times == sorted(times)
    for p in points:
        beaten = any(
            q.latency_ms <= p.latency_ms and q.top1 >= p.top1 and (q.latency_ms, q.top1) != (p.latency_ms, p.top1)
            for q in points
        )
        assert beaten != any((q.latency_ms, q.top1) == (p.latency_ms, p.top1) for q in kept)


def test_a_sweep_row() -> None:
    found = points_of_sweep(documents.sweep())
    assert [p.family for p in found] == ["float"] * 3 + ["w8a8"] * 4
    assert [p.r for p in found] == [0, 2, 4, 0, 2, 4, 9]
    first, failed = found[0], found[-1]
    assert (first.latency_ms, first.spread_ms, first.throughput_ips) == (16.0, pytest.approx(0.1), 62.5)
    assert (failed.latency_ms, failed.error) == (None, "RecipeError: <b>block 8</b> has one pair left")
    assert baseline(found) is first
    assert first.speed_range == (15 / 16, 17 / 16)
    assert first.drop is not None
    other = points_of_sweep(
        [documents.sweep_row(1, "w8a8", 5.0, 0.8, method="minmax", merge=[2, 0], target="openvino")]
    )
    assert (other[0].family, other[0].r) == ("w8a8, minmax, openvino", 1.0)


def test_plots_compare_paired_times() -> None:
    """A row that was timed while the machine was busy stands where its speed-up says."""
    quick, busy = (documents.sweep_row(r, "none", ms, 0.8) for r, ms in ((2, 8.0), (4, 40.0)))
    rows = [documents.sweep_row(0, "none", 16.0, 0.8), {**quick, "speedup": {"median": 2.0, "low": 1.9, "high": 2.1}}]
    rows.append({**busy, "speedup": {"median": 4.0, "low": 3.0, "high": 5.0}})
    plain, twice, four_times = points_of_sweep(rows)
    assert (plain.paired_ms, twice.paired_ms, four_times.paired_ms) == (16.0, 8.0, 4.0)
    assert four_times.latency_ms == 40.0
    assert four_times.paired_ips == pytest.approx(250.0)
    assert [p.name for p in front([plain, twice, four_times], "paired_ms", "top1")] == [four_times.name]
    untimed = points_of_sweep([{**quick, "speedup": None}])[0]
    assert (untimed.paired_ms, untimed.paired_ips) == (8.0, pytest.approx(125.0))


def test_merging_rules_are_families_of_their_own() -> None:
    rows = [
        documents.sweep_row(r, quant, 10.0 - r, 0.8, recipe=f"r{r}-{quant}-{rule}", rule=rule)
        for r in (2, 4)
        for rule in ("tome", "pitome")
        for quant in ("none", "w8a8")
    ]
    found = points_of_sweep(rows)
    assert [p.family for p in found] == ["float", "w8a8", "float, pitome", "w8a8, pitome"] * 2


def test_a_bench_row() -> None:
    found = points_of_bench(documents.bench(), "demo")
    assert [p.name for p in found] == ["torch", "r0", "r4", "r0-w8a8", "r4-w8a8", "r8-w8a8"], "the engine's scope alone"
    assert [p.family for p in found] == ["others", "float", "float", "w8a8", "w8a8", "w8a8"]
    assert (found[4].r, found[4].latency_ms, found[4].spread_ms) == (4.0, 6.2, 0.1)
    assert found[0].r is None
    assert quality_key(found) == "top1"
    untimed = documents.bench_row("modelopt", None, 0.88, untimed="no time: it runs nowhere here")
    assert points_of_bench({"rows": [untimed]}, "x")[0].error == "no time: it runs nowhere here"
    with pytest.raises(ReportError, match="x is not what vitfold bench writes"):
        points_of_bench({"rows": [{"scope": "engine"}]}, "x")


def test_without_fidelity_nothing_is_compared() -> None:
    found = points_of_bench({"rows": [documents.bench_row("r0", 5.0, None)]}, "x")
    assert quality_key(found) is None
