"""Processes that compile and draw beside the report, and stand still while something is timed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import IO, Any

CHILDREN = 8
"""Processes that compile side by side; the kernels that they find are read from torch's cache afterwards."""


ASIDE = 6
"""Of those that are started aside."""


class Children:
    """Processes that compile side by side, most important first, and stop while something is timed."""

    def __init__(self) -> None:
        self._pools = ThreadPoolExecutor(CHILDREN), ThreadPoolExecutor(ASIDE)
        self._lock, self._free, self._ended = threading.Lock(), threading.Event(), False
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._found: dict[str, Future[str]] = {}
        self._free.set()

    def start(self, name: str, task: Sequence[Any], *, threads: int = 2, aside: bool = False) -> None:
        """Queue a task: what `TASKS` does, and its arguments; `aside` from the others, whom it does not hold up."""
        self._found[name] = self._pools[aside].submit(self._run, name, task, threads)

    def wait(self, names: Iterable[str], seconds: float) -> None:
        """Return when these are done, or the seconds are over."""
        wait_for([self._found[name] for name in names if name in self._found], timeout=max(0.0, seconds))

    def said(self, name: str) -> str | None:
        """What went wrong, nothing where all went well or nothing was asked, None while it is at work."""
        if name not in self._found:
            return ""
        found = self._found[name]
        if not found.done():
            return None
        return found.result() if found.exception() is None else f"not started: {found.exception()}"

    @contextlib.contextmanager
    def paused(self, but: str | None = None) -> Iterator[None]:
        """Stop those that run, but for one, and start no others, for as long as the block runs."""
        with self._lock:
            self._free.clear()
            self._signal(signal.SIGSTOP, but)
        try:
            yield
        finally:
            with self._lock:
                self._signal(signal.SIGCONT)
                self._free.set()

    def end(self) -> None:
        """End those that run, and start no others."""
        with self._lock:
            self._ended = True
            self._free.set()
            self._signal(signal.SIGKILL)
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def _signal(self, what: signal.Signals, but: str | None = None) -> None:
        for process in (process for name, process in self._running.items() if name != but):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, what)

    def _run(self, name: str, task: Sequence[Any], threads: int) -> str:
        with tempfile.TemporaryFile("w+", errors="replace") as said:  # a pipe would stay open as long as its children
            process = self._begun(name, task, threads, said)
            if process is None:
                return "there was no time"
            code = process.wait()
            with self._lock:
                del self._running[name]
            said.seek(0)
            return "" if code == 0 else f"exit {code}: {said.read()[-600:]}"

    def _begun(self, name: str, task: Sequence[Any], threads: int, said: IO[str]) -> subprocess.Popen[bytes] | None:
        """Start a process as soon as none has to be quiet; none if all are over by then."""
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
        command = [sys.executable, "-m", "vitfold.gpu", "--child", json.dumps(task)]
        while True:
            self._free.wait()
            with self._lock:
                if self._ended:
                    return None
                if self._free.is_set():
                    self._running[name] = subprocess.Popen(
                        command, env=environment, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
                    )
                    return self._running[name]
