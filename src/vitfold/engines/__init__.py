"""Runtimes that execute bundles: one module each, loaded only when asked for.

What an engine can stands in its row of `vitfold.target.ENGINES`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vitfold.artifacts.bundle import MAIN
from vitfold.cores import check_threads, usable_cores
from vitfold.engines.exactness import (
    cannot_be_exact,
    describe_execution,
    find_execution,
    quantized_target,
    runs_here,
)
from vitfold.engines.graphs import check_graph
from vitfold.engines.session import Ends, Session, open_on, session_class
from vitfold.errors import BundleError, EngineError, missing_extra, nearest
from vitfold.ops.protocol import Port
from vitfold.products import Product
from vitfold.target import ENGINES, PLAIN, WIDE, Engine, EngineName

if TYPE_CHECKING:
    from vitfold.artifacts.bundle import Bundle

DEFAULT = "onnxruntime"
"""The engine that runs every graph on every machine."""
_log = logging.getLogger(__name__)

__all__ = [
    "DEFAULT",
    "ENGINES",
    "MAIN",
    "PLAIN",
    "Ends",
    "Engine",
    "EngineName",
    "Port",
    "Session",
    "check_ends",
    "check_threads",
    "describe_execution",
    "engine_obstacle",
    "find_engine",
    "find_execution",
    "open_graph",
    "open_session",
    "quantized_target",
    "runs_here",
    "usable_cores",
]


def find_engine(name: str) -> Engine:
    """Return the row of an engine that runs graphs.

    Raises:
        EngineError: offering the nearest names.
    """
    known = [row.name for row in ENGINES.values() if row.executes]
    if name not in known:
        raise EngineError(f"unknown engine {name!r}; {nearest(name, known)}")
    return ENGINES[name]


def open_session(bundle: Bundle, *, engine: str | None = None, threads: int | None = None) -> Session:
    """Load a bundle into the engine that its target names, or into another one.

    Where this processor would compute its products wrongly, it runs in another, exact way, and where it has no
    bfloat16 that the bundle is made for, in float32; a warning is logged.

    Raises:
        EngineError: if the engine is unknown, not installed or refuses the graph, or can't compute it exactly here, or
            the threads are no number for this machine.
        BundleError: if the file is no graph, or one that vitfold does not write.
    """
    check_threads(threads)
    manifest = bundle.manifest
    made_for = ENGINES[str(manifest.target["engine"])]
    if manifest.simulated:
        if engine not in (None, made_for.name):
            quant = manifest.recipe.quant
            raise EngineError(
                f"{bundle.path} is simulated: no engine executes {'it' if quant is None else quant.scheme}, so "
                f"{engine} cannot; make one with --quant w8a8 to run it there"
            )
        try:
            from vitfold.engines.simulation import open_simulation
        except ModuleNotFoundError:
            raise EngineError(missing_extra("torch", "optimize", "a simulated bundle")) from None

        return open_simulation(bundle, threads=threads)
    row = _starting(made_for, bundle) if engine is None else find_engine(engine)
    if not row.gpu:  # whose own parsers look first
        for path in bundle.graphs.values():
            check_graph(path)
    batch = manifest.target.get("batch")
    session = open_graph(
        bundle.graphs,
        row.name,
        threads=threads,
        products=manifest.products,
        literal=made_for.gpu,
        batch=None if batch is None else tuple(batch),
    )
    remark = describe_execution(session.execution, row.name)
    if remark is not None:
        _log.warning("%s: %s", bundle.path, remark)
    return session


def _starting(made_for: Engine, bundle: Bundle) -> Engine:
    """Return the engine that a bundle is made for; the one that it is like, where this processor lacks its floats."""
    obstacle = engine_obstacle(made_for.name) if made_for.narrow_floats else None
    if obstacle is None or engine_obstacle(made_for.exact_floats) is not None:
        return made_for
    _log.warning("%s runs on %s: %s", bundle.path, made_for.exact_floats, obstacle.partition(",")[0])
    return ENGINES[made_for.exact_floats]


def open_graph(
    graphs: Path | Mapping[str, Path],
    engine: str,
    *,
    threads: int | None = None,
    products: Iterable[Product] = (),
    literal: bool = False,
    batch: tuple[int, int, int] | None = None,
) -> Session:
    """Load an ONNX graph, or one per part, into an engine.

    `products` are the integer products that they hold: where the engine's usual kernels would compute them wrongly on
    this processor, it runs in the first way that is exact, which `session.execution` names. `literal` says that they
    were made for another engine (ONNX Runtime only): their products run as the floats that they are written as. `batch`
    are the smallest, the optimal and the largest batch that it has to run (engines that build for them only).

    Raises:
        EngineError: if the engine is unknown, not installed or refuses a graph, runs one part only, or computes its
            products wrongly, or the threads are no number for this machine.
    """
    check_threads(threads)
    row, needed = find_engine(engine), tuple(products)
    found = graphs if isinstance(graphs, Mapping) else {MAIN: graphs}
    if len(found) > 1 and not row.several_parts:
        able = " or ".join(one.name for one in ENGINES.values() if one.several_parts)
        raise EngineError(f"{engine} runs bundles of one part, and this has {len(found)}; run it on {able}")
    execution = PLAIN if literal else find_execution(engine, needed)
    given = {"threads": threads, "execution": execution, "literal": literal, "batch": batch}
    try:
        return open_on(row, found, **{name: given[name] for name in row.options})
    except EngineError:
        if execution != WIDE:
            raise
        # It cannot change a weight that two products share, as those of a twin quantizer do.
        raise cannot_be_exact(engine, needed[0]) from None


def check_ends(session: Session, expected: Mapping[str, Ends], graphs: Mapping[str, Path]) -> None:
    """Check that graphs have the inputs and outputs that they are meant to have.

    Raises:
        BundleError: naming the first that has not.
    """
    for part, ends in expected.items():
        found = session.parts[part]
        for ports, present in ((ends.inputs, found.inputs), (ends.outputs, found.outputs)):
            shapes = {port.name: (port.batch, *port.shape) for port in present}
            said = None
            if {port.name for port in ports} != set(shapes):
                said = f"it has the ends {', '.join(sorted(shapes))[:200]}"
            for port in () if said else ports:
                batch, *shape = shapes[port.name]
                if tuple(shape) != port.shape or (isinstance(batch, int) and batch != port.batch):
                    said = f"its {port.name[:60]} has the shape {shapes[port.name]}"
            if said is not None:
                raise BundleError(f"{graphs[part]} is not the graph that the plan needs: {said}; make the bundle again")


def engine_obstacle(engine: str) -> str | None:
    """Return what keeps an engine from starting on this machine, a package, a driver or a GPU; None if nothing does."""
    try:
        row = find_engine(engine)
        session_class(row).check_starts(**row.settings)
    except EngineError as error:
        return str(error)
    return None
