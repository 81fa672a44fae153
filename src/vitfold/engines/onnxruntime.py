"""ONNX Runtime on the CPU.

Owns the session options, each chosen by measurement (docs/architecture.md), and turns the runtime's
errors into ones that name the cure.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from jaxtyping import Float

from vitfold.engines.session import Session, usable_cores
from vitfold.errors import EngineError

_EXCEPTIONS = (
    ort.capi.onnxruntime_pybind11_state.Fail,
    ort.capi.onnxruntime_pybind11_state.InvalidArgument,
    ort.capi.onnxruntime_pybind11_state.InvalidGraph,
    ort.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    ort.capi.onnxruntime_pybind11_state.NoSuchFile,
    ort.capi.onnxruntime_pybind11_state.NotImplemented,
    ort.capi.onnxruntime_pybind11_state.RuntimeException,
)


@dataclass(frozen=True, slots=True)
class End:
    """The input or the output of a graph: its name, its NumPy type, its shape with a name for every symbolic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}


class OnnxRuntimeSession(Session):
    """One ONNX graph on ONNX Runtime's CPU provider, with one input and one output, which `ends` describes.

    `literal` leaves the graph as it was written, but for the simplest fusions: some of the others move 8-bit floats to
    operators that do not take them.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, literal: bool = False) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or usable_cores()
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_BASIC if literal else levels.ORT_ENABLE_ALL
        # Threads spin within a run, where it pays, and sleep between runs, where it robs the neighbours.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except _EXCEPTIONS as error:
            raise EngineError(
                f"ONNX Runtime {ort.__version__} cannot load {path}: {error}; "
                "check the file, or upgrade with: pip install -U onnxruntime"
            ) from None
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

    @property
    def engine(self) -> str:
        """Name and version."""
        return f"onnxruntime {ort.__version__}"

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
        except _EXCEPTIONS as error:
            raise EngineError(f"ONNX Runtime failed while running: {error}") from None

    def fetch(self) -> Float[np.ndarray, "B ..."]:
        """Copy the output out of the runtime's arena."""
        return np.array(self._bound().copy_outputs_to_cpu()[0])

    def close(self) -> None:
        """Drop the runtime's session and its memory."""
        self._binding = self._session = self._pixels = None
