"""The process that runs NVIDIA's compiler: a graph in, the list of its kernels out.

A compiler may crash, and its memory should be given back: so it has a process of its own, started by `compiler`.
Its one argument is a JSON object, its result another one in the file that the first names.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

_LISTS_LAYERS = "Layers:"
_ERRORS = 2


def main() -> None:
    """Compile as the argument says."""
    order = json.loads(sys.argv[1])
    Path(order["result"]).write_text(json.dumps(_compile(order)), encoding="utf-8")


def _compile(order: dict[str, Any]) -> dict[str, Any]:
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc]  # a class of the compiler, which has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[int, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append((int(severity), message))

        def errors(self) -> list[str]:
            """What was logged as an error; complaints about a missing driver are none here."""
            return [m for severity, m in self.lines if severity < _ERRORS and "cudaError" not in m and "CUDA" not in m]

    started = time.monotonic()
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(order["graph"]):
        problems = [parser.get_error(index) for index in range(parser.num_errors)]
        return {
            "version": trt.__version__,
            "parser": [{"node": p.node_name(), "operator": p.node_operator(), "text": p.desc()} for p in problems],
        }
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, order["gpu"].upper()), 0)
    profile = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape[1:]:
            return {"version": trt.__version__, "dynamic": f"{tensor.name} {list(shape)}"}
        if shape and shape[0] == -1:
            dynamic = True
            fixed = (order["batch"], *shape[1:])
            profile.set_shape(tensor.name, fixed, fixed, fixed)
    if dynamic:
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    layers = [message for _, message in log.lines if message.startswith(_LISTS_LAYERS)]
    return {
        "version": trt.__version__,
        "errors": log.errors() if plan is None else [],
        "engine_bytes": None if plan is None else plan.nbytes,
        "layers": layers[-1] if layers else "",
        "seconds": time.monotonic() - started,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main()
