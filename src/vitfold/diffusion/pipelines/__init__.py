"""Step reuse for pipelines of diffusers, in torch and in the user's process: plans, hooks, and what they gain."""

from vitfold.diffusion.pipelines.installing import accelerate, restore
from vitfold.diffusion.pipelines.planning import plan_steps
from vitfold.diffusion.pipelines.step_plan import StepPlan, load_plan

__all__ = ["StepPlan", "accelerate", "load_plan", "plan_steps", "restore"]
