"""OpenVINO on the CPU.

Owns the plugin's settings, each stated with its reason, the models compiled per batch size, and turns the
runtime's errors into ones that name the cure. Nothing is kept on disk.
"""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vitfold.engines.session import (
    FLOATING,
    PLAIN,
    SHOWN,
    Call,
    EngineProfile,
    NodeTime,
    Session,
    profile_of,
    take_turns,
    usable_cores,
)
from vitfold.errors import EngineError, missing_extra

# Batch sizes compiled at once: the common one and the remainder at the end of a folder. Each holds the weights again.
KEPT_SIZES = 2
EXECUTIONS: Mapping[str, Mapping[str, str]] = {PLAIN: {}, FLOATING: {"LP_TRANSFORMS_MODE": "NO"}}
"""Settings of each way to execute integer products: without the plugin's low-precision passes they are floats."""
_PRODUCTS = {"FullyConnected", "MatMul", "Convolution"}


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Import OpenVINO or NNCF within this context, so that they report nothing to their makers.

    OpenVINO sends an event unasked as it is imported, NNCF as it is used, unless the package openvino_telemetry is
    missing: here it is, for the time of the import. A program that has imported it before keeps it.
    """
    if "openvino_telemetry" in sys.modules:
        yield
        return
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["openvino_telemetry"]


class OpenVinoSession(Session):
    """One ONNX graph on OpenVINO's CPU plugin, with one input and one output.

    The graph is compiled for the batch size that is bound, since static shapes run about 10% faster than a symbolic
    batch (ViT-B/16 and ViT-S/14, batch 1); a size seen for the first time therefore costs a compilation in `bind`.

    The settings are those of one caller who waits for each result (hint LATENCY, one stream) with all threads on it.
    Floats stay float32: on processors with bfloat16 the plugin would otherwise compute in it, and it would quantize
    the activations of weight-only INT8 layers while running. The recipe decides precision, not the engine.
    `execution` is a key of `EXECUTIONS`.

    Raises:
        EngineError: if OpenVINO is not installed, or refuses the graph.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, execution: str = PLAIN) -> None:
        try:
            with without_telemetry():
                import openvino as ov
        except ModuleNotFoundError:
            raise EngineError(missing_extra("openvino", "openvino", "the engine openvino")) from None
        self._ov = ov
        self._path, self.execution = path, execution
        self._settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads or usable_cores(),
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            **EXECUTIONS[execution],
        }
        self._core: Any = ov.Core()
        try:
            self._model: Any = self._core.read_model(str(path))
        except RuntimeError as error:
            raise EngineError(self._refusal("load", error)) from None
        if len(self._model.inputs) != 1 or len(self._model.outputs) != 1:
            raise EngineError(
                f"{path} has {len(self._model.inputs)} inputs and {len(self._model.outputs)} outputs; vitfold runs "
                "graphs with one image input and one output: export only the vision encoder"
            )
        self._shape = tuple(
            axis.get_length() if axis.is_static else str(axis) for axis in self._model.inputs[0].partial_shape
        )
        self._requests: OrderedDict[int, Any] = OrderedDict()
        self._request: Any = None
        self._pixels: np.ndarray | None = None
        self._has_run = False

    @property
    def engine(self) -> str:
        """Name and version, without the build, and how integer products run where that is not as usual."""
        return f"openvino {self._ov.__version__.partition('-')[0]}{SHOWN[self.execution]}"

    def _refusal(self, verb: str, error: Exception) -> str:
        lines = [line.strip() for line in str(error).splitlines()]
        said = " ".join(line for line in lines if line and not line.startswith(("Exception from", "Check '")))
        cure = "check the file, or upgrade with: pip install -U openvino"
        if "com.microsoft" in said:
            cure = (
                "the graph holds ONNX Runtime's own operators: make the bundle again with --target openvino or "
                "--target portable"
            )
        return f"OpenVINO {self._ov.__version__.partition('-')[0]} cannot {verb} {self._path}: {said}; {cure}"

    def _open(self) -> None:
        if self._model is None:
            raise EngineError("this session is closed; open the bundle again")

    def _compiled_for(self, batch: int) -> Any:
        if batch in self._requests:
            self._requests.move_to_end(batch)
            return self._requests[batch]
        while len(self._requests) >= KEPT_SIZES:
            self._requests.popitem(last=False)
        self._requests[batch] = self._compile(batch, self._settings)
        return self._requests[batch]

    def _compile(self, batch: int, settings: dict[str, Any]) -> Any:
        try:
            self._model.reshape([batch, *self._shape[1:]])
            return self._core.compile_model(self._model, "CPU", settings).create_infer_request()
        except RuntimeError as error:
            raise EngineError(self._refusal(f"compile for batch {batch}", error)) from None

    def bind(self, pixel_values: Float[np.ndarray, "B 3 H W"]) -> None:
        """Bind without a copy where the array is contiguous float32; compile if this batch size is new.

        Raises:
            EngineError: for a shape that the graph does not take.
        """
        self._open()
        given = pixel_values.shape
        if len(given) != len(self._shape) or any(
            isinstance(want, int) and want != have for want, have in zip(self._shape, given, strict=True)
        ):
            raise EngineError(f"the graph takes input of shape {self._shape}, found {tuple(given)}; resize the images")
        self._request, self._has_run = self._compiled_for(given[0]), False
        # The plugin reads this array's own memory, so it has to live as long as the binding.
        self._pixels = np.ascontiguousarray(pixel_values, np.float32)
        self._request.set_input_tensor(self._ov.Tensor(self._pixels, shared_memory=True))

    def run(self) -> None:
        """Execute; returns when the result is there."""
        self._open()
        if self._request is None:
            raise EngineError("nothing is bound; call bind before run")
        try:
            self._request.infer(share_outputs=True)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed while running {self._path}: {error}") from None
        self._has_run = True

    def fetch(self) -> Float[np.ndarray, "B ..."]:
        """Copy the output out of the plugin's memory."""
        self._open()
        if not self._has_run:
            raise EngineError("nothing has run; call run before fetch")
        return np.array(self._request.get_output_tensor().data)

    def profile(self, runs: int = 20, beside: Mapping[str, Call] | None = None) -> EngineProfile:
        """Compile the graph once more with the plugin's counters on; nodes that it fused away report no time."""
        self._open()
        if self._pixels is None:
            raise EngineError("nothing is bound; call bind before profile")
        request = self._compile(len(self._pixels), {**self._settings, "PERF_COUNT": True})
        request.set_input_tensor(self._ov.Tensor(self._pixels, shared_memory=True))

        def profiled() -> None:
            request.infer(share_outputs=True)

        self.run()
        profiled()
        first = request.get_profiling_info()
        turns = take_turns(self.run, profiled, beside or {}, runs)
        nodes = _node_times(first, request.get_profiling_info(), runs)
        return profile_of(nodes, turns)

    def close(self) -> None:
        """Drop all compiled models and their memory."""
        self._requests.clear()
        self._request = self._model = self._core = self._pixels = None


def _node_times(first: list[Any], last: list[Any], runs: int) -> tuple[NodeTime, ...]:
    """Return the mean of each node that was executed.

    The counters are averages over all runs so far: the first, slow one is taken out again.
    """
    nodes = []
    for once, node in zip(first, last, strict=True):
        if node.status == node.Status.EXECUTED:
            total = (runs + 1) * node.real_time.total_seconds() - once.real_time.total_seconds()
            nodes.append(
                NodeTime(
                    name=node.node_name,
                    op=node.node_type,
                    latency_ns=max(0.0, 1e9 * total / runs),
                    integer=node.node_type in _PRODUCTS and node.exec_type.endswith("_I8"),
                )
            )
    return tuple(nodes)
