"""The seam between vitfold and a runtime: what a session is, and what its profiler reports.

Each engine is one module beside this one and one row of `vitfold.target.ENGINES`; none imports another.
"""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, TypeVar

import numpy as np

from vitfold.artifacts.bundle import MAIN
from vitfold.errors import EngineError, missing_extra
from vitfold.model import Array
from vitfold.ops.protocol import Port
from vitfold.target import FLOATING, PLAIN, WIDE, Engine

S = TypeVar("S", bound="Session")
Call = Callable[[], None]

OPEN_AXIS = -1
SHOWN = {PLAIN: "", WIDE: " (u8 x u8)", FLOATING: " (float products)"}
"""How tables call the ways in which an engine executes integer products."""
_NO_NAMES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Ends:
    """The named inputs and outputs of a part; an axis of -1 is one that the graph leaves open."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


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


def take_turns(plain: Call, profiled: Call, beside: Mapping[str, Call], runs: int) -> EngineProfile:
    """Run all calls in turn, `runs` times each, so that a slow spell of the machine falls on all of them.

    Returns their nanoseconds, as a profile without nodes. After those `beside`, which may clear the caches, `plain`
    runs once unrecorded.
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
    return EngineProfile(
        nodes=(),
        plain_ns=tuple(plain_ns),
        profiled_ns=tuple(profiled_ns),
        beside_ns={name: tuple(times) for name, times in beside_ns.items()},
    )


def _timed(call: Call) -> int:
    before = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - before


def median_ns(samples: Iterable[float]) -> float:
    """Return the median of a node's times."""
    return float(np.median(list(samples)))


class Session(ABC):
    """Loaded parts of a model: `bind` moves inputs to the device, `run` returns when done, `fetch` brings outputs back.

    Tensors have names. A part reads what was bound, or written by a part that ran before, under the names of its
    inputs, and what it writes is kept under the names of its outputs. A classifier is one part with one input and one
    output, which `session(pixels)` runs at once.

    A session is a context manager; outside of `with`, `close` releases what it holds. `execution` says how integer
    products run: as the engine chooses, unless that is wrong on this processor. An engine adds `engine` and `_execute`,
    and what it does beyond the host's memory.
    """

    execution: str = PLAIN
    reads_in_place: bool = True
    """What was bound is read where it lies, if contiguous and of the right type; False where `bind` copies it."""

    def __init__(self, parts: Mapping[str, Ends]) -> None:
        self.parts = parts
        self._tensors: dict[str, Any] = {}
        self._written: tuple[str, ...] = ()
        self._open = True

    @property
    @abstractmethod
    def engine(self) -> str:
        """The engine's name and version, as tables show it."""
        ...

    @abstractmethod
    def _execute(self, part: str, inputs: Sequence[Any], kept: tuple[str, ...]) -> Sequence[Any]:
        """Run a part on its inputs, in order, and return its outputs, which are kept under the names `kept`."""
        ...

    def _upload(self, array: Array) -> Any:
        """What the engine keeps of an array: arrays, unless it has tensors of its own."""
        return array

    def _download(self, value: Any) -> Array:
        """The array of what the engine keeps."""
        found: Array = value
        return found

    @staticmethod
    def check_starts() -> None:
        """Check that the engine starts on this machine; it is handed the settings of its row.

        Raises:
            EngineError: naming the package, the driver or the GPU that is missing.
        """
        return

    @property
    def input(self) -> str:
        """The name of the only input of the only part."""
        (port,) = self.parts[MAIN].inputs
        return port.name

    def bind(self, inputs: Mapping[str, Array]) -> None:
        """Hand over tensors (batch, ...) by name; on CPUs they are read where they lie, if contiguous float32.

        Raises:
            EngineError: for a name that no part reads, or a shape that it does not take.
        """
        self._check_open()
        known = {port.name: port for ends in self.parts.values() for port in ends.inputs}
        for name, values in inputs.items():
            port = known.get(name)
            if port is None and MAIN in self.parts:
                raise EngineError(f"the graph has no input {name!r}; it has {', '.join(known)}")
            if port is not None and not _takes(port, values.shape):
                shape = (port.batch, *port.shape)
                raise EngineError(f"the graph takes {name} of shape {shape}, found {values.shape}; resize the images")
            dtype = "float32" if port is None else port.dtype
            whole = np.dtype(dtype).kind in "iu" and values.dtype.kind == "f"
            array = np.ascontiguousarray(np.rint(values) if whole else values, np.dtype(dtype))
            self._tensors[name] = self._upload(array)
        self._written = ()

    def run(self, part: str = MAIN, names: Mapping[str, str] = _NO_NAMES) -> None:
        """Execute a part; returns when its outputs are there. `names` are ends that are kept under another name.

        Raises:
            EngineError: if something that it reads is neither bound nor written.
        """
        kept = tuple(names.get(port.name, port.name) for port in self.parts[part].outputs)
        self._tensors.update(zip(kept, self._execute(part, self._inputs(part, names), kept), strict=True))
        self._written = kept

    def _inputs(self, part: str = MAIN, names: Mapping[str, str] = _NO_NAMES) -> list[Any]:
        self._check_open()
        try:
            return [self._tensors[names.get(port.name, port.name)] for port in self.parts[part].inputs]
        except KeyError as error:
            raise EngineError(f"nothing is bound to {error}; call bind before run") from None

    def fetch(self, *names: str) -> dict[str, Array]:
        """Return the outputs of the last run, or the tensors named, as arrays of their own.

        Raises:
            EngineError: if nothing has run since the last `bind`.
        """
        self._check_open()
        if not self._written:
            raise EngineError("nothing has run; call run before fetch")
        return {name: np.array(self._download(self._tensors[name])) for name in names or self._written}

    def __call__(self, pixel_values: Array) -> Array:
        """Run the only part on its only input (B, ...) and return its first output (B, ...)."""
        first = self.parts[MAIN].outputs[0].name
        return self.named(pixel_values, first)[first]

    def named(self, pixel_values: Array, *names: str) -> dict[str, Array]:
        """Run the only part on its only input (B, ...) and return the outputs named, or all of them, each (B, ...).

        A graph of a fixed batch runs as often as it takes, its last batch filled up with the last row.
        """
        size, count = self.parts[MAIN].inputs[0].batch, len(pixel_values)
        if not isinstance(size, int) or count == size:
            self.bind({self.input: pixel_values})
            self.run()
            return self.fetch(*names)
        missing = -count % size
        rows = np.concatenate((pixel_values, np.repeat(pixel_values[-1:], missing, 0))) if missing else pixel_values
        made = [self.named(rows[start : start + size], *names) for start in range(0, len(rows), size)]
        return {name: np.concatenate([one[name] for one in made])[:count] for name in made[0]}

    def profile(self, runs: int = 20, beside: Mapping[str, Call] | None = None) -> EngineProfile:
        """Time each node of the main part on what is bound, by the engine's own profiler.

        Calls `beside` take turns with it.

        Raises:
            EngineError: if nothing is bound, or the engine has no profiler.
        """
        raise EngineError(
            f"{self.engine} has no profiler (asked for {runs} runs beside {len(beside or ())} others); "
            "profile on onnxruntime, openvino or tensorrt"
        )

    @property
    def kept_bytes(self) -> int:
        """Bytes of all tensors that it keeps in the host's memory."""
        return sum(array.nbytes for array in self._tensors.values())

    def _check_open(self) -> None:
        if not self._open:
            raise EngineError("this session is closed; open the bundle again")

    def close(self) -> None:
        """Release all tensors, and what the engine holds."""
        self._open, self._tensors = False, {}

    def __enter__(self: S) -> S:
        """Enter a context that closes the session."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _takes(port: Port, shape: tuple[int, ...]) -> bool:
    wanted = (port.batch if isinstance(port.batch, int) else OPEN_AXIS, *port.shape)
    return len(shape) == len(wanted) and all(
        want in (OPEN_AXIS, have) for want, have in zip(wanted, shape, strict=True)
    )


def only_image(path: object, inputs: int, outputs: int, *, most: int | None = None) -> None:
    """Check that a graph has one input, and an output, at most `most` of them.

    Raises:
        EngineError: if it has not.
    """
    if inputs != 1 or outputs < 1 or (most is not None and outputs > most):
        raise EngineError(
            f"{path} has {inputs} inputs and {outputs} outputs; vitfold runs graphs with one image input and "
            f"{'one output' if most == 1 else 'outputs'}: export only the vision encoder"
        )


def open_on(row: Engine, graphs: Mapping[str, Path], **options: Any) -> Session:
    """Load graphs, one per part, into an engine, with options that it takes.

    Raises:
        EngineError: if it is not installed or refuses a graph.
    """
    session: Session = session_class(row)(graphs if row.several_parts else graphs[MAIN], **options, **row.settings)
    return session


def session_class(row: Engine) -> Any:
    """Load the module of an engine and return its kind of session.

    Raises:
        EngineError: if what it needs is not installed.
    """
    module, _, name = str(row.session).partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise EngineError(missing_extra(str(error.name), "optimize", f"the engine {row.name}")) from None
