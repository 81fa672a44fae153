"""Progress where no terminal shows a bar: in a file, in CI, under nohup.

A line comes with each kind of step, then every tenth of the work, but none within five seconds of another, and every
half minute.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

OFTEN, SELDOM = 5.0, 30.0
"""Seconds between lines: at least, and at most where the work counts."""
_COUNTED = re.compile(r"^(?P<whole>.*?):? (?P<number>\d+)/(?P<total>\d+)$")


class Lines:
    """Says now and then how far a piece of work is."""

    def __init__(
        self,
        title: str,
        *,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        unit: str | None = None,
    ) -> None:
        self._title, self._say, self._clock, self._unit = title, say, clock, unit
        self._kind: str | None = None
        self._step = ""
        self._steps: tuple[int, int] | None = None
        self._tenth = 0
        self._began = self._said = clock()

    def step(self, step: str) -> None:
        """Take the name of a step; one that ends in 3/12 is the third of twelve of its kind."""
        counted = _COUNTED.match(step)
        self._step = step if counted is None else counted["whole"]
        self._steps = None if counted is None else (int(counted["number"]), int(counted["total"]))
        kind = self._step.partition(": ")[0]
        if kind != self._kind:
            self._kind, self._tenth, self._began = kind, 0, self._clock()
            place = "" if self._steps is None else " of ".join(map(str, self._steps))
            self._print(f"{self._step}, {place}" if place else kind)
        elif self._steps is not None:
            self._advance(self._steps[0] - 1, self._steps[1], shown=" of ".join(map(str, self._steps)))
        elif self._clock() - self._said >= SELDOM:
            self._print(self._step)

    def advance(self, done: int, total: int) -> None:
        """Take how many items are done and of how many; where steps are counted, those are what is shown."""
        if self._steps is None:
            self._advance(done, total, shown=f"{done} of {total}")
        elif self._clock() - self._said >= SELDOM:
            self._advance(self._steps[0] - 1, self._steps[1], shown=" of ".join(map(str, self._steps)))

    def _advance(self, done: int, total: int, *, shown: str) -> None:
        now, tenth = self._clock(), 10 * done // max(total, 1)
        if tenth < self._tenth:  # the next round of the same step
            self._tenth, self._began = 0, now
        since = now - self._said
        if since >= SELDOM or (tenth > self._tenth and since >= OFTEN):
            self._tenth = tenth
            left = ""
            if 0 < done < total and now > self._began:
                rate = "" if self._unit is None else f", {done / (now - self._began):.1f} {self._unit}/s"
                left = rate + f", {shown_seconds((now - self._began) / done * (total - done))} left"
            self._print(f"{self._step + ', ' if self._step else ''}{shown}{left}")

    def _print(self, shown: str) -> None:
        self._said = self._clock()
        self._say(f"{self._title}: {shown}")


def shown_seconds(seconds: float) -> str:
    """Return a duration in words: 40 s, 12 min, 3 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"
