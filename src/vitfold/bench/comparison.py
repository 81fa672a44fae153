"""Subjects side by side: every row pairs a speed with a fidelity."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num

from vitfold.bench.evaluation import finite_outputs
from vitfold.bench.fidelity import Fidelity
from vitfold.bench.measurement import Measurement, Scope, speed_up
from vitfold.bench.statistics import ratio_interval
from vitfold.bench.timing import interleave
from vitfold.decoding import prepared
from vitfold.engines import Session
from vitfold.errors import ImageError
from vitfold.images import ImageSet, prepared_ahead
from vitfold.model import Preprocess
from vitfold.ops.work import Work
from vitfold.progress import Say


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """Something to time, with what its row says beside the time.

    `untimed` says why it is not timed: then its rows have a fidelity and no speed.
    """

    name: str
    session: Session
    preprocess: Preprocess
    fidelity: Fidelity | None
    tokens: int | None = None
    macs: int | None = None
    size_bytes: int | None = None
    work: Work | None = None
    untimed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One line of a table: never a speed without its fidelity; without `measurement`, a fidelity alone."""

    subject: Subject
    batch: int
    scope: Scope
    measurement: Measurement | None
    speed_up: Mapping[str, float] | None
    baseline: str

    def to_dict(self) -> dict[str, Any]:
        """Return the documented JSON form of a row."""
        fidelity, measured = self.subject.fidelity, self.measurement
        return {
            "bundle": self.subject.name,
            "engine": self.subject.session.engine,
            "batch": self.batch,
            "scope": self.scope,
            "latency_ms": None if measured is None else measured.latency_ms(),
            "throughput_ips": None if measured is None else measured.throughput_ips(),
            "noisy": measured is not None and measured.noisy,
            "untimed": self.subject.untimed,
            "fidelity": None if fidelity is None else fidelity.to_dict(),
            "speed_up": {
                **(self.speed_up or dict.fromkeys(("median", "iqr", "low", "high"))),
                "baseline": self.baseline,
            },
            "tokens": self.subject.tokens,
            "macs": self.subject.macs,
            "size_bytes": self.subject.size_bytes,
            "work": None if self.subject.work is None else self.subject.work.to_dict(),
        }


def compare(
    subjects: Sequence[Subject],
    *,
    batch: int,
    images: ImageSet | None,
    scopes: Sequence[Scope] = ("engine", "end_to_end"),
    trials: int = 10,
    seconds: float = 2.0,
    warmup: int = 2,
    iterations: int | None = None,
    progress: Say | None = None,
) -> list[Row]:
    """Time all subjects interleaved, scope by scope; the first of those that are timed is the baseline.

    Without images there is nothing to decode: only scope "engine" is timed, on seeded noise.
    """
    names = [subject.name for subject in subjects]
    if len(set(names)) != len(names):
        raise ValueError(f"subjects need different names, found {names}")
    timed = [subject for subject in subjects if subject.untimed is None]
    if not timed:
        raise ValueError("a comparison needs a subject that is timed")
    rows: list[Row] = []
    for scope in scopes:
        if scope != "engine" and images is None:
            continue
        calls = {subject.name: _call(subject, scope, batch, images) for subject in timed}
        samples = interleave(
            calls,
            trials=trials,
            seconds=seconds,
            warmup=warmup,
            iterations=iterations,
            progress=progress,
            between=functools.partial(stop_decoding, list(calls.values())),
        )
        measured = {
            subject.name: Measurement(
                subject=subject.name,
                engine=subject.session.engine,
                batch=batch,
                scope=scope,
                trials_ns=samples[subject.name],
            )
            for subject in timed
        }
        baseline = measured[timed[0].name]
        for subject in subjects:
            measurement = measured.get(subject.name)
            rows.append(
                Row(
                    subject=subject,
                    batch=batch,
                    scope=scope,
                    measurement=measurement,
                    speed_up=None if measurement is None else _speed_up(baseline, measurement),
                    baseline=baseline.subject,
                )
            )
    return rows


def _speed_up(baseline: Measurement, subject: Measurement) -> dict[str, float]:
    return {**speed_up(baseline, subject), **ratio_interval(baseline, subject)}


def raw_samples(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return every raw sample of the rows that were timed, in the documented JSON form."""
    return [row.measurement.to_dict() for row in rows if row.measurement is not None]


def _call(subject: Subject, scope: Scope, batch: int, images: ImageSet | None) -> Callable[[], None]:
    session = subject.session
    if scope == "engine":
        finite_outputs(session(pixels_for(subject.preprocess, batch, images)), f"{subject.name} on {session.engine}")
        return session.run
    assert images is not None
    if scope == "decoded_ahead":
        return DecodedAhead(subject.session, subject.preprocess, batch, images)
    paths = itertools.cycle(images.paths)

    def end_to_end() -> None:
        chosen = [next(paths) for _ in range(batch)]
        session(np.stack([prepared(path, subject.preprocess) for path in chosen])).reshape(batch, -1).argmax(axis=1)

    return end_to_end


class DecodedAhead:
    """Calls that take one batch each from files to labels, while threads decode the next ones.

    `stop` throws away what was decoded: no subject decodes in another one's turn, and each begins its own with nothing.
    """

    def __init__(self, session: Session, preprocess: Preprocess, batch: int, images: ImageSet) -> None:
        self._session, self._preprocess, self._batch = session, preprocess, batch
        self._paths = itertools.cycle(images.paths)
        self._ahead: Generator[Num[np.ndarray, "B ..."], None, None] | None = None

    def __call__(self) -> None:
        """Run one batch."""
        if self._ahead is None:
            groups = (list(itertools.islice(self._paths, self._batch)) for _ in itertools.count())
            self._ahead = prepared_ahead(groups, self._decoded)
        self._session(next(self._ahead)).reshape(self._batch, -1).argmax(axis=1)

    def stop(self) -> None:
        """Throw away what was decoded and wait until nothing is being decoded."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _decoded(self, paths: Sequence[Path]) -> Num[np.ndarray, "B ..."]:
        return np.stack([prepared(path, self._preprocess) for path in paths])


def stop_decoding(calls: Iterable[Callable[[], None]]) -> None:
    """Stop whichever of the calls decodes ahead."""
    for call in calls:
        if isinstance(call, DecodedAhead):
            call.stop()


def pixels_for(preprocess: Preprocess, batch: int, images: ImageSet | None) -> Num[np.ndarray, "B ..."]:
    """Return what an engine is timed on: the first readable images, repeated if they are few; noise without images.

    Raises:
        ImageError: if none is readable.
    """
    if images is None:
        return np.random.default_rng(0).standard_normal((batch, *preprocess.shape), dtype=np.float32)
    readable: list[Num[np.ndarray, ...]] = []
    for path in images.paths:
        if len(readable) == batch:
            break
        readable.append(prepared(path, preprocess))
    if not readable:
        raise ImageError(f"no image to time in {images.root}")
    return np.stack([readable[i % len(readable)] for i in range(batch)])
