"""Whether quantizing and merging pay on this machine, and which engine is fastest."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vitfold.artifacts.bundle import Bundle
from vitfold.bench.environment import installed_version
from vitfold.bench.measurement import speed_up
from vitfold.bench.timing import Protocol
from vitfold.engines import PLAIN, Session, engine_obstacle, open_session, quantized_target, runs_here
from vitfold.pipeline.plan import Plan
from vitfold.pipeline.trial import SHORT, opened, timed
from vitfold.recipe import Recipe
from vitfold.target import find_target

NARROW = "openvino-bf16"
"""The engine, and the target, whose floats have fewer bits than those of a graph."""
_MERGES_COST = "every merge takes time of its own, in each block that merges, whatever it saves behind it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """How much faster a graph runs than the one beside it: median and interquartile range over trials.

    `reason` says why it is not, None where it is.
    """

    median: float
    iqr: float
    reason: str | None

    @property
    def faster(self) -> bool:
        """True if what was done pays."""
        return self.median > 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"speed_up": {"median": self.median, "iqr": self.iqr}, "reason": self.reason}


def float_plan(folded: Plan) -> Plan:
    """Return the same plan without quantization, on the best float target of the same engine."""
    target = find_target(folded.target.runtime.float_target)
    recipe = Recipe(merge=folded.recipe.merge)
    from vitfold.model.folds import fold_layer_scale

    return replace(
        folded,
        folded=fold_layer_scale(folded.float_model),
        recipe=recipe,
        target=target,
        quantizers=None,
        calibration=None,
    )


def race(quantized: Bundle, folded: Plan, *, protocol: Protocol = SHORT) -> Race | None:
    """Time the bundle against the float graph of the same merging, interleaved; None where nothing can be timed.

    Simulated bundles have no time, others none on a machine where their engine does not start, and those for a
    processor with exact 8-bit products none on one that has to run them in another way.
    """
    return _against(float_plan(folded), quantized, folded, protocol)


def _against(other: Plan, bundle: Bundle, folded: Plan, protocol: Protocol, reason: str | None = None) -> Race | None:
    if bundle.manifest.simulated or engine_obstacle(folded.target.engine) is not None:
        return None
    with opened(other) as plain, open_session(bundle) as session:
        return raced(plain, session, folded, protocol, reason) if session.execution == PLAIN else None


def raced(plain: Session, made: Session, folded: Plan, protocol: Protocol, reason: str | None = None) -> Race:
    """Time two opened graphs, the plain one and what was made of it; `reason`, if given, says why it is no faster."""
    measured = timed({"plain": plain, "made": made}, folded.model.spec, protocol=protocol)
    ratio = speed_up(measured["plain"], measured["made"])
    return Race(**ratio, reason=None if ratio["median"] > 1.0 else reason or _reason(folded))


def unmerged_plan(folded: Plan) -> Plan:
    """Return the same plan without merging: the same weights, ranges and target."""
    merge = folded.recipe.merge
    nothing = replace(merge, r=(0,) * len(merge.r), compensate=False)
    return replace(folded, recipe=replace(folded.recipe, merge=nothing))


def race_merging(merged: Bundle, folded: Plan, *, protocol: Protocol = SHORT) -> Race | None:
    """Time the bundle against the same graph without merging, interleaved; None where nothing merges.

    None, too, where nothing can be timed, as in `race`.
    """
    if not any(folded.recipe.merge.r):
        return None
    return _against(unmerged_plan(folded), merged, folded, protocol, _MERGES_COST)


def fastest(folded: Plan, *, protocol: Protocol = SHORT) -> Plan:
    """Return the plan for the engine that runs it fastest here: ONNX Runtime, or OpenVINO where it is installed.

    All graphs hold the same codes; a simulated plan is returned as it is, and an engine that would compute these
    codes wrongly on this processor does not run. What is rounded already may be computed with floats of fewer bits,
    too, where the processor multiplies them; what is not stays in float32.
    """
    if folded.simulated or installed_version("openvino") is None:
        return folded
    other = replace(folded, target=quantized_target("openvino") if folded.quantizers else find_target("openvino"))
    if folded.quantizers and other.target.weight_bits < folded.target.weight_bits:
        return folded
    plans = {plan.target.engine: plan for plan in (folded, other)}
    if folded.quantizers and engine_obstacle(NARROW) is None:
        plans[NARROW] = replace(folded, target=find_target(NARROW))
    with ExitStack() as stack:
        sessions = {engine: stack.enter_context(opened(plan)) for engine, plan in plans.items()}
        measured = timed(sessions, folded.model.spec, protocol=protocol)
    return plans[min(measured, key=lambda engine: float(np.median(measured[engine].trial_medians_ms)))]


def _reason(folded: Plan) -> str:
    if folded.target.runtime.gpu:
        return "on this GPU the conversions to 8 bit cost more than the products save"
    if folded.target.quantized_product == "integer":
        return "target integer shows operand reordering with standard operators, which no runtime fuses"
    if not runs_here(find_target("cpu-vnni")):
        return "this processor has no integer dot products (VNNI, AMX or ARM dotprod), so integer products gain little"
    costs = folded.costs()
    macs = sum(cost.macs for cost in costs)
    work = f"{macs / 1e9:.2g} GMACs per image"
    return f"the model is small ({work}): rounding its activations costs more than the products save"
