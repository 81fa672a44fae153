"""The one timing loop: every subject of a comparison goes through it, interleaved."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vitfold.progress import Say


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How long is timed: `trials` interleaved rounds of `seconds` / `trials` each, or of exactly `iterations`.

    `decode_ahead` says whether images are also timed from file to label, the next ones being decoded meanwhile.
    """

    batch: int = 1
    trials: int = 10
    warmup: int = 2
    seconds: float = 3.0
    iterations: int | None = None
    decode_ahead: bool = False


PROTOCOLS: Mapping[str, Protocol] = {
    "quick": Protocol(),
    # Source: the report on ToMe and PTQ4ViT on GPUs, table 4.3 (docs/sources.md); here subjects take turns.
    "report": Protocol(batch=128, trials=5, warmup=200, iterations=1000, decode_ahead=True),
}


def interleave(
    subjects: Mapping[str, Callable[[], None]],
    *,
    trials: int = 10,
    seconds: float = 1.0,
    warmup: int = 2,
    max_iterations: int = 1000,
    iterations: int | None = None,
    settling: bool = True,
    progress: Say | None = None,
    between: Callable[[], None] = lambda: None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Time each subject `trials` times, in turn, and return nanoseconds per iteration and trial.

    Every trial visits all subjects, starting with another one each time, so that a slow spell of the
    machine falls on all of them. A visit runs once unrecorded unless `settling` is off, then records iterations for
    `seconds` / `trials` (at least one, at most `max_iterations`), or exactly `iterations`. The first
    trial is preceded by `warmup` unrecorded runs of each. `between` is called before another subject's turn.
    Without subjects nothing is timed.

    Raises:
        ValueError: if trials, iterations, warmup or seconds are too few.
    """
    if trials < 1 or warmup < 0 or seconds <= 0 or (iterations is not None and iterations < 1):
        raise ValueError("trials and iterations must be at least 1, warmup at least 0 and seconds positive")
    names = list(subjects)
    for name in names:
        if progress is not None:
            progress(f"warm-up: {name}")
        for _ in range(warmup):
            subjects[name]()
        between()
    budget_ns = int(seconds / trials * 1e9) if iterations is None else sys.maxsize
    most = max_iterations if iterations is None else iterations
    samples: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for trial in range(trials):
            start = trial % max(1, len(names))
            for name in names[start:] + names[:start]:
                if progress is not None:
                    progress(f"trial {trial + 1}/{trials}: {name}")
                samples[name].append(_visit(subjects[name], budget_ns, most, settling=settling, clock=clock))
                between()
    finally:
        if collecting:
            gc.enable()
    return {name: tuple(trials_ns) for name, trials_ns in samples.items()}


def _visit(
    call: Callable[[], None], budget_ns: int, max_iterations: int, *, settling: bool, clock: Callable[[], int]
) -> tuple[int, ...]:
    if settling:
        call()
    recorded: list[int] = []
    begin = clock()
    while True:
        before = clock()
        call()
        after = clock()
        recorded.append(after - before)
        if after - begin >= budget_ns or len(recorded) >= max_iterations:
            return tuple(recorded)
