"""Samples of a Diffusion Transformer by several methods at equal seeds: what they take and how like they are.

Owns the comparison: the unaccelerated sampler, the method asked for, and plainly fewer steps, timed in turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vitfold.bench.measurement import Measurement, speed_up
from vitfold.bench.pictures import psnr_db, ssim
from vitfold.bench.statistics import Rise
from vitfold.bench.timing import interleave
from vitfold.errors import RecipeError
from vitfold.model import Array, DiTModel
from vitfold.pipeline.judging import Judge, Verdict
from vitfold.pipeline.opening import Compression, open_parts, prepare_predictor
from vitfold.reuse import Method, Sampled, find_method, sample
from vitfold.reuse.sampling import Executor
from vitfold.reuse.schedulers import build_scheduler

VERDICT_KEYS = ("frechet", "frechet_noise", "class_accuracy", "class_accuracy_interval")
NO_FRECHET = "no model for features and no real images were given"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to draw: one image per label, and how."""

    labels: tuple[int, ...]
    seed: int
    steps: int
    sampler: str
    guidance: float
    batch: int

    def __post_init__(self) -> None:
        if not self.labels:
            raise RecipeError("no class is asked for; give --classes 1,2,3")
        if self.batch < 1:
            raise RecipeError(f"--batch must be at least 1, found {self.batch}")
        if not self.guidance >= 1:
            raise RecipeError(f"--guidance must be at least 1 (no guidance), found {self.guidance}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One way to sample, beside the unaccelerated one: `samples` are as the model makes them, pixels or latents."""

    name: str
    method: Method
    steps: int
    sampled: Sampled
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
            "seconds_per_image": seconds,
            "speedup": self.speedup["median"],
            "speedup_iqr": self.speedup["iqr"],
            "noisy": self.measurement.noisy,
            "psnr_db": self.psnr_db,
            "ssim": self.ssim,
            **(dict.fromkeys(VERDICT_KEYS) if self.verdict is None else self.verdict.to_dict()),
            "frechet_rise": None if self.rise is None else self.rise.to_dict(),
            "frechet_reason": NO_FRECHET if self.verdict is None else None,
            "kept_bytes": self.sampled.kept_bytes,
        }


def diffuse(
    model: DiTModel,
    methods: Sequence[Method],
    asked: Asked,
    *,
    compression: Compression | None = None,
    engine: str = "onnxruntime",
    threads: int | None = None,
    trials: int = 3,
    decode: Callable[[Array], Array] | None = None,
    judge: Judge | None = None,
    say: Say = lambda _: None,
) -> list[Row]:
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
    with contextlib.ExitStack() as stack:

        def opened(method: Method, how: Compression) -> Executor:
            say(f"writing the graphs of {method.text}{how.suffix}")
            predictor = None if method.ratio is None else prepare_predictor(model, method, asked.steps, asked.seed, say)
            return stack.enter_context(
                open_parts(model, method, compression=how, predictor=predictor, engine=engine, threads=threads)
            )

        plain = opened(none, Compression())
        plans = [("none", none, plain, asked)]
        own = [none, *methods] if compression.suffix else [method for method in methods if method.reuses]
        for method in {method.text: method for method in own}.values():
            executor = opened(method, compression)
            plans.append((f"{method.text}{compression.suffix}", method, executor, asked))
            steps = _plain_steps(model, executor, method, asked) if method.reuses else asked.steps
            if steps < asked.steps and all(plan[0] != fewer_name(steps) for plan in plans):
                plans.append((fewer_name(steps), none, plain, replace(asked, steps=steps)))
        results: dict[str, Sampled] = {}

        def subject(name: str, method: Method, executor: Executor, how: Asked) -> Callable[[], None]:
            def run() -> None:
                results[name] = draw(model, executor, method, how)

            return run

        subjects = {plan[0]: subject(*plan) for plan in plans}
        times = interleave(subjects, trials=trials, warmup=0, iterations=1, progress=say)
    measured = {
        name: Measurement(subject=name, engine=engine, batch=len(asked.labels), scope="end_to_end", trials_ns=found)
        for name, found in times.items()
    }

    def judged(images: Array) -> Verdict | None:
        return None if judge is None else judge(images, asked.labels, model.spec.classes)

    shown = {name: _shown(results[name].samples, decode) for name in measured}
    verdicts = {name: judged(images) for name, images in shown.items()}
    return [_row(name, method, how.steps, results[name], measured, shown, verdicts) for name, method, _, how in plans]


CANDIDATES: tuple[str, ...] = (
    "stack:2", "taylor:2:1", "taylor:3:1", "taylor:4:1", "chebyshev:3:1", "first-block:0.05", "first-block:0.1",
    "first-block:0.2", "guidance:2", "guidance:4",
)  # fmt: skip


def choose_method(model: DiTModel, asked: Asked, *, least_db: float, **how: Any) -> Method:
    """Return the fastest of `CANDIDATES` whose images are at least so near to the unaccelerated ones; else none.

    Takes what `diffuse` takes.
    """
    return fastest_method(diffuse(model, [find_method(text) for text in CANDIDATES], asked, trials=1, **how), least_db)


def fastest_method(rows: Sequence[Row], least_db: float) -> Method:
    """Return the fastest method of a comparison that is at least so near to the unaccelerated images, or none."""
    able = [row for row in rows if row.method.reuses and (row.psnr_db is None or row.psnr_db >= least_db)]
    best = max(able, key=lambda row: row.speedup["median"], default=None)
    return best.method if best is not None and best.speedup["median"] > 1 else find_method("none")


def _plain_steps(model: DiTModel, executor: Executor, method: Method, asked: Asked) -> int:
    """How many plain steps compute as much as a method does on the first batch, what it reuses left out."""
    found = draw(model, executor, method, replace(asked, labels=asked.labels[: asked.batch]))
    return asked.steps - found.reused_steps // 2 if method.guidance else found.full_steps


def fewer_name(steps: int) -> str:
    """Return the name of the plain alternative to a method."""
    return f"none, {steps} steps"


def check_asked(model: DiTModel, asked: Asked) -> None:
    """Check what was asked for against the model.

    Raises:
        RecipeError: naming what is out of range.
    """
    wrong = [label for label in asked.labels if not 0 <= label < model.spec.classes]
    if wrong:
        raise RecipeError(
            f"class {wrong[0]} is out of range; this model has {model.spec.classes} classes: 0 to "
            f"{model.spec.classes - 1}"
        )
    build_scheduler(asked.sampler, model.schedule, asked.steps, learned_sigma=model.spec.learned_sigma)


def draw(model: DiTModel, executor: Executor, method: Method, asked: Asked) -> Sampled:
    """Draw all images, batch by batch."""
    found = []
    for start in range(0, len(asked.labels), asked.batch):
        scheduler = build_scheduler(asked.sampler, model.schedule, asked.steps, learned_sigma=model.spec.learned_sigma)
        labels = asked.labels[start : start + asked.batch]
        found.append(
            sample(executor, model.spec, scheduler, method, labels, seed=asked.seed + start, guidance=asked.guidance)
        )
    most = max(found, key=lambda batch: batch.full_steps)
    return Sampled(
        samples=np.concatenate([batch.samples for batch in found]),
        full_ns=most.full_ns,
        reused_ns=most.reused_ns,
        kept_bytes=max(batch.kept_bytes for batch in found),
    )


def _row(
    name: str,
    method: Method,
    steps: int,
    sampled: Sampled,
    measured: Mapping[str, Measurement],
    shown: Mapping[str, Array],
    verdicts: Mapping[str, Verdict | None],
) -> Row:
    reference, verdict, baseline = shown["none"], verdicts[name], verdicts["none"]
    is_image = bool(reference.min() >= 0 and reference.max() <= 1)
    peak = 1.0 if is_image else float(np.ptp(reference))
    return Row(
        name=name,
        method=method,
        steps=steps,
        sampled=sampled,
        measurement=measured[name],
        speedup=speed_up(measured["none"], measured[name]),
        psnr_db=psnr_db(reference, shown[name], peak=peak),
        ssim=ssim(reference, shown[name]) if is_image and min(reference.shape[2:]) >= 11 else None,
        verdict=verdict,
        rise=None if verdict is None or baseline is None else verdict.rise_from(baseline),
    )


def _shown(samples: Array, decode: Callable[[Array], Array] | None) -> Array:
    return samples if decode is None else decode(samples)
