"""The seam between vitfold and a runtime.

Owns the shape of a session and of what its profiler reports. Each engine is one module beside this one; none
imports another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float

from vitfold.errors import EngineError

S = TypeVar("S", bound="Session")


def usable_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTime:
    """One node as the engine ran it: the name and the operator that the engine gives it, nanoseconds per run.

    `integer` says whether it multiplied integers.
    """

    name: str
    op: str
    latency_ns: float
    integer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """What an engine's own profiler says, in the order in which nodes run: medians over runs (OpenVINO: means).

    `profiled_ns` are those runs from outside, `plain_ns` runs without the profiler, which took turns with them.
    """

    nodes: tuple[NodeTime, ...]
    profiled_ns: tuple[int, ...]
    plain_ns: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.profiled_ns or len(self.profiled_ns) != len(self.plain_ns):
            raise ValueError("a profile needs as many plain runs as profiled ones, and at least one")


def alternate(plain: Callable[[], None], profiled: Callable[[], None], runs: int) -> tuple[list[int], list[int]]:
    """Run both in turn, `runs` times each, and return the nanoseconds of either."""
    times: tuple[list[int], list[int]] = [], []
    for _ in range(runs):
        for call, kept in zip((plain, profiled), times, strict=True):
            before = time.perf_counter_ns()
            call()
            kept.append(time.perf_counter_ns() - before)
    return times


def median_ns(samples: Iterable[float]) -> float:
    """Return the median of a node's times."""
    return float(np.median(list(samples)))


@runtime_checkable
class Session(Protocol):
    """A loaded model: `bind` moves input to the device, `run` returns when done, `fetch` brings output back.

    A session is a context manager; outside of `with`, `close` releases what it holds. Engines inherit that.
    """

    @property
    def engine(self) -> str:
        """The engine's name and version, as tables show it."""
        ...

    def bind(self, pixel_values: Float[np.ndarray, "B 3 H W"]) -> None:
        """Hand over a batch."""
        ...

    def run(self) -> None:
        """Execute on what was bound; returns when the result is there."""
        ...

    def fetch(self) -> Float[np.ndarray, "B ..."]:
        """Return the last result as an array of its own."""
        ...

    def profile(self, runs: int = 20) -> EngineProfile:
        """Time each node on what is bound, by the engine's own profiler.

        Raises:
            EngineError: if nothing is bound, or the engine has no profiler.
        """
        raise EngineError(
            f"{self.engine} has no profiler (asked for {runs} runs); profile on onnxruntime, openvino or tensorrt"
        )

    def close(self) -> None:
        """Release everything."""
        ...

    def __enter__(self: S) -> S:
        """Enter a context that closes the session."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
