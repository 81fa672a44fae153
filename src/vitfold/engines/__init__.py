"""Runtimes that execute bundles: one module each, loaded only when asked for."""

from __future__ import annotations

from vitfold.bundle import Bundle
from vitfold.engines.session import Session, usable_cores
from vitfold.errors import EngineError, nearest

ENGINES = ("onnxruntime", "openvino")

__all__ = ["ENGINES", "Session", "open_session", "usable_cores"]


def open_session(bundle: Bundle, *, engine: str | None = None, threads: int | None = None) -> Session:
    """Load a bundle into the engine that its target names, or into another one.

    Raises:
        EngineError: if the engine is unknown, not installed or refuses the graph.
    """
    name = engine or str(bundle.manifest.target.get("engine"))
    if name == "onnxruntime":
        from vitfold.engines.onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession(bundle.onnx_path, threads=threads)
    if name == "openvino":
        from vitfold.engines.openvino import OpenVinoSession

        return OpenVinoSession(bundle.onnx_path, threads=threads)
    raise EngineError(f"unknown engine {name!r}; {nearest(name, ENGINES)}")
