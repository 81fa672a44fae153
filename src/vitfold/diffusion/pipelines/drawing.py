"""Images of a pipeline for a plan: drawn with all steps, with some at rest, or with fewer; kept, so as to go on."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vitfold.artifacts.cache import keep_arrays, key_of, read_arrays
from vitfold.diffusion.forecast import Weights
from vitfold.diffusion.pipelines.installing import bound_arguments
from vitfold.diffusion.pipelines.recording import Recorder, Trace
from vitfold.diffusion.pipelines.stacks import Stack, StackFinder
from vitfold.diffusion.pipelines.step_plan import scheduler_facts, stacks_of, weights_digest
from vitfold.diffusion.pipelines.stepping import Steps, rest
from vitfold.errors import ArgumentError, EngineError
from vitfold.model import Array

KIND = "step-plans"
OWN = ("num_inference_steps", "generator", "num_images_per_prompt", "num_videos_per_prompt", "return_dict")
_SHORT = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Image:
    """What a pipeline returned for one prompt and seed, and what it took."""

    values: Array
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """Which steps are computed in full, what forecasts of the others count by, and by what weights; none: by a line."""

    full: tuple[int, ...]
    position: str = "step"
    rows: tuple[Weights, ...] = ()


class Drawer:
    """Draws by a pipeline, one image at a time, and keeps what it drew in the cache.

    `call` are arguments of the pipeline that go with every prompt.
    """

    def __init__(self, pipe: Any, transformers: Mapping[str, nn.Module], steps: int, call: Mapping[str, Any]) -> None:
        self.pipe, self.transformers, self.steps = pipe, transformers, steps
        names = [name for name in bound_names(pipe) if name != "self"]
        self._first = names[0] if names else "prompt"
        self.call = dict(call)
        if "output_type" in names:
            self.call.setdefault("output_type", "np")
        own = next((name for name in OWN if name in call), None)
        if own is not None:
            raise ArgumentError(f"{own} is set by plan_steps itself (steps, seeds, one image at a time); leave it out")
        unknown = sorted(set(self.call) - set(names))
        if unknown and "kwargs" not in names:
            raise ArgumentError(f"{type(pipe).__name__} takes no argument {unknown[0]!r}; leave it out")
        self.weights = weights_digest(transformers)
        types = sorted({str(one.dtype) for module in transformers.values() for one in module.parameters()})
        facts = (type(pipe).__name__, json.dumps(scheduler_facts(pipe.scheduler), sort_keys=True), self.weights, types)
        self._base = key_of(*facts, _plain(self.call, "an argument"))
        self._stacks: dict[str, Stack] = {}

    def arguments(self, prompt: Any) -> dict[str, Any]:
        """Return the arguments of a call, defaults included."""
        given = self._given(prompt, 0, self.steps)
        return bound_arguments(type(self.pipe), self.pipe, (), given)

    def record(self, prompt: Any, seed: int) -> Trace:
        """Return what the blocks add at every step of one image."""
        key = key_of(self._base, "trace", _plain(prompt, "a prompt"), seed, self.steps)
        kept = read_arrays(KIND, key)
        if kept is not None:
            return _trace_of(kept)
        stacks = self._find_stacks(prompt, seed)
        used = {name: module for name, module in self.transformers.items() if name in stacks}
        recorder = Recorder(scheduler=self.pipe.scheduler, transformers=used, stacks=stacks)
        try:
            self._run(prompt, seed, self.steps)
            trace = recorder.trace()
        finally:
            recorder.close()
        keep_arrays(KIND, key, _arrays_of(trace))
        return trace

    def draw(self, prompt: Any, seed: int, steps: int, resting: Rest | None = None) -> Image:
        """Return one image of so many steps, or the one that is kept of it."""
        key = key_of(self._base, "image", _plain(prompt, "a prompt"), seed, steps, resting)
        kept = read_arrays(KIND, key)
        if kept is None:
            values, seconds = self._run(prompt, seed, steps, resting, self._stacks)
            kept = {"values": values, "seconds": np.array(seconds)}
            keep_arrays(KIND, key, kept)
        return Image(values=kept["values"], seconds=float(kept["seconds"]))

    def knows(self, trace: Trace) -> None:
        """Take over the stacks that were found when a trace was recorded."""
        self._stacks = dict(trace.stacks)

    def _given(self, prompt: Any, seed: int, steps: int) -> dict[str, Any]:
        own = dict(prompt) if isinstance(prompt, Mapping) else {self._first: _listed(prompt)}
        generator = torch.Generator("cpu").manual_seed(seed)
        return {**self.call, **own, "num_inference_steps": steps, "generator": generator}

    def _run(
        self,
        prompt: Any,
        seed: int,
        steps: int,
        resting: Rest | None = None,
        stacks: Mapping[str, Stack] | None = None,
    ) -> tuple[Array, float]:
        hooks = None
        if resting is not None:
            hooks = Steps(scheduler=self.pipe.scheduler, full=frozenset(resting.full), position=resting.position)
            hooks.rows = resting.rows
            hooks.install()
            for name, stack in (stacks or {}).items():
                rest(hooks, self.transformers[name], stack)
        began = time.perf_counter()
        try:
            values = _values(self.pipe(**self._given(prompt, seed, steps)))
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"the device has not enough memory for this pipeline and two residuals per call ({error}); plan on "
                "smaller images, or enable_model_cpu_offload first"
            ) from None
        finally:
            if hooks is not None:
                hooks.remove()
        return values, time.perf_counter() - began

    def _find_stacks(self, prompt: Any, seed: int) -> dict[str, Stack]:
        """Find the blocks of those transformers that the pipeline calls: of two steps where these call all."""
        for steps in (_SHORT, self.steps):
            if len(self._stacks) == len(self.transformers):
                break
            finders = {name: StackFinder(module) for name, module in self.transformers.items()}
            try:
                self._run(prompt, seed, steps)
            finally:
                for finder in finders.values():
                    finder.close()
            self._stacks = {name: finder.stack for name, finder in finders.items() if finder.stack is not None}
        return self._stacks


def bound_names(pipe: Any) -> Sequence[str]:
    """Return the names of the arguments that a pipeline takes."""
    return list(inspect.signature(type(pipe).__call__).parameters)


def _listed(prompt: Any) -> Any:
    return [prompt] if isinstance(prompt, int) else prompt


def _values(output: Any) -> Array:
    first = output[0] if isinstance(output, tuple) else next(iter(output.values()))
    if isinstance(first, torch.Tensor):
        return np.asarray(first.detach().float().cpu().numpy())
    found = np.asarray([np.asarray(one) for one in first])
    return found.astype(np.float32) / 255 if found.dtype == np.uint8 else found.astype(np.float32)


def _plain(value: Any, what: str) -> Any:
    """A value as a part of a key.

    Raises:
        ArgumentError: for what has no content of its own, such as a generator or a callback.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().float().numpy()
    if isinstance(value, Mapping):
        return {name: _plain(one, f"{what} ({name})") for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, what) for one in value]
    if hasattr(value, "getbands"):
        return np.asarray(value)
    if value is None or isinstance(value, str | int | float | np.ndarray):
        return value
    raise ArgumentError(
        f"{what} is a {type(value).__name__}; plan_steps takes numbers, texts, tensors and images, and sets the "
        "seeds itself"
    )


def _arrays_of(trace: Trace) -> dict[str, Array]:
    stacks = {name: asdict(stack) for name, stack in trace.stacks.items()}
    facts = {"stacks": stacks, "timesteps": trace.timesteps, "first": trace.first, "passes": trace.passes}
    return {
        "gram": trace.gram,
        "weights": trace.weights,
        "active": trace.active,
        "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
        **{f"at.{name}": places for name, places in trace.places.items()},
    }


def _trace_of(kept: Mapping[str, Array]) -> Trace:
    facts = json.loads(kept["facts"].tobytes())
    return Trace(
        gram=kept["gram"],
        weights=kept["weights"],
        active=kept["active"],
        places={name.removeprefix("at."): places for name, places in kept.items() if name.startswith("at.")},
        **{**facts, "stacks": stacks_of(facts["stacks"])},
    )
