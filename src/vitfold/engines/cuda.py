"""One NVIDIA GPU through the CUDA runtime: its name, a stream, buffers in pairs, captured graphs.

Source: CUDA Runtime API; "CUDA Graphs" in the CUDA C++ Programming Guide.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from vitfold.errors import EngineError

FOR_ACCURACY = "for accuracy run it with --engine onnxruntime, on any machine"


class Buffer:
    """Memory on the device with its pinned twin on the host, an array of `shape` and `dtype`; `free` releases both."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._gpu = gpu
        self.size_bytes = int(np.prod(shape)) * dtype.itemsize
        self.device, self.pinned = gpu.allocate(self.size_bytes)
        content = (ctypes.c_byte * self.size_bytes).from_address(self.pinned)
        self.host = np.frombuffer(memoryview(content), dtype).reshape(shape)

    def upload(self) -> None:
        """Queue the copy from host to device."""
        self._gpu.copy(self.device, self.pinned, self.size_bytes, to_device=True)

    def download(self) -> None:
        """Queue the copy from device to host."""
        self._gpu.copy(self.pinned, self.device, self.size_bytes, to_device=False)

    def free(self) -> None:
        """Release both; `host` must not be read afterwards."""
        self._gpu.release(self.device, self.pinned)


class Gpu:
    """The current CUDA device and one stream on it.

    Raises:
        EngineError: if cuda.bindings, the driver or a GPU is missing, saying what to install.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except (ImportError, OSError) as error:
            raise EngineError(
                f"the engine tensorrt needs the package cuda-bindings, which cannot be imported ({error}); "
                f"run: pip install 'vitfold[tensorrt]'; {FOR_ACCURACY}"
            ) from None
        self._runtime: Any = runtime
        self._check_device()
        index = self._call("find the current device", runtime.cudaGetDevice())
        properties = self._call("read the properties of the GPU", runtime.cudaGetDeviceProperties(index))
        self.name: str = bytes(properties.name).rstrip(b"\0").decode("utf-8", "replace")
        self.capability: tuple[int, int] = (int(properties.major), int(properties.minor))
        self._stream: Any = self._call(
            "create a stream", runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)
        )

    def _check_device(self) -> None:
        status, count = self._runtime.cudaGetDeviceCount()
        if status == self._runtime.cudaError_t.cudaSuccess and count:
            return
        raise EngineError(
            f"the engine tensorrt finds no NVIDIA GPU ({self._reason(status)}): install or upgrade its driver, "
            f"and check that nvidia-smi lists the GPU; {FOR_ACCURACY}"
        )

    def _reason(self, status: Any) -> str:
        if status == self._runtime.cudaError_t.cudaSuccess:
            return "no device"
        _, text = self._runtime.cudaGetErrorString(status)
        return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(status)

    def _call(self, purpose: str, result: tuple[Any, ...]) -> Any:
        """Return what a call of the runtime returned behind its status; None if that was all."""
        status, *values = result
        if status != self._runtime.cudaError_t.cudaSuccess:
            self._runtime.cudaGetLastError()
            full = status == self._runtime.cudaError_t.cudaErrorMemoryAllocation
            cure = (
                "use a smaller batch, or end what else runs on the GPU" if full else "nvidia-smi shows the GPU's state"
            )
            raise EngineError(f"CUDA could not {purpose}: {self._reason(status)}; {cure}")
        return values[0] if values else None

    @property
    def stream(self) -> int:
        """The stream as TensorRT takes it."""
        return int(self._stream)

    def allocate(self, size_bytes: int) -> tuple[int, int]:
        """Return addresses of that many bytes on the device, and pinned on the host."""
        device = int(self._call(f"allocate {size_bytes} bytes on the GPU", self._runtime.cudaMalloc(size_bytes)))
        try:
            pinned = self._call(f"pin {size_bytes} bytes of host memory", self._runtime.cudaMallocHost(size_bytes))
        except EngineError:
            self._runtime.cudaFree(device)
            raise
        return device, int(pinned)

    def release(self, device: int, pinned: int) -> None:
        """Free what `allocate` returned."""
        self._call("free memory on the GPU", self._runtime.cudaFree(device))
        self._call("free pinned memory", self._runtime.cudaFreeHost(pinned))

    def copy(self, destination: int, source: int, size_bytes: int, *, to_device: bool) -> None:
        """Queue a copy on the stream."""
        kinds = self._runtime.cudaMemcpyKind
        kind = kinds.cudaMemcpyHostToDevice if to_device else kinds.cudaMemcpyDeviceToHost
        self._call(
            "copy between host and GPU",
            self._runtime.cudaMemcpyAsync(destination, source, size_bytes, kind, self._stream),
        )

    def synchronize(self) -> None:
        """Wait until the stream is empty."""
        self._call("finish the work on the stream", self._runtime.cudaStreamSynchronize(self._stream))

    def capture(self, queue: Callable[[], bool]) -> Any:
        """Return what `queue` puts on the stream as one launchable graph, or None where that cannot be captured."""
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("begin a graph capture", runtime.cudaStreamBeginCapture(self._stream, mode))
        queued = queue()
        # The capture has to end on this stream whatever happened, or nothing can run on it any more.
        ended, graph = runtime.cudaStreamEndCapture(self._stream)
        success = runtime.cudaError_t.cudaSuccess
        if ended != success:
            runtime.cudaGetLastError()
            return None
        made, executable = runtime.cudaGraphInstantiate(graph, 0) if queued else (None, None)
        self._call("drop a captured graph", runtime.cudaGraphDestroy(graph))
        if made != success:
            runtime.cudaGetLastError()
            return None
        return executable

    def launch(self, graph: Any) -> None:
        """Queue a captured graph."""
        self._call("launch a graph", self._runtime.cudaGraphLaunch(graph, self._stream))

    def drop(self, graph: Any) -> None:
        """Release a captured graph."""
        self._call("drop a graph", self._runtime.cudaGraphExecDestroy(graph))

    def close(self) -> None:
        """Release the stream."""
        self._call("destroy a stream", self._runtime.cudaStreamDestroy(self._stream))
