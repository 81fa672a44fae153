"""Weights that mend what merging shifts, from images without labels."""

from vitfold.compensation.polishing import polish
from vitfold.compensation.refit import LEAST_IMAGES, MOST_IMAGES, Compensated, Refit, check_enough, compensate

__all__ = ["LEAST_IMAGES", "MOST_IMAGES", "Compensated", "Refit", "check_enough", "compensate", "polish"]
