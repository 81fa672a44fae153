"""Whether the quantized bundle is faster than the float one on this machine, and which engine is.

Owns those races and the reason that is given when quantization loses.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitfold.bench.environment import installed_version, processor
from vitfold.bench.measurement import Measurement, speed_up
from vitfold.bench.timing import interleave
from vitfold.bundle import Bundle
from vitfold.engines import TENSORRT, Session, open_graph, open_session, tensorrt_obstacle
from vitfold.pipeline.plan import Folded
from vitfold.pipeline.writing import write_graph
from vitfold.recipe import Recipe
from vitfold.target import find_target

TRIALS = 7
SECONDS = 2.0
_FLOAT_TARGETS = {"onnxruntime": "cpu", TENSORRT: "tensorrt-fp16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """How much faster the quantized bundle runs than the float one: median and interquartile range over trials."""

    median: float
    iqr: float
    reason: str | None

    @property
    def faster(self) -> bool:
        """True if quantization pays."""
        return self.median > 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"speed_up": {"median": self.median, "iqr": self.iqr}, "reason": self.reason}


def float_plan(folded: Folded) -> Folded:
    """Return the same plan without quantization, on the best float target of the same engine."""
    target = find_target(_FLOAT_TARGETS.get(folded.target.engine, folded.target.name))
    recipe = Recipe(merge=folded.recipe.merge)
    from vitfold.model.folds import fold_layer_scale

    return replace(
        folded, folded=fold_layer_scale(folded.model), recipe=recipe, target=target, quantizers=None, calibration=None
    )


def race(quantized: Bundle, folded: Folded, *, batch: int = 1, seconds: float = SECONDS) -> Race | None:
    """Time the bundle against the float graph of the same merging, interleaved; None where nothing can be timed.

    Simulated bundles have no time, those for TensorRT none on a machine where it does not start.
    """
    if quantized.manifest.simulated or (folded.target.engine == TENSORRT and tensorrt_obstacle() is not None):
        return None
    with _opened(float_plan(folded)) as plain, open_session(quantized) as session:
        measured = _timed({"float": plain, "quantized": session}, folded, batch=batch, seconds=seconds)
    ratio = speed_up(measured["float"], measured["quantized"])
    return Race(**ratio, reason=None if ratio["median"] > 1.0 else _reason(folded))


def fastest(folded: Folded, *, batch: int = 1, seconds: float = SECONDS) -> Folded:
    """Return the plan for the engine that runs it fastest here: ONNX Runtime, or OpenVINO where it is installed.

    Both graphs hold the same codes; a simulated plan is returned as it is.
    """
    if folded.simulated or installed_version("openvino") is None:
        return folded
    plans = {plan.target.engine: plan for plan in (folded, replace(folded, target=find_target("openvino")))}
    with ExitStack() as stack:
        sessions = {engine: stack.enter_context(_opened(plan)) for engine, plan in plans.items()}
        measured = _timed(sessions, folded, batch=batch, seconds=seconds)
    return plans[min(measured, key=lambda engine: float(np.median(measured[engine].trial_medians_ms)))]


@contextmanager
def _opened(folded: Folded) -> Iterator[Session]:
    """Write the graph of a plan to a temporary folder and open it in the engine of its target."""
    with tempfile.TemporaryDirectory(prefix="vitfold-") as folder:
        path = Path(folder) / "model.onnx"
        write_graph(folded, path)
        with open_graph(path, folded.target.engine, batch=folded.batch) as session:
            yield session


def _timed(sessions: Mapping[str, Session], folded: Folded, *, batch: int, seconds: float) -> dict[str, Measurement]:
    """Time sessions on the same random images (B, channels, height, width), interleaved, engine only."""
    shape = (batch, folded.model.spec.channels, *folded.model.spec.image_size)
    pixels = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    for session in sessions.values():
        session.bind(pixels)
    samples = interleave({name: session.run for name, session in sessions.items()}, trials=TRIALS, seconds=seconds)
    return {
        name: Measurement(subject=name, engine=session.engine, batch=batch, scope="engine", trials_ns=samples[name])
        for name, session in sessions.items()
    }


def _reason(folded: Folded) -> str:
    if folded.target.engine == TENSORRT:
        return "on this GPU the conversions to 8 bit cost more than the products save"
    sets = set(processor()["instruction_sets"])
    if folded.target.quantized_product == "integer":
        return "target integer shows operand reordering with standard operators, which no runtime fuses"
    if not sets & {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp"}:
        return "this processor has no integer dot products (VNNI, AMX or ARM dotprod), so integer products gain little"
    costs = folded.costs()
    macs = sum(cost.macs for cost in costs)
    work = f"{macs / 1e9:.2g} GMACs per image"
    return f"the model is small ({work}): rounding its activations costs more than the products save"
