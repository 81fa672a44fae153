"""Runtimes that execute bundles: one module each, loaded only when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from vitfold.bundle import Bundle
from vitfold.engines.session import Session, usable_cores
from vitfold.errors import EngineError, nearest

EngineName = Literal["onnxruntime", "openvino", "tensorrt"]
ENGINES: tuple[str, ...] = get_args(EngineName)
SIMULATION = "simulation"
TENSORRT = "tensorrt"

__all__ = [
    "ENGINES",
    "SIMULATION",
    "TENSORRT",
    "EngineName",
    "Session",
    "open_graph",
    "open_session",
    "tensorrt_obstacle",
    "usable_cores",
]


def open_session(bundle: Bundle, *, engine: str | None = None, threads: int | None = None) -> Session:
    """Load a bundle into the engine that its target names, or into another one.

    Raises:
        EngineError: if the engine is unknown, not installed or refuses the graph.
    """
    if bundle.manifest.simulated:
        if engine not in (None, SIMULATION):
            raise EngineError(
                f"{bundle.path} is simulated: no engine executes {_scheme(bundle)}, so {engine} cannot; "
                "make one with --quant w8a8 to run it there"
            )
        from vitfold.engines.simulation import open_simulation

        return open_simulation(bundle, threads=threads)
    made_for, batch = str(bundle.manifest.target.get("engine")), bundle.manifest.target.get("batch")
    return open_graph(
        bundle.onnx_path,
        engine or made_for,
        threads=threads,
        literal=made_for == TENSORRT,
        batch=None if batch is None else tuple(batch),
    )


def _scheme(bundle: Bundle) -> str:
    quant = bundle.manifest.recipe.quant
    return "it" if quant is None else quant.scheme


def open_graph(
    path: Path,
    engine: str,
    *,
    threads: int | None = None,
    literal: bool = False,
    batch: tuple[int, int, int] | None = None,
) -> Session:
    """Load an ONNX graph into an engine.

    `literal` says that it was made for another one (ONNX Runtime only), `batch` are the smallest, the optimal and the
    largest batch that it has to run (TensorRT only).

    Raises:
        EngineError: if the engine is unknown, not installed or refuses the graph.
    """
    if engine == "onnxruntime":
        from vitfold.engines.onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession(path, threads=threads, literal=literal)
    if engine == "openvino":
        from vitfold.engines.openvino import OpenVinoSession

        return OpenVinoSession(path, threads=threads)
    if engine == TENSORRT:
        from vitfold.engines.tensorrt import TensorRtSession

        return TensorRtSession(path, batch=batch)
    raise EngineError(f"unknown engine {engine!r}; {nearest(engine, ENGINES)}")


def tensorrt_obstacle() -> str | None:
    """Return what keeps TensorRT from starting on this machine, a package, a driver or a GPU; None if nothing does."""
    from vitfold.engines.cuda import Gpu
    from vitfold.engines.tensorrt import load_tensorrt

    try:
        Gpu().close()
        load_tensorrt()
    except EngineError as error:
        return str(error)
    return None
