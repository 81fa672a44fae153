"""Diffusion step reuse: methods as values, forecasts, samplers, and the loop that follows a method's plan."""

from vitfold.diffusion.methods import METHODS, ReuseMethod, every_step, find_method, full_steps
from vitfold.diffusion.sampling import Sampled, sample
from vitfold.diffusion.solving import solve_steps

__all__ = ["METHODS", "ReuseMethod", "Sampled", "every_step", "find_method", "full_steps", "sample", "solve_steps"]
