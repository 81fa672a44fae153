"""Which steps of a pipeline are computed in full: solved on some prompts, confirmed on others beside fewer steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vitfold.bench.pictures import psnr_db
from vitfold.diffusion.methods import METHODS, ReuseMethod, find_method
from vitfold.diffusion.pipelines.choosing import planned, solve
from vitfold.diffusion.pipelines.drawing import Drawer, Rest
from vitfold.diffusion.pipelines.installing import restore
from vitfold.diffusion.pipelines.recording import Trace
from vitfold.diffusion.pipelines.step_plan import Row, StepPlan, guidance_of, scheduler_facts
from vitfold.diffusion.pipelines.stepping import denoisers
from vitfold.errors import ArgumentError, RecipeError, check_whole
from vitfold.model import Array
from vitfold.progress import Say

FEW = 8
"""Models that are distilled to so few steps change all the way at each of them."""
SEED = 1_000_000
HELD_OUT_SEED = 2_000_000
_AS_GOOD_DB = 0.1
_EQUAL_DB = 1000.0


def plan_steps(
    pipe: Any,
    prompts: Sequence[Any],
    *,
    steps: int = 50,
    full: int | None = None,
    min_psnr: float | None = None,
    max_seconds: float | None = None,
    method: str = "fitted",
    held_out: Sequence[Any] | None = None,
    seeds: int = 2,
    say: Say | None = None,
    **call: Any,
) -> StepPlan:
    """Return which of a pipeline's steps to compute in full, with what it gives on prompts and seeds held out.

    Prompts are what the pipeline takes first (texts; numbers of classes), or mappings of its arguments; `call` are
    arguments that go with all of them (height=..., guidance_scale=...). `full` names the number of full steps;
    `min_psnr` (30 if nothing is named) takes the fewest with that PSNR to the images of all steps, `max_seconds` the
    most that take no longer. `method` is "fitted" (full steps and weights fitted to the model), "solved" (lines),
    "dpcache", or one whose steps follow from numbers of its own, such as "taylor:3:2" or "magcache". Where no prompts
    are `held_out`, the second half of `prompts` is. One image is drawn at a time. What was drawn stays in the cache:
    the same call goes on where it was interrupted.

    Raises:
        ArgumentError: if an argument is none that it takes.
        RecipeError: if no number of full steps keeps the bound, the method is none of these, or the scheduler is none
            that can be weighed.
        UnsupportedError: if the pipeline has no transformer, or one whose blocks are not understood.
        EngineError: if the device has not enough memory.
    """
    chosen = _static(method, named=any(value is not None for value in (full, min_psnr, max_seconds)))
    bound = _check(prompts, steps, full, min_psnr, max_seconds, held_out, seeds)
    restore(pipe)
    drawer, say = Drawer(pipe, denoisers(pipe), steps, call), say or (lambda _: None)
    solving, others = _split(prompts, held_out)
    trace = _recorded(drawer, [(prompt, SEED + s) for prompt in solving for s in range(seeds)], say)
    held = _HeldOut(drawer, [(prompt, HELD_OUT_SEED + s) for prompt in others for s in range(seeds)], say)
    plan = StepPlan(
        pipeline=type(pipe).__name__,
        stacks=trace.stacks,
        weights=drawer.weights,
        scheduler=scheduler_facts(pipe.scheduler),
        guidance=guidance_of(drawer.arguments(solving[0])),
        steps=steps,
        timesteps=trace.timesteps,
        first=trace.first,
        runs=len(trace.gram),
        passes=trace.passes,
        full=tuple(range(len(trace.gram))),
        position="step",
        held_out=(),
        remark=f"{len(trace.gram)} steps leave nothing to reuse: all of so few change the image, and all are in full.",
    )
    if plan.runs <= FEW:
        return replace(plan, held_out=(held.all_steps(plan.runs),))
    plan = replace(plan, method=chosen.text if chosen.budget is None else chosen.text.split(":")[0])
    if chosen.budget is None:
        return _finished(plan, held, held.all_steps(plan.runs), planned(trace, chosen))
    return _finished(plan, held, *_choose(trace, held, bound, chosen))


def _static(text: str, *, named: bool) -> ReuseMethod:
    """Return a method whose schedule is the same for every image."""
    method = find_method(text)
    if not method.is_static or not method.reuses:
        raise RecipeError(
            f"method {text!r} is no plan of steps: it decides per image, or keeps more than what all blocks add; take "
            f"one of {', '.join(name for name in METHODS if find_method(name).is_static)}"
        )
    if method.budget is not None and ":" in text:
        raise RecipeError(f"name the full steps of {text!r} as full=..., and the method without its numbers")
    if method.budget is None and named:
        raise RecipeError(
            f"the full steps of {method.text} follow from its numbers; leave out full, min_psnr and max_seconds"
        )
    return method


def _split(prompts: Sequence[Any], held_out: Sequence[Any] | None) -> tuple[list[Any], list[Any]]:
    """Prompts to solve on, and those to confirm on: of a single one, its other seeds confirm."""
    if held_out is not None or len(prompts) == 1:
        return list(prompts), list(held_out or prompts)
    half = (len(prompts) + 1) // 2
    return list(prompts[:half]), list(prompts[half:])


def _check(
    prompts: Any, steps: Any, full: Any, min_psnr: Any, max_seconds: Any, held_out: Any, seeds: Any
) -> tuple[str, float]:
    check_whole("steps", steps, least=1)
    check_whole("seeds", seeds, least=1)
    for name, value in (("prompts", prompts), ("held_out", held_out)):
        if value is None and name == "held_out":
            continue
        if isinstance(value, str) or not isinstance(value, Sequence) or not len(value):
            raise ArgumentError(f'{name} must be a list of at least one prompt, such as ["a red fox"], found {value!r}')
        if any(one is None or (isinstance(one, str) and not one.strip()) for one in value):
            raise ArgumentError(f"{name} holds an empty prompt; name what your pipeline is to draw")
    asked = (("full", full), ("min_psnr", min_psnr), ("max_seconds", max_seconds))
    named = {name: value for name, value in asked if value is not None} or {"min_psnr": 30.0}
    if len(named) > 1:
        raise ArgumentError(f"{' and '.join(named)} are given; name one of full, min_psnr and max_seconds")
    ((name, value),) = named.items()
    if name == "full":
        check_whole("full", value, least=3)
        if value >= steps > FEW:
            raise ArgumentError(f"full = {value} of {steps} steps leaves none to reuse; name fewer")
    elif not (isinstance(value, int | float) and value > 0):
        raise ArgumentError(f"{name} must be a positive number, found {value!r}")
    return name, float(value)


def _recorded(drawer: Drawer, pairs: Sequence[tuple[Any, int]], say: Say) -> Trace:
    traces = []
    for i, (prompt, seed) in enumerate(pairs):
        say(f"recording image {i + 1} of {len(pairs)}")
        traces.append(drawer.record(prompt, seed))
    first = traces[0]
    if any(t.gram.shape != first.gram.shape or not np.array_equal(t.active, first.active) for t in traces):
        raise RecipeError("the prompts take different numbers of steps; give prompts that the pipeline draws alike")
    drawer.knows(first)
    return replace(first, gram=np.sum([trace.gram for trace in traces], axis=0))


class _HeldOut:
    """Images of prompts and seeds that no plan was solved on, drawn in one way or another."""

    def __init__(self, drawer: Drawer, pairs: Sequence[tuple[Any, int]], say: Say) -> None:
        self._drawer, self._pairs, self._say = drawer, pairs, say
        self._reference: list[Array] = []
        self._rows: dict[Any, Row] = {}

    def all_steps(self, runs: int) -> Row:
        row, self._reference = self._row("all steps", runs, runs, self._drawer.steps, None)
        return row

    def resting(self, chosen: Rest, runs: int) -> Row:
        if chosen not in self._rows:
            self._rows[chosen] = self._row("planned", len(chosen.full), runs, self._drawer.steps, chosen)[0]
        return self._rows[chosen]

    def fewer(self, steps: int) -> Row:
        return self._row("plainly fewer steps", steps, steps, steps, None)[0]

    def _row(self, name: str, full: int, runs: int, steps: int, resting: Rest | None) -> tuple[Row, list[Array]]:
        self._say(f"drawing {len(self._pairs)} held-out images: {name}, {full} of {runs} steps in full")
        images = [self._drawer.draw(prompt, seed, steps, resting) for prompt, seed in self._pairs]
        values = [image.values for image in images]
        lowest = [_psnr([a], [b], self._peak()) for a, b in zip(self._reference, values, strict=False)]
        row = Row(
            name=name,
            full=full,
            steps=runs,
            psnr_db=_psnr(self._reference, values, self._peak()) if self._reference else None,
            lowest_psnr_db=min((one for one in lowest if one is not None), default=None),
            seconds=float(np.median([image.seconds for image in images])),
        )
        return row, values

    def _peak(self) -> float:
        if self._drawer.call.get("output_type") != "latent" or not self._reference:
            return 1.0
        return float(max(one.max() for one in self._reference) - min(one.min() for one in self._reference))


def _psnr(reference: Sequence[Array], images: Sequence[Array], peak: float) -> float | None:
    a, b = (np.concatenate([one.reshape(-1) for one in values])[None, None, None] for values in (reference, images))
    return psnr_db(a, b, peak=peak)


def _choose(trace: Trace, held: _HeldOut, bound: tuple[str, float], method: ReuseMethod) -> tuple[Row, Rest]:
    """The row of all steps, and the full steps that keep the bound."""
    runs, (name, value) = len(trace.gram), bound
    solved = solve(trace, _most(bound))

    @functools.cache
    def found(count: int) -> Rest:
        position, full = solved[count]
        lines = method.text.startswith("solved")
        return Rest(full=full, position=position) if lines else planned(trace, method, full)

    every, counts = held.all_steps(runs), sorted(solved)
    if name == "full":
        if int(value) not in solved:
            raise RecipeError(f"full = {value:g} is out of range here; from {counts[0]} to {counts[-1]}")
        return every, found(int(value))
    if name == "max_seconds":
        return every, _within(found, counts, every, held, value)

    def keeps(count: int) -> bool:
        reached = held.resting(found(count), runs).psnr_db
        return reached is None or reached >= value

    low, high = 0, len(counts) - 1
    if not keeps(counts[high]):
        raise RecipeError(
            f"even {counts[high]} of {runs} steps in full give less than {value:g} dB; lower min_psnr, or draw with "
            "all steps"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(counts[middle]) else (middle + 1, high)
    return every, found(counts[high])


def _most(bound: tuple[str, float]) -> int | None:
    return int(bound[1]) if bound[0] == "full" else None


def _within(found: Callable[[int], Rest], counts: Sequence[int], every: Row, held: _HeldOut, seconds: float) -> Rest:
    """The most full steps that take no longer: by a line through two measurements, then confirmed."""
    middle = counts[len(counts) // 2]
    row = held.resting(found(middle), every.steps)
    slope = max((every.seconds - row.seconds) / (every.steps - middle), 1e-9)
    count = min(counts[-1], math.floor(middle + (seconds - row.seconds) / slope))
    while count >= counts[0]:
        row = held.resting(found(count), every.steps)
        if row.seconds <= seconds:
            return found(count)
        count -= max(1, math.ceil((row.seconds - seconds) / slope))
    fastest = held.resting(found(counts[0]), every.steps)
    raise RecipeError(
        f"no plan takes {seconds:g} s: {counts[0]} steps in full take {fastest.seconds:.3g} s; allow more seconds, or "
        "name fewer steps"
    )


def _finished(plan: StepPlan, held: _HeldOut, every: Row, chosen: Rest) -> StepPlan:
    """The plan beside plainly fewer steps: as many as it computes in full, and as many as take its time."""
    resting = held.resting(chosen, plan.runs)
    equal = min(plan.steps - 1, round(plan.steps * resting.seconds / every.seconds))
    fewer = [held.fewer(steps) for steps in sorted({len(chosen.full), max(equal, len(chosen.full))})]
    best = max(fewer, key=_nearness)
    ahead = _nearness(resting) - _nearness(best)
    if not ahead > _AS_GOOD_DB:
        remark = (
            f"Plainly fewer steps are as good: num_inference_steps={best.steps} gives {_decibels(best)} and this "
            f"plan {_decibels(resting)}; use them instead."
        )
    else:
        remark = (
            f"On prompts and seeds held out the plan is {ahead:.1f} dB nearer to all steps than "
            f"num_inference_steps={best.steps}, and takes {resting.seconds / every.seconds:.0%} of their time."
        )
    rows = (every, resting, *fewer)
    return replace(plan, full=chosen.full, position=chosen.position, rows=chosen.rows, held_out=rows, remark=remark)


def _nearness(row: Row) -> float:
    return _EQUAL_DB if row.psnr_db is None else row.psnr_db


def _decibels(row: Row) -> str:
    return "equal images" if row.psnr_db is None else f"{row.psnr_db:.1f} dB"
