"""A plan in a pipeline, which is then called as before; what does not go with the plan is refused."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vitfold.diffusion.pipelines.step_plan import (
    StepPlan,
    different,
    guidance_of,
    load_plan,
    scheduler_facts,
    weights_digest,
)
from vitfold.diffusion.pipelines.stepping import Steps, denoisers, rest
from vitfold.errors import RecipeError

_MARK = "_vitfold_installed"
_CURE = "make a plan for this by vitfold.plan_steps, or call vitfold.restore(pipe)"


def accelerate(pipe: Any, plan: StepPlan | str | Path) -> Any:
    """Install a plan, or the file of one, in a pipeline of diffusers, and return the pipeline.

    A plan that is installed already gives way.

    Raises:
        RecipeError: if the plan is of another model, scheduler, number of steps or guidance; the last two when the
            pipeline is called.
        UnsupportedError: if the pipeline has no transformer.
    """
    restore(pipe)
    plan = plan if isinstance(plan, StepPlan) else load_plan(plan)
    transformers = denoisers(pipe)
    _check_model(pipe, plan)
    steps = Steps(scheduler=pipe.scheduler, full=frozenset(plan.full), position=plan.position, rows=plan.rows)
    installed = _Installed(plan, steps, list(transformers.values()))
    steps.ready, steps.begin = installed.check_timesteps, installed.check_step
    steps.install()
    for name, stack in plan.stacks.items():
        rest(steps, transformers[name], stack)
    _exchange_class(pipe, installed)
    return pipe


def restore(pipe: Any) -> Any:
    """Take a plan off a pipeline, if there is one, and return the pipeline."""
    installed = getattr(type(pipe), _MARK, None)
    if installed is not None:
        installed.steps.remove()
        pipe.__class__ = type(pipe).__mro__[1]
    return pipe


def _check_model(pipe: Any, plan: StepPlan) -> None:
    transformers = denoisers(pipe)
    missing = sorted(set(plan.stacks) - set(transformers))
    if missing or weights_digest(transformers) != plan.weights:
        raise RecipeError(
            f"the plan was made for other weights than those of this {type(pipe).__name__} (it is of {plan.pipeline}; "
            "a LoRA counts as other weights, and so does another type than float32 or bfloat16); make a plan of this "
            "model by vitfold.plan_steps"
        )
    now = scheduler_facts(pipe.scheduler)
    if now != plan.scheduler:
        names = different(now["config"], plan.scheduler["config"])
        raise RecipeError(
            f"the plan is for {plan.scheduler['class']}, and the pipeline's scheduler is {now['class']}"
            f"{' with ' + '; '.join(names[:3]) if names else ''}; give the pipeline the plan's scheduler, or make a "
            "plan for this one by vitfold.plan_steps"
        )


class _Installed:
    """What a pipeline that follows a plan checks when it is called."""

    def __init__(self, plan: StepPlan, steps: Steps, transformers: Sequence[nn.Module]) -> None:
        self.plan, self.steps, self._transformers = plan, steps, transformers
        self._parameters = self._count()

    def check_call(self, pipe: Any, arguments: dict[str, Any]) -> None:
        if pipe.scheduler is not self.steps.scheduler:
            raise RecipeError(
                "the pipeline has another scheduler than when the plan was installed; give it the plan's scheduler and "
                "call vitfold.accelerate(pipe, plan) anew"
            )
        if self._count() != self._parameters:
            raise RecipeError(
                "the transformer has other parameters than when the plan was installed, such as a LoRA's; "
                f"call the pipeline as it was planned, {_CURE}"
            )
        wrong = different(guidance_of(arguments), self.plan.guidance)
        if wrong:
            raise RecipeError(
                f"the plan is for another guidance: {'; '.join(wrong)}; call the pipeline as it was planned, {_CURE}"
            )

    def _count(self) -> int:
        return sum(1 for transformer in self._transformers for _ in transformer.parameters())

    def check_timesteps(self, count: int) -> None:
        if count != self.plan.timesteps:
            raise RecipeError(
                f"the plan is for {self.plan.timesteps} timesteps, and the scheduler has {count}; call the pipeline "
                f"with num_inference_steps={self.plan.steps}, {_CURE}"
            )

    def check_step(self, *_: Any) -> None:
        steps, plan = self.steps, self.plan
        if steps.step == 0 and steps.first != plan.first:
            raise RecipeError(
                f"the plan begins at timestep {plan.first} of {plan.timesteps}, this call at {steps.first}; give the "
                f"strength and the timesteps of the plan, {_CURE}"
            )
        passes = sum(resting.call for resting in steps.resting)
        if passes != plan.passes:
            raise RecipeError(
                f"the plan is for {plan.passes} calls of the transformer at a step, here are {passes} (a negative "
                f"prompt makes two of one); call the pipeline as it was planned, {_CURE}"
            )


def _exchange_class(pipe: Any, installed: _Installed) -> None:
    """Give a pipeline a class that checks every call; by name, module and signature it is the former one."""
    former = type(pipe)

    @functools.wraps(former.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        installed.check_call(self, bound_arguments(former, self, args, kwargs))
        try:
            return former.__call__(self, *args, **kwargs)
        finally:
            installed.steps.forget()

    names = {"__call__": call, "__module__": former.__module__, "__qualname__": former.__qualname__, _MARK: installed}
    pipe.__class__ = type(former.__name__, (former,), names)


def bound_arguments(kind: Any, pipe: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included; what does not fit is left to the pipeline."""
    try:
        bound = inspect.signature(kind.__call__).bind(pipe, *args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return dict(bound.arguments)
