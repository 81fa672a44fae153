"""The latency table of a plan on this machine.

Nothing here depends on values: quantizers of any calibration do, and no fidelity is claimed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vitfold.bench.measurement import speed_up
from vitfold.bench.timing import Protocol
from vitfold.errors import RecipeError, TargetError
from vitfold.images import ImageSet
from vitfold.model import Model
from vitfold.pipeline.calibration import calibrate_plan
from vitfold.pipeline.plan import Plan, count_costs, optimize
from vitfold.pipeline.trial import opened, timed
from vitfold.progress import Say
from vitfold.recipe import MergeRecipe, PruneRecipe, QuantRecipe
from vitfold.schedule.table import LatencyTable, Schedule, fit_table, probe_schedules

PROBE = Protocol(trials=7, seconds=1.0)
ROUGH_IMAGES = 8
MOST_MERGES = 6
FINENESS = 32


def measure_latency(
    plan: Plan,
    *,
    protocol: Protocol = PROBE,
    say: Say = lambda _: None,
) -> LatencyTable:
    """Time schedules of a plan, each interleaved with the unmerged one, and fit the table.

    The plan is calibrated where it quantizes; its own schedule is not looked at.

    Raises:
        RecipeError: if the model has too few blocks to tell them apart.
    """
    spec = plan.model.spec
    try:
        probes = probe_schedules(spec.num_layers, spec.tokens, spec.fixed, on_this_machine(plan)["step"])
    except ValueError as error:
        raise RecipeError(f"no latency table for this model: {error}; give the tokens to merge") from None
    times: dict[Schedule, float] = {}
    with opened(with_schedule(plan, probes[0])) as plain:
        for index, probe in enumerate(probes[1:], start=1):
            say(f"timing schedules: {index}/{len(probes) - 1}")
            with opened(with_schedule(plan, probe)) as session:
                found = timed({"plain": plain, "probe": session}, spec, protocol=protocol)
            taken = found["plain"].latency_ms()["median"] * 1e-3
            times.setdefault(probes[0], taken)
            times[probe] = times[probes[0]] / speed_up(found["plain"], found["probe"])["median"]
    return fit_table(times, tokens=spec.tokens, attention_ratio=_attention_ratio(plan))


def roughly_calibrated(
    model: Model,
    quant: QuantRecipe | None,
    target: str,
    images: ImageSet,
    rule: str = "tome",
    prune: PruneRecipe | None = None,
) -> Plan:
    """Return a plan that can be timed, not one to keep: few images, the quickest method, any heads and units.

    Raises:
        TargetError: if no engine executes it.
    """
    rough = None if quant is None else replace(quant, method="minmax", calibration_size=ROUGH_IMAGES)
    plan = optimize(model, quant=rough or "none", rule=rule, target=target)
    if prune is not None:
        from vitfold.compensation import cut_to_width

        plan = replace(plan, folded=cut_to_width(plan.folded, prune))
    if plan.simulated:
        raise TargetError("what no engine executes has no time to solve for; give the tokens to merge")
    return calibrate_plan(plan, images.sample(ROUGH_IMAGES, seed=0))


def on_this_machine(plan: Plan) -> dict[str, Any]:
    """Return how schedules for a plan look: their order, to which lengths they lead, in how many merges at most."""
    tokens, rows = plan.model.spec.tokens, plan.target.runtime.rows
    step, aligned = max(1, tokens // FINENESS), tokens >= FINENESS
    if aligned:
        step = rows * max(1, round(step / rows))
    return {"order": plan.recipe.merge.order, "step": step, "aligned": aligned, "most_merges": MOST_MERGES}


def with_schedule(plan: Plan, r: Schedule) -> Plan:
    """Return the plan with another schedule."""
    return replace(plan, recipe=replace(plan.recipe, merge=replace(plan.recipe.merge, r=r)))


def _attention_ratio(plan: Plan) -> float:
    """Return the share of a block's work that is done on the tokens that enter it."""
    costs = [cost for cost in count_costs(plan.folded.spec, MergeRecipe(r=())) if cost.block is not None]
    attention = sum(cost.macs for cost in costs if cost.role == "attention")
    return attention / sum(cost.macs for cost in costs)
