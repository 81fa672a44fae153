"""Runtimes that execute bundles: one module each, loaded only when asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from vitfold.artifacts.bundle import Bundle
from vitfold.engines.exactness import (
    cannot_be_exact,
    describe_execution,
    find_execution,
    quantized_cpu_target,
    quantized_openvino_target,
    runs_here,
)
from vitfold.engines.graphs import check_graph
from vitfold.engines.session import PLAIN, Session, check_threads, usable_cores
from vitfold.errors import EngineError, nearest
from vitfold.products import Product

EngineName = Literal["onnxruntime", "openvino", "tensorrt"]
ENGINES: tuple[str, ...] = get_args(EngineName)
SIMULATION = "simulation"
_log = logging.getLogger(__name__)
TENSORRT = "tensorrt"

__all__ = [
    "ENGINES",
    "PLAIN",
    "SIMULATION",
    "TENSORRT",
    "EngineName",
    "Session",
    "check_threads",
    "describe_execution",
    "find_execution",
    "open_graph",
    "open_session",
    "quantized_cpu_target",
    "quantized_openvino_target",
    "runs_here",
    "tensorrt_obstacle",
    "usable_cores",
]


def open_session(bundle: Bundle, *, engine: str | None = None, threads: int | None = None) -> Session:
    """Load a bundle into the engine that its target names, or into another one.

    Where this processor would compute its products wrongly, it runs in another, exact way, and a warning is logged.

    Raises:
        EngineError: if the engine is unknown, not installed or refuses the graph, or can't compute it exactly here, or
            the threads are no number for this machine.
        BundleError: if the file is no graph, or one that vitfold does not write.
    """
    check_threads(threads)
    if bundle.manifest.simulated:
        if engine not in (None, SIMULATION):
            raise EngineError(
                f"{bundle.path} is simulated: no engine executes {_scheme(bundle)}, so {engine} cannot; "
                "make one with --quant w8a8 to run it there"
            )
        from vitfold.engines.simulation import open_simulation

        return open_simulation(bundle, threads=threads)
    made_for, batch = str(bundle.manifest.target.get("engine")), bundle.manifest.target.get("batch")
    if (engine or made_for) != TENSORRT:  # whose own parser looks first
        check_graph(bundle.onnx_path)
    session = open_graph(
        bundle.onnx_path,
        engine or made_for,
        threads=threads,
        products=bundle.manifest.products,
        literal=made_for == TENSORRT,
        batch=None if batch is None else tuple(batch),
    )
    remark = describe_execution(session.execution, engine or made_for)
    if remark is not None:
        _log.warning("%s: %s", bundle.path, remark)
    return session


def _scheme(bundle: Bundle) -> str:
    quant = bundle.manifest.recipe.quant
    return "it" if quant is None else quant.scheme


def open_graph(
    path: Path,
    engine: str,
    *,
    threads: int | None = None,
    products: Iterable[Product] = (),
    literal: bool = False,
    batch: tuple[int, int, int] | None = None,
) -> Session:
    """Load an ONNX graph into an engine.

    `products` are the integer products that it holds: where the engine's usual kernels would compute them wrongly on
    this processor, it runs in the first way that is exact, which `session.execution` names. `literal` says that it was
    made for another engine (ONNX Runtime only): its products run as the floats that they are written as. `batch` are
    the smallest, the optimal and the largest batch that it has to run (TensorRT only).

    Raises:
        EngineError: if the engine is unknown, not installed or refuses the graph, or computes its products wrongly, or
            the threads are no number for this machine.
    """
    check_threads(threads)
    if engine == "onnxruntime":
        from vitfold.engines.onnxruntime import OnnxRuntimeSession

        needed = tuple(products)
        execution = PLAIN if literal else find_execution(engine, needed)
        try:
            return OnnxRuntimeSession(path, threads=threads, literal=literal, execution=execution)
        except EngineError:
            if execution == PLAIN:
                raise
            # It cannot change a weight that two products share, as those of a twin quantizer do.
            raise cannot_be_exact(engine, needed[0]) from None
    if engine == "openvino":
        from vitfold.engines.openvino import OpenVinoSession

        return OpenVinoSession(path, threads=threads, execution=find_execution(engine, products))
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
