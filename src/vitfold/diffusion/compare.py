"""Samples of a Diffusion Transformer by several methods at equal seeds: what they take and how like they are.

The comparison: the unaccelerated sampler, the method asked for, and plainly fewer steps, timed in turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vitfold.artifacts.steps import DiffusionModelInfo
from vitfold.bench.measurement import Measurement, speed_up
from vitfold.bench.pictures import FRECHET_IMAGES, psnr_db, ssim
from vitfold.bench.statistics import Rise
from vitfold.bench.timing import interleave
from vitfold.diffusion import ReuseMethod, Sampled, find_method, full_steps, sample, solve_steps
from vitfold.diffusion.compression import Compression
from vitfold.diffusion.conditions import Conditions, Prompts
from vitfold.diffusion.judge import Judge, Verdict
from vitfold.diffusion.opening import open_parts, prepare_tokens, reused_work
from vitfold.diffusion.peers import PeerPipeline
from vitfold.diffusion.planners import Products
from vitfold.diffusion.sampling import conditions_of, joined
from vitfold.diffusion.schedulers import build_scheduler
from vitfold.engines import Session
from vitfold.errors import RecipeError
from vitfold.model import Array, DenoiserSpec, DiTModel, DiTSpec
from vitfold.progress import Say

VERDICT_KEYS = ("frechet", "frechet_noise", "class_accuracy", "class_accuracy_interval")
NO_FRECHET = f"it takes a model for features, and at least {FRECHET_IMAGES} real images and {FRECHET_IMAGES} drawn"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """What to draw: one image per label, and how; labels are numbers among the `conditions`, by default classes."""

    labels: tuple[int, ...]
    seed: int
    steps: int
    sampler: str
    guidance: float
    batch: int
    conditions: Conditions | None = None

    def __post_init__(self) -> None:
        if not self.labels:
            raise RecipeError("no class is asked for; give --classes 1,2,3")
        if self.batch < 1:
            raise RecipeError(f"--batch must be at least 1, found {self.batch}")
        if not self.guidance >= 1:
            raise RecipeError(f"--guidance must be at least 1 (no guidance), found {self.guidance}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Variant:
    """One way to draw what was asked for; `reused_work` is what a step that reuses computes of one in full.

    A peer draws by itself; otherwise the method does, by the executor.
    """

    name: str
    method: ReuseMethod
    executor: Session
    asked: SamplingConfig
    reused_work: float | None = None
    peer: PeerPipeline | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplerRow:
    """One way to sample, beside the unaccelerated one: `samples` are as the model makes them, pixels or latents."""

    name: str
    method: ReuseMethod
    steps: int
    sampled: Sampled
    reused_work: float | None
    measurement: Measurement
    speedup: dict[str, float]
    psnr_db: float | None
    ssim: float | None
    verdict: Verdict | None
    rise: Rise | None

    @property
    def reused_step_ratio(self) -> float | None:
        """The median time of a step that reuses, as a share of one in full of the same run."""
        full, reused = self.sampled.full_ns, self.sampled.reused_ns
        return float(np.median(reused) / np.median(full)) if reused else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        seconds = self.measurement.latency_ms()["median"] / 1e3 / len(self.sampled.samples)
        return {
            "name": self.name,
            "reuse": self.method.text,
            "steps": self.steps,
            "full_steps": self.sampled.full_steps,
            "reused_steps": self.sampled.reused_steps,
            "reused_step_ratio": self.reused_step_ratio,
            "reused_work_ratio": self.reused_work if self.sampled.reused_steps else None,
            "seconds_per_image": seconds,
            "speedup": self.speedup["median"],
            "speedup_iqr": self.speedup["iqr"] if len(self.measurement.trials_ns) > 1 else None,
            "noisy": self.measurement.noisy,
            "psnr_db": self.psnr_db,
            "ssim": self.ssim,
            **(dict.fromkeys(VERDICT_KEYS) if self.verdict is None else self.verdict.to_dict()),
            "frechet_rise": None if self.rise is None else self.rise.to_dict(),
            "frechet_reason": NO_FRECHET if self.verdict is None or self.verdict.frechet is None else None,
            "kept_bytes": self.sampled.kept_bytes,
        }


def diffuse(
    model: DiTModel,
    methods: Sequence[ReuseMethod],
    asked: SamplingConfig,
    *,
    compression: Compression | None = None,
    engine: str = "onnxruntime",
    threads: int | None = None,
    trials: int = 3,
    decode: Callable[[Array], Array] | None = None,
    judge: Judge | None = None,
    say: Say = lambda _: None,
) -> list[SamplerRow]:
    """Draw by the unaccelerated sampler, every method, and for each of them by as few plain steps as it computes.

    `compression` is what methods run with besides; then it also stands alone, with every step computed. `decode` turns
    samples into images for the comparison; without it samples are compared as they are. `judge` sees images only.

    Raises:
        RecipeError: if a class, the steps, the sampler or the batch is out of range.
        EngineError: if the engine is unknown or refuses a graph.
    """
    check_asked(model, asked)
    compression = compression or Compression()
    none = find_method("none")
    executors: dict[Any, Session] = {}
    known: dict[str, Products] = {}
    with contextlib.ExitStack() as stack:

        def opened(method: ReuseMethod, how: Compression) -> Variant:
            tokens = prepare_tokens(model, method, asked.steps, say)
            graphs = (method.graphs, how is compression)
            if graphs not in executors:
                say(f"writing the graphs of {method.text}{how.suffix}")
                executors[graphs] = stack.enter_context(
                    open_parts(model, method, compression=how, tokens=tokens, engine=engine, threads=threads)
                )
            executor = executors[graphs]
            work = reused_work(model.spec, method, () if tokens is None else tokens.counts, how.r)
            name = f"{method.text}{how.suffix}"
            method = settled(model, executor, method, asked, known)
            return Variant(name=name, method=method, executor=executor, asked=asked, reused_work=work)

        ways = [opened(none, Compression())]
        own = [none, *methods] if compression.suffix else [method for method in methods if method.reuses]
        for method in {method.text: method for method in own}.values():
            ways.append(opened(method, compression))
            add_fewer_steps(model, ways)
        return compare(model, ways, engine=engine, trials=trials, decode=decode, judge=judge, say=say)


def compare(
    model: DiffusionModelInfo,
    ways: Sequence[Variant],
    *,
    engine: str,
    trials: int,
    decode: Callable[[Array], Array] | None,
    judge: Judge | None = None,
    say: Say = lambda _: None,
) -> list[SamplerRow]:
    """Draw by every way, timed in turn; the first is what the others are compared with, in time and in images."""
    results: dict[str, Sampled] = {}

    def subject(way: Variant) -> Callable[[], None]:
        def run() -> None:
            results[way.name] = _drawn(model, way)

        return run

    # a few steps settle memory; a drawing is long enough that nothing else has to
    for way in (one for one in ways if one.peer is None):
        settling = replace(way.asked, labels=way.asked.labels[: way.asked.batch], steps=min(4, way.asked.steps))
        draw(model, way.executor, replace(way.method, planner=None), settling)
    subjects = {way.name: subject(way) for way in ways}
    times = interleave(subjects, trials=trials, warmup=0, iterations=1, settling=False, progress=say)
    measured = {
        way.name: Measurement(
            subject=way.name,
            engine=engine,
            batch=len(way.asked.labels),
            scope="end_to_end",
            trials_ns=times[way.name],
        )
        for way in ways
    }
    first = ways[0]

    def judged(images: Array) -> Verdict | None:
        if judge is None:
            return None
        return judge(images, first.asked.labels, model.spec.classes if isinstance(model.spec, DiTSpec) else 0)

    shown = {way.name: shown_by(results[way.name].samples, decode) for way in ways}
    verdicts = {name: judged(images) for name, images in shown.items()}
    return [_row(way, first.name, results[way.name], measured, shown, verdicts) for way in ways]


def settled(
    model: DiffusionModelInfo,
    executor: Session,
    method: ReuseMethod,
    asked: SamplingConfig,
    known: dict[str, Products] | None = None,
) -> ReuseMethod:
    """Return the method with what it leaves to the model chosen, where nobody has yet."""
    if method.settled:
        return method
    return solve_steps(
        executor,
        model.spec,
        model.schedule,
        method,
        steps=asked.steps,
        sampler=asked.sampler,
        guidance=asked.guidance,
        known=known,
        conditions=asked.conditions,
    )


def add_fewer_steps(model: DiffusionModelInfo, ways: list[Variant]) -> None:
    """Add the plain alternative to the last way: the first one, in as few steps as that one computes.

    Steps of methods that decide as they go are counted on the first batch; a pass without guidance is half of one.
    """
    first, last = ways[0], ways[-1]
    asked = last.asked
    if not last.method.reuses:
        return
    full = sum(full_steps(last.method, asked.steps))
    if last.method.threshold is not None:
        full = draw(model, last.executor, last.method, replace(asked, labels=asked.labels[: asked.batch])).full_steps
    steps = asked.steps - (asked.steps - full) // 2 if last.method.guidance else full
    if steps < asked.steps and all(way.name != fewer_name(steps) for way in ways):
        ways.append(replace(first, name=fewer_name(steps), asked=replace(first.asked, steps=steps)))


def fewer_name(steps: int) -> str:
    """Return the name of the plain alternative to a method."""
    return f"none, {steps} steps"


def check_asked(model: DiffusionModelInfo, asked: SamplingConfig) -> None:
    """Check what was asked for against the model.

    Raises:
        RecipeError: naming what is out of range.
    """
    conditions = asked.conditions or conditions_of(model.spec)
    if isinstance(conditions, Prompts) and isinstance(model.spec, DenoiserSpec):
        conditions.check(model.spec, asked.guidance)
    count = conditions.count
    what, has = (
        ("class", f"this model has {count} classes")
        if isinstance(model.spec, DiTSpec)
        else ("prompt", f"there are {count}")
    )
    wrong = [label for label in asked.labels if not 0 <= label < count]
    if wrong:
        raise RecipeError(f"{what} {wrong[0]} is out of range; {has}: 0 to {count - 1}")
    build_scheduler(asked.sampler, model.schedule, asked.steps, learned_sigma=model.spec.learned_sigma)


def _drawn(model: DiffusionModelInfo, way: Variant) -> Sampled:
    if way.peer is None:
        return draw(model, way.executor, way.method, way.asked)
    asked = way.asked
    return way.peer.draw(asked.labels, seed=asked.seed, steps=asked.steps, guidance=asked.guidance)


def draw(model: DiffusionModelInfo, executor: Session, method: ReuseMethod, asked: SamplingConfig) -> Sampled:
    """Draw all images, batch by batch."""
    found = []
    for start in range(0, len(asked.labels), asked.batch):
        scheduler = build_scheduler(asked.sampler, model.schedule, asked.steps, learned_sigma=model.spec.learned_sigma)
        labels = asked.labels[start : start + asked.batch]
        found.append(
            sample(
                executor,
                model.spec,
                scheduler,
                method,
                labels,
                seed=asked.seed + start,
                guidance=asked.guidance,
                conditions=asked.conditions,
            )
        )
    return joined(found)


def _row(
    way: Variant,
    first: str,
    sampled: Sampled,
    measured: Mapping[str, Measurement],
    shown: Mapping[str, Array],
    verdicts: Mapping[str, Verdict | None],
) -> SamplerRow:
    reference, verdict, baseline = shown[first], verdicts[way.name], verdicts[first]
    peak = peak_of(reference)
    return SamplerRow(
        name=way.name,
        method=way.method,
        steps=way.asked.steps,
        sampled=sampled,
        reused_work=way.reused_work,
        measurement=measured[way.name],
        speedup=speed_up(measured[first], measured[way.name]),
        psnr_db=psnr_db(reference, shown[way.name], peak=peak),
        ssim=ssim(reference, shown[way.name]) if _is_image(reference) and min(reference.shape[2:]) >= 11 else None,
        verdict=verdict,
        rise=None if verdict is None or baseline is None else verdict.rise_from(baseline),
    )


def shown_by(samples: Array, decode: Callable[[Array], Array] | None) -> Array:
    """Return the images of samples, or the samples where nothing decodes them."""
    return samples if decode is None else decode(samples)


def _is_image(values: Array) -> bool:
    return bool(values.min() >= 0 and values.max() <= 1)


def peak_of(values: Array) -> float:
    """Return what PSNR takes for the largest value: 1 of images, the range of latents."""
    return 1.0 if _is_image(values) else float(np.ptp(values))
