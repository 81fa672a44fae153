"""Weights that mend what merging shifts, in closed form, from images without labels."""

from vitfold.compensation.dividing import (
    DIVIDING_IMAGES,
    BlockLosses,
    Losses,
    divide,
    losses_from_dict,
    measure_losses,
)
from vitfold.compensation.narrowing import cut_to_width, with_widths
from vitfold.compensation.refit import LEAST_IMAGES, MOST_IMAGES, Compensated, Refit, check_enough, compensate

__all__ = [
    "DIVIDING_IMAGES",
    "LEAST_IMAGES",
    "MOST_IMAGES",
    "BlockLosses",
    "Compensated",
    "Losses",
    "Refit",
    "check_enough",
    "compensate",
    "cut_to_width",
    "divide",
    "losses_from_dict",
    "measure_losses",
    "with_widths",
]
