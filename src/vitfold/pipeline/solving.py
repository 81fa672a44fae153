"""A schedule by what it costs on a GPU and what it does to the output on images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np

from vitfold.architectures.programs import forward
from vitfold.audit.canonical import BlockShape, block_kernels, schedule_kernels
from vitfold.audit.gpus import Gpu, find_gpu
from vitfold.audit.roofline import Prediction, predict
from vitfold.errors import RecipeError, TargetError
from vitfold.images import ImageSet, batches
from vitfold.model import Architecture, Array, Model, ViTSpec
from vitfold.progress import Say
from vitfold.recipe import MergeRecipe, Order
from vitfold.schedule import resolve_r
from vitfold.schedule.solve import MOST_MERGES, STEP, Distortion, Seconds, Space, schedule_seconds, solve
from vitfold.schedule.table import LatencyTable
from vitfold.target import Target, find_target

SHARES = (0.04, 0.12, 0.25, 0.5)
LIKE = "8"
ON_GPUS: Mapping[str, Any] = {"step": STEP, "aligned": True}
"""How schedules for GPUs look: they lead to multiples of 4 tokens, among which those that fill tiles are."""
SOLVING_IMAGES = 32
CONSIDERED_RULES = ("tome", "nearest")
"""Rules that suit every model, the cheapest first: the second costs 4 % more in float and 9 % in INT8 (demo, r = 4)."""
_WORTH = 0.8
"""How much of the cheapest rule's distortion another one may leave to be worth its time."""
USUAL_BATCH = 8
_HALF = "tensorrt-fp16"
_BATCH = 8
Bits = Literal["fp16", "int8", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The schedule, and what the model of time says about it, about `like` and about merging nothing.

    Milliseconds are a model's of the transformer blocks alone, or, where `gpu` is None, come from a table measured on
    this machine; `ms_fp16` merges nothing and does not quantize, `cores` and `cores_none` say which shares of the
    tensor cores' time go to padding and to idle multiprocessors, and `ms_roofline` what the schedule would take without
    either; they are None where nothing is modelled. Distortions are measured.
    """

    r: tuple[int, ...]
    gpu: str | None
    batch: int
    like: str
    images: int
    ms: float
    ms_like: float
    ms_none: float
    ms_fp16: float | None
    distortion: float
    distortion_like: float
    ms_roofline: float | None = None
    cores: Mapping[str, float] | None = None
    cores_none: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "r": list(self.r)}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergeDistortion:
    """What merging does to a model's output on images: by single merges, and how to measure a schedule."""

    spec: Architecture
    space: Space
    measure: Distortion
    images: int


def measure_merging(
    model: Model,
    images: ImageSet,
    *,
    order: Order = "score",
    rule: str = "tome",
    step: int = STEP,
    most_merges: int = MOST_MERGES,
    aligned: bool = False,
    say: Say = lambda _: None,
) -> MergeDistortion:
    """Measure single merges of several sizes in every block; what schedules will be is told by `Space`'s fields."""
    pixels, spec = _pixels(model, images), model.spec
    measure = _measurer(model, pixels, order, rule)
    single: list[dict[float, float]] = []
    for block in range(spec.num_layers):
        say(f"measuring single merges: block {block + 1}/{spec.num_layers}")
        single.append({share: measure(_one(spec, block, share)) for share in SHARES})
    space = Space(
        depth=spec.num_layers,
        tokens=spec.tokens,
        prefix=spec.fixed,
        single=single,
        step=step,
        most_merges=most_merges,
        aligned=aligned,
    )
    return MergeDistortion(spec=spec, space=space, measure=measure, images=len(pixels))


def gentlest_rule(model: Model, images: ImageSet) -> str:
    """Return which of `CONSIDERED_RULES` turns the output least where a constant r takes half of the tokens away.

    Another one than the cheapest has to turn it clearly less.
    """
    pixels, spec = _pixels(model, images), model.spec
    half = resolve_r(max(1, spec.tokens // (2 * spec.num_layers)), spec)
    turned = {rule: _measurer(model, pixels, "index", rule)(half) for rule in CONSIDERED_RULES}
    cheapest, *others = CONSIDERED_RULES
    best = min(others, key=lambda rule: turned[rule])
    return best if turned[best] <= _WORTH * turned[cheapest] else cheapest


def solve_merge(merging: MergeDistortion, *, target: str, gpu: str, batch: int, like: str = LIKE) -> Solution:
    """Find the schedule that is fastest on a GPU among those that distort no more than `like` does.

    Args:
        like: the schedule whose distortion is the bound, in the words of `schedule.resolve_r`.

    Raises:
        TargetError: if the target is not one of TensorRT's, or the GPU is unknown or does not run its types.
        RecipeError: if `like` merges nothing.
    """
    device, spec = find_gpu(gpu), merging.spec
    seconds, half = (block_seconds(spec, find_target(name), device, batch) for name in (target, _HALF))
    found, none = _solve(merging, seconds, like), (0,) * spec.num_layers
    shape, precision = block_of(spec, find_target(target), device)
    solved, unmerged = (
        predict(schedule_kernels(shape, precision, batch=batch, tokens=spec.tokens, r=r), device)
        for r in (found.r, none)
    )
    return replace(
        found,
        gpu=device.key,
        batch=batch,
        ms_fp16=1e3 * schedule_seconds(none, spec.tokens, half),
        ms_roofline=solved.roofline_ms,
        cores=_cores(solved),
        cores_none=_cores(unmerged),
    )


def solve_measured(merging: MergeDistortion, table: LatencyTable, *, batch: int = 1, like: str = LIKE) -> Solution:
    """Find the schedule that is fastest on this machine among those that distort no more than `like` does.

    Raises:
        RecipeError: if `like` merges nothing.
    """
    found = _solve(merging, lambda tokens, merged, _: table.block(tokens, merged), like)
    return replace(found, batch=batch)


def _solve(merging: MergeDistortion, seconds: Seconds, like: str) -> Solution:
    spec = merging.spec
    allowed = resolve_r(like, spec)
    if not any(allowed):
        raise RecipeError(f"--merge auto:{like} distorts nothing, so nothing may be merged; give --merge none")
    bound = merging.measure(allowed)
    found = solve(merging.space, seconds, merging.measure, bound)
    none = (0,) * spec.num_layers
    r = none if found is None else found.r

    def ms(schedule: tuple[int, ...]) -> float:
        return 1e3 * schedule_seconds(schedule, spec.tokens, seconds)

    return Solution(
        r=r,
        gpu=None,
        batch=1,
        like=like,
        images=merging.images,
        ms=ms(r),
        ms_like=ms(allowed),
        ms_none=ms(none),
        ms_fp16=None,
        distortion=0.0 if found is None else found.distortion,
        distortion_like=bound,
    )


def check_forecast(spec: Architecture, *, target: str, gpu: str, batch: int) -> None:
    """Raise what `solve_merge` would raise, before anything is measured."""
    block_seconds(spec, find_target(target), find_gpu(gpu), batch)


def block_seconds(spec: Architecture, target: Target, gpu: Gpu, batch: int) -> Seconds:
    """Return the model's seconds of a block on a GPU.

    Raises:
        TargetError: if the target is not TensorRT's, or the GPU does not multiply its type.
    """
    shape, precision = block_of(spec, target, gpu)

    @cache
    def seconds(tokens: int, merged: int, sizes: bool) -> float:
        kernels = block_kernels(shape, precision, batch=batch, tokens=tokens, merged=merged, sizes=sizes)
        return predict(kernels, gpu).ms * 1e-3

    return seconds


def block_of(spec: Architecture, target: Target, gpu: Gpu) -> tuple[BlockShape, Bits]:
    """Return the shape of a model's blocks, and the type that TensorRT multiplies in on a GPU.

    Raises:
        TargetError: if the target is not TensorRT's, or the GPU does not multiply its type.
    """
    if not target.runtime.gpu:
        raise TargetError(
            f"times on GPUs need a target of TensorRT, {target.name} is none; choose tensorrt-fp16, tensorrt-int8 or "
            "tensorrt-fp8, or give the tokens to merge"
        )
    precision: Bits = {"w8a8": "int8", "fp8": "fp8"}.get(target.implied_quant, "fp16")  # type: ignore[assignment]
    if precision not in gpu.peak:
        raise TargetError(f"{gpu.name} does not multiply {precision}; choose another target or GPU")
    hidden = spec.mlp_dim * (2 if isinstance(spec, ViTSpec) and spec.mlp == "swiglu" else 1)
    shape = BlockShape(
        width=spec.embed_dim, heads=spec.num_heads, head_width=spec.head_dim, hidden=hidden, inner=spec.mlp_dim
    )
    return shape, precision


def _cores(found: Prediction) -> dict[str, float]:
    return {"padding": found.padding, "idle": found.idle}


def _one(spec: Architecture, block: int, share: float) -> tuple[int, ...]:
    """One merge of a share of the tokens in one block."""
    most = (spec.tokens - spec.fixed) // 2
    merged = max(1, min(most, round(share * spec.tokens)))
    return tuple(merged if index == block else 0 for index in range(spec.num_layers))


def _pixels(model: Model, images: ImageSet) -> list[Array]:
    chosen = images.first(SOLVING_IMAGES)
    return [pixels for group in batches(chosen, model.preprocess, batch=_BATCH) for pixels in group.pixel_values]


def _measurer(model: Model, pixels: list[Array], order: Order, rule: str) -> Callable[[tuple[int, ...]], float]:
    """Return how far a schedule turns the output: the mean of 1 - cosine; of single numbers, the squared error."""
    import torch

    from vitfold.ops.run import Run

    ops = Run(model.params)
    known: dict[tuple[int, ...], float] = {}

    def outputs(r: tuple[int, ...]) -> Array:
        recipe = MergeRecipe(r=r, order=order, rule=rule)
        with torch.inference_mode():
            rows = [
                forward(ops, model.spec, recipe, torch.from_numpy(np.stack(pixels[start : start + _BATCH]))).flatten(1)
                for start in range(0, len(pixels), _BATCH)
            ]
        return torch.cat(rows).numpy()

    exact = outputs(())

    def measure(r: tuple[int, ...]) -> float:
        if r not in known:
            found = outputs(r)
            if exact.shape[1] == 1:  # a cosine of single numbers knows only their signs
                known[r] = float(np.square(found - exact).sum() / np.square(exact).sum())
                return known[r]
            products = (found * exact).sum(1)
            norms = np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
            known[r] = float(1 - np.mean(products / norms))
        return known[r]

    return measure
