"""Small models as NVIDIA's compiler sees them, with quantizers that need no calibration: only structure counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitfold import pipeline
from vitfold.architectures.programs import forward
from vitfold.model import Model
from vitfold.ops.emit import emit_graph, write_onnx
from vitfold.quant.sites import find_sites
from vitfold.quantizer import Float8, Quantizer, QuantParams, Uniform
from vitfold.recipe import MergeRecipe
from vitfold.target import TARGETS, Target

WIDE: dict[str, Any] = {
    "image_size": (224, 224),
    "patch_size": (16, 16),
    "embed_dim": 384,
    "num_layers": 3,
    "num_heads": 6,
    "head_dim": 64,
    "mlp_dim": 768,
}


def quantizers_for(model: Model, *, float8: bool, attention: bool = True) -> dict[str, Quantizer]:
    """Symmetric quantizers for every site but the head."""

    def tensor(scale: float, low: int = -128) -> Quantizer:
        if float8:
            return Float8(scale=np.array(scale))
        return Uniform(scale=np.array(scale), zero_point=np.array(0), low=low, high=127)

    found: dict[str, Quantizer] = {}
    linears, attentions = find_sites(model.spec)
    for site in linears:
        if site.role == "head":
            continue
        reach = np.abs(model.params[f"{site.layer}.weight"]).max(1)
        found[f"{site.layer}.x"] = tensor(0.03)
        found[f"{site.layer}.w"] = (
            Float8(scale=reach / 448, axis=0)
            if float8
            else Uniform(scale=reach / 127, zero_point=np.zeros(len(reach)), low=-128, high=127, axis=0)
        )
    for one in attentions if attention else ():
        found |= {f"{one.site}.{name}": tensor(0.03) for name in "qkv"}
        found[f"{one.site}.softmax"] = tensor(1 / 448) if float8 else tensor(1 / 127, low=0)
    return found


@pytest.fixture
def written(tmp_path: Path):
    """Return a function that writes a model for a target and returns the file."""
    pytest.importorskip("tensorrt_rtx", reason="NVIDIA's compiler is not installed: pip install 'vitfold[audit]'")

    def write(
        model: Model,
        target: Target | str,
        quantizers: dict[str, Quantizer] | None = None,
        r: tuple[int, ...] = (),
        name: str = "model",
    ) -> Path:
        target = TARGETS[target] if isinstance(target, str) else target
        recipe = MergeRecipe(r=r, order="index" if target.keeps_order else "score")
        path = tmp_path / f"{name}.onnx"
        write_onnx(
            emit_graph(lambda ops, image: forward(ops, model.spec, recipe, image), model, target, quantizers), path
        )
        return path

    return write


@pytest.fixture
def deployed(tmp_path: Path):
    """Return a function that writes what `optimize` makes of a model for a target, without calibration."""
    pytest.importorskip("tensorrt_rtx", reason="NVIDIA's compiler is not installed: pip install 'vitfold[audit]'")

    def write(
        model: Model, name: str, quantizers: dict[str, Quantizer] | None, merge: str | None = None, **changes: Any
    ) -> Path:
        plan = pipeline.optimize(model, target=name, merge=merge)
        given = None if quantizers is None else QuantParams(quantizers)
        plan = replace(plan, target=replace(plan.target, **changes), quantizers=given)
        path = tmp_path / "deployed.onnx"
        assert pipeline.writing.write_graph(plan, path) == sum(cost.macs for cost in plan.costs())
        return path

    return write
