"""TensorRT 10 and 11 on an NVIDIA GPU.

How a graph becomes an engine (strongly typed: every precision stands in the graph), which batches an engine covers,
what is kept on disk between runs; TensorRT's failures become errors that name the cure. TensorRT never calibrates:
a graph that is not quantized stays in its own types.

Source: TensorRT Developer Guide, "Strongly Typed Networks", "Working with Dynamic Shapes", "CUDA Graphs".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitfold.artifacts.bundle import MAIN
from vitfold.artifacts.cache import keep_bytes, key_of, read_bytes
from vitfold.engines.cuda import FOR_ACCURACY, Buffer, Gpu
from vitfold.engines.session import Call, Ends, EngineProfile, NodeTime, Session, median_ns, only_image, take_turns
from vitfold.errors import EngineError, TargetError
from vitfold.model import Array
from vitfold.ops.protocol import Port
from vitfold.storage.digest import file_sha256

KEPT = "tensorrt"
PLAN = ".plan"
TIMINGS = ".timings"
FLOAT8_CAPABILITY = (8, 9)
# Batch sizes held ready at once: the common one and the remainder at the end of a folder. Each holds activations.
KEPT_SIZES = 2


@dataclass(frozen=True, slots=True)
class BatchRange:
    """The batches that an engine takes, and the one that its kernels are chosen for."""

    smallest: int
    optimum: int
    largest: int

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.optimum <= self.largest:
            raise TargetError(
                f"batches have to rise from 1: smallest, optimum, largest; found {astuple(self)}; give them as 1,8,64"
            )

    def covers(self, batch: int) -> bool:
        """True if an engine of this range runs that batch."""
        return self.smallest <= batch <= self.largest

    def extended(self, batch: int) -> BatchRange:
        """Return a range that covers that batch too, and every smaller one, so that remainders cost one build at most.

        A batch larger than all before becomes the optimum.
        """
        larger = batch > self.largest
        return BatchRange(1, batch if larger else self.optimum, batch if larger else self.largest)


def load_tensorrt() -> Any:
    """Return the package tensorrt.

    Raises:
        EngineError: if it is missing, broken, or older than 10.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise EngineError(
            f"the engine tensorrt needs the package tensorrt, which cannot be imported ({error}); "
            f"run: pip install 'vitfold[tensorrt]'; {FOR_ACCURACY}"
        ) from None
    if _major(tensorrt) < 10:
        raise EngineError(
            f"the engine tensorrt needs TensorRT 10 or newer, found {tensorrt.__version__}; "
            "run: pip install -U 'vitfold[tensorrt]'"
        )
    return tensorrt


def _major(trt: Any) -> int:
    return int(trt.__version__.partition(".")[0])


def _error_log(trt: Any) -> Any:
    """Return a logger that prints nothing and keeps errors for the messages."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc]  # a class of TensorRT, which has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg.strip())

    return ErrorLog()


def _stopwatch(trt: Any) -> Any:
    """Return a profiler that keeps the milliseconds of each layer, in the order of their first run."""

    class Stopwatch(trt.IProfiler):  # type: ignore[misc]  # a class of TensorRT, which has no types
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.seen_ms: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.seen_ms.setdefault(layer_name, []).append(ms)

    return Stopwatch()


class _Builder:
    """A parsed graph, from which engines for ranges of batches are built.

    Raises:
        EngineError: if the file is no graph, has a node that TensorRT does not take, or does not run on this GPU.
    """

    def __init__(self, trt: Any, path: Path, gpu: Gpu) -> None:
        self._trt, self._path, self._gpu = trt, path, gpu
        self._log = _error_log(trt)
        try:
            self._builder, self._runtime = trt.Builder(self._log), trt.Runtime(self._log)
        except (TypeError, RuntimeError):
            raise EngineError(
                f"TensorRT {trt.__version__} does not start on {gpu.name}: {self._reason()}; upgrade the NVIDIA "
                f"driver, or install the tensorrt that goes with its CUDA version; {FOR_ACCURACY}"
            ) from None
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if _major(trt) < 11 else 0
        self._network = self._builder.create_network(typed)
        # The network reads weights from the parser's memory, so the parser has to live as long.
        self._parser = trt.OnnxParser(self._network, self._log)
        parsed = path.is_file() and self._parser.parse_from_file(str(path))
        # What is no ONNX at all may parse as a graph of nothing.
        if not parsed or not self._network.num_inputs:
            raise EngineError(self._rejection())
        only_image(path, self._network.num_inputs, self._network.num_outputs, most=1)
        self._check_float8()
        given, returned = self._network.get_input(0), self._network.get_output(0)
        self.input, self.output = given.name, returned.name
        self.shape: tuple[int, ...] = tuple(given.shape)
        self.ends = Ends((_port(given),), (_port(returned),))

    def _reason(self) -> str:
        return self._log.errors[-1] if self._log.errors else "no reason given"

    def _rejection(self) -> str:
        said, cure = "no such file", "check the file, or upgrade with: pip install -U tensorrt"
        if self._parser.num_errors:
            error = self._parser.get_error(0)
            operator = error.node_operator()
            said = (
                f"node {error.node_name() or error.node()} ({operator}): {error.desc()}" if operator else error.desc()
            )
            if operator:
                cure = (
                    "make the bundle again with --target tensorrt-fp16, tensorrt-int8 or tensorrt-fp8, or upgrade "
                    "with: pip install -U tensorrt"
                )
        elif self._path.is_file():
            said = "no ONNX graph in it"
        return f"TensorRT {self._trt.__version__} cannot load {self._path}: {said}; {cure}"

    def _check_float8(self) -> None:
        layers = (self._network.get_layer(index) for index in range(self._network.num_layers))
        outputs = (layer.get_output(index) for layer in layers for index in range(layer.num_outputs))
        if self._gpu.capability < FLOAT8_CAPABILITY and any(o.dtype == self._trt.DataType.FP8 for o in outputs):
            found = ".".join(map(str, self._gpu.capability))
            raise EngineError(
                f"{self._path} holds 8-bit floats, which need a GPU of compute capability 8.9 or newer (Ada, Hopper, "
                f"Blackwell); {self._gpu.name} has {found}: make the bundle again with --target tensorrt-int8"
            )

    def digest(self) -> str:
        """Return a digest of the graph and of the weights beside it."""
        weights = self._path.with_name(self._path.name + ".data")
        return file_sha256(self._path) + (file_sha256(weights) if weights.is_file() else "")

    def engine(self, batches: BatchRange) -> Any:
        """Return the engine for these batches: the kept one if it still loads here, else a new one, which is kept.

        Raises:
            EngineError: if TensorRT cannot build it.
        """
        key = self._key(self.digest(), *astuple(batches))
        plan = read_bytes(KEPT, key, PLAN)
        engine = None if plan is None else self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            plan = self._build(batches)
            keep_bytes(KEPT, key, PLAN, plan)
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(self._failure(batches))
        return engine

    def _key(self, *parts: Any) -> str:
        return key_of(self._trt.__version__, self._gpu.name, self._gpu.capability, *parts)

    def _build(self, batches: BatchRange) -> bytes:
        config = self._builder.create_builder_config()
        # The recipe decides precision, not the engine: float32 stays float32.
        config.clear_flag(self._trt.BuilderFlag.TF32)
        config.profiling_verbosity = self._trt.ProfilingVerbosity.DETAILED
        profile = self._builder.create_optimization_profile()
        profile.set_shape(self.input, *((batch, *self.shape[1:]) for batch in astuple(batches)))
        config.add_optimization_profile(profile)
        timings = self._key()
        cache = config.create_timing_cache(read_bytes(KEPT, timings, TIMINGS) or b"")
        if not config.set_timing_cache(cache, False):
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        plan = self._builder.build_serialized_network(self._network, config)
        if plan is None:
            raise EngineError(self._failure(batches))
        keep_bytes(KEPT, timings, TIMINGS, bytes(cache.serialize()))
        return bytes(plan)

    def _failure(self, batches: BatchRange) -> str:
        return (
            f"TensorRT {self._trt.__version__} cannot build {self._path} on {self._gpu.name} for batches "
            f"{astuple(batches)}: {self._reason()}; try smaller batches, or upgrade with: pip install -U tensorrt"
        )


def _port(tensor: Any) -> Port:
    batch, *shape = tensor.shape
    return Port(name=tensor.name, shape=tuple(shape), batch="batch" if batch < 0 else batch)


class _Ready:
    """One batch size made ready: a context, its buffers, and its run as a CUDA graph where that can be captured.

    A captured graph holds the state of its context, so each has a context of its own.
    """

    def __init__(self, trt: Any, engine: Any, builder: _Builder, gpu: Gpu, shape: tuple[int, ...]) -> None:
        self._engine, self._gpu, self._names = engine, gpu, (builder.input, builder.output)
        self._graph: Any = None
        self._shape = shape
        self._context = engine.create_execution_context()
        self._set_shape(self._context)
        kinds = [np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in self._names]
        self.input = Buffer(gpu, shape, kinds[0])
        try:
            self.output = Buffer(gpu, tuple(self._context.get_tensor_shape(builder.output)), kinds[1])
        except EngineError:
            self.input.free()
            raise
        self._set_addresses(self._context)

    def _set_shape(self, context: Any) -> None:
        if context is None:
            raise EngineError(
                f"TensorRT finds no memory for a batch of {self._shape[0]} on {self._gpu.name}; use a smaller batch"
            )
        context.set_optimization_profile_async(0, self._gpu.stream)
        context.set_input_shape(self._names[0], self._shape)

    def _set_addresses(self, context: Any) -> None:
        for name, buffer in zip(self._names, (self.input, self.output), strict=True):
            context.set_tensor_address(name, buffer.device)

    def _queue(self) -> bool:
        return bool(self._context.execute_async_v3(self._gpu.stream))

    def capture(self) -> None:
        """Run once, which TensorRT needs before a capture, then capture the run."""
        self._started(self._queue())
        self._gpu.synchronize()
        self._graph = self._gpu.capture(self._queue)

    def _started(self, queued: bool) -> None:
        if not queued:
            raise EngineError(
                f"TensorRT failed while running a batch of {self._shape[0]}; nvidia-smi shows the GPU's state"
            )

    def run(self) -> None:
        """Replay the graph, or queue the kernels one by one where there is none; wait for the end."""
        if self._graph is None:
            self._started(self._queue())
        else:
            self._gpu.launch(self._graph)
        self._gpu.synchronize()

    def profile(self, trt: Any, runs: int, beside: Mapping[str, Call]) -> EngineProfile:
        """Time each layer in a context of its own: a graph reports none."""
        context, stopwatch = self._engine.create_execution_context(), _stopwatch(trt)
        self._set_shape(context)
        self._set_addresses(context)

        def profiled() -> None:
            self._started(context.execute_async_v3(self._gpu.stream))
            self._gpu.synchronize()

        profiled()
        context.profiler = stopwatch
        turns = take_turns(self.run, profiled, beside, runs)
        nodes = [
            NodeTime(name=name, op="", latency_ns=median_ns(1e6 * ms for ms in seen))
            for name, seen in stopwatch.seen_ms.items()
        ]
        return replace(turns, nodes=tuple(nodes))

    def free(self) -> None:
        """Release the graph, the context and the buffers."""
        if self._graph is not None:
            self._gpu.drop(self._graph)
        self._graph = self._context = self._engine = None
        self.input.free()
        self.output.free()


class TensorRtSession(Session):
    """One ONNX graph on TensorRT, with one input and one output.

    The engine is built in `bind`, for the batch that is bound first, or for `batch` (smallest, optimum, largest); a
    batch outside costs one more build, for a range. Engines and kernel timings are kept in the cache folder, by graph,
    TensorRT version, GPU and range. `bind` copies to the device, `run` replays a CUDA graph and waits, `fetch` copies
    back: so `run` alone is the engine's time.

    Raises:
        EngineError: if TensorRT, the driver or a GPU is missing, if the GPU is too old for the graph's types, or if
            TensorRT rejects a node.
    """

    reads_in_place = False

    def __init__(self, path: str | Path, *, batch: tuple[int, int, int] | None = None) -> None:
        self._batches = None if batch is None else BatchRange(*batch)
        self._gpu = Gpu()
        try:
            self._trt = load_tensorrt()
            self._builder: _Builder | None = _Builder(self._trt, Path(path), self._gpu)
        except EngineError:
            self._gpu.close()
            raise
        super().__init__({MAIN: self._builder.ends})
        self._engine: Any = None
        self._ready: OrderedDict[int, _Ready] = OrderedDict()
        self._bound: _Ready | None = None

    @staticmethod
    def check_starts() -> None:
        """Check that TensorRT, the driver and a GPU are there.

        Raises:
            EngineError: naming what is missing.
        """
        Gpu().close()
        load_tensorrt()

    @property
    def engine(self) -> str:
        """Name and version."""
        return f"tensorrt {self._trt.__version__}"

    def _opened(self) -> _Builder:
        self._check_open()
        assert self._builder is not None
        return self._builder

    def _found(self) -> _Ready:
        self._check_open()
        if self._bound is None:
            raise EngineError("nothing is bound; call bind before run")
        return self._bound

    def _engine_for(self, batch: int) -> Any:
        known = self._batches
        batches = BatchRange(batch, batch, batch) if known is None else known
        if not batches.covers(batch):
            batches = batches.extended(batch)
        if self._engine is None or batches != known:
            self._release()
            self._engine, self._batches = self._opened().engine(batches), batches
        return self._engine

    def _ready_for(self, shape: tuple[int, ...]) -> tuple[_Ready, bool]:
        """Return what runs this shape, and whether it is new."""
        engine, batch = self._engine_for(shape[0]), shape[0]
        if batch in self._ready:
            self._ready.move_to_end(batch)
            return self._ready[batch], False
        while len(self._ready) >= KEPT_SIZES:
            self._ready.popitem(last=False)[1].free()
        self._ready[batch] = _Ready(self._trt, engine, self._opened(), self._gpu, shape)
        return self._ready[batch], True

    def bind(self, inputs: Mapping[str, Array]) -> None:
        """Queue the copy to the device; build and capture first if this batch size is new.

        Raises:
            EngineError: for a shape that the graph does not take, or a batch that cannot be built.
        """
        super().bind(inputs)
        self._bound = None
        (pixels,) = self._inputs()
        ready, new = self._ready_for(pixels.shape)
        # The last copy may still read the pinned memory.
        self._gpu.synchronize()
        np.copyto(ready.input.host, pixels)
        ready.input.upload()
        if new:
            ready.capture()
        self._bound = ready

    def _execute(self, part: str, inputs: Sequence[Array], kept: tuple[str, ...]) -> Sequence[Array]:
        ready = self._found()
        ready.run()
        return (ready.output.host,)

    def fetch(self, *names: str) -> dict[str, Array]:
        """Copy the output back from the device."""
        if self._written:
            self._found().output.download()
            self._gpu.synchronize()
        return super().fetch(*names)

    def profile(self, runs: int = 20, beside: Mapping[str, Call] | None = None) -> EngineProfile:
        """Time each layer, kernels one by one: what a CUDA graph saves shows as the profiler's cost."""
        return self._found().profile(self._trt, runs, beside or {})

    def _release(self) -> None:
        while self._ready:
            self._ready.popitem()[1].free()
        self._bound = self._engine = None

    def close(self) -> None:
        """Free graphs, contexts, buffers, the engine, the parsed graph and the stream."""
        if not self._open:
            return
        super().close()
        self._release()
        self._builder = None
        self._gpu.close()
