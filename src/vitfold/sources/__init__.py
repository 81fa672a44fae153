"""Pretrained models come in: from a zoo, a file, or a torch module in memory. Imports no torch by itself."""

from vitfold.sources.load import FORMS, ZOOS, Loaded, adapt, demo_folder, load_source

__all__ = ["FORMS", "ZOOS", "Loaded", "adapt", "demo_folder", "load_source"]
