"""Graphs that came from outside are compensated like written programs."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from compensation_cases import drawn

from vitfold.compensation import compensate
from vitfold.model import Model
from vitfold.recipe import MergeRecipe
from vitfold.sources import load_source


def exported(folder: Path, module: torch.nn.Module) -> Model:
    """A module by way of an ONNX file."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(2, 3, 32, 32),),
            folder / "vit.onnx",
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "n"}, "logits": {0: "n"}},
            dynamo=False,
        )
    return load_source(str(folder / "vit.onnx")).model


@pytest.mark.parametrize("options", [{}, {"init_values": 0.5}], ids=["plain", "with scales of layers"])
def test_a_lifted_graph_is_compensated(tmp_path: Path, options: dict[str, float]) -> None:
    import timm

    torch.manual_seed(0)
    given = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
    model = exported(tmp_path, timm.models.vision_transformer.VisionTransformer(**given, **options).eval())
    done = compensate(model, MergeRecipe(r=(4, 4), order="index"), drawn(256))
    assert done.error_after < done.error_before
    assert done.model.params.keys() == model.params.keys()


def test_tokens_keep_their_places_from_block_to_block(tmp_path: Path) -> None:
    """Rotary positions are read by every block, for the places of the tokens that are left."""
    import timm

    torch.manual_seed(0)
    module = timm.models.eva.Eva(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=10, use_rot_pos_emb=True
    )
    for block in module.blocks:
        block.attn.fused_attn = False
    model = exported(tmp_path, module.eval())
    done = compensate(model, MergeRecipe(r=(4, 4, 2), order="index"), drawn(256))
    assert done.error_after < done.error_before
