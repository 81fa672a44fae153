"""Post-training quantization: samples in, quantizers and weights on their grid out. Needs torch."""

from vitfold.quant.calibrate import Calibrated, Progress, QuantConstraints, calibrate, calibrate_network, check_globs
from vitfold.quant.methods import METHODS, QuantMethod, find_method

__all__ = [
    "METHODS",
    "Calibrated",
    "Progress",
    "QuantConstraints",
    "QuantMethod",
    "calibrate",
    "calibrate_network",
    "check_globs",
    "find_method",
]
