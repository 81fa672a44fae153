"""Text towers of both zoos, on tiny local models: what they embed, averaged over prompts, computed once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_clip import write_clip
from vitfold.errors import SourceError
from vitfold.sources.text_towers import text_embeds

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny CLIP in transformers' format, with a tokenizer of a few words."""
    pytest.importorskip("transformers")
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny CLIP of open_clip, whose tokenizer comes with the package."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 12,
        "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**config).state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def test_transformers_texts_are_what_its_model_says(clip_folder):
    import transformers as hf

    found = text_embeds(f"hf:{clip_folder}", ["cat", "dog"])
    model = hf.CLIPModel.from_pretrained(clip_folder).eval()
    ids = [[1, 4, 5, 6, 4, 7 + offset, 10, 2, 0] for offset in (0, 1)]
    mask = [[1] * 8 + [0]] * 2
    with torch.inference_mode():
        features = model.get_text_features(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    expected = torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1).numpy()
    assert np.allclose(found, expected, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_prompts_are_averaged_as_unit_vectors(clip_folder):
    one, two = (text_embeds(f"hf:{clip_folder}", ["cat"], [t]) for t in ("a photo of a {}.", "the {}."))
    both = text_embeds(f"hf:{clip_folder}", ["cat"], ["a photo of a {}.", "the {}."])
    mean = one + two
    assert np.allclose(both, mean / np.linalg.norm(mean), atol=1e-6)


def test_open_clip_texts_are_unit_vectors_of_its_tower(open_clip_folder):
    import open_clip

    source = f"open_clip:local-dir:{open_clip_folder}"
    found = text_embeds(source, ["cat", "dog"])
    model = open_clip.create_model(f"local-dir:{open_clip_folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")(["a photo of a cat.", "a photo of a dog."])
    with torch.inference_mode():
        expected = model.encode_text(tokens, normalize=True).numpy()
    assert np.allclose(found, expected, atol=1e-5)


def test_texts_are_embedded_once_and_anew_when_the_folder_changes(clip_folder, monkeypatch):
    first = text_embeds(f"hf:{clip_folder}", ["cat"])
    monkeypatch.setitem(sys.modules, "transformers", None)  # without which nothing can be embedded again
    assert np.array_equal(text_embeds(f"hf:{clip_folder}", ["cat"]), first)
    (clip_folder / "more.json").write_text("{}")
    with pytest.raises(SourceError, match="transformers"):
        text_embeds(f"hf:{clip_folder}", ["cat"])
    (clip_folder / "more.json").unlink()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:vit", "no text tower 'timm:vit'; give open_clip:ARCH/TAG"),
        ("hf:", "no text tower 'hf:'"),
        ("open_clip:ViT-B-32", "names no weights; give open_clip:ViT-B-32/TAG"),
        ("hf:/nowhere/at/all", "there is no folder /nowhere/at/all"),
    ],
)
def test_what_has_no_text_tower_is_refused(source, message):
    with pytest.raises(SourceError, match=message):
        text_embeds(source, ["cat"])


def test_a_template_needs_a_place_for_the_name(clip_folder):
    with pytest.raises(SourceError, match=r"has no \{\} where"):
        text_embeds(f"hf:{clip_folder}", ["cat"], ["a photo"])
