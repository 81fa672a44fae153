"""ONNX Runtime on the CPU.

Owns the session options, each chosen by measurement (docs/architecture.md), and turns the runtime's
errors into ones that name the cure.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from jaxtyping import Float

from vitfold.engines.session import (
    FLOATING,
    PLAIN,
    SHOWN,
    WIDE,
    Call,
    EngineProfile,
    NodeTime,
    Session,
    median_ns,
    profile_of,
    take_turns,
    usable_cores,
)
from vitfold.errors import EngineError

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


@dataclass(frozen=True, slots=True)
class End:
    """The input or the output of a graph: its name, its NumPy type, its shape with a name for every symbolic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


EXECUTIONS: Mapping[str, Mapping[str, str]] = {
    PLAIN: {},
    WIDE: {"session.x64quantprecision": "1"},
    FLOATING: {"session.disable_quant_qdq": "1"},
}
"""Session settings of each way to execute integer products: int8 weights become uint8, Q/DQ pairs are not fused."""
_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
_KERNEL = "_kernel_time"
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


def load_graph(path: str | Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """Load a graph on the CPU provider, quietly.

    Raises:
        EngineError: if the runtime refuses it.
    """
    try:
        # Without a second try on the same provider, which would print a banner.
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except EXCEPTIONS as error:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot load {path}: {reason_of(error)}; "
            "check the file, or upgrade with: pip install -U onnxruntime"
        ) from None


def reason_of(error: Exception) -> str:
    """Return what the runtime says, as one short line."""
    if isinstance(error, UnicodeDecodeError):
        return "it holds names that are no text"
    said = " ".join(str(error).split())
    return said if len(said) <= _REASON else f"{said[:_REASON]} ..."


class OnnxRuntimeSession(Session):
    """One ONNX graph on ONNX Runtime's CPU provider, with one input and one output, which `ends` describes.

    `literal` leaves the graph as it was written, but for the simplest fusions: some of the others move 8-bit floats to
    operators that do not take them, and 8-bit products to kernels that saturate. `execution` is a key of `EXECUTIONS`.
    """

    def __init__(
        self, path: str | Path, *, threads: int | None = None, literal: bool = False, execution: str = PLAIN
    ) -> None:
        self._path, self._threads, self._literal, self.execution = path, threads, literal, execution
        self._session = self._load(self._options())
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise EngineError(
                f"{path} has {len(inputs)} inputs and {len(outputs)} outputs; vitfold runs graphs with one image input "
                "and one output: export only the vision encoder"
            )
        self._input = inputs[0].name
        self._output = outputs[0].name
        self._shape = tuple(inputs[0].shape)
        self.ends = tuple(End(e.name, _TYPES.get(e.type, e.type), tuple(e.shape)) for e in (*inputs, *outputs))
        self._binding: ort.IOBinding | None = self._session.io_binding()
        self._pixels: np.ndarray | None = None

    def _options(self) -> ort.SessionOptions:
        return session_options(self._threads, literal=self._literal, execution=self.execution)

    def _load(self, options: ort.SessionOptions) -> ort.InferenceSession:
        return load_graph(self._path, options)

    @property
    def engine(self) -> str:
        """Name, version, and how integer products run where that is not as usual."""
        return f"onnxruntime {ort.__version__}{SHOWN[self.execution]}"

    def _bound(self) -> ort.IOBinding:
        if self._binding is None:
            raise EngineError("this session is closed; open the bundle again")
        return self._binding

    def bind(self, pixel_values: Float[np.ndarray, "B 3 H W"]) -> None:
        """Bind without a copy where the array is contiguous float32."""
        given = pixel_values.shape
        if len(given) != len(self._shape) or any(
            isinstance(want, int) and want != have for want, have in zip(self._shape, given, strict=True)
        ):
            raise EngineError(f"the graph takes input of shape {self._shape}, found {tuple(given)}; resize the images")
        binding = self._bound()
        # The runtime reads this array's own memory, so it has to live as long as the binding.
        self._pixels = np.ascontiguousarray(pixel_values, np.float32)
        binding.bind_cpu_input(self._input, self._pixels)
        binding.bind_output(self._output, "cpu")

    def run(self) -> None:
        """Execute."""
        binding = self._bound()
        try:
            self._session.run_with_iobinding(binding)
        except EXCEPTIONS as error:
            raise EngineError(f"ONNX Runtime failed while running: {reason_of(error)}") from None

    def fetch(self) -> Float[np.ndarray, "B ..."]:
        """Copy the output out of the runtime's arena."""
        return np.array(self._bound().copy_outputs_to_cpu()[0])

    def profile(self, runs: int = 20, beside: Mapping[str, Call] | None = None) -> EngineProfile:
        """Load the graph once more with the runtime's profiler on; it reports whole microseconds, rounded down."""
        self._bound()
        if self._pixels is None:
            raise EngineError("nothing is bound; call bind before profile")
        with tempfile.TemporaryDirectory(prefix="vitfold-") as folder:
            options = self._options()
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
            watched, feed = self._load(options), {self._input: self._pixels}

            def profiled() -> None:
                watched.run(None, feed)

            self.run()
            profiled()
            turns = take_turns(self.run, profiled, beside or {}, runs)
            events = json.loads(Path(watched.end_profiling()).read_text(encoding="utf-8"))
        return profile_of(_node_times(events), turns)

    def close(self) -> None:
        """Drop the runtime's session and its memory."""
        self._binding = self._session = self._pixels = None


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
