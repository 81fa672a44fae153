"""The fastest way to draw that is still near enough, found by measuring."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from vitfold.bench.pictures import FRECHET_IMAGES, psnr_db
from vitfold.diffusion import ReuseMethod, find_method
from vitfold.diffusion.compare import (
    SamplerRow,
    SamplingConfig,
    Variant,
    check_asked,
    compare,
    draw,
    fewer_name,
    peak_of,
    settled,
    shown_by,
)
from vitfold.diffusion.compression import Compression
from vitfold.diffusion.judge import Judge
from vitfold.diffusion.opening import TokenPlan, open_parts, prepare_tokens, reused_work
from vitfold.diffusion.rows import append_group, read_groups
from vitfold.engines import Session
from vitfold.errors import RecipeError
from vitfold.model import Array, DiTModel
from vitfold.progress import Say


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpace:
    """What a search tries: methods by name; shares of the steps that `fitted` computes in full; of plainly fewer steps.

    TokenCache trains a predictor first, once for a model and a number of steps.
    """

    methods: tuple[str, ...] = (
        "stack:2", "stack:3", "stack:4", "taylor:2:1", "taylor:3:1", "taylor:4:1", "taylor:5:1", "taylor:3:2",
        "taylor:4:2", "chebyshev:3:1", "chebyshev:4:1", "first-block:0.05", "first-block:0.1", "first-block:0.2",
        "guidance:2", "guidance:4", "fora:2", "tokencache:0.5:2:4", "tokencache:0.8:3:6", "tokencache-blocks:0.5:2:4",
        "tokencache-blocks:0.7:3:6",
    )  # fmt: skip
    fitted: tuple[float, ...] = (0.2, 0.24, 0.28, 0.36, 0.44, 0.52)
    fewer: tuple[float, ...] = (0.8, 0.65, 0.5, 0.4, 0.3, 0.2)


LEAST_FITTED = 4
CONVERGED = 4
"""So many times the steps count as the image that a sampler converges to."""
HELD_OUT_SEED = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How far images may be from the unaccelerated ones; at least one bound is set.

    `min_psnr_db` compares at equal seeds. `max_psnr_drop_db` is how much further from the converged image (by PSNR, at
    equal seeds) than the unaccelerated sampler's is allowed, whose own steps are an approximation, too.
    `max_fid_rise` is in the Frechet distance of the judge's features, and the upper end of the interval has to keep it.
    """

    min_psnr_db: float | None = None
    max_psnr_drop_db: float | None = None
    max_fid_rise: float | None = None

    def __post_init__(self) -> None:
        if all(bound is None for bound in (self.min_psnr_db, self.max_psnr_drop_db, self.max_fid_rise)):
            raise ValueError("a search needs a bound")

    def to_dict(self) -> dict[str, float | None]:
        """Return plain JSON values."""
        return {
            "min_psnr_db": self.min_psnr_db,
            "max_psnr_drop_db": self.max_psnr_drop_db,
            "max_fid_rise": self.max_fid_rise,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tried:
    """One candidate as it was measured beside the unaccelerated sampler."""

    row: SamplerRow
    compression: Compression
    psnr_drop_db: float | None

    def within(self, bounds: Bounds) -> bool:
        """Whether it keeps every bound that was measured for it; equal images keep all."""
        psnr, drop, rise = self.row.psnr_db, self.psnr_drop_db, self.row.rise
        return (
            (bounds.min_psnr_db is None or psnr is None or psnr >= bounds.min_psnr_db)
            and (bounds.max_psnr_drop_db is None or drop is None or drop <= bounds.max_psnr_drop_db)
            and (bounds.max_fid_rise is None or rise is None or rise.high <= bounds.max_fid_rise)
        )

    @property
    def speed_up(self) -> float:
        """The median over trials."""
        return self.row.speedup["median"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        found = {**self.row.to_dict(), "quant": self.compression.quant}
        return {**found, "psnr_drop_db": self.psnr_drop_db}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepSearchResult:
    """What a search measured: the unaccelerated row, all candidates, and the winner on held-out seeds, if any."""

    plain: SamplerRow
    tried: tuple[Tried, ...]
    refused: tuple[Tried, ...]
    winner: Tried | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setup:
    """What is tried and what runs it, what looks at the images, and the folder in which an interrupted search goes on.

    Without a `space` all of `StepSpace` is tried. `measure` times ways to draw beside each other, as `compare` does.
    """

    space: StepSpace | None = None
    measure: Callable[..., list[SamplerRow]] = compare
    engine: str = "onnxruntime"
    threads: int | None = None
    decode: Callable[[Array], Array] | None = None
    judge: Judge | None = None
    folder: Path | None = None
    say: Say = lambda _: None


def search_steps(
    model: DiTModel,
    asked: SamplingConfig,
    bounds: Bounds,
    compressions: Sequence[Compression],
    setup: Setup,
    *,
    samples: int = 64,
    minutes: float = 20.0,
) -> StepSearchResult:
    """Time every candidate on a few images; then take the fastest one that keeps the bounds on `samples` others.

    The distance of features needs many images, so it is measured on those only.

    Raises:
        RecipeError: if what is asked for is out of range, or a bound cannot be measured by this sampler.
    """
    deadline = time.monotonic() + 60 * minutes
    check_bounds(model, asked, bounds, setup)
    if bounds.max_fid_rise is not None and samples < FRECHET_IMAGES:
        raise RecipeError(f"--samples {samples} are too few for a Frechet distance; give at least {FRECHET_IMAGES}")
    tried = screen(model, asked, bounds, compressions, unjudged(setup), deadline=deadline)
    able = sorted((one for one in tried if one.within(bounds)), key=lambda one: -one.speed_up)
    labels = tuple(i % model.spec.classes for i in range(samples))
    held_out = replace(asked, labels=labels, seed=asked.seed + HELD_OUT_SEED)
    refused: list[Tried] = []
    plain: SamplerRow | None = None
    winner, reason = None, "nothing that keeps the bounds is faster than the unaccelerated sampler"
    with _opened(model, find_method("none"), Compression(), setup) as executor:
        first = Variant(name="none", method=find_method("none"), executor=executor, asked=held_out)
        goal = _converged(model, first, bounds, setup) if able else None
        best_psnr = float("-inf")
        for one in able:
            if one.speed_up <= 1:
                break
            if bounds.max_fid_rise is not None and (one.row.psnr_db or 0) <= best_psnr:
                continue
            if refused and time.monotonic() > deadline:
                reason = "the time was over before a candidate kept the bounds on held-out seeds"
                break
            setup.say(f"{one.row.name} on {samples} held-out seeds")
            plain, again = _again(model, first, one, goal, setup)
            if again.within(bounds) and again.speed_up > 1:
                winner, reason = again, "the fastest candidate that keeps the bounds on held-out seeds"
                break
            best_psnr = max(best_psnr, one.row.psnr_db or 0)
            refused.append(again)
        if plain is None:
            (plain,) = setup.measure(
                model, [first], engine=setup.engine, trials=1, decode=setup.decode, judge=setup.judge
            )
    return StepSearchResult(plain=plain, tried=tuple(tried), refused=tuple(refused), winner=winner, reason=reason)


def unjudged(setup: Setup) -> Setup:
    """Return the same without a judge: a few images have no distribution."""
    return replace(setup, judge=None)


def check_bounds(model: DiTModel, asked: SamplingConfig, bounds: Bounds, setup: Setup) -> None:
    """Check what is asked for before anything slow starts.

    Raises:
        RecipeError: naming what cannot be measured, or is out of range.
    """
    check_asked(model, asked)
    if bounds.max_psnr_drop_db is not None and asked.sampler == "ddpm":
        raise RecipeError("--max-psnr-drop needs a sampler that converges with more steps: --sampler ddim or dpm++")
    if bounds.max_fid_rise is not None and setup.judge is None:
        raise RecipeError("--max-fid-rise needs --real and --features, by which images are judged")


def screen(
    model: DiTModel,
    asked: SamplingConfig,
    bounds: Bounds,
    compressions: Sequence[Compression],
    setup: Setup,
    *,
    deadline: float = float("inf"),
    fewer: bool = True,
) -> list[Tried]:
    """Measure all candidates on the images asked for, those that share graphs in one run with the plain sampler.

    What `setup.folder` holds of them is taken from there.

    Raises:
        JournalError: if a line there is no group of rows.
    """
    none, space = find_method("none"), setup.space or StepSpace()
    found: list[Tried] = []
    kept = read_groups(setup.folder)
    with _opened(model, none, Compression(), setup) as plain:
        first = Variant(name="none", method=none, executor=plain, asked=asked)
        goal = _converged(model, first, bounds, setup)
        for compression in compressions:
            for method, group in _groups(none, asked.steps, space):
                called = f"{', '.join(one.text for one in group)}{compression.suffix}"
                if called in kept:
                    found += [Tried(row=row, compression=compression, psnr_drop_db=drop) for row, drop in kept[called]]
                    continue
                if found and time.monotonic() > deadline:
                    return found
                tokens = prepare_tokens(model, method, asked.steps, setup.say)
                counts = () if tokens is None else tokens.counts
                setup.say(f"measuring {called}")
                with _opened(model, method, compression, setup, tokens) as executor:
                    ways = [
                        Variant(
                            name=f"{one.text}{compression.suffix}",
                            method=settled(model, executor, one, asked),
                            executor=executor,
                            asked=asked,
                            reused_work=reused_work(model.spec, one, counts, compression.r),
                        )
                        for one in group
                        if one.reuses or compression.suffix
                    ]
                    if method.cut == "whole" and fewer:
                        ways += _fewer_steps(executor, none, asked, compression, space)
                    rows = _measured(model, [first, *ways], setup) if ways else []
                tried = [_tried(row, rows[0], compression, goal, setup) for row in rows[1:]]
                append_group(setup.folder, called, [(one.row, one.psnr_drop_db) for one in tried])
                found += tried
    return found


def _groups(none: ReuseMethod, steps: int, space: StepSpace) -> list[tuple[ReuseMethod, list[ReuseMethod]]]:
    """Candidates by the graphs that they run; no two in a group need others."""
    fitted = sorted({count for share in space.fitted if LEAST_FITTED <= (count := round(share * steps)) < steps})
    methods = [none, *map(find_method, space.methods), *(find_method(f"fitted:{count}") for count in fitted)]
    found = [list(group) for _, group in groupby(sorted(methods, key=lambda one: one.graphs), lambda one: one.graphs)]
    return [(group[0], group) for group in found]


def _fewer_steps(
    executor: Session, none: ReuseMethod, asked: SamplingConfig, compression: Compression, space: StepSpace
) -> list[Variant]:
    counts = sorted({max(1, round(share * asked.steps)) for share in space.fewer} - {asked.steps}, reverse=True)
    return [
        Variant(
            name=f"{fewer_name(steps)}{compression.suffix}",
            method=none,
            executor=executor,
            asked=replace(asked, steps=steps),
        )
        for steps in counts
    ]


def _again(model: DiTModel, first: Variant, one: Tried, goal: Array | None, setup: Setup) -> tuple[SamplerRow, Tried]:
    """Measure one candidate on held-out seeds, beside the plain sampler."""
    tokens = prepare_tokens(model, one.row.method, one.row.steps, setup.say)
    with _opened(model, one.row.method, one.compression, setup, tokens) as executor:
        asked = replace(first.asked, steps=one.row.steps)
        work = one.row.reused_work
        way = Variant(name=one.row.name, method=one.row.method, executor=executor, asked=asked, reused_work=work)
        plain, row = _measured(model, [first, way], setup)
    return plain, _tried(row, plain, one.compression, goal, setup)


def _measured(model: DiTModel, ways: Sequence[Variant], setup: Setup) -> list[SamplerRow]:
    return setup.measure(
        model, ways, engine=setup.engine, trials=1, decode=setup.decode, judge=setup.judge, say=lambda _: None
    )


def _opened(
    model: DiTModel, method: ReuseMethod, compression: Compression, setup: Setup, tokens: TokenPlan | None = None
) -> contextlib.AbstractContextManager[Session]:
    threads = setup.threads
    return open_parts(model, method, compression=compression, tokens=tokens, engine=setup.engine, threads=threads)


def _converged(model: DiTModel, first: Variant, bounds: Bounds, setup: Setup) -> Array | None:
    """The images that the sampler converges to, if a bound asks how near they are."""
    if bounds.max_psnr_drop_db is None:
        return None
    most = int(model.schedule.get("num_train_timesteps", 1000))
    asked = replace(first.asked, steps=min(most, CONVERGED * first.asked.steps))
    setup.say(f"drawing in {asked.steps} steps")
    return shown_by(draw(model, first.executor, first.method, asked).samples, setup.decode)


def _tried(row: SamplerRow, plain: SamplerRow, compression: Compression, goal: Array | None, setup: Setup) -> Tried:
    drop = None
    if goal is not None:
        peak = peak_of(goal)
        own, reached = (psnr_db(goal, shown_by(one.sampled.samples, setup.decode), peak=peak) for one in (plain, row))
        drop = None if own is None or reached is None else own - reached
    return Tried(row=row, compression=compression, psnr_drop_db=drop)


def fastest_method(tried: Sequence[Tried], bounds: Bounds) -> ReuseMethod:
    """Return the method of the fastest candidate that keeps the bounds and beats the plain sampler, or none."""
    able = [one for one in tried if one.row.method.reuses and one.within(bounds) and one.speed_up > 1]
    best = max(able, key=lambda one: one.speed_up, default=None)
    return find_method("none") if best is None else best.row.method


def describe_bounds(bounds: Mapping[str, float | None]) -> str:
    """Return the bounds in words."""
    words = {
        "min_psnr_db": "at least {:g} dB to the unaccelerated images",
        "max_psnr_drop_db": "at most {:g} dB further from the converged images",
        "max_fid_rise": "a Frechet distance at most {:g} larger",
    }
    return ", ".join(text.format(bounds[key]) for key, text in words.items() if bounds[key] is not None)
