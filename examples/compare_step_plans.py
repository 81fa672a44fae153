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
from types import SimpleNamespace
from typing import Any

import cache_dit
import numpy as np
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context

import vitfold
from vitfold.bench.environment import busy_remark, environment
from vitfold.bench.pictures import psnr_db
from vitfold.sources.dit import demo_dit_folder

STEPS, GUIDANCE, CLASSES, SEEDS = 50, 1.5, 10, 2
BUDGETS = (12, 14, 18, 26)
NULL = 1000
"""The class that DiTPipeline takes for none."""


class Pixels(torch.nn.Module):
    """In the place of a VAE: latents are pixels."""

    config = SimpleNamespace(scaling_factor=1.0)
    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        """Return what came in."""
        return SimpleNamespace(sample=latents)


def build() -> Any:
    """Return the demo as a DiTPipeline, whose table of classes has the demo's ten and the pipeline's null class."""
    folder = demo_dit_folder()
    small = DiTTransformer2DModel.from_pretrained(folder)
    config = {**small.config, "num_embeds_ada_norm": NULL}
    large = DiTTransformer2DModel.from_config(config)
    state = large.state_dict()
    for name, weight in small.state_dict().items():
        if weight.shape == state[name].shape:
            state[name] = weight
        else:
            state[name] = torch.zeros_like(state[name])
            state[name][:CLASSES], state[name][NULL] = weight[:CLASSES], weight[-1]
    large.load_state_dict(state)
    pipe = DiTPipeline(
        transformer=large.eval(), vae=Pixels(), scheduler=DDIMScheduler.from_pretrained(folder / "scheduler")
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def hooked(apply: Callable[[Any, Any], None], config: Any) -> Callable[[Any], Any]:
    """Draw with a hook of diffusers; a pipeline is made anew, since not all hooks come off."""

    @contextmanager
    def install(pipe: Any) -> Iterator[None]:
        apply(pipe.transformer, config)
        yield

    return install


def cached(mask: list[int]) -> Callable[[Any], Any]:
    """Draw with cache-dit, a mask and its Taylor series of order one."""

    @contextmanager
    def install(pipe: Any) -> Iterator[None]:
        cache_dit.enable_cache(
            pipe,
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                max_warmup_steps=2,
                num_inference_steps=STEPS,
                steps_computation_mask=mask,
                steps_computation_policy="static",
            ),
            calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
        )
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
        for module in self.pipe.transformer.modules():
            if isinstance(getattr(module, "_diffusers_hook", None), HookRegistry):
                module._diffusers_hook.reset_stateful_hooks(recurse=False)
        _set_cache_context(self.pipe.transformer, CacheContext("all"))
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
        yield Subject(f"cache-dit, the plan's mask, {full} full", cached([int(one) for one in plan.mask]))
        yield Subject(f"plainly {full} steps", plain, full)
    yield Subject("cache-dit's mask fast", cached(cache_dit.steps_mask(total_steps=STEPS, mask_policy="fast")))
    for threshold in (0.06, 0.08, 0.1, 0.12):
        config = FirstBlockCacheConfig(threshold=threshold)
        yield Subject(f"FirstBlockCache {threshold}", hooked(apply_first_block_cache, config))
    for interval in (2, 3):
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            max_order=1,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],
        )
        yield Subject(f"TaylorSeer per module, interval {interval}", hooked(apply_taylorseer_cache, config))


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
