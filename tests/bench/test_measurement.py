"""Statistics of raw samples: checked against NumPy and by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vitfold.bench.measurement import Measurement, speed_up


def measurement(*trials: tuple[int, ...], batch: int = 1, subject: str = "a") -> Measurement:
    return Measurement(subject=subject, engine="fake 1.0", batch=batch, scope="engine", trials_ns=trials)


def test_latency_statistics_are_those_of_all_samples() -> None:
    taken = measurement((1_000_000, 3_000_000), (2_000_000, 10_000_000))
    latency = taken.latency_ms()
    samples = [1.0, 3.0, 2.0, 10.0]
    assert latency["median"] == pytest.approx(2.5)
    assert latency["mean"] == pytest.approx(4.0)
    assert latency["std"] == pytest.approx(np.std(samples, ddof=1))
    assert latency["p90"] == pytest.approx(np.percentile(samples, 90))
    assert latency["iqr"] == pytest.approx(np.percentile(samples, 75) - np.percentile(samples, 25))


def test_throughput_counts_every_image_of_a_batch() -> None:
    assert measurement((4_000_000,), batch=8).throughput_ips()["median"] == pytest.approx(2000.0)


def test_noisy_is_said_when_the_middle_half_spreads() -> None:
    assert not measurement((100, 101, 102, 103)).noisy
    assert measurement((100, 200, 100, 200)).noisy


def test_speed_up_pairs_trials_so_that_a_slow_spell_cancels() -> None:
    slow_spell = measurement((100,), (1000,), (100,))
    twice_as_fast = measurement((50,), (500,), (50,), subject="b")
    assert speed_up(slow_spell, twice_as_fast) == {"median": 2.0, "iqr": 0.0}


def test_speed_up_is_per_image() -> None:
    one, eight = measurement((100,)), measurement((400,), batch=8)
    assert speed_up(one, eight)["median"] == pytest.approx(2.0)


def test_speed_up_needs_the_same_run() -> None:
    with pytest.raises(ValueError, match="same interleaved run"):
        speed_up(measurement((1,)), measurement((1,), (1,)))


def test_an_empty_trial_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        measurement((1,), ())


def test_raw_samples_survive_json() -> None:
    taken = measurement((5, 6), (7,))
    assert json.loads(json.dumps(taken.to_dict()))["trials_ns"] == [[5, 6], [7]]
