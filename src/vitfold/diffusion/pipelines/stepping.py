"""A pipeline of diffusers whose blocks rest at reused steps: hooks on its scheduler and its transformers."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vitfold.diffusion.forecast import Weights, taylor
from vitfold.diffusion.pipelines.stacks import Stack, Stream, argument
from vitfold.errors import RecipeError, UnsupportedError

HISTORY = 2
Streams = dict[Stream, torch.Tensor | None]


@dataclass(slots=True, kw_only=True, eq=False)
class Steps:
    """Counts a scheduler's steps; says which are computed in full (`full`; None: all) and where in `places` they are.

    `places` has "step", "time" and, where the scheduler has them, "sigma": what forecasts may count by; `rows` are the
    weights of what the newest full steps added, by step, and without them forecasts are lines. `begin` and
    `end` are called around every step, with the prediction and with the sample; `ready` with the number of timesteps.
    """

    scheduler: Any
    full: frozenset[int] | None = None
    position: str = "step"
    rows: Sequence[Weights] = ()
    ready: Callable[[int], None] | None = None
    begin: Callable[[Any, Any], None] | None = None
    end: Callable[[Any], None] | None = None
    step: int = 0
    first: int = 0
    fresh: Any = None
    places: Mapping[str, Sequence[float]] = field(default_factory=dict)
    resting: list[RestingBlocks] = field(default_factory=list)

    def install(self) -> None:
        """Count from now on.

        Raises:
            UnsupportedError: if something else is hooked to the scheduler's steps.
        """
        if "step" in vars(self.scheduler):
            raise UnsupportedError("this pipeline's scheduler has hooks already; call vitfold.restore(pipe) first")
        for name, method in (("step", self._counted()), ("set_timesteps", self._restarted())):
            setattr(self.scheduler, name, types.MethodType(method, self.scheduler))

    def remove(self) -> None:
        """Leave scheduler and blocks as they were."""
        for name in ("step", "set_timesteps"):
            vars(self.scheduler).pop(name, None)
        for resting in self.resting:
            resting.remove()

    @property
    def history(self) -> int:
        """How many full steps a forecast needs at most."""
        return max((len(row) for row in self.rows), default=HISTORY)

    def reuses(self, step: int) -> bool:
        """Say whether a step's blocks rest."""
        return self.full is not None and step not in self.full

    def forget(self) -> None:
        """Begin a new image."""
        self.step = 0
        for resting in self.resting:
            resting.forget()

    def _counted(self) -> Callable[..., Any]:
        inner = type(self.scheduler).step

        @functools.wraps(inner)
        def step(own: Any, model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            if own is not self.scheduler:  # a copy of it
                return inner(own, model_output, timestep, *args, **kwargs)
            if self.step == 0:
                self.first = _place(own, timestep)
            if self.begin is not None:
                self.begin(model_output, timestep)
            found = inner(own, model_output, timestep, *args, **kwargs)
            if self.end is not None:
                self.end(found[0] if isinstance(found, tuple) else found.prev_sample)
            self.step += 1
            for resting in self.resting:
                resting.call = 0
            return found

        return step

    def _restarted(self) -> Callable[..., Any]:
        inner = type(self.scheduler).set_timesteps

        @functools.wraps(inner)
        def set_timesteps(own: Any, *args: Any, **kwargs: Any) -> None:
            inner(own, *args, **kwargs)
            if own is self.scheduler:
                self.forget()
                self.fresh = copy.deepcopy(own)
                self.places = places_of(own)
                if self.ready is not None:
                    self.ready(len(own.timesteps))

        return set_timesteps


def places_of(scheduler: Any) -> dict[str, list[float]]:
    """Return what a scheduler counts by, where no two steps are at one place."""
    count = len(scheduler.timesteps)
    found = {"step": [float(i) for i in range(count)], "time": [float(t) for t in scheduler.timesteps]}
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and count <= len(sigmas) <= count + 1:
        found["sigma"] = [float(sigma) for sigma in sigmas[:count]]
    return {name: places for name, places in found.items() if len(set(places)) == count}


def _place(scheduler: Any, timestep: Any) -> int:
    """Which of its timesteps a scheduler begins with: where it was told, else the first of that time."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    at = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
    timesteps = [float(t) for t in scheduler.timesteps]
    return min(range(len(timesteps)), key=lambda i: (abs(timesteps[i] - at), i))


class RestingBlocks:
    """The blocks of one transformer: computed at full steps, at others replaced by a forecast of what they add.

    Every call within a step (with and without a condition) keeps what was added at its own last full steps.
    `watch` is shown the number of the call and what was added to the image's stream.
    """

    def __init__(
        self, steps: Steps, transformer: nn.Module, stack: Stack, watch: Callable[[int, torch.Tensor], None] | None
    ) -> None:
        self._steps, self._watch = steps, watch
        self._kept: dict[int, list[tuple[int, Streams]]] = {}
        self._entered: Streams = {}
        self._forecast: Streams | None = None
        self.call, self.computed = 0, 0
        """Calls within this step; blocks that were computed since `forget`."""
        self._removed = False
        self._former: list[tuple[nn.Module, Any, Any]] = []
        blocks = stack.blocks(transformer)
        for i, (block, streams) in enumerate(blocks):
            former = vars(block).get("forward")
            block.forward = self._run(block, block.forward, streams, first=i == 0, last=i == len(blocks) - 1)
            self._former.append((block, block.forward, former))

    def remove(self) -> None:
        """Leave the blocks as they were; where something else wraps them by now, compute all within it."""
        self.forget()
        self._removed = True
        for block, own, former in self._former:
            if vars(block).get("forward") is own:
                del block.forward
                if former is not None:
                    block.forward = former

    def forget(self) -> None:
        """Begin a new image."""
        self._kept.clear()
        self._entered, self._forecast, self.call, self.computed = {}, None, 0, 0

    def _run(
        self, block: nn.Module, inner: Any, streams: tuple[Stream, ...], *, first: bool, last: bool
    ) -> Callable[..., Any]:
        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._removed:
                return inner(*args, **kwargs)
            if first:
                self._enter(block, args, kwargs)
            if self._forecast is None:
                self.computed += 1
                found = inner(*args, **kwargs)
                if last:
                    self._keep(found, streams)
                return found
            if last:
                left = {stream: self._added(stream) for stream in streams}
                self.call += 1
            else:
                left = {stream: argument(block, stream, args, kwargs) for stream in streams}
            return left["image"] if streams == ("image",) else tuple(left[stream] for stream in streams)

        apart: Callable[..., Any] = torch.compiler.disable(forward, recursive=False)  # type: ignore[no-untyped-call]
        return apart  # a compiler takes what is within

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self._entered = {"image": argument(block, "image", args, kwargs), "text": argument(block, "text", args, kwargs)}
        self._forecast, kept = None, self._kept.get(self.call, [])
        needed = len(self._steps.rows[self._steps.step]) if self._steps.rows else HISTORY
        if not self._steps.reuses(self._steps.step) or len(kept) < needed:
            return
        image, entered = kept[-1][1]["image"], self._entered["image"]
        if image is not None and entered is not None and image.shape == entered.shape:
            self._forecast = self._foretell(kept)

    def _foretell(self, kept: Sequence[tuple[int, Streams]]) -> Streams:
        if self._steps.rows:
            row = self._steps.rows[self._steps.step]
            values = [value for _, value in kept[-len(row) :]]
            return {stream: _sum([value[stream] for value in values], row) for stream in values[-1]}
        places = self._steps.places[self._steps.position][self._steps.first :]
        (before, old), (newest, new) = kept
        weights: Weights = taylor([places[before], places[newest]], places[self._steps.step], order=1)
        return {stream: _line(old[stream], value, weights[0]) for stream, value in new.items()}

    def _added(self, stream: Stream) -> torch.Tensor | None:
        assert self._forecast is not None
        entered, forecast = self._entered[stream], self._forecast[stream]
        return None if entered is None or forecast is None else entered + forecast

    def _keep(self, found: Any, streams: tuple[Stream, ...]) -> None:
        values = (found,) if isinstance(found, torch.Tensor) else found
        added: Streams = {"image": None, "text": None}
        for stream, value in zip(streams, values, strict=True):
            entered = self._entered[stream]
            if value is not None and entered is not None:
                added[stream] = value.detach() - entered.detach()
        image = added["image"]
        assert image is not None
        if self._watch is not None:
            self._watch(self.call, image)
        if self._steps.full is not None:
            kept = self._kept.setdefault(self.call, [])
            kept[:] = [*kept, (self._steps.step, added)][-self._steps.history :]
        self._entered = {}
        self.call += 1


def _line(old: torch.Tensor | None, new: torch.Tensor | None, weight: float) -> torch.Tensor | None:
    """A line through both: weights of a line add up to one."""
    return None if old is None or new is None else torch.add(new, new - old, alpha=-weight)


def _sum(values: Sequence[torch.Tensor | None], weights: Weights) -> torch.Tensor | None:
    """The weighted sum, of the newest and of differences from it: what a float of 16 bits rounds is small."""
    newest = values[-1]
    if newest is None:
        return None
    found = newest * sum(weights)
    for value, weight in zip(values[:-1], weights, strict=False):
        if value is None:
            return None
        found = torch.add(found, value - newest, alpha=weight)
    return found


def rest(
    steps: Steps, transformer: nn.Module, stack: Stack, watch: Callable[[int, torch.Tensor], None] | None = None
) -> None:
    """Let the blocks of a transformer follow `steps`."""
    steps.resting.append(RestingBlocks(steps, transformer, stack, watch))


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Return the transformers of a pipeline by the names of its components.

    Raises:
        UnsupportedError: if it has none, or no scheduler.
    """
    parts = getattr(pipe, "components", {})
    found = {name: one for name, one in parts.items() if name.startswith("transformer") and isinstance(one, nn.Module)}
    if not found or not hasattr(parts.get("scheduler"), "step"):
        known = ", ".join(name for name, one in parts.items() if one is not None) or "no components"
        raise UnsupportedError(
            f"{type(pipe).__name__} is no pipeline of diffusers with a transformer and a scheduler ({known}); step "
            "reuse here needs blocks of one shape, which a U-Net has not: use DeepCache, or a transformer's pipeline"
        )
    compiled = [name for name, one in found.items() if _is_compiled(one)]
    if compiled:
        raise RecipeError(
            f"{compiled[0]} is compiled, and a graph that was compiled before leaves no block out; plan and "
            "accelerate first, then compile"
        )
    return found


def _is_compiled(transformer: nn.Module) -> bool:
    return hasattr(transformer, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in transformer.modules()
    )
