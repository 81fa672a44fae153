"""Ctrl-C and SIGTERM put off while something is made that must be known before it can be cleaned up."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off SIGINT and SIGTERM until the end of the block, where their handlers run; for blocks that end soon.

    Python runs handlers in its main thread only: blocks of other threads need no such care and get none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[signal.Signals] = []

    def put_off(number: int, _: FrameType | None) -> None:
        arrived.append(signal.Signals(number))

    # A handler that was not set from Python (None) could not be set again.
    usual = {number: signal.getsignal(number) for number in _SIGNALS if signal.getsignal(number) is not None}
    try:
        for number in usual:
            signal.signal(number, put_off)
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        for one in dict.fromkeys(arrived):
            signal.raise_signal(one)
