"""OpenVINO on the CPU.

The plugin's settings each stand with their reason; models are compiled per batch size; the runtime's errors become
ones that name the cure. Nothing is kept on disk.
"""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    only_image,
    take_turns,
)
from vitfold.errors import EngineError, missing_extra
from vitfold.model import Array
from vitfold.ops.protocol import Port
from vitfold.target import FLOATING, PLAIN

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
    Floats stay float32 unless `precision` is bf16: on processors with bfloat16 the plugin would otherwise compute in
    it, and it would quantize the activations of weight-only INT8 layers while running. The recipe decides precision,
    not the engine. `execution` is a key of `EXECUTIONS`.

    Raises:
        EngineError: if OpenVINO is not installed, or refuses the graph, or this processor has no bfloat16.
    """

    def __init__(
        self, path: str | Path, *, threads: int | None = None, execution: str = PLAIN, precision: str = "f32"
    ) -> None:
        self.check_starts(precision=precision)
        self._ov = ov = _openvino()
        self._path, self.execution, self._precision = path, execution, precision
        self._settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads or usable_cores(),
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            **EXECUTIONS[execution],
        }
        self._core: Any = ov.Core()
        try:
            self._model: Any = self._core.read_model(str(path))
        except RuntimeError as error:
            raise EngineError(self._refusal("load", error)) from None
        only_image(path, len(self._model.inputs), len(self._model.outputs))
        ends = (self._model.inputs, self._model.outputs)
        super().__init__({MAIN: Ends(*(tuple(_port(one) for one in side) for side in ends))})
        self._requests: OrderedDict[int, Any] = OrderedDict()
        self._request: Any = None

    @staticmethod
    def check_starts(precision: str = "f32") -> None:
        """Check that OpenVINO is installed, and that it multiplies floats of this precision here.

        Raises:
            EngineError: if it is not, or does not.
        """
        ov = _openvino()
        if precision == "bf16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise EngineError(
                "this processor has no products of bfloat16 (AMX or AVX512-BF16), which OpenVINO would emulate, "
                "slowly; take openvino"
            )

    @property
    def engine(self) -> str:
        """Name and version, without the build, and how integer products run where that is not as usual."""
        name = "openvino" if self._precision == "f32" else f"openvino-{self._precision}"
        return f"{name} {self._ov.__version__.partition('-')[0]}{SHOWN[self.execution]}"

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
            self._model.reshape([batch, *self.parts[MAIN].inputs[0].shape])
            return self._core.compile_model(self._model, "CPU", settings).create_infer_request()
        except RuntimeError as error:
            raise EngineError(self._refusal(f"compile for batch {batch}", error)) from None

    def bind(self, inputs: Mapping[str, Array]) -> None:
        """Bind without a copy where the array is contiguous float32; compile if this batch size is new.

        The plugin reads this array's own memory, which is kept as long.
        """
        super().bind(inputs)
        (pixels,) = self._inputs()
        self._request = self._compiled_for(len(pixels))
        self._request.set_input_tensor(self._ov.Tensor(pixels, shared_memory=True))

    def _execute(self, part: str, inputs: Sequence[Array], kept: tuple[str, ...]) -> Sequence[Array]:
        try:
            self._request.infer(share_outputs=True)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed while running {self._path}: {error}") from None
        return tuple(self._request.get_output_tensor(i).data for i in range(len(self._model.outputs)))

    def profile(self, runs: int = 20, beside: Mapping[str, Call] | None = None) -> EngineProfile:
        """Compile the graph once more with the plugin's counters on; nodes that it fused away report no time."""
        (pixels,) = self._inputs()
        request = self._compile(len(pixels), {**self._settings, "PERF_COUNT": True})
        request.set_input_tensor(self._ov.Tensor(pixels, shared_memory=True))

        def profiled() -> None:
            request.infer(share_outputs=True)

        self.run()
        profiled()
        first = request.get_profiling_info()
        turns = take_turns(self.run, profiled, beside or {}, runs)
        nodes = _node_times(first, request.get_profiling_info(), runs)
        return replace(turns, nodes=nodes)

    def close(self) -> None:
        """Drop all compiled models and their memory."""
        super().close()
        self._requests.clear()
        self._request = self._model = self._core = None


def _openvino() -> Any:
    try:
        with without_telemetry():
            import openvino
    except ModuleNotFoundError:
        raise EngineError(missing_extra("openvino", "openvino", "the engine openvino")) from None
    return openvino


def _port(end: Any) -> Port:
    batch, *shape = (axis.get_length() if axis.is_static else OPEN_AXIS for axis in end.partial_shape)
    return Port(name=end.any_name, shape=tuple(shape), batch="batch" if batch == OPEN_AXIS else batch)


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
