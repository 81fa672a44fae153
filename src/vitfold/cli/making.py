"""What commands that make bundles share: the extra that they need, the model, what options say about quantization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vitfold.cli.terminal import quiet_stdout
from vitfold.errors import VitfoldError, missing_extra

if TYPE_CHECKING:
    from vitfold.model import Model
    from vitfold.recipe import QuantRecipe

Say = Callable[[str], None]


def require_optimize() -> None:
    """Raise if the extra that makes bundles is not installed."""
    import importlib.util

    for package in ("torch", "onnx_ir"):
        if importlib.util.find_spec(package) is None:
            raise VitfoldError(missing_extra(package, "optimize", "making a bundle"))


def load_model(source: str, say: Say, *arguments: Any) -> Model:
    """Load a model by arch, num_classes, image_size, weights and seed; what it prints goes to stderr."""
    from vitfold.sources import load_source

    say(f"loading {source}")
    names = ("arch", "num_classes", "image_size", "weights", "seed")
    with quiet_stdout():
        return load_source(source, **dict(zip(names, arguments, strict=True))).model


def quant_recipe(quant: str | None, method: str | None, size: int, seed: int) -> QuantRecipe | None:
    """Return the quantization that options ask for."""
    from vitfold.recipe import quant_from_scheme

    found = None if quant is None else quant_from_scheme(quant.lower())
    if found is None:
        return None
    return replace(found, method=method or "vitfold", calibration_size=size, seed=seed)
