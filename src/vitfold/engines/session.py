"""The seam between vitfold and a runtime.

Owns the shape of a session. Each engine is one module beside this one; none imports another.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float

S = TypeVar("S", bound="Session")


def usable_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


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
