"""Engine time of ViT-B/16, ours and others, subject by subject in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vitfold.bench.timing import interleave
from vitfold.gpu.report import Ready, Report, Subject, runner
from vitfold.gpu.samplers import start_samplers
from vitfold.gpu.study import captured, compiled, need_study, random_pixels

LATE = "not compiled in time"

WARMING = 0.3
"""The share of what is left that a section waits for them."""

BASELINES = ("torch-fp32", "torch-compile-fp16")


def speed(report: Report) -> None:
    """Engine time of ViT-B/16 (random weights): every subject of a batch takes turns with the others.

    The first subjects are timed and written before the rest is compiled, and again beside it.
    """
    study = need_study(report)
    for place, subjects in enumerate((study.subjects[: study.first], study.subjects[study.first :])):
        if place:
            start_samplers(report)
        failed = make_ready(report, subjects, study.batch, study.ready, report.until(WARMING))
        study.rows = [row for row in study.rows if "error" in row] + failed
        study.rows += timed_rows(report, study.ready, study.batch)
        write_speed(report)


def batches_of(report: Report) -> None:
    """The same at other batches, of a few subjects."""
    study = need_study(report)
    for batch in study.batches:
        if report.over():
            return
        ready: dict[str, Ready] = {}
        study.rows += make_ready(report, study.core, batch, ready, report.until(WARMING))
        study.rows += timed_rows(report, ready, batch)
        write_speed(report)


def late(report: Report) -> None:
    """What was not compiled in time at the largest batch, beside the baselines once more."""
    study = need_study(report)
    missing = {row["name"] for row in study.rows if row.get("error") == LATE and row["batch"] == study.batch}
    again = [one for one in study.subjects if one.name in missing]
    if not again:
        return
    ready = {name: study.ready[name] for name in BASELINES if name in study.ready}
    failed = make_ready(report, again, study.batch, ready, report.until(0.6))
    found = [*failed, *(row for row in timed_rows(report, ready, study.batch) if row["name"] not in BASELINES)]
    study.rows = [row for row in study.rows if row["name"] not in missing or row["batch"] != study.batch] + found
    write_speed(report)


def write_speed(report: Report) -> None:
    """Write `gpu-vit-b16.json` as it stands."""
    study = need_study(report)
    note = "random weights; ratios are least, median and largest of paired rounds"
    facts = {"model": study.source, "scope": "engine", "note": note, "blocks": study.blocks}
    report.write("vit-b16", study.rows, **facts)


def make_ready(
    report: Report, subjects: Sequence[Subject], batch: int, ready: dict[str, Ready], until: float
) -> list[dict[str, Any]]:
    """Add the subjects that run to `ready`, and return rows of those that do not; compiled by children until then."""
    study, failed = need_study(report), []
    for subject in subjects:
        key = f"{subject.name}@{batch}"
        study.children.wait([key], 120.0 if report.small else until - time.monotonic())
        said = study.children.said(key)
        if (said is None or report.over(until)) and not study.essential(subject, batch):
            error = LATE
        elif said and ("CUDA error" in said or said.startswith("exit -")):  # it would take this process along
            error = said
        else:
            try:
                ready[subject.name] = one = made_ready(report, subject, batch)
                report.say(f"ready at batch {batch}: {subject.name}, {one.how}")
                continue
            except Exception as caught:  # what one subject meets is said, and the others are measured
                error = f"{type(caught).__name__}: {caught}"
        failed.append({"name": subject.name, "batch": batch, "error": error[:500]})
        report.say(f"{subject.name}: {error[:150]}")
    return failed


def made_ready(report: Report, subject: Subject, batch: int) -> Ready:
    """Return a subject that has run; where it does not compile, as a CUDA graph of its own kernels, or eagerly."""
    source = need_study(report).source
    module = subject.module(report.device, source)
    x = random_pixels(source, module, subject.dtype, batch, report.device)
    how = "eager"
    called: Callable[..., Any] = module
    if subject.how != "eager":
        try:
            if not report.compiles:
                raise RuntimeError("nothing compiles here")
            called, how = compiled(module, report.device, subject.how), "torch.compile"
            runner(called, x)()
        except Exception as error:
            report.say(f"{subject.name} does not compile: {type(error).__name__}: {str(error)[:150]}")
            called, how = module, "eager"
            if report.device.type == "cuda":
                called, how = captured(module, x), "eager in a CUDA graph"
    call = _in_tf32(runner(called, x), subject.tf32)
    for _ in range(2):
        call()
    return Ready(subject, called, call, how)


def timed_rows(report: Report, ready: Mapping[str, Ready], batch: int) -> list[dict[str, Any]]:
    """Time subjects in turns and return their rows."""
    calls = {name: one.call for name, one in ready.items()}
    rounds, seconds = (2, 0.02) if report.small else (7, 1.4)
    with report.quiet():
        timed = interleave(calls, trials=rounds, seconds=seconds, warmup=1, max_iterations=200)
    rows = rows_of(timed, batch)
    for row in rows:
        row["how"] = ready[row["name"]].how
        pairs = ", ".join(f"{row[key][1]:.2f} {key.replace('_', ' ')}" for key in row if key.startswith("faster"))
        report.say(f"batch {batch}: {row['name']:20} {row['median_ms']:9.3f} ms  {pairs}")
    return rows


def rows_of(timed: Mapping[str, Sequence[Sequence[int]]], batch: int) -> list[dict[str, Any]]:
    """Return a row per subject, with its ratios to the baselines."""
    medians = {name: medians_ms(trials) for name, trials in timed.items()}
    rows = []
    for name, trials in timed.items():
        row: dict[str, Any] = {"name": name, "batch": batch, "median_ms": float(np.median(medians[name]))}
        row["images_per_second"] = batch / row["median_ms"] * 1e3
        rows.append({**row, **ratios_of(medians, name), "trials_ns": trials})
    return rows


def ratios_of(times: Mapping[str, Sequence[float]], name: str) -> dict[str, list[float]]:
    """Return how many times as fast as each baseline a subject is: the least, the median and the largest round."""
    found = {}
    for baseline in BASELINES:
        if baseline in times:
            ratios = [other / own for other, own in zip(times[baseline], times[name], strict=True)]
            found[f"faster_than_{baseline}"] = [float(r) for r in (min(ratios), np.median(ratios), max(ratios))]
    return found


def _in_tf32(call: Callable[[], None], wanted: bool) -> Callable[[], None]:
    if not wanted:
        return call

    def run() -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            call()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return run


def medians_ms(trials: Sequence[Sequence[int]]) -> list[float]:
    """Return the median of every trial in milliseconds, of samples in nanoseconds."""
    return [float(np.median(trial)) / 1e6 for trial in trials]
