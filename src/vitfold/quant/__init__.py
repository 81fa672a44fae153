"""Post-training quantization: samples in, quantizers and weights on their grid out. Needs torch."""

from vitfold.quant.calibrate import Calibrated, Progress, Scheme, calibrate, check_globs
from vitfold.quant.methods import METHODS, Method, find_method

__all__ = ["METHODS", "Calibrated", "Method", "Progress", "Scheme", "calibrate", "check_globs", "find_method"]
