"""Rows of a search on a machine that is busy now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from vitfold.bench.measurement import Measurement
from vitfold.pipeline.trials import _calm, _float_ms

STEADY = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
NOISY = (1.0, 1.0, 1.0, 1.0, 3.0, 3.0)


def times(float_ms: float, attempt_ms: float, spread: Sequence[float] = STEADY) -> Mapping[str, Measurement]:
    def one(name: str, ms: float) -> Measurement:
        trials = tuple((round(1e6 * ms * factor),) * 3 for factor in spread)
        return Measurement(subject=name, engine="onnxruntime", batch=1, scope="engine", trials_ns=trials)

    return {"float": one("float", float_ms), "attempt": one("attempt", attempt_ms)}


def measuring(*runs: Mapping[str, Measurement]) -> Callable[[], Mapping[str, Measurement]]:
    left: Iterator[Mapping[str, Measurement]] = iter(runs)
    return lambda: next(left)


def float_ms(found: Mapping[str, Measurement]) -> float:
    return found["float"].latency_ms()["median"]


def test_a_float_model_that_is_slower_than_before_is_timed_again():
    found = _calm(measuring(times(40.0, 3.0), times(11.0, 3.0)), 10.0)
    assert float_ms(found) == pytest.approx(11.0)


def test_three_busy_runs_are_enough_and_the_steadiest_counts():
    busy = [times(40.0, 3.0, NOISY), times(30.0, 3.0), times(50.0, 3.0, NOISY)]
    assert float_ms(_calm(measuring(*busy), 10.0)) == pytest.approx(30.0)


def test_a_calm_run_is_taken_at_once():
    assert float_ms(_calm(measuring(times(10.0, 3.0)), 10.0)) == pytest.approx(10.0)


def test_a_noisy_run_that_is_not_slow_beats_a_steady_slow_one():
    runs = [times(10.0, 3.0, NOISY), times(40.0, 3.0), times(40.0, 3.0)]
    assert float_ms(_calm(measuring(*runs), 10.0)) < 30.0


def test_without_earlier_rows_only_noise_is_repeated():
    runs = [times(10.0, 3.0, NOISY), times(90.0, 3.0)]
    assert float_ms(_calm(measuring(*runs), float("inf"))) == pytest.approx(90.0)


@pytest.mark.parametrize(("speedup", "expected"), [({"median": 4.0}, 12.0), (None, float("inf"))])
def test_a_row_says_what_the_float_model_took(speedup, expected):
    assert _float_ms({"latency_ns": {"median": 3e6}, "speedup": speedup}) == pytest.approx(expected)
