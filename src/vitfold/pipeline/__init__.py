"""From a model to a verified bundle: plan, calibrate, emit, verify, compare, write."""

from vitfold.pipeline.calibration import calibrate_folded, recorded_images, split_images
from vitfold.pipeline.plan import Folded, count_costs, optimize, read_recipe
from vitfold.pipeline.writing import FIDELITY_IMAGES, run_reference, save

__all__ = [
    "FIDELITY_IMAGES",
    "Folded",
    "calibrate_folded",
    "count_costs",
    "optimize",
    "read_recipe",
    "recorded_images",
    "run_reference",
    "save",
    "split_images",
]
