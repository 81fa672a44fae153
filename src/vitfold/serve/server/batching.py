"""Images of many requests in one call of the engine: whatever waits when the engine is free."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitfold.serve.predictor import Predictor
from vitfold.serve.server.refusing import RefusedError

Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waiting:
    """One image, and where its outputs are wanted."""

    pixels: np.ndarray
    answer: asyncio.Future[Outputs]
    loop: asyncio.AbstractEventLoop


class Batcher:
    """A thread that runs what waits, at most `largest` images at a time, and never waits for more to come.

    So one request on an idle server is answered at once, and batches grow with the load. Images are prepared before
    they come here: a broken one is in no batch. At most `queue` images wait; more are refused.
    """

    def __init__(
        self, predictor: Predictor, *, largest: int, queue: int, told: Callable[[int], None] = lambda _: None
    ) -> None:
        self.predictor, self.largest = predictor, largest
        self._most, self._told = queue, told
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many images wait."""
        return len(self._waiting)

    async def run(self, images: list[np.ndarray]) -> list[Outputs]:
        """Return the outputs of each prepared image.

        Raises:
            RefusedError: if too many wait, the engine fails, or the server ends.
        """
        loop = asyncio.get_running_loop()
        mine = [_Waiting(pixels=one, answer=loop.create_future(), loop=loop) for one in images]
        with self._changed:
            if self._closed:
                raise RefusedError(503, "the server is ending")
            if len(self._waiting) + len(mine) > self._most:
                raise RefusedError(503, f"{self.waiting} images wait already; ask again later")
            self._waiting.extend(mine)
            self._changed.notify()
        try:
            return list(await asyncio.gather(*(one.answer for one in mine)))
        finally:
            for one in mine:
                one.answer.cancel()  # of no use any more where one has failed, or nobody waits

    def close(self) -> None:
        """End when what waits is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                taken = [self._waiting.popleft() for _ in range(min(self.largest, len(self._waiting)))]
            if not taken:
                return
            if wanted := [one for one in taken if not one.answer.cancelled()]:
                self._told(len(wanted))
                self._run(wanted)

    def _run(self, taken: list[_Waiting]) -> None:
        try:
            made = self.predictor.run(np.stack([one.pixels for one in taken]))
        except Exception as error:  # whatever the engine raises, the thread goes on
            found: list[Any] = [RefusedError(500, f"the engine failed: {error}")] * len(taken)
        else:
            rows = [{name: values[i] for name, values in made.items()} for i in range(len(taken))]
            found = [row if _finite(row) else RefusedError(500, "the output is NaN or infinite") for row in rows]
        for one, outputs in zip(taken, found, strict=True):
            one.loop.call_soon_threadsafe(_answer, one.answer, outputs)


def _finite(outputs: Outputs) -> bool:
    return all(np.isfinite(values).all() for values in outputs.values())


def _answer(future: asyncio.Future[Outputs], found: Outputs | RefusedError) -> None:
    if future.done():
        return
    if isinstance(found, RefusedError):
        future.set_exception(found)
    else:
        future.set_result(found)
