"""Diffusion step reuse: methods as values, forecasts, samplers, and the loop that follows a method's plan."""

from vitfold.reuse.methods import METHODS, Method, every_step, find_method, full_steps
from vitfold.reuse.sampling import Sampled, sample
from vitfold.reuse.solving import solve_steps

__all__ = ["METHODS", "Method", "Sampled", "every_step", "find_method", "full_steps", "sample", "solve_steps"]
