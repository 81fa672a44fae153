# ruff: noqa: N801, N802, N815 - names are NVIDIA's
"""A GPU of paper: fakes of `tensorrt` and `cuda.bindings.runtime` that hold real memory and record every call.

A graph is a JSON file: {"shape": [-1, 3, 8, 8], "layers": ["FLOAT"], "reject": [node, operator, reason]}. The engine
made of it returns the sums of the channels of each image, (B, 3): enough to see what was copied, bound and replayed.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections import Counter
from collections.abc import Callable
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


class cudaError_t(Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorStreamCaptureUnsupported = 900


class FakeRuntime(ModuleType):
    """cuda.bindings.runtime on one stream; `alive` counts what is allocated, `calls` every function by name."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1

    def __init__(self, *, devices: int = 1, capability: tuple[int, int] = (8, 9), captures: bool = True) -> None:
        super().__init__("cuda.bindings.runtime")
        self.devices, self.capability, self.captures = devices, capability, captures
        self.calls: Counter[str] = Counter()
        self.alive: dict[Any, Any] = {}
        self.limit_bytes: int | None = None
        self._capturing: list[Callable[[], None]] | None = None

    def _done(self, name: str, *values: Any, status: cudaError_t = cudaError_t.cudaSuccess) -> tuple[Any, ...]:
        self.calls[name] += 1
        return (status, *values)

    def submit(self, work: Callable[[], None]) -> None:
        """Run now, or put it into the graph that is being captured."""
        if self._capturing is None:
            work()
        else:
            self._capturing.append(work)

    def cudaGetDeviceCount(self) -> Any:
        if not self.devices:
            return self._done("cudaGetDeviceCount", None, status=cudaError_t.cudaErrorInsufficientDriver)
        return self._done("cudaGetDeviceCount", self.devices)

    def cudaGetErrorString(self, status: cudaError_t) -> Any:
        return self._done("cudaGetErrorString", f"fake {status.name}".encode())

    def cudaGetLastError(self) -> Any:
        return self._done("cudaGetLastError")

    def cudaGetDevice(self) -> Any:
        return self._done("cudaGetDevice", 0)

    def cudaGetDeviceProperties(self, index: int) -> Any:
        major, minor = self.capability
        return self._done("properties", SimpleNamespace(name=b"Paper GPU\0\0", major=major, minor=minor))

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        self.alive["stream"] = flags
        return self._done("cudaStreamCreateWithFlags", 7)

    def cudaStreamDestroy(self, stream: int) -> Any:
        del self.alive["stream"]
        return self._done("cudaStreamDestroy")

    def cudaStreamSynchronize(self, stream: int) -> Any:
        return self._done("cudaStreamSynchronize")

    def _allocate(self, name: str, size: int) -> Any:
        if self.limit_bytes is not None and size > self.limit_bytes:
            return self._done(name, None, status=cudaError_t.cudaErrorMemoryAllocation)
        memory = ctypes.create_string_buffer(size)
        address = ctypes.addressof(memory)
        self.alive[address] = memory
        return self._done(name, address)

    def cudaMalloc(self, size: int) -> Any:
        return self._allocate("cudaMalloc", size)

    def cudaMallocHost(self, size: int) -> Any:
        return self._allocate("cudaMallocHost", size)

    def cudaFree(self, address: int) -> Any:
        del self.alive[address]
        return self._done("cudaFree")

    def cudaFreeHost(self, address: int) -> Any:
        del self.alive[address]
        return self._done("cudaFreeHost")

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> Any:
        assert stream == 7
        ctypes.memmove(to, source, size)
        return self._done("upload" if kind == 1 else "download")

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:
        self._capturing = []
        return self._done("cudaStreamBeginCapture")

    def cudaStreamEndCapture(self, stream: int) -> Any:
        captured, self._capturing = self._capturing, None
        if not self.captures:
            failed = cudaError_t.cudaErrorStreamCaptureUnsupported
            return self._done("cudaStreamEndCapture", None, status=failed)
        self.alive["graph"] = captured
        return self._done("cudaStreamEndCapture", captured)

    def cudaGraphDestroy(self, graph: Any) -> Any:
        del self.alive["graph"]
        return self._done("cudaGraphDestroy")

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        executable = SimpleNamespace(work=graph)
        self.alive[id(executable)] = executable
        return self._done("cudaGraphInstantiate", executable)

    def cudaGraphLaunch(self, executable: Any, stream: int) -> Any:
        for work in executable.work:
            work()
        return self._done("cudaGraphLaunch")

    def cudaGraphExecDestroy(self, executable: Any) -> Any:
        del self.alive[id(executable)]
        return self._done("cudaGraphExecDestroy")


class FakeTensorRt(ModuleType):
    """tensorrt, as far as the engine uses it; `profiles` are the shapes of every engine that was built."""

    def __init__(self, runtime: FakeRuntime, *, version: str = "10.8.0.43") -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.runtime = runtime
        self.network_flags: list[int] = []
        self.cleared: list[str] = []
        self.profiles: list[tuple[tuple[int, ...], ...]] = []
        self.timings_read: list[bytes] = []
        self.contexts = 0
        self.build_fails = False
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1 if version.startswith("10.") else 0)
        self.BuilderFlag = SimpleNamespace(TF32="TF32")
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
        self.DataType = SimpleNamespace(FLOAT="FLOAT", FP8="FP8")
        self.ILogger, self.IProfiler = _Logger, _Profiler
        self.OnnxParser = _Parser

    def Builder(self, log: Any) -> _Builder:
        return _Builder(self, log)

    def Runtime(self, log: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=self._engine)

    def _engine(self, plan: bytes) -> _Engine | None:
        return _Engine(self, json.loads(plan)) if plan.startswith(b"{") else None

    @staticmethod
    def nptype(kind: str) -> type:
        return {"FLOAT": np.float32}[kind]


class _Logger:
    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)


class _Profiler:
    pass


class _Builder:
    def __init__(self, trt: FakeTensorRt, log: Any) -> None:
        self._trt, self._log = trt, log

    def create_network(self, flags: int) -> SimpleNamespace:
        self._trt.network_flags.append(flags)
        return SimpleNamespace(num_inputs=0, num_outputs=0, num_layers=0)

    def create_builder_config(self) -> _Config:
        return _Config(self._trt)

    def create_optimization_profile(self) -> SimpleNamespace:
        profile = SimpleNamespace(shapes=())
        profile.set_shape = lambda name, *shapes: setattr(profile, "shapes", (name, *shapes))
        return profile

    def build_serialized_network(self, network: Any, config: _Config) -> bytes | None:
        if self._trt.build_fails:
            self._log.log(1, "no implementation for node blocks.0.attn")
            return None
        name, *shapes = config.profile.shapes
        assert name == "pixel_values"
        self._trt.profiles.append(tuple(shapes))
        return json.dumps({"shape": list(network.shape), "range": [shape[0] for shape in shapes]}).encode()


class _Config:
    def __init__(self, trt: FakeTensorRt) -> None:
        self._trt = trt
        self.profiling_verbosity = "LAYER_NAMES_ONLY"

    def clear_flag(self, flag: str) -> None:
        self._trt.cleared.append(flag)

    def add_optimization_profile(self, profile: Any) -> None:
        self.profile = profile

    def create_timing_cache(self, content: bytes) -> Any:
        self._trt.timings_read.append(content)
        return SimpleNamespace(content=content, serialize=lambda: b"timings")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return cache.content in (b"", b"timings")


class _Parser:
    def __init__(self, network: Any, log: Any) -> None:
        self._network, self._log, self._reject = network, log, None

    def parse_from_file(self, path: str) -> bool:
        with open(path, "rb") as file:  # noqa: PTH123
            text = file.read()
        if not text.startswith(b"{"):
            self._log.log(1, "Failed to parse ONNX model")
            return False
        graph = json.loads(text)
        self._reject = graph.get("reject")
        self._network.shape = tuple(graph["shape"])
        self._network.num_inputs = graph.get("inputs", 1)
        self._network.num_outputs = 1
        kinds = graph.get("layers", ["FLOAT"])
        self._network.num_layers = len(kinds)
        outputs = [SimpleNamespace(dtype=kind) for kind in kinds]
        self._network.get_layer = lambda i: SimpleNamespace(num_outputs=1, get_output=lambda _: outputs[i])
        self._network.get_input = lambda _: SimpleNamespace(name="pixel_values", shape=self._network.shape)
        self._network.get_output = lambda _: SimpleNamespace(name="logits", shape=(-1, 3))
        return self._reject is None

    @property
    def num_errors(self) -> int:
        return 0 if self._reject is None else 1

    def get_error(self, index: int) -> Any:
        node, operator, reason = self._reject or ("", "", "")
        return SimpleNamespace(
            node=lambda: 0, node_name=lambda: node, node_operator=lambda: operator, desc=lambda: reason
        )


class _Engine:
    def __init__(self, trt: FakeTensorRt, plan: dict[str, Any]) -> None:
        self._trt, self.plan = trt, plan

    def create_execution_context(self) -> _Context:
        self._trt.contexts += 1
        return _Context(self._trt, self)

    def get_tensor_dtype(self, name: str) -> str:
        return "FLOAT"


class _Context:
    def __init__(self, trt: FakeTensorRt, engine: _Engine) -> None:
        self._trt, self._engine = trt, engine
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()
        self._has_profile = False
        self.profiler: Any = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._has_profile = index == 0 and stream == 7
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self._engine.plan["range"]
        assert self._has_profile
        assert smallest <= shape[0] <= largest
        self._shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape if name == "pixel_values" else self._shape[:2]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        self._trt.runtime.submit(self._compute)
        if self.profiler is not None:
            self.profiler.report_layer_time("blocks.0", 0.5)
            self.profiler.report_layer_time("head", 0.25)
        return True

    def _compute(self) -> None:
        pixels = _floats(self._addresses["pixel_values"], self._shape)
        _floats(self._addresses["logits"], self._shape[:2])[:] = pixels.sum(axis=(2, 3))


def _floats(address: int, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    return np.frombuffer((ctypes.c_float * size).from_address(address), np.float32).reshape(shape)


def install(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime, version: str = "10.8.0.43") -> FakeTensorRt:
    """Put the fakes where the engine imports them."""
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = runtime  # type: ignore[attr-defined]
    trt = FakeTensorRt(runtime, version=version)
    for name, module in (("cuda.bindings", bindings), ("cuda.bindings.runtime", runtime), ("tensorrt", trt)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    return trt
