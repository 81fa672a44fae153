"""ONNX Runtime on the CPU, and on other hardware through its providers.

The session options are each chosen by measurement on CPUs (docs/architecture.md); the runtime's errors become ones
that name the cure.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from vitfold.artifacts.bundle import MAIN
from vitfold.cores import usable_cores
from vitfold.engines.session import (
    OPEN_AXIS,
    SHOWN,
    Call,
    Ends,
    EngineProfile,
    NodeTime,
    Session,
    median_ns,
    only_image,
    take_turns,
)
from vitfold.errors import EngineError
from vitfold.model import Array
from vitfold.ops.protocol import Port
from vitfold.target import FLOATING, PLAIN, WIDE

EXCEPTIONS = (
    ort.capi.onnxruntime_pybind11_state.Fail,
    ort.capi.onnxruntime_pybind11_state.InvalidArgument,
    ort.capi.onnxruntime_pybind11_state.InvalidGraph,
    ort.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    ort.capi.onnxruntime_pybind11_state.NoSuchFile,
    ort.capi.onnxruntime_pybind11_state.NotImplemented,
    ort.capi.onnxruntime_pybind11_state.RuntimeException,
    RuntimeError,  # what its C++ throws of the standard library
    ValueError,  # a message of its own that is no UTF-8, since a damaged graph is quoted in it
    IndexError,
)
_REASON = 400


EXECUTIONS: Mapping[str, Mapping[str, str]] = {
    PLAIN: {},
    WIDE: {"session.x64quantprecision": "1"},
    FLOATING: {"session.disable_quant_qdq": "1"},
}
"""Session settings of each way to execute integer products: int8 weights become uint8, Q/DQ pairs are not fused."""
_TYPES = {
    **{"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"},
    **{f"tensor({name})": name for name in ("uint8", "int8", "int32", "int64", "bool")},
}
_KERNEL = "_kernel_time"
CPU = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One of the runtime's backends: how tables call it, what it is told, and how it is had."""

    shown: str
    cure: str
    options: Mapping[str, str] = field(default_factory=dict)


_GPU_BUILD = (
    "install the build of ONNX Runtime for NVIDIA GPUs over the other one: pip install 'vitfold[gpu]' && pip install "
    "--force-reinstall --no-deps onnxruntime-gpu"
)
PROVIDERS: Mapping[str, Provider] = {
    CPU: Provider(shown="", cure="pip install -U onnxruntime"),
    "CUDAExecutionProvider": Provider(shown=" on CUDA", cure=_GPU_BUILD, options={"use_tf32": "0"}),
    "TensorrtExecutionProvider": Provider(shown=" on TensorRT", cure=f"{_GPU_BUILD}, and TensorRT's libraries"),
    "CoreMLExecutionProvider": Provider(shown=" on CoreML", cure="it is in the builds of ONNX Runtime for macOS"),
    "DmlExecutionProvider": Provider(
        shown=" on DirectML",
        cure="on Windows: pip uninstall -y onnxruntime && pip install onnxruntime-directml",
    ),
}
"""By the runtime's name. What one of them does not compute, the runtime computes on the CPU."""
_CODES = {"uint8", "int8"}


def session_options(threads: int | None, *, literal: bool = False, execution: str = PLAIN) -> ort.SessionOptions:
    """Return how graphs run; `literal` leaves them as they were written, but for the simplest fusions."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if literal else levels.ORT_ENABLE_ALL
    # Threads spin within a run, where it pays, and sleep between runs, where it robs the neighbours.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for key, value in EXECUTIONS[FLOATING if literal else execution].items():
        options.add_session_config_entry(key, value)
    return options


def check_provider(name: str) -> None:
    """Check that the installed build of the runtime has a provider.

    Raises:
        EngineError: with what it has, and how to get this one.
    """
    available = ort.get_available_providers()
    if name not in available:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} as installed here has no {name}, only {', '.join(available)}; "
            f"{PROVIDERS[name].cure}"
        )


def load_graph(path: str | Path, options: ort.SessionOptions, provider: str = CPU) -> ort.InferenceSession:
    """Load a graph on a provider, quietly.

    Raises:
        EngineError: if the runtime refuses it, or the provider does not start.
    """
    check_provider(provider)
    if provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider") and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # the libraries of CUDA that came with PyTorch or as packages of their own
    if provider == "DmlExecutionProvider":
        options.enable_mem_pattern = False
    providers = [(provider, dict(PROVIDERS[provider].options))] + ([] if provider == CPU else [(CPU, {})])
    try:
        # Without a second try on the same provider, which would print a banner.
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except EXCEPTIONS as error:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot load {path}: {reason_of(error)}; "
            "check the file, or upgrade with: pip install -U onnxruntime"
        ) from None
    if provider not in session.get_providers():
        raise EngineError(
            f"ONNX Runtime's {provider} does not start here: its driver or libraries are missing, or of other versions "
            f"than ONNX Runtime {ort.__version__} was built for; {PROVIDERS[provider].cure}"
        )
    return session


def reason_of(error: Exception) -> str:
    """Return what the runtime says, as one short line."""
    if isinstance(error, UnicodeDecodeError):
        return "it holds names that are no text"
    said = " ".join(str(error).split())
    return said if len(said) <= _REASON else f"{said[:_REASON]} ..."


class OnnxRuntimeSession(Session):
    """ONNX graphs, one per part, on one of `PROVIDERS`; what parts hand on is read and written in the host's memory.

    So `run` on a GPU holds the copies there and back. `literal` leaves graphs as they were written, but for the
    simplest fusions: some of the others move 8-bit floats to operators that do not take them, and 8-bit products to
    kernels that saturate. `execution` is a key of `EXECUTIONS`.
    """

    def __init__(
        self,
        graphs: str | Path | Mapping[str, Path],
        *,
        threads: int | None = None,
        literal: bool = False,
        execution: str = PLAIN,
        provider: str = CPU,
    ) -> None:
        self._provider = provider
        self._paths = graphs if isinstance(graphs, Mapping) else {MAIN: Path(graphs)}
        self._threads, self._literal, self.execution = threads, literal, execution
        self._sessions = {part: load_graph(path, self._options(), provider) for part, path in self._paths.items()}
        self._bindings: dict[tuple[str, tuple[str, ...]], _Binding] = {}
        self._rooms: dict[str, Array] = {}
        super().__init__({part: _ends(self._paths[part], session) for part, session in self._sessions.items()})
        if MAIN in self.parts:
            ends = self.parts[MAIN]
            only_image(self._paths[MAIN], len(ends.inputs), len(ends.outputs))

    @staticmethod
    def check_starts(*, provider: str = CPU) -> None:
        """The runtime itself is always there; a provider is in some builds of it."""
        check_provider(provider)

    def _options(self) -> ort.SessionOptions:
        return session_options(self._threads, literal=self._literal, execution=self.execution)

    @property
    def engine(self) -> str:
        """Name, version, and how integer products run where that is not as usual."""
        return f"onnxruntime {ort.__version__}{PROVIDERS[self._provider].shown}{SHOWN[self.execution]}"

    def _execute(self, part: str, inputs: Sequence[Array], kept: tuple[str, ...]) -> Sequence[Array]:
        bound = self._bindings.get((part, kept))
        if bound is None or not bound.takes(inputs):
            bound = self._bindings[part, kept] = self._bind(part, inputs, kept)
        try:
            self._sessions[part].run_with_iobinding(bound.binding)
        except EXCEPTIONS as error:
            raise EngineError(f"ONNX Runtime failed while running {part}: {reason_of(error)}") from None
        return bound.outputs

    def _bind(self, part: str, inputs: Sequence[Array], kept: tuple[str, ...]) -> _Binding:
        """Bind the memory of all inputs, and that of outputs, which parts share by the names that these are kept under.

        The runtime reads and writes these arrays' own memory, so they have to live as long as the binding.
        """
        outputs: list[Array] = []
        try:
            for place, name in enumerate(kept):
                shape, dtype = self._output(part, place, inputs)
                room = self._rooms.get(name)
                if room is None or room.shape != shape or room.dtype != dtype or any(room is one for one in inputs):
                    room = self._rooms[name] = np.zeros(shape, dtype)
                outputs.append(room)
            found = _Binding(self._sessions[part].io_binding(), self.parts[part], outputs)
            found.read(inputs)
            for port, array in zip(self.parts[part].outputs, outputs, strict=True):
                found.binding.bind_output(port.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        except (*EXCEPTIONS, MemoryError) as error:  # a graph may state any shape
            raise EngineError(f"ONNX Runtime cannot run {part} on this input: {reason_of(error)}") from None
        return found

    def _output(self, part: str, place: int, inputs: Sequence[Array]) -> tuple[tuple[int, ...], Any]:
        """Return the shape and the type of an output; where the graph does not say it, by running it once."""
        session = self._sessions[part]
        output = session.get_outputs()[place]
        sizes = {
            axis: size
            for one, array in zip(session.get_inputs(), inputs, strict=True)
            for axis, size in zip(one.shape, array.shape, strict=False)
        }
        shape: Any = tuple(axis if isinstance(axis, int) else sizes.get(axis) for axis in output.shape)
        if output.type in _TYPES and all(isinstance(axis, int) for axis in shape):
            return shape, np.dtype(_TYPES[output.type])
        feed = {one.name: array for one, array in zip(session.get_inputs(), inputs, strict=True)}
        found = np.asarray(session.run([output.name], feed)[0])
        return found.shape, found.dtype

    def profile(self, runs: int = 20, beside: Mapping[str, Call] | None = None) -> EngineProfile:
        """Load the graph once more with the runtime's profiler on; it reports whole microseconds, rounded down."""
        feed = dict(zip((port.name for port in self.parts[MAIN].inputs), self._inputs(), strict=True))
        with tempfile.TemporaryDirectory(prefix="vitfold-") as folder:
            options = self._options()
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
            watched = load_graph(self._paths[MAIN], options, self._provider)

            def profiled() -> None:
                watched.run(None, feed)

            self.run()
            profiled()
            turns = take_turns(self.run, profiled, beside or {}, runs)
            events = json.loads(Path(watched.end_profiling()).read_text(encoding="utf-8"))
        return replace(turns, nodes=_node_times(events))

    def close(self) -> None:
        """Drop the runtime's sessions and their memory."""
        super().close()
        self._bindings, self._sessions, self._rooms = {}, {}, {}


class _Binding:
    """The ends of a part bound to arrays."""

    def __init__(self, binding: ort.IOBinding, ends: Ends, outputs: Sequence[Array]) -> None:
        self.binding, self.outputs = binding, outputs
        self._ends = ends
        self._inputs: list[Array] = []

    def read(self, inputs: Sequence[Array]) -> None:
        """Bind all inputs."""
        for port, array in zip(self._ends.inputs, inputs, strict=True):
            self.binding.bind_input(port.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._inputs = list(inputs)

    def takes(self, inputs: Sequence[Array]) -> bool:
        """Bind those inputs that lie elsewhere now; False if one has another shape, or lies where an output does."""
        for place, (old, new) in enumerate(zip(self._inputs, inputs, strict=True)):
            if new is old:
                continue
            if new.shape != old.shape or any(new is one for one in self.outputs):
                return False
            name = self._ends.inputs[place].name
            self.binding.bind_input(name, "cpu", 0, new.dtype, new.shape, new.ctypes.data)
            self._inputs[place] = new
        return True


def _ends(path: Path, session: ort.InferenceSession) -> Ends:
    """Return the ends of a graph.

    Raises:
        EngineError: if it reads something else than numbers.
    """
    for one in session.get_inputs():
        if one.type not in _TYPES:
            raise EngineError(f"{path} reads {one.name[:60]} as {one.type}; vitfold hands over tensors of numbers")
    return Ends(*(tuple(_port(one) for one in ends) for ends in (session.get_inputs(), session.get_outputs())))


def _port(end: ort.NodeArg) -> Port:
    batch, *shape = end.shape or (OPEN_AXIS,)
    return Port(
        name=end.name,
        shape=tuple(axis if isinstance(axis, int) else OPEN_AXIS for axis in shape),
        batch=batch if isinstance(batch, int | str) else "batch",
        dtype=_TYPES.get(end.type, "float32"),
    )


def _node_times(events: list[dict[str, Any]]) -> tuple[NodeTime, ...]:
    """Return the median of each node over all runs but the first, which warms up."""
    seen: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(_KERNEL):
            seen.setdefault(event["args"]["node_index"], []).append(event)
    nodes = []
    for found in seen.values():
        last = found[-1]["args"]
        types = [kind for operand in last.get("input_type_shape", ()) for kind in operand]
        nodes.append(
            NodeTime(
                name=found[-1]["name"].removesuffix(_KERNEL),
                op=last["op_name"],
                latency_ns=median_ns(1e3 * event["dur"] for event in found[1:]),
                integer=sum(kind in _CODES for kind in types) >= 2 and "Quantize" not in last["op_name"],
            )
        )
    return tuple(nodes)
