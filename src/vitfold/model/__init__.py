"""Models as plain data: spec, parameters, preprocessing, labels, origin. No torch here."""

from vitfold.model.denoiser import Condition, DenoiserModel, DenoiserSpec
from vitfold.model.dit import DiTModel, DiTSpec
from vitfold.model.graph import GraphEnd, GraphSpec
from vitfold.model.params import Array, Checkpoint, Model, Origin, check_params
from vitfold.model.preprocess import Preprocess, preprocess_from_dict
from vitfold.model.sinks import Sinks
from vitfold.model.spec import (
    Architecture,
    ViTSpec,
    block_layers,
    param_shapes,
    spec_from_dict,
    spec_to_dict,
    vit_spec_from_dict,
)

__all__ = [
    "Architecture",
    "Array",
    "Checkpoint",
    "Condition",
    "DenoiserModel",
    "DenoiserSpec",
    "DiTModel",
    "DiTSpec",
    "GraphEnd",
    "GraphSpec",
    "Model",
    "Origin",
    "Preprocess",
    "Sinks",
    "ViTSpec",
    "block_layers",
    "check_params",
    "param_shapes",
    "preprocess_from_dict",
    "spec_from_dict",
    "spec_to_dict",
    "vit_spec_from_dict",
]
