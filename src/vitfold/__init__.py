"""vitfold: pretrained Vision Transformers made fast without retraining, with an honest account of the cost."""

__version__ = "0.1.0"
