"""The timing loop, with a fake clock: no test here depends on how fast the machine is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from vitfold.bench import timing


@pytest.fixture
def clock() -> list[int]:
    return [0]


def interleave(clock: list[int], subjects: Mapping[str, Callable[[], None]], **how: Any) -> Any:
    return timing.interleave(subjects, clock=lambda: clock[0], **how)


def worker(clock: list[int], name: str, cost_ns: int, calls: list[str]) -> Callable[[], None]:
    def call() -> None:
        calls.append(name)
        clock[0] += cost_ns

    return call


def test_every_trial_visits_every_subject_and_starts_with_another(clock: list[int]) -> None:
    calls: list[str] = []
    subjects = {name: worker(clock, name, 10**9, calls) for name in "abc"}
    samples = interleave(clock, subjects, trials=3, seconds=3.0, warmup=0)
    assert calls == list("aabbcc" + "bbccaa" + "ccaabb")
    assert samples == {name: ((10**9,),) * 3 for name in "abc"}


def test_without_subjects_nothing_is_timed(clock: list[int]) -> None:
    assert interleave(clock, {}, trials=3) == {}


def test_warmup_and_the_first_run_of_a_visit_are_not_recorded(clock: list[int]) -> None:
    calls: list[str] = []
    samples = interleave(clock, {"a": worker(clock, "a", 10**9, calls)}, trials=2, seconds=2.0, warmup=3)
    assert len(calls) == 3 + 2 * 2
    assert samples["a"] == ((10**9,), (10**9,))


def test_a_visit_records_for_its_share_of_the_seconds(clock: list[int]) -> None:
    samples = interleave(clock, {"a": worker(clock, "a", 10**7, [])}, trials=2, seconds=0.2, warmup=0)
    assert [len(trial) for trial in samples["a"]] == [10, 10]


def test_iterations_are_bounded(clock: list[int]) -> None:
    samples = interleave(clock, {"a": worker(clock, "a", 1, [])}, trials=1, seconds=1.0, max_iterations=7)
    assert len(samples["a"][0]) == 7


def test_a_protocol_may_count_iterations_instead(clock: list[int]) -> None:
    report = timing.PROTOCOLS["report"]
    calls: list[str] = []
    samples = interleave(
        clock, {"a": worker(clock, "a", 10**10, calls)}, trials=2, warmup=report.warmup, iterations=report.iterations
    )
    assert [len(trial) for trial in samples["a"]] == [1000, 1000]
    assert len(calls) == 200 + 2 * (1 + 1000)
    assert (report.batch, report.trials) == (128, 5)


def test_garbage_collection_is_restored_when_a_subject_fails(clock: list[int]) -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="broken"):
        interleave(clock, {"a": broken}, warmup=0)
    assert gc.isenabled()


@pytest.mark.parametrize("arguments", [{"trials": 0}, {"seconds": 0.0}, {"warmup": -1}, {"iterations": 0}])
def test_senseless_arguments_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        interleave(clock, {"a": lambda: None}, **arguments)
