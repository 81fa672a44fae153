"""What users of diffusers run today, beside bundles: its hooks and cache-dit, on a DiTPipeline of the same weights."""

# mypy: disable-error-code="no-untyped-call,attr-defined,import-untyped"
# (diffusers is typed in part, cache-dit not at all)

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vitfold.artifacts.steps import DiffusionModelInfo
from vitfold.diffusion.methods import ReuseMethod, find_method, full_steps
from vitfold.diffusion.sampling import Sampled
from vitfold.diffusion.schedulers import build_scheduler
from vitfold.errors import EngineError, RecipeError, SourceError, nearest
from vitfold.model import DiTSpec
from vitfold.sources.dit import DEMO_DIT, demo_dit_folder

NULL = 1000
"""The class that DiTPipeline takes for none."""
THRESHOLDS = (0.06, 0.08, 0.1, 0.12)
INTERVALS = (2, 3, 5)


class _Samples(torch.nn.Module):
    """In the place of a VAE: hands on what comes in, and keeps it."""

    config = SimpleNamespace(scaling_factor=1.0)
    device, dtype = torch.device("cpu"), torch.float32
    latents: torch.Tensor | None = None

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        """Return what came in."""
        self.latents = latents
        return SimpleNamespace(sample=latents)


@dataclass(slots=True, kw_only=True, eq=False)
class PeerPipeline:
    """A DiTPipeline with somebody's cache installed; steps are full where the last block's MLP runs."""

    name: str
    pipe: Any
    computed: int = 0
    ends: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pipe.transformer.transformer_blocks[-1].ff.net[0].register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.computed += 1

    def draw(self, labels: Sequence[int], *, seed: int, steps: int, guidance: float) -> Sampled:
        """Draw one image per label, one by one, from the noise that vitfold draws from."""
        found, most = [], ((0,) * 0, (0,) * 0)
        for place, label in enumerate(labels):
            samples, full, reused = self._draw_one(label, seed + place, steps, guidance)
            found.append(samples)
            most = max(most, (full, reused), key=lambda took: len(took[0]))
        return Sampled(samples=np.concatenate(found), full_ns=most[0], reused_ns=most[1], kept_bytes=None)

    def _draw_one(self, label: int, seed: int, steps: int, guidance: float) -> Any:
        forget(self.pipe.transformer)
        marks = [(time.perf_counter_ns(), self.computed)]
        inner = type(self.pipe.scheduler).step

        def step(*args: Any, **kwargs: Any) -> Any:
            result = inner(self.pipe.scheduler, *args, **kwargs)
            marks.append((time.perf_counter_ns(), self.computed))
            return result

        self.pipe.scheduler.step = step
        try:
            self.pipe(
                [label],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            )
        finally:
            del self.pipe.scheduler.step
        took: dict[bool, list[int]] = {True: [], False: []}
        for (began, before), (ended, after) in pairwise(marks):
            took[after > before].append(ended - began)
        return self.pipe.vae.latents.float().numpy(), tuple(took[True]), tuple(took[False])


def open_peers(
    names: Sequence[str], model: DiffusionModelInfo, method: ReuseMethod, *, steps: int, sampler: str
) -> list[PeerPipeline]:
    """Return the pipeline of all steps, and one for every setting of the peers; cache-dit also with a method's steps.

    Raises:
        RecipeError: if a peer is unknown.
        SourceError: if the model's weights are in no folder of diffusers.
        EngineError: if a peer's package is not installed.
    """
    for name in names:
        if name not in PEERS:
            raise RecipeError(f"unknown peer {name!r}; {nearest(name, PEERS)}")
    if not isinstance(model.spec, DiTSpec):
        raise RecipeError("peers draw by classes, and this model takes prompts; leave out --peers")
    transformer = _transformer(model.origin.source)
    if find_method("none").text != method.text and method.threshold is None:
        mask = [int(one) for one in full_steps(method, steps)]
    else:
        mask = []
    found: list[tuple[str, Callable[[Any], None]]] = [("diffusers, every step", lambda _: None)]
    for name in names:
        found += PEERS[name](mask, steps)
    opened = []
    for text, install in found:
        scheduler = build_scheduler(sampler, model.schedule, steps, learned_sigma=model.spec.learned_sigma)
        pipe = class_pipeline(transformer, scheduler, model.spec.classes)
        install(pipe)
        opened.append(PeerPipeline(name=text, pipe=pipe))
    return opened


def _transformer(source: str) -> Any:
    from diffusers import DiTTransformer2DModel

    folder = demo_dit_folder() if source == DEMO_DIT else Path(source.removeprefix("hf:"))
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"peers draw by diffusers' own model, and {source} is no folder of it here; make the bundle of hf:FOLDER"
        )
    return DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)


def class_pipeline(small: Any, scheduler: Any, classes: int) -> Any:
    """Return a DiTPipeline, whose table of classes has the model's own and the pipeline's null class."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    large = DiTTransformer2DModel.from_config({**small.config, "num_embeds_ada_norm": NULL})
    state = large.state_dict()
    for name, weight in small.state_dict().items():
        if weight.shape == state[name].shape:
            state[name] = weight
        else:
            state[name] = torch.zeros_like(state[name])
            state[name][:classes], state[name][NULL] = weight[:classes], weight[-1]
    large.load_state_dict(state)
    pipe = DiTPipeline(transformer=large.eval(), vae=_Samples(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _by_diffusers(_: list[int], __: int) -> list[tuple[str, Callable[[Any], None]]]:
    from diffusers.hooks import (
        FirstBlockCacheConfig,
        TaylorSeerCacheConfig,
        apply_first_block_cache,
        apply_taylorseer_cache,
    )

    def first(threshold: float) -> Callable[[Any], None]:
        return lambda pipe: apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=threshold))

    def taylor(interval: int) -> Callable[[Any], None]:
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            max_order=1,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],
        )
        return lambda pipe: apply_taylorseer_cache(pipe.transformer, config)

    return [
        *((f"diffusers, FirstBlockCache {threshold:g}", first(threshold)) for threshold in THRESHOLDS),
        *((f"diffusers, TaylorSeer interval {interval}", taylor(interval)) for interval in INTERVALS),
    ]


def _by_cache_dit(mask: list[int], steps: int) -> list[tuple[str, Callable[[Any], None]]]:
    try:
        import cache_dit
    except ModuleNotFoundError:
        raise EngineError("the peer cache-dit is not installed; run: pip install cache-dit") from None

    def masked(chosen: list[int]) -> Callable[[Any], None]:
        return lambda pipe: cache_dit.enable_cache(
            pipe,
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                max_warmup_steps=2,
                num_inference_steps=steps,
                steps_computation_mask=chosen,
                steps_computation_policy="static",
            ),
            calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
        )

    found = [("cache-dit, its mask fast", masked(cache_dit.steps_mask(total_steps=steps, mask_policy="fast")))]
    return [*([("cache-dit, the bundle's steps", masked(mask))] if mask else []), *found]


PEERS = {"diffusers": _by_diffusers, "cache-dit": _by_cache_dit}
"""Settings by the name of the package, from the full steps of a bundle and the number of steps."""


def forget(transformer: Any) -> None:
    """Let hooks of diffusers begin a new image."""
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if isinstance(registry, HookRegistry):
            registry.reset_stateful_hooks(recurse=False)
    _set_cache_context(transformer, CacheContext("all"))
