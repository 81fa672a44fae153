"""Schedules by cost and distortion: against brute force, and in the cases where the answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vitfold.schedule.solve import STEP, Space, frontier, schedule_seconds, solve

DEPTH, TOKENS = 4, 33


def space(weights=(1.0, 1.0, 1.0, 1.0)) -> Space:
    single = [{0.1: 0.01 * w, 0.25: 0.03 * w, 0.5: 0.1 * w} for w in weights]
    return Space(depth=DEPTH, tokens=TOKENS, prefix=1, single=single)


def seconds(launch: float):
    return lambda tokens, merged, sizes: 1e-6 * (tokens + tokens - merged) + (launch if merged else 0.0)


def summed(s: Space):
    def measure(r):
        total, tokens = 0.0, s.tokens
        for block, merged in enumerate(r):
            total += s.distortion(block, tokens, merged) if merged else 0.0
            tokens -= merged
        return total

    return measure


def brute_force(s: Space, cost, bound: float) -> float:
    """The least seconds over all schedules in steps of 4."""
    best = schedule_seconds((0,) * DEPTH, s.tokens, cost)
    measure = summed(s)
    for r in itertools.product(range(0, 17, STEP), repeat=DEPTH):
        tokens, fits = s.tokens, True
        for merged in r:
            fits = fits and merged <= (tokens - 1) // 2
            tokens -= merged
        if fits and measure(r) <= bound:
            best = min(best, schedule_seconds(r, s.tokens, cost))
    return best


@pytest.mark.parametrize("launch", [0.0, 2e-6, 1e-5])
@pytest.mark.parametrize("bound", [0.03, 0.1, 0.3])
def test_the_schedule_is_the_best_of_all(launch, bound):
    s, cost = space((3.0, 2.0, 1.0, 1.0)), seconds(launch)
    found = solve(s, cost, summed(s), bound)
    plain, best = schedule_seconds((0,) * DEPTH, s.tokens, cost), brute_force(s, cost, bound)
    assert (found is None) == (best == plain)
    if found is not None:
        assert found.distortion <= bound
        assert all(merged % STEP == 0 for merged in found.r)
        assert found.seconds == pytest.approx(schedule_seconds(found.r, s.tokens, cost))
        assert plain - found.seconds >= 0.97 * (plain - best)


def test_costly_merges_are_few():
    cheap, dear = (solve(space(), seconds(launch), summed(space()), 0.2) for launch in (0.0, 4e-5))
    assert cheap is not None
    assert dear is not None
    assert sum(r > 0 for r in dear.r) < sum(r > 0 for r in cheap.r)


def test_nothing_is_merged_where_it_cannot_pay():
    assert solve(space(), seconds(1.0), summed(space()), 1.0) is None


def test_measurements_overrule_the_sum_of_single_merges():
    """Together the merges distort three times as much as alone: the bound still holds as measured."""
    s = space()
    found = solve(s, seconds(1e-7), lambda r: 3 * summed(s)(r), 0.1)
    assert found is not None
    assert 0 < found.distortion <= 0.1


def test_distortion_is_interpolated_in_the_share_of_the_tokens():
    s = space()
    assert s.distortion(0, 100, 10) == pytest.approx(0.01)
    assert s.distortion(0, 100, 5) == pytest.approx(0.005)
    assert s.distortion(0, 40, 7) == pytest.approx(0.01 + 0.02 * (0.175 - 0.1) / 0.15)
    assert s.distortion(0, 10, 6) == pytest.approx(0.12)


def test_lengths_are_multiples_where_they_are_aligned():
    """The first merge makes up for what the length is beside; a length that is a multiple goes by whole steps."""
    space = Space(depth=2, tokens=65, prefix=1, single=[{0.5: 1.0}] * 2, step=6, aligned=True)
    assert [65 - merged for merged in space.merges(65)] == [60, 54, 48, 42, 36]
    assert [54 - merged for merged in space.merges(54)] == [48, 42, 36, 30]
    found = frontier(space, lambda tokens, merged, _: float(tokens - merged), 10.0)
    assert len(found) > 3
    for _, _, r in found:
        lengths = 65 - np.cumsum(r)
        assert all(length == 65 or length % 6 == 0 for length in lengths)
