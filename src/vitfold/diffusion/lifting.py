"""A pipeline of diffusers as values: its transformer as a program, its prompts as arrays, its plan as a method."""

from __future__ import annotations

import functools
import inspect
import json
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitfold.diffusion.conditions import Prompts
from vitfold.diffusion.denoiser_parts import ENTERED, LEFT
from vitfold.diffusion.forecast import Weights, taylor
from vitfold.diffusion.methods import ReuseMethod, find_method
from vitfold.diffusion.parts import PREDICTION
from vitfold.diffusion.pipelines.drawing import bound_names
from vitfold.diffusion.pipelines.installing import restore
from vitfold.diffusion.pipelines.stacks import Stack, StackFinder, argument, image_of
from vitfold.diffusion.pipelines.step_plan import StepPlan, scheduler_facts
from vitfold.diffusion.pipelines.stepping import denoisers, places_of
from vitfold.diffusion.schedulers import even_sigmas
from vitfold.errors import RecipeError, UnsupportedError
from vitfold.model import Array, Condition, DenoiserModel, DenoiserSpec, Origin
from vitfold.model.denoiser import IMAGE, TIMESTEP
from vitfold.model.schedule import EVEN, SHIFT, SIGMAS
from vitfold.sources.onnx.exporting import Given, read_program

_LATENTS = "hidden_states"
_PACKED, _IMAGES = 3, 4
"""Axes of latents: batch, tokens and channels, or batch, channels, height and width."""
_STEPS = 3
"""For how many a pipeline is asked, whose first one is looked at."""
_CURE = "draw in its own process by vitfold.accelerate"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Call:
    """One call of a transformer: what it was given by name, `inner` names of sections as a.b; tensors and the rest.

    `timestep` is the scheduler's there, `times` what the scheduler was told of its steps.
    """

    tensors: Mapping[str, Tensor]
    rest: Mapping[str, Any]
    timestep: float
    times: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.tensors[_LATENTS])

    @property
    def conditions(self) -> dict[str, Tensor]:
        """What has a row per image, but for latents and timestep."""
        return {n: t for n, t in self.tensors.items() if n not in (_LATENTS, TIMESTEP)}


class _SeenError(Exception):
    """Ends a pipeline behind what was to be seen."""


def lift_pipeline(pipe: Any, prompt: Any, *, origin: Origin, decoder: str | None = None, **call: Any) -> DenoiserModel:
    """Return the transformer of a pipeline as a program, for the sizes that a call with this prompt has.

    `call` are arguments of the pipeline that go with every prompt (height=..., guidance_scale=...).

    Raises:
        UnsupportedError: if the pipeline has several transformers, or calls its own in another way than once a step.
        SourceError: if the transformer cannot be exported, or the scheduler is not followed.
        ParityError: if the program differs from the transformer.
    """
    module = _only(pipe)
    seen = _seen(pipe, module, prompt, call)
    packing = _packing(pipe, module, prompt, call) if seen.tensors[_LATENTS].ndim == _PACKED else ()
    schedule = {**_schedule(pipe.scheduler), **_times(pipe, module, prompt, call, seen)}
    stack = _stack(module, seen)
    blocks = stack.blocks(module)
    cut = _Cut(module, seen, blocks)
    latents, conditions = seen.tensors[_LATENTS], seen.conditions
    given = [
        Given(name=IMAGE, shape=tuple(latents.shape[1:])),
        Given(name=TIMESTEP, shape=()),
        *(Given(name=n, shape=tuple(t.shape[1:])) for n, t in conditions.items()),
    ]
    found = read_program(cut, given, (PREDICTION, ENTERED, LEFT))
    shapes = {n: found.program.shapes[ref] for n, ref in found.program.outputs.items()}
    if len(shapes[PREDICTION]) != latents.ndim or len(shapes[LEFT]) != 3:
        raise UnsupportedError(f"{type(module).__name__} draws no image from tokens in one row; {_CURE}")
    spec = DenoiserSpec(
        module=type(module).__name__,
        image_shape=tuple(latents.shape[1:]),
        outputs=shapes[PREDICTION][-1 if packing else 1],
        tokens=shapes[LEFT][1],
        embed_dim=shapes[LEFT][2],
        num_layers=len(blocks),
        conditions=tuple(Condition(name=n, shape=tuple(t.shape[1:])) for n, t in conditions.items()),
        time_scale=_time_scale(seen),
        packing=packing,
    )
    return DenoiserModel(
        spec=spec,
        params=found.params,
        labels=None,
        origin=origin,
        program=json.dumps(found.program.to_dict(), separators=(",", ":")),
        shapes={n: tuple(array.shape) for n, array in found.params.items()},
        schedule=schedule,
        decoder=decoder,
    )


def _schedule(scheduler: Any) -> dict[str, Any]:
    """What a scheduler is made of; infinite defaults, which no file of ours holds, are left out.

    Raises:
        UnsupportedError: if it has an infinite number of its own.
    """
    facts = scheduler_facts(scheduler)
    defaults = {name: one.default for name, one in inspect.signature(type(scheduler).__init__).parameters.items()}
    endless = {n: v for n, v in facts["config"].items() if isinstance(v, float) and not math.isfinite(v)}
    own = next((name for name, value in endless.items() if defaults.get(name) != value), None)
    if own is not None:
        raise UnsupportedError(f"{facts['class']} has {own} = {endless[own]}; {_CURE}")
    return {"_class_name": facts["class"], **{n: v for n, v in facts["config"].items() if n not in endless}}


def embed_prompts(pipe: Any, prompts: Sequence[Any], **call: Any) -> Prompts:
    """Return prompts as the pipeline hands them to its transformer: embeddings, masks and what else has a row each.

    Prompts are what the pipeline takes first (texts), or mappings of its arguments; `call` are arguments that go with
    all of them. No step is drawn.

    Raises:
        UnsupportedError: if the pipeline calls its transformer in another way than once a step.
        RecipeError: if prompts come to different shapes.
    """
    module = _only(pipe)
    given: dict[str, list[Array]] = {}
    negative: dict[str, list[Array]] = {}
    scale = 1.0
    for prompt in prompts:
        seen = _seen(pipe, module, prompt, call)
        scale = _time_scale(seen)
        for name, tensor in seen.conditions.items():
            rows = tensor.detach().float().cpu().numpy()
            given.setdefault(name, []).append(rows[-1])
            if seen.rows == 2:
                negative.setdefault(name, []).append(rows[0])
    names = tuple(prompt if isinstance(prompt, str) else f"prompt-{i}" for i, prompt in enumerate(prompts))
    try:
        return Prompts(
            names=names,
            given={name: np.stack(rows) for name, rows in given.items()},
            negative={name: np.stack(rows) for name, rows in negative.items()},
            time_scale=scale,
        )
    except ValueError as error:
        raise RecipeError(f"prompts come to conditions of different shapes ({error}); pad them to one length") from None


def method_of_plan(plan: StepPlan, scheduler: Any) -> ReuseMethod:
    """Return a plan of a pipeline's steps as a method: its full steps, and the weights of its forecasts.

    `scheduler` is one with the plan's timesteps set.

    Raises:
        RecipeError: if the plan takes other steps than its scheduler has, or none of them at rest.
    """
    if plan.first or plan.runs != plan.steps:
        raise RecipeError(
            f"this plan takes {plan.runs} of {plan.timesteps} timesteps from the {plan.first + 1}th on, and a bundle "
            "takes all; make a plan with another scheduler, and no image to begin with"
        )
    if len(plan.full) == plan.runs:
        return find_method("none")
    rows = plan.rows or _lines(plan, scheduler)
    history = max(len(row) for row in rows)
    numbers = {"fitted": f":{len(plan.full)}:{history}", "solved": f":{len(plan.full)}"}
    numbers["dpcache"] = f":{len(plan.full)}:{max(history - 1, 1)}"
    method = find_method(plan.method + numbers.get(plan.method, ""))
    if method.history < history or method.planner is None:
        raise RecipeError(f"a plan by {plan.method} has no form in a bundle; plan by fitted, solved or dpcache")
    return replace(method, mask=tuple(sorted(plan.full)), rows=tuple(tuple(row) for row in rows))


def _lines(plan: StepPlan, scheduler: Any) -> tuple[Weights, ...]:
    """The weights of lines over what a plan counts by."""
    places, rows = places_of(scheduler)[plan.position], []
    for step in range(plan.runs):
        before = [full for full in plan.full if full < step][-2:]
        line = taylor([places[full] for full in before], places[step], order=1) if step not in plan.full else ()
        rows.append(line)
    return tuple(rows)


def _only(pipe: Any) -> nn.Module:
    """The one transformer of a pipeline."""
    restore(pipe)
    found = denoisers(pipe)
    if len(found) > 1:
        raise UnsupportedError(f"{type(pipe).__name__} has {len(found)} transformers, and a bundle has one; {_CURE}")
    (module,) = found.values()
    return module


def call_arguments(pipe: Any, prompt: Any, call: Mapping[str, Any], *, steps: int) -> dict[str, Any]:
    """Return what a pipeline is called with to draw by a prompt, from seed 0: a text, or some of its arguments."""
    first = next(name for name in bound_names(pipe) if name != "self")
    own = dict(prompt) if isinstance(prompt, Mapping) else {first: prompt}
    return {**call, **own, "num_inference_steps": steps, "generator": torch.Generator("cpu").manual_seed(0)}


def _time_scale(seen: _Call) -> float:
    """What a transformer is given for a timestep of the scheduler, as a share of it."""
    return float(seen.tensors[TIMESTEP].flatten()[0]) / seen.timestep if seen.timestep else 1.0


def _times(pipe: Any, module: nn.Module, prompt: Any, call: Mapping[str, Any], seen: _Call) -> dict[str, Any]:
    """What a pipeline tells its scheduler besides a number of steps, in the words of `model.schedule`.

    Raises:
        UnsupportedError: if that does not follow from the number of steps and the size of images.
    """
    found: dict[str, Any] = {}
    if seen.times.get("sigmas") is not None:
        if not np.allclose(seen.times["sigmas"], even_sigmas(_STEPS), atol=1e-6):
            raise UnsupportedError(f"{type(pipe).__name__} gives its scheduler sigmas of its own; {_CURE}")
        found[SIGMAS] = EVEN
    if pipe.scheduler.config.get("use_dynamic_shifting") and seen.times.get("mu") is not None:
        other = _seen(pipe, module, prompt, call, steps=4 * _STEPS)
        if other.times.get("mu") != seen.times["mu"]:
            raise UnsupportedError(f"{type(pipe).__name__} shifts times by the number of steps; {_CURE}")
        found[SHIFT] = float(seen.times["mu"])
    return found


def _packing(pipe: Any, module: nn.Module, prompt: Any, call: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Length and stride, in the noise that a pipeline draws, of the axes that its packed latents consist of.

    They are seen where the noise is numbered instead of random.

    Raises:
        UnsupportedError: if it draws something else than the latents, or does more than change their order.
    """
    with _Numbered() as numbered:
        latents = _seen(pipe, module, prompt, call).tensors[_LATENTS]
    place = latents[0].detach().double().flatten().numpy() / numbered.unit
    order = place.round().astype(np.int64)
    if len(numbered.drawn) != 1 or math.prod(numbered.drawn[0]) != len(order) or np.abs(place - order).max() > 0:
        raise UnsupportedError(f"{type(pipe).__name__} makes packed latents of more than one noise; {_CURE}")
    axes: list[tuple[int, int]] = []
    while len(order) > 1:
        stride = int(order[1] - order[0])
        length = next((i for i in range(1, len(order)) if order[i] - order[i - 1] != stride), len(order))
        if len(order) % length or length < 2:
            break
        axes.insert(0, (length, stride))
        order = order.reshape(-1, length)[:, 0]
    return tuple(axes)


class _Numbered(TorchFunctionMode):
    """Gives numbers, times `unit`, for normal noise; remembers the shapes that were `drawn`."""

    unit = 2.0**-24

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[int, ...]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is not torch.randn:
            return made
        self.drawn.append(tuple(made.shape))
        return (torch.arange(made.numel(), dtype=torch.float64) * self.unit).reshape(made.shape).to(made.dtype)


def _seen(pipe: Any, module: nn.Module, prompt: Any, call: Mapping[str, Any], steps: int = _STEPS) -> _Call:
    """What a transformer is given at a pipeline's first step, and the scheduler before it."""
    calls: list[inspect.BoundArguments] = []
    times: list[dict[str, Any]] = []
    inner = type(pipe.scheduler).set_timesteps

    @functools.wraps(inner)
    def set_timesteps(own: Any, *args: Any, **kwargs: Any) -> None:
        times.append(inspect.signature(inner).bind(own, *args, **kwargs).arguments)
        inner(own, *args, **kwargs)

    def see(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(inspect.signature(type(module).forward).bind(module, *args, **kwargs))
        raise _SeenError

    hook = module.register_forward_pre_hook(see, with_kwargs=True)
    pipe.scheduler.set_timesteps = types.MethodType(set_timesteps, pipe.scheduler)
    try:
        pipe(**call_arguments(pipe, prompt, call, steps=steps))
    except _SeenError:
        pass
    finally:
        hook.remove()
        del pipe.scheduler.set_timesteps
    if not calls:
        raise UnsupportedError(f"{type(pipe).__name__} draws without a call of its transformer; {_CURE}")
    flat = dict(_flat(calls[0].arguments))
    latents = flat.get(_LATENTS)
    timestep = flat.get(TIMESTEP)
    fitting = isinstance(latents, Tensor) and latents.ndim in (_PACKED, _IMAGES) and len(latents) < 3
    if not isinstance(latents, Tensor) or not fitting or not isinstance(timestep, Tensor):
        raise UnsupportedError(
            f"{type(pipe).__name__} gives its transformer no latents of (batch, channels, height, width) or (batch, "
            f"tokens, channels) with a timestep each; {_CURE}"
        )
    rows = len(latents)
    tensors = {n: v for n, v in flat.items() if isinstance(v, Tensor) and v.ndim and len(v) == rows}
    return _Call(
        tensors=tensors,
        rest={n: v for n, v in flat.items() if n not in tensors and n != "self"},
        timestep=float(pipe.scheduler.timesteps[0]),
        times=times[-1] if times else {},
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Arguments by name; those of sections by both names with a point between."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `_flat`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        section, *path = name.split(".")
        if path:
            found.setdefault(section, {})[".".join(path)] = value
        else:
            found[section] = value
    return found


def _stack(module: nn.Module, seen: _Call) -> Stack:
    finder = StackFinder(module)
    try:
        with torch.no_grad():
            module(**_nested({**seen.rest, **seen.tensors}))
    finally:
        finder.close()
    if finder.stack is None:
        raise UnsupportedError(f"no stack of blocks was found in {type(module).__name__}; {_CURE}")
    return finder.stack


class _Cut(nn.Module):
    """A transformer that returns its prediction, and the image's tokens in front of its blocks and behind them."""

    def __init__(self, module: nn.Module, seen: _Call, blocks: Sequence[tuple[nn.Module, tuple[Any, ...]]]) -> None:
        super().__init__()
        self.module, self._rest = module, {**seen.rest, "return_dict": False}
        self._names = (_LATENTS, TIMESTEP, *seen.conditions)
        self._first, (self._last, self._streams) = blocks[0][0], blocks[-1]

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return prediction, what enters the blocks, and what leaves them."""
        found: dict[str, Any] = {}
        hooks = [
            self._first.register_forward_pre_hook(
                lambda block, args, kwargs: found.update({ENTERED: argument(block, "image", args, kwargs)}),
                with_kwargs=True,
            ),
            self._last.register_forward_hook(
                lambda _block, _args, output: found.update({LEFT: image_of(output, self._streams)})
            ),
        ]
        try:
            made = self.module(**_nested({**self._rest, **dict(zip(self._names, given, strict=True))}))
        finally:
            for hook in hooks:
                hook.remove()
        return made[0], found[ENTERED], found[LEFT]
