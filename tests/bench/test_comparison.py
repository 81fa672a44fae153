"""What stands in a comparison beside what is timed."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from vitfold.bench.comparison import DecodedAhead, Subject, compare, raw_samples
from vitfold.bench.timing import interleave
from vitfold.engines import MAIN, Ends, Port, Session
from vitfold.images import ImageSet
from vitfold.model import Array, Preprocess


class Counting(Session):
    """A session that counts its runs."""

    @property
    def engine(self) -> str:
        return "counting 1"

    def __init__(self) -> None:
        ends = Ends((Port(name="pixel_values", shape=(3, 8, 8)),), (Port(name="logits", shape=(2,)),))
        super().__init__({MAIN: ends})
        self.runs = 0

    def _execute(self, part: str, inputs: Sequence[Array], kept: tuple[str, ...]) -> Sequence[Array]:
        self.runs += 1
        return (np.zeros((1, 2), np.float32),)


def subject(name: str, untimed: str | None = None) -> Subject:
    size = (8, 8)
    zero, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    preprocess = Preprocess(
        resize="exact", resize_size=size, crop_size=size, interpolation="bicubic", mean=zero, std=one
    )
    return Subject(name=name, session=Counting(), preprocess=preprocess, fidelity=None, untimed=untimed)


def test_what_is_not_timed_has_a_row_without_a_speed() -> None:
    subjects = [subject("guest", "made for elsewhere"), subject("first"), subject("second")]
    rows = compare(subjects, batch=1, images=None, trials=1, seconds=0.001)
    assert [row.subject.name for row in rows] == ["guest", "first", "second"]
    assert subjects[0].session.runs == 0  # type: ignore[attr-defined]
    guest, first, _ = (row.to_dict() for row in rows)
    assert guest["untimed"] == "made for elsewhere"
    assert guest["latency_ms"] is guest["throughput_ips"] is None
    assert guest["speed_up"] == {"median": None, "iqr": None, "low": None, "high": None, "baseline": "first"}
    assert not guest["noisy"]
    assert first["untimed"] is None
    assert first["speed_up"]["median"] == 1.0
    assert [one["subject"] for one in raw_samples(rows)] == ["first", "second"]


def test_a_comparison_needs_a_clock() -> None:
    with pytest.raises(ValueError, match="timed"):
        compare([subject("guest", "made for elsewhere")], batch=1, images=None)


def test_nothing_is_decoded_ahead_in_the_turn_of_another(photos: ImageSet) -> None:
    """Every turn begins with nothing decoded and ends with no thread decoding."""
    images = photos
    one, other = subject("one"), subject("other")
    scopes = ("engine", "decoded_ahead")
    rows = compare([one, other], batch=1, images=images, scopes=scopes, trials=2, warmup=1, iterations=3)
    assert [(row.subject.name, row.scope) for row in rows] == [(n, s) for s in scopes for n in ("one", "other")]
    assert all(row.measurement is not None and len(row.measurement.trials_ns[0]) == 3 for row in rows)
    ahead = DecodedAhead(one.session, one.preprocess, 2, images)
    ahead()
    assert any(thread.name.startswith("decode") for thread in threading.enumerate())
    ahead.stop()
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())
    ahead()
    ahead.stop()


def test_the_clock_stops_between_turns() -> None:
    turns: list[str] = []
    subjects = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}
    interleave(subjects, trials=2, warmup=1, iterations=1, settling=False, between=lambda: turns.append("|"))
    assert "".join(turns) == "a|b|" + "a|b|" + "b|a|"
