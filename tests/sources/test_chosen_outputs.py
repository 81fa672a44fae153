"""Outputs that the user chooses, and oblong images: what the program gives is what the original has there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import vitfold
from vitfold.architectures.programs import plain_program
from vitfold.errors import SourceError
from vitfold.model import Model, ViTSpec, spec_from_dict
from vitfold.model.spec import spec_to_dict
from vitfold.ops.run import Run
from vitfold.program import replay
from vitfold.sources import load_source
from vitfold.sources.outputs import parse_outputs
from vitfold.sources.sizes import parse_size

SIZE = (32, 48)


def plain() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=SIZE, depth=4, num_classes=5, global_pool="avg").eval()


def rotary() -> Any:
    torch.manual_seed(0)
    return timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=3, num_classes=5).eval()


def made(model: Model, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        values = replay(plain_program(model.spec), Run(model.params), pixels)
    return dict(zip(model.spec.output_names, values, strict=True))


def originals(module: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    behind: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, x: behind.append(x)) for block in module.blocks]
    with torch.inference_mode():
        tokens = module.forward_features(pixels)
        values = {
            "logits": module.forward_head(tokens),
            "image_embeds": module.forward_head(tokens, pre_logits=True),
            "last_hidden_state": tokens,
        }
    for hook in hooks:
        hook.remove()
    return values | {f"hidden_states.{i + 1}": x for i, x in enumerate(behind)}


@pytest.mark.parametrize("module", [plain(), rotary()], ids=["by class", "as a graph"])
@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("embedding", ["image_embeds"]),
        ("tokens", ["last_hidden_state"]),
        ("layers:1,2", ["hidden_states.2", "hidden_states.1"]),
        ("layers:1,3,tokens,logits", ["logits", "last_hidden_state", "hidden_states.1", "hidden_states.3"]),
        ("tokens,embedding,logits", ["logits", "image_embeds", "last_hidden_state"]),
    ],
)
def test_what_is_given_is_what_the_original_has_there(module: Any, asked: str, names: list[str]) -> None:
    model = vitfold.adapt(module, outputs=asked)
    pixels = torch.randn(2, 3, *model.spec.image_size, generator=torch.Generator().manual_seed(0))
    found, expected = made(model, pixels), originals(module, pixels)
    assert [{"output": "logits"}.get(name, name) for name in found] == names
    for name, value in zip(names, found.values(), strict=True):
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


def test_what_nothing_needs_is_left_out() -> None:
    whole, short = vitfold.adapt(plain()), vitfold.adapt(plain(), outputs="layers:2")
    assert short.spec.num_layers == 2
    assert not any(name.startswith(("head", "blocks.2", "norm")) for name in short.params)
    assert short.labels is None
    assert whole.spec.num_layers == 4


def test_merged_tokens_come_back_in_every_output(tmp_path: Path) -> None:
    model = vitfold.adapt(plain(), outputs="logits,tokens,layers:2")
    bundle = vitfold.save(vitfold.optimize(model, merge=1), tmp_path / "a.fold")
    assert bundle.manifest.verified["max_relative_error"] < 1e-4
    with vitfold.open(bundle.path) as vit:
        (found,) = vit(np.zeros((*SIZE, 3), np.uint8))
    tokens = model.spec.tokens
    assert {name: value.shape for name, value in found.outputs.items()} == {
        "logits": (5,),
        "last_hidden_state": (tokens, 192),
        "hidden_states.2": (tokens, 192),
    }
    np.testing.assert_array_equal(found.output, found.outputs["logits"])
    assert len(np.unique(found.outputs["hidden_states.2"], axis=0)) == tokens - 2, "merged ones have one row"


def test_an_architecture_keeps_its_outputs_in_json() -> None:
    spec = vitfold.adapt(plain(), outputs="tokens,layers:2").spec
    assert isinstance(spec, ViTSpec)
    assert spec_from_dict(spec_to_dict(spec)) == spec
    assert "also" not in spec_to_dict(vitfold.adapt(plain()).spec), "digests of what was there before stay"


def test_a_source_takes_them_and_says_so() -> None:
    model = load_source(
        "timm:vit_tiny_patch16_224", weights="random", image_size="32x48", outputs=["tokens", "layers:2"]
    ).model
    assert model.spec.output_names == ("last_hidden_state", "hidden_states.2")
    assert model.spec.image_size == SIZE
    assert model.origin.arguments["outputs"] == "last_hidden_state,hidden_states.2"
    assert model.origin.arguments["image_size"] == SIZE
    assert model.preprocess.crop_size == SIZE
    assert model.preprocess.resize == "cover", "an oblong crop of the short side would have black edges"


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ("layers:9", "layers:1 to 4"),
        ("layers:x", "layers:3,6"),
        ("", "no outputs are named"),
        ("tokes", "no output 'tokes'"),
    ],
)
def test_mistakes_are_named(asked: str, error: str) -> None:
    with pytest.raises(SourceError, match=error):
        vitfold.adapt(plain(), outputs=asked)


def test_lists_are_read() -> None:
    assert parse_outputs("logits, layers:3,6,tokens") == (
        "logits",
        "hidden_states.3",
        "hidden_states.6",
        "last_hidden_state",
    )
    assert parse_outputs("boxes,3") == ("boxes", "3")


@pytest.mark.parametrize(
    ("given", "size"),
    [(224, 224), ("224", 224), ("384x512", (384, 512)), ((384, 384), 384), ([2, 3], (2, 3)), (None, None)],
)
def test_sizes(given: Any, size: Any) -> None:
    assert parse_size(given) == size


@pytest.mark.parametrize("given", ["384x", "x", "0", 0, -3, "1x2x3", "3.5", ()])
def test_sizes_that_are_none(given: Any) -> None:
    with pytest.raises(SourceError, match="HEIGHTxWIDTH"):
        parse_size(given)


@pytest.mark.parametrize("kind", ["ViTModel", "SiglipVisionModel"])
def test_oblong_images_of_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    module = getattr(transformers, kind)(
        getattr(transformers, kind.replace("Model", "Config"))(**small, image_size=64, patch_size=16)
    ).eval()
    module.save_pretrained(tmp_path / "model")
    model = load_source(f"hf:{tmp_path / 'model'}", image_size=(48, 80), outputs="tokens").model
    pixels = torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = module(pixels, interpolate_pos_encoding=True).last_hidden_state
    (found,) = made(model, pixels).values()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_square_images_where_nothing_else_goes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.CLIPVisionConfig(**small, image_size=32, patch_size=16)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    for source in (f"hf:{tmp_path / 'clip'}", "torchvision:vit_b_16"):
        with pytest.raises(SourceError, match="square images, and 32x48"):
            load_source(source, image_size="32x48", weights="random" if source.startswith("torch") else "pretrained")
