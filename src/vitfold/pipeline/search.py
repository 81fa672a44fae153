"""The fastest recipe that loses at most so much, or the most accurate that takes at most so long, by measurement.

Frontiers of schedules come from measured latency tables and measured distortions; what is believed of a recipe is
its row: a bundle that ran over images and was timed beside the float one.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitfold.artifacts.bundle import Bundle, open_bundle
from vitfold.artifacts.journal import ROWS, append_row, read_rows
from vitfold.bench.evaluation import Outputs, run_over
from vitfold.bench.fidelity import Fidelity
from vitfold.bench.measurement import speed_up
from vitfold.bench.statistics import Drop
from vitfold.engines import open_session
from vitfold.errors import BundleError, RecipeError, VitfoldError
from vitfold.images import ImageSet
from vitfold.model import ViTSpec
from vitfold.pipeline.goals import CLOSE, Arm, Goal, LeastLatency, Narrower, arm_from_dict
from vitfold.pipeline.latency import PROBE, measure_latency, on_this_machine, roughly_calibrated
from vitfold.pipeline.plan import Plan
from vitfold.pipeline.pruning import solve_prune
from vitfold.pipeline.solving import gentlest_rule, measure_merging
from vitfold.pipeline.sweep import PLAIN, plain_bundle
from vitfold.pipeline.trial import opened, timed
from vitfold.pipeline.trials import EvalContext, Trial, failed_row, measure_attempt, plan_attempt
from vitfold.progress import Say
from vitfold.recipe import MergeRecipe, PruneRecipe, check_prune, quant_from_scheme
from vitfold.schedule.solve import Point, Space, frontier
from vitfold.schedule.table import LatencyTable
from vitfold.target import find_target

ARMS = "arms.jsonl"
SCREENED = "screened.jsonl"
SCREENED_IMAGES = 500
NARROWER_IMAGES = 2000
"""Narrower blocks are told apart by fewer points than schedules, and cost a refit each: they are looked at longer."""
FLOAT_SITES = 4
PRUNED = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
"""Shares of the blocks' work that arms may lack, where there are images to refit what stays on."""
_WORST = 0.25
_ALIKE = 0.1
"""How far the distortions of two schedules may lie apart, relative to the larger, for one to stand for the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A recipe with its row, and its drop on images that nothing was chosen by."""

    row: Mapping[str, Any]
    bundle: Bundle
    held_out: Drop
    fidelity: Fidelity


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class _Step:
    """A point of an arm: how many sites are float or wide, whether merging is compensated, and sinks are seen to."""

    index: int
    float_sites: int = 0
    wide: bool = False
    compensate: bool = False
    registers: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """How a search ended: the winner, if any, every row, and the nearest miss where nothing met the bound."""

    winner: Verdict | None
    rows: tuple[Mapping[str, Any], ...]
    verified: int
    nearest: Mapping[str, Any] | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Screened:
    """What merging or pruning alone costs, in float; `distortion` is what was predicted of its schedule."""

    attempt: Trial
    distortion: float
    drop: Drop

    def is_like(self, distortion: float) -> bool:
        """Say whether a schedule that distorts so much costs as much, as near as some images tell."""
        return abs(self.distortion - distortion) <= _ALIKE * max(self.distortion, distortion)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        kept = {name: self.attempt.to_dict()[name] for name in ("merge", "rule", "prune")}
        return {**kept, "distortion": self.distortion, "drop": self.drop.to_dict()}


def _screened_from_dict(row: Mapping[str, Any]) -> _Screened:
    prune = check_prune(row["prune"], name=SCREENED)
    attempt = Trial(name="", r=tuple(row["merge"]), rule=row["rule"], prune=prune)
    return _Screened(attempt=attempt, distortion=row["distortion"], drop=Drop(**row["drop"]))


@dataclass(slots=True, kw_only=True, eq=False)
class SearchContext:
    """What a search measures with: images to choose by and images to verify on, a folder, a journal of rows."""

    trying: EvalContext
    held_out: EvalContext
    folder: Path
    say: Say
    rows: list[dict[str, Any]] = field(default_factory=list)
    _screened: list[_Screened] = field(default_factory=list)
    _plain: Bundle | None = None

    def __post_init__(self) -> None:
        self.rows = read_rows(self.folder / ROWS)
        self._screened = [_screened_from_dict(row) for row in read_rows(self.folder / SCREENED)]

    @property
    def plain(self) -> Bundle:
        """The float bundle that merges nothing."""
        if self._plain is None:
            self._plain = plain_bundle(self.folder / PLAIN, self.trying, say=self.say)
        return self._plain

    @property
    def takes_registers(self) -> bool:
        """Whether something could be done about sink tokens: the model has the parts that remedies name."""
        return isinstance(self.trying.model.spec, ViTSpec)

    def plain_ms(self) -> float:
        """Return what the float model takes per call."""
        with open_session(self.plain) as session:
            times = timed({"float": session}, self.trying.model.spec, protocol=self.trying.protocol)
        return times["float"].latency_ms()["median"]

    def screen(self, point: Point, rule: str) -> Drop:
        """Return the drop of merging alone, on the first images; or that of a schedule that distorts alike."""
        _, distortion, r = point
        alike = [
            found
            for found in self._screened
            if found.attempt.prune is None and found.attempt.rule == rule and found.is_like(distortion)
        ]
        if alike:
            return min(alike, key=lambda found: abs(found.distortion - distortion)).drop
        return self._screen(Trial(name="", r=r, rule=rule), distortion, "schedules")

    def screen_pruned(self, narrower: Narrower) -> Drop:
        """Return the drop of narrower blocks alone, on the first images."""
        for found in self._screened:
            if found.attempt.prune == narrower.prune:
                return found.drop
        unmerged = (0,) * self.trying.model.spec.num_layers
        attempt = Trial(name="", r=unmerged, prune=narrower.prune)
        return self._screen(attempt, 0.0, f"{100 * narrower.share:g} % less work", NARROWER_IMAGES)

    def _screen(self, attempt: Trial, distortion: float, shown: str, images: int = SCREENED_IMAGES) -> Drop:
        self.say(f"screening {shown}")
        some = self.trying.images.first(images)
        with opened(plan_attempt(attempt, self.trying, say=lambda step: self.say(f"screening {shown}, {step}"))) as one:
            self.say(f"screening {shown}, running over {len(some.paths)} images")
            outputs = run_over(one, some, self.trying.model.preprocess)
        trying = replace(self.trying, images=some, expected=_only(self.trying, some))
        found = _Screened(attempt=attempt, distortion=distortion, drop=trying.drop(outputs))
        self._screened.append(found)
        append_row(self.folder / SCREENED, found.to_dict())
        return found.drop

    def measure(self, attempt: Trial) -> dict[str, Any]:
        """Return the row of an attempt: a kept one whose bundle is still there, or a new one."""
        for row in self.rows:
            if row["recipe"] == attempt.name and (row["error"] is not None or self._kept(attempt) is not None):
                return row
        try:
            row = measure_attempt(
                attempt,
                self.trying,
                self.folder,
                self.plain,
                rows=self.rows,
                say=lambda step: self.say(f"{attempt.name}: {step}"),
            )
        except VitfoldError as error:
            row = failed_row(attempt, error)
        append_row(self.folder / ROWS, row)
        self.rows = [*(other for other in self.rows if other["recipe"] != attempt.name), row]
        return row

    def verify(self, row: Mapping[str, Any]) -> Verdict:
        """Run an attempt's bundle over the images that nothing was chosen by."""
        self.say(f"{row['recipe']}: verifying on held-out images")
        bundle = open_bundle(self.folder / row["bundle"])
        with open_session(bundle) as session:
            outputs = run_over(session, self.held_out.images, self.held_out.model.preprocess)
        held_out = self.held_out
        return Verdict(row=row, bundle=bundle, held_out=held_out.drop(outputs), fidelity=held_out.fidelity(outputs))

    def _kept(self, attempt: Trial) -> Bundle | None:
        try:
            return open_bundle(self.folder / f"{attempt.name}.fold")
        except BundleError:
            return None


def find_arms(laboratory: SearchContext, quants: Sequence[str], targets: Sequence[str], goal: Goal) -> list[Arm]:
    """Return the arms of an earlier run in the same folder, and build and keep those that are missing."""
    path, wanted = laboratory.folder / ARMS, goal.worth_trying(_narrower(laboratory))
    pairs = [(quant, target) for quant in quants for target in targets]
    shares = [0.0, *(one.share for one in wanted)]
    kept: dict[tuple[str, str], list[Arm]] = {}
    for row in read_rows(path):
        arm = arm_from_dict(row)
        kept.setdefault((arm.quant, arm.target), []).append(arm)
    found = {pair: arms for pair, arms in kept.items() if [arm.share for arm in arms] == shares}
    if found != kept:
        path.unlink(missing_ok=True)
        for arm in (arm for arms in found.values() for arm in arms):
            append_row(path, arm.to_dict())
    missing = [pair for pair in pairs if pair not in found]
    if missing:
        for pair, arms in build_arms(laboratory, missing, wanted):
            found[pair] = arms
            for arm in arms:
                append_row(path, arm.to_dict())
    return [arm for pair in pairs for arm in found[pair]]


def build_arms(
    laboratory: SearchContext, pairs: Sequence[tuple[str, str]], narrower: Sequence[Narrower]
) -> Iterator[tuple[tuple[str, str], list[Arm]]]:
    """Measure the distortions once and a latency table for every pair, and yield its frontiers.

    Of narrower blocks only the narrowest are timed: what others take lies on the line between them and whole blocks.

    Args:
        pairs: bits and a target.
        narrower: what of the blocks stays, by rising share of their work that goes.
    """
    trying, say = laboratory.trying, laboratory.say
    say("choosing a merging rule")
    rule = gentlest_rule(trying.model, trying.calibration)

    def rough(pair: tuple[str, str], prune: PruneRecipe | None = None) -> Plan:
        quant, target = pair
        kept = (trying.calibration, rule, prune)
        return roughly_calibrated(trying.model, quant_from_scheme(quant), target, *kept)

    first = on_this_machine(rough(pairs[0]))
    merging = measure_merging(trying.model, trying.calibration, **first, rule=rule, say=say)
    protocol = replace(PROBE, batch=trying.protocol.batch)
    with open_session(laboratory.plain) as plain:
        for number, (quant, target) in enumerate(pairs, start=1):
            say(f"timing schedules: {quant} on {target} {number}/{len(pairs)}")
            plan = rough((quant, target))
            space = replace(merging.space, step=on_this_machine(plan)["step"])
            table = measure_latency(plan, protocol=protocol)
            with ExitStack() as closing:
                sessions = {"float": plain, "whole": closing.enter_context(opened(plan))}
                if narrower:
                    narrow = rough((quant, target), narrower[-1].prune)
                    sessions["narrow"] = closing.enter_context(opened(narrow))
                times = timed(sessions, trying.model.spec, protocol=protocol)
            none = (0,) * trying.model.spec.num_layers
            total = table.total(none, trying.model.spec.tokens)
            scale = 1 / speed_up(times["float"], times["whole"])["median"] / total
            arms = [Arm(quant=quant, target=target, rule=rule, points=_points(space, table, scale))]
            for one in narrower:
                least = 1 / speed_up(times["whole"], times["narrow"])["median"]
                left = table.narrowed(float(np.interp(one.share, (0.0, narrower[-1].share), (1.0, least))))
                points = _points(space, left, scale)
                arms.append(replace(arms[0], points=points, share=one.share, prune=one.prune, lost=one.lost))
            yield (quant, target), arms


def _points(space: Space, table: LatencyTable, scale: float) -> tuple[Point, ...]:
    """Return the schedules that none beats in both predicted time and distortion."""
    return tuple(frontier(space, lambda tokens, merged, _: scale * table.block(tokens, merged), _WORST))


def _narrower(laboratory: SearchContext) -> list[Narrower]:
    """What of the blocks stays by the share of their work that goes, as far as that can be; none without refitting."""
    trying, found = laboratory.trying, list[Narrower]()
    if trying.refitting is None:
        return found
    from vitfold.quant import Progress

    progress = Progress(step=laboratory.say)
    with contextlib.suppress(RecipeError):  # nothing can go, or not so much
        for share in PRUNED:
            prune = solve_prune(trying.model, MergeRecipe(r=()), trying.refitting, share, progress=progress)
            found.append(Narrower(share=share, prune=prune))
    return found


def search(laboratory: SearchContext, arms: Sequence[Arm], goal: Goal, *, minutes: float) -> SearchResult:
    """Try recipes in the order of what they promise until none left promises more than the best that met the bound.

    On every arm the trial starts where `goal` says; from what met the bound it goes on to bolder recipes, from what
    missed it to gentler ones. One whose drop comes from quantization more than from merging is tried again with its
    most sensitive sites wide where its engine multiplies 16 bits, then float, and with a remedy against sink tokens
    where that does not mend it; one that merges too much with its merging compensated, where there are images for that.
    Arms of narrower blocks start from gentler merging, by what pruning alone costs, and, while nothing has met the
    bound, from no merging: that needs no other refit, and where it breaks the bound they do not merge at all. What
    meets the bound has to keep it on held-out images too.
    """
    ends, verified = time.monotonic() + 60 * minutes, 0
    # An arm waits with the best that it could promise at all; only when its turn comes is it found out what it does.
    waiting: list[tuple[float, int, _Step | None]] = [
        (min(goal.cost(arm, i) for i in range(len(arm.points))), n, None) for n, arm in enumerate(arms)
    ]
    heapq.heapify(waiting)
    best: Verdict | None = None
    tried: set[tuple[int, _Step]] = set()
    alone: dict[int, bool] = {}
    reason = "every recipe that promised more was tried"
    while waiting:
        cost, number, step = heapq.heappop(waiting)
        if best is not None and cost > CLOSE * goal.reached(best.row):
            break
        if time.monotonic() > ends:
            reason = f"its {minutes:g} minutes were over; the same command goes on"
            break
        arm = arms[number]
        if step is None:
            step = _Step(index=goal.start(arm))
            heapq.heappush(waiting, (goal.cost(arm, step.index), number, step))
            continue
        if (number, step) in tried or not _worth_a_refit(arm, step, goal, best, alone=alone.get(number, True)):
            continue
        unmerged = _Step(index=len(arm.points) - 1)
        if best is None and arm.prune is not None and isinstance(goal, LeastLatency) and number not in alone:
            # Narrower blocks alone were refitted when they were screened, and merging adds to their drop.
            heapq.heappush(waiting, (cost, number, step))
            step = unmerged
        tried.add((number, step))
        row = laboratory.measure(
            arm.attempt(
                step.index, step.float_sites, wide=step.wide, compensate=step.compensate, registers=step.registers
            )
        )
        if step == unmerged:
            alone[number] = goal.meets(row)
        kept = False
        if goal.meets(row) and _pays(row):
            verdict = laboratory.verify(row)
            verified += 1
            kept = verdict.held_out.drop <= goal.max_drop
            if kept and (best is None or goal.reached(row) < goal.reached(best.row)):
                best = verdict
        for following in _following(laboratory, goal, arm, step, row, kept=kept):
            heapq.heappush(waiting, (goal.cost(arm, following.index), number, following))
    rows = [row for row in laboratory.rows if any((row["quant"], row["target"]) == (a.quant, a.target) for a in arms)]
    nearest = min((row for row in rows if row["error"] is None), key=goal.missed_by, default=None)
    return SearchResult(winner=best, rows=tuple(rows), verified=verified, nearest=nearest, reason=reason)


def _worth_a_refit(arm: Arm, step: _Step, goal: Goal, best: Verdict | None, *, alone: bool) -> bool:
    """Say whether narrower blocks that merge, too, promise clearly more than the best: they are refitted together.

    They do not where they break the bound `alone`, without merging.
    """
    if arm.prune is None or not any(arm.points[step.index][2]) or not isinstance(goal, LeastLatency):
        return True
    return alone and (best is None or CLOSE * goal.cost(arm, step.index) <= goal.reached(best.row))


def _following(
    laboratory: SearchContext, goal: Goal, arm: Arm, step: _Step, row: Mapping[str, Any], *, kept: bool
) -> Iterator[_Step]:
    """Yield what to try behind a step that kept the bound or did not."""
    index, mends = step.index, laboratory.trying.refitting is not None and any(arm.points[step.index][2])
    mends = mends and arm.prune is None  # there merging is mended with it
    if kept:
        bolder = _bolder(goal, arm, step, row)
        if bolder is not None:
            yield _Step(index=bolder, compensate=step.compensate, registers=step.registers)
        elif mends and isinstance(goal, LeastLatency):
            bolder = goal.bolder(arm, index, compensated=True)
            if bolder is not None:
                yield _Step(index=bolder, compensate=True)
        if mends and not isinstance(goal, LeastLatency):
            yield replace(step, compensate=True)
        return
    if step.float_sites == 0 and isinstance(goal, LeastLatency):
        if mends and not step.compensate:
            yield replace(step, compensate=True)
        if not step.registers and _quantization_costs(arm, index, row, laboratory):
            yield replace(step, float_sites=FLOAT_SITES, wide=find_target(arm.target).takes_wide)
    if step.wide:
        yield replace(step, wide=False)
    elif step.float_sites and arm.prune is None and laboratory.takes_registers:
        yield replace(step, float_sites=0, registers=True)
    following = goal.further(arm, index) if step.float_sites == 0 and not step.compensate else None
    if following is not None:
        yield _Step(index=following)


def _bolder(goal: Goal, arm: Arm, step: _Step, row: Mapping[str, Any]) -> int | None:
    """Return the bolder schedule to try next; of narrower blocks the first that promises clearly more than this row."""
    compensated = step.compensate or arm.prune is not None
    found = goal.bolder(arm, step.index, compensated=compensated)
    if arm.prune is None or not isinstance(goal, LeastLatency):
        return found
    while found is not None and CLOSE * goal.cost(arm, found) > goal.reached(row):
        found = goal.bolder(arm, found, compensated=compensated)
    return found


def divided_for_search(images: ImageSet, *, seed: int) -> tuple[ImageSet, ImageSet]:
    """Return two halves, drawn by a seed: one to choose recipes by, one to verify on."""
    chosen = images.sample(len(images.paths) // 2, seed=seed)
    others = images.without(chosen)
    if others is None:
        raise VitfoldError("a search needs images to choose by and others to verify on; give more images")
    return chosen, others


def divided_for_refitting(images: ImageSet, *, seed: int) -> tuple[ImageSet | None, ImageSet]:
    """Return a third of the images for refitting layers, drawn by a seed, and the others; none, if that is too few."""
    from vitfold.compensation import LEAST_IMAGES, MOST_IMAGES

    count = min(MOST_IMAGES, len(images.paths) // 3)
    if count < LEAST_IMAGES:
        return None, images
    chosen = images.sample(count, seed=seed)
    return chosen, images.without(chosen) or images


def enough_for_refitting(images: ImageSet) -> ImageSet | None:
    """Return as many images as refitting layers takes; None, if they are too few."""
    from vitfold.compensation import LEAST_IMAGES
    from vitfold.pipeline.compensating import all_for_compensation

    return all_for_compensation(images) if len(images.paths) >= LEAST_IMAGES else None


def check_enough(images: int, max_drop: float) -> None:
    """Check that images can tell a drop of `max_drop`.

    Raises:
        VitfoldError: if a single image is already more than that.
    """
    if images * max_drop < 1:
        raise VitfoldError(
            f"{images} images cannot tell a drop of {100 * max_drop:g} points: one is {100 / images:.2f} already; give "
            f"at least {2 * int(1 / max_drop + 1)} images beside those for calibration, or allow more"
        )


def _pays(row: Mapping[str, Any]) -> bool:
    """Say whether a recipe is surely faster than the float model."""
    return row["speedup"] is not None and row["speedup"]["low"] > 1.0


def _quantization_costs(arm: Arm, index: int, row: Mapping[str, Any], laboratory: SearchContext) -> bool:
    if arm.quant == "none" or row["drop"] is None:
        return False
    others = laboratory.screen(arm.points[index], arm.rule).drop + arm.lost
    return bool(row["drop"]["drop"] - others > max(others, 0.0))


def _only(trying: EvalContext, images: ImageSet) -> Outputs:
    """Return the float model's outputs on a subset of the images."""
    position = {path: row for row, path in enumerate(trying.images.paths)}
    rows = [position[path] for path in images.paths]
    return Outputs(values=trying.expected.values[rows], index=tuple(range(len(rows))), skipped=())
