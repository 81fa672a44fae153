"""Weights that mend what merging shifts, in closed form, from images without labels."""

from vitfold.compensation.pruning import can_prune, cut_to_width, with_widths
from vitfold.compensation.refit import LEAST_IMAGES, MOST_IMAGES, Compensated, Refit, check_enough, compensate

__all__ = [
    "LEAST_IMAGES",
    "MOST_IMAGES",
    "Compensated",
    "Refit",
    "can_prune",
    "check_enough",
    "compensate",
    "cut_to_width",
    "with_widths",
]
