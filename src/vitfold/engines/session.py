"""The seam between vitfold and a runtime.

Owns the shape of a session and of what its profiler reports. Each engine is one module beside this one; none
imports another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float

from vitfold.cores import check_threads, usable_cores
from vitfold.errors import EngineError

__all__ = [
    "Call",
    "EngineProfile",
    "NodeTime",
    "Session",
    "Turns",
    "check_threads",
    "median_ns",
    "profile_of",
    "take_turns",
    "usable_cores",
]

S = TypeVar("S", bound="Session")
Call = Callable[[], None]

PLAIN = "plain"
WIDE = "wide"
FLOATING = "floating"
SHOWN = {PLAIN: "", WIDE: " (u8 x u8)", FLOATING: " (float products)"}
"""How an engine executes integer products, and how tables call it: as it chooses, in wider kernels, in floats."""


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

    `profiled_ns` are those runs from outside, `plain_ns` runs without the profiler, which took turns with them, and
    `beside_ns` whatever else did.
    """

    nodes: tuple[NodeTime, ...]
    profiled_ns: tuple[int, ...]
    plain_ns: tuple[int, ...]
    beside_ns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.profiled_ns or len(self.profiled_ns) != len(self.plain_ns):
            raise ValueError("a profile needs as many plain runs as profiled ones, and at least one")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """The nanoseconds of calls that took turns."""

    plain_ns: tuple[int, ...]
    profiled_ns: tuple[int, ...]
    beside_ns: Mapping[str, tuple[int, ...]]


def take_turns(plain: Call, profiled: Call, beside: Mapping[str, Call], runs: int) -> Turns:
    """Run all calls in turn, `runs` times each, so that a slow spell of the machine falls on all of them.

    After those `beside`, which may clear the caches, `plain` runs once unrecorded.
    """
    plain_ns: list[int] = []
    profiled_ns: list[int] = []
    beside_ns: dict[str, list[int]] = {name: [] for name in beside}
    for _ in range(runs):
        for name, call in beside.items():
            beside_ns[name].append(_timed(call))
        if beside:
            plain()
        plain_ns.append(_timed(plain))
        profiled_ns.append(_timed(profiled))
    return Turns(
        plain_ns=tuple(plain_ns),
        profiled_ns=tuple(profiled_ns),
        beside_ns={name: tuple(times) for name, times in beside_ns.items()},
    )


def profile_of(nodes: Iterable[NodeTime], turns: Turns) -> EngineProfile:
    """Put what the profiler and what the clock say together."""
    return EngineProfile(
        nodes=tuple(nodes), profiled_ns=turns.profiled_ns, plain_ns=turns.plain_ns, beside_ns=turns.beside_ns
    )


def _timed(call: Call) -> int:
    before = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - before


def median_ns(samples: Iterable[float]) -> float:
    """Return the median of a node's times."""
    return float(np.median(list(samples)))


@runtime_checkable
class Session(Protocol):
    """A loaded model: `bind` moves input to the device, `run` returns when done, `fetch` brings output back.

    A session is a context manager; outside of `with`, `close` releases what it holds. Engines inherit that.
    `execution` says how integer products run: as the engine chooses, unless that is wrong on this processor.
    """

    execution: str = PLAIN

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

    def profile(self, runs: int = 20, beside: Mapping[str, Call] | None = None) -> EngineProfile:
        """Time each node on what is bound, by the engine's own profiler; calls `beside` take turns with it.

        Raises:
            EngineError: if nothing is bound, or the engine has no profiler.
        """
        raise EngineError(
            f"{self.engine} has no profiler (asked for {runs} runs beside {len(beside or ())} others); "
            "profile on onnxruntime, openvino or tensorrt"
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
