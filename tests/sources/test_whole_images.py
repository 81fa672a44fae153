"""Modules that need more than one array: towers of any number of patches, hidden patches, texts with an end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitfold
from vitfold.architectures.programs import plain_program
from vitfold.errors import SourceError
from vitfold.ops.run import Run
from vitfold.program import replay
from vitfold.sources import load_source

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TOWER = {**SMALL, "num_patches": 16, "patch_size": 8}
WORDS = {**SMALL, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}


def naflex(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "Siglip2VisionModel":
        return transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**TOWER)).eval()
    config = transformers.Siglip2Config(vision_config=TOWER, text_config=WORDS, num_labels=3)
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("kind", ["Siglip2VisionModel", "Siglip2ForImageClassification"])
def test_a_tower_of_any_size_at_one_size(kind: str, tmp_path: Path) -> None:
    from transformers.models.siglip2.image_processing_siglip2 import Siglip2ImageProcessor

    module = naflex(kind)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    given = Siglip2ImageProcessor(patch_size=8, max_num_patches=24)(images=picture, return_tensors="pt")
    assert given["spatial_shapes"].tolist() == [[4, 6]]
    with torch.inference_mode():
        made = module(**given)
    expected = made.logits if hasattr(made, "logits") else made.pooler_output
    model = vitfold.adapt(module, image_size=(32, 48))
    assert (model.spec.grid, model.spec.unmergeable) == ((4, 6), "")
    bundle = vitfold.save(vitfold.optimize(model), tmp_path / "a.fold")
    with vitfold.open(bundle.path) as fold:
        np.testing.assert_allclose(fold(picture)[0].output, expected[0].numpy(), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        again = module(**given)
    torch.testing.assert_close(again[0], made[0])  # the module was left as it was


def test_its_own_grid_is_the_usual_size() -> None:
    assert vitfold.adapt(naflex("Siglip2Model")).spec.image_size == (32, 32)
    with pytest.raises(SourceError, match="--image-size 24x32"):
        vitfold.adapt(naflex("Siglip2VisionModel"), image_size=(30, 32))


def test_a_masked_autoencoder_sees_all_patches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {**SMALL, "image_size": 32, "patch_size": 8}
    masked = transformers.ViTMAEModel(transformers.ViTMAEConfig(**config, mask_ratio=0.75)).eval()
    whole = transformers.ViTMAEModel(transformers.ViTMAEConfig(**config, mask_ratio=0.0)).eval()
    whole.load_state_dict(masked.state_dict())
    masked.save_pretrained(tmp_path / "mae")
    model = load_source(f"hf:{tmp_path / 'mae'}").model
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = whole(pixels, noise=torch.arange(16.0).expand(2, 16)).last_hidden_state
        found = replay(plain_program(model.spec), Run(model.params), pixels)[0]
        assert masked(pixels).last_hidden_state.shape[1] == 5, "it still hides patches"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.spec.tokens == 17


@pytest.mark.parametrize("eos", [2, 49], ids=["the largest number", "a number of its own"])
def test_the_text_tower_of_clip_pools_the_end_of_a_text(eos: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        **SMALL, vocab_size=50, max_position_embeddings=8, projection_dim=6, eos_token_id=eos, bos_token_id=1
    )
    module = transformers.CLIPTextModelWithProjection(config).eval()
    model = vitfold.adapt(module)
    assert model.spec.output == "text_embeds"
    draw = np.random.default_rng(0)
    texts = draw.integers(3, 48, (5, 8))
    for row, place in zip(texts, (7, 3, 5, 1, 6), strict=True):
        row[place:] = 49  # the end, which is repeated as padding
    with torch.inference_mode():
        expected = module(torch.from_numpy(texts)).text_embeds.numpy()
    bundle = vitfold.save(vitfold.optimize(model), tmp_path / "text.fold")
    with vitfold.open(bundle.path) as fold:
        found = np.stack([one.output for one in fold(texts)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
