"""Plans of steps on the demo's Diffusion Transformer beside diffusers' hooks, cache-dit and plainly fewer steps.

Usage: python examples/compare_step_plans.py OUT.json. Every row draws the same held-out images: a class and a seed
each; PSNR is to those of all steps. Rows are timed in turn, image by image. Needs: pip install cache-dit.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

import vitfold
from vitfold.bench.environment import busy_remark, environment
from vitfold.bench.pictures import psnr_db
from vitfold.diffusion.peers import PEERS, class_pipeline, forget
from vitfold.sources.dit import demo_dit_folder

STEPS, GUIDANCE, CLASSES, SEEDS = 50, 1.5, 10, 2
BUDGETS = (12, 14, 18, 26)


def build() -> Any:
    """Return the demo as a DiTPipeline."""
    folder = demo_dit_folder()
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    return class_pipeline(DiTTransformer2DModel.from_pretrained(folder), scheduler, CLASSES)


@contextmanager
def plain(_: Any) -> Iterator[None]:
    """Draw as the pipeline does."""
    yield


def planned(plan: Any) -> Callable[[Any], Any]:
    """Draw by a plan."""

    @contextmanager
    def install(pipe: Any) -> Iterator[None]:
        vitfold.accelerate(pipe, plan)
        try:
            yield
        finally:
            vitfold.restore(pipe)

    return install


def installed(apply: Callable[[Any], None]) -> Callable[[Any], Any]:
    """Draw with what a peer installs; a pipeline is made anew, since not all of it comes off."""

    @contextmanager
    def install(pipe: Any) -> Iterator[None]:
        apply(pipe)
        yield

    return install


class Subject:
    """A row: a pipeline of its own, drawn image by image; `full` counts the runs within its last block's MLP."""

    def __init__(self, name: str, install: Callable[[Any], Any], steps: int = STEPS) -> None:
        self.name, self.steps, self.pipe, self.full = name, steps, build(), 0
        self.images: list[Any] = []
        self.seconds: list[float] = []
        self.pipe.transformer.transformer_blocks[-1].ff.net[0].register_forward_hook(self._count)
        self._entered = install(self.pipe)
        self._entered.__enter__()

    def _count(self, *_: Any) -> None:
        self.full += 1

    def draw(self, label: int, seed: int) -> None:
        """Draw one image."""
        forget(self.pipe.transformer)
        began = time.perf_counter()
        found = self.pipe(
            [label],
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        )
        self.seconds.append(time.perf_counter() - began)
        self.images.append(found.images.transpose(0, 3, 1, 2))

    def row(self, reference: Subject) -> Mapping[str, Any]:
        """Return the figures of all images."""
        a, b = np.concatenate(reference.images), np.concatenate(self.images)
        ratios = [base / own for base, own in zip(reference.seconds, self.seconds, strict=True)]
        return {
            "name": self.name,
            "steps": self.steps,
            "full": self.full / len(self.images),
            "psnr_db": psnr_db(a, b),
            "seconds": statistics.median(self.seconds),
            "speedup": statistics.median(ratios),
            "speedup_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        }


def subjects() -> Iterator[Subject]:
    """Yield the rows, the one of all steps first."""
    yield Subject("all steps", plain)
    for full in BUDGETS:
        plan = vitfold.plan_steps(
            build(), list(range(CLASSES)), held_out=[0], seeds=1, steps=STEPS, full=full, guidance_scale=GUIDANCE
        )
        print(plan, flush=True)
        yield Subject(f"plan, {full} full", planned(plan))
        by_mask, *_ = PEERS["cache-dit"]([int(one) for one in plan.mask], STEPS)
        yield Subject(f"cache-dit, the plan's mask, {full} full", installed(by_mask[1]))
        yield Subject(f"plainly {full} steps", plain, full)
    for name in ("cache-dit", "diffusers"):
        for setting, apply in PEERS[name]([], STEPS):
            yield Subject(setting, installed(apply))


def main(out: Path) -> None:
    """Compare, print and write."""
    torch.set_num_threads(1)
    around = environment(threads=1)
    rows = list(subjects())
    for seed in range(SEEDS):
        for label in range(CLASSES):
            first = seed * CLASSES + label
            for subject in (*rows[first % len(rows) :], *rows[: first % len(rows)]):
                subject.draw(label, 3_000_000 + seed)
    found = [subject.row(rows[0]) for subject in rows]
    for row in found:
        decibels = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        print(f"{row['name']:42}{row['full']:7.1f}{row['seconds']:9.3f}{row['speedup']:7.2f}x{decibels:>7}")
    how = {"steps": STEPS, "guidance": GUIDANCE, "images": CLASSES * SEEDS, "threads": 1, "remark": busy_remark(around)}
    out.write_text(json.dumps({"how": how, "environment": around, "rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
