"""Which zoo a folder or repository belongs to, and which class of transformers it is meant for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitfold.errors import SourceError

# model_type -> (class without a classifier, class with one, the weight that shows the second).
_KINDS = {
    "vit": ("ViTModel", "ViTForImageClassification", "classifier.weight"),
    "deit": ("DeiTModel", "DeiTForImageClassification", "classifier.weight"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification", "classifier.weight"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification", "classifier.weight",
    ),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection", "visual_projection.weight"),
    "clip": ("CLIPVisionModel", "CLIPVisionModelWithProjection", "visual_projection.weight"),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipForImageClassification", "classifier.weight"),
    "siglip": ("SiglipVisionModel", "SiglipForImageClassification", "classifier.weight"),
}  # fmt: skip
_WITH_TEACHER = "cls_classifier.weight"


def timm_name(name: str) -> str | None:
    """Return the name by which timm loads what `hf:` names, None where it is not timm's.

    timm/NAME is a repository of timm's authors; a folder is timm's if its config.json names timm's architecture.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        config = read_config(folder)
        return f"local-dir:{folder}" if "architecture" in config and "model_type" not in config else None
    owner, _, inner = name.partition("/")
    return inner if owner == "timm" and inner else None


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json, empty where there is none.

    Raises:
        SourceError: if it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    return read_object(path)


def architecture(config: Any, name: str) -> str:
    """Return the class that a configuration names; where it names none, the one that the weights are of.

    Raises:
        SourceError: if neither says it.
    """
    named = getattr(config, "architectures", None)
    if named:
        return str(named[0])
    if config.model_type not in _KINDS:
        return ""
    plain, classifier, sign = _KINDS[config.model_type]
    weights = Path(name).expanduser() / "model.safetensors"
    if not weights.is_file():
        raise SourceError(
            f"the config.json of hf:{name} names no architectures, and no model.safetensors lies beside it that would "
            f'tell; write "architectures": ["{classifier}"] or ["{plain}"] into it'
        )
    names = _tensor_names(weights)
    if _WITH_TEACHER in names:
        return "DeiTForImageClassificationWithTeacher"
    return classifier if sign in names else plain


def _tensor_names(path: Path) -> frozenset[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys())
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{path} is not a readable safetensors file ({error}); fetch it again") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file of a model's folder.

    Raises:
        SourceError: if it is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON ({error}); fetch the folder again") from None
    if not isinstance(found, dict):
        raise SourceError(f"{path} holds no JSON object; fetch the folder again")
    return found
