"""`evaluate --retrieval`, as users type it, on a tiny random CLIP with its own text tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from invoking import error, run, run_json
from PIL import Image

from tiny_clip import write_clip

CAPTIONS = ("a photo of a cat .", "the dog .", "a dog of the cat .", "photo of the photo .", "the cat .")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CLIP, four pictures, a table of them and a bundle of its image tower."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("retrieval")
    write_clip(folder / "model")
    rng = np.random.default_rng(0)
    for name in ("cats/0", "cats/1", "dogs/2", "dogs/3"):
        path = folder / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    owners = ("dogs/3.png", "cats/0.png", "dogs/3.png", "cats/1.png", "cats/0.png")
    rows = [f"{image},{caption}" for image, caption in zip(owners, CAPTIONS, strict=True)]
    (folder / "pairs.csv").write_text("\n".join(("image,caption", *rows)) + "\n")
    run("optimize", f"hf:{folder / 'model'}", "-o", folder / "clip.fold")
    return folder


def test_recalls_are_those_of_the_original_model(clip):
    """Against transformers' own text and image features on the same pixels."""
    import transformers as hf

    from vitfold.artifacts.bundle import open_bundle
    from vitfold.decoding import prepared

    common = ("--images", clip / "images", "--retrieval", clip / "pairs.csv", "--text-tower", f"hf:{clip / 'model'}")
    found = run_json("evaluate", clip / "clip.fold", *common)["retrieval"]
    assert (found["images"], found["captions"]) == (3, 5)
    model = hf.CLIPModel.from_pretrained(clip / "model").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(clip / "model")
    names, owner = ("dogs/3.png", "cats/0.png", "cats/1.png"), np.array([0, 1, 0, 2, 1])
    preprocess = open_bundle(clip / "clip.fold").manifest.preprocess
    pixels = torch.from_numpy(np.stack([prepared(clip / "images" / name, preprocess) for name in names]))
    tokens = tokenizer(list(CAPTIONS), padding="max_length", max_length=9, return_tensors="pt")
    with torch.inference_mode():
        images = model.get_image_features(pixel_values=pixels)
        texts = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    rows = [torch.nn.functional.normalize(getattr(x, "pooler_output", x), dim=-1) for x in (images, texts)]
    scores = (rows[0] @ rows[1].T).numpy()
    own = owner[scores.argmax(1)] == np.arange(3)
    assert found["image_to_text"]["recall_at_1"]["recall"] == pytest.approx(own.mean())
    assert found["text_to_image"]["recall_at_1"]["recall"] == pytest.approx((scores.argmax(0) == owner).mean())
    assert found["text_to_image"]["recall_at_5"]["recall"] == 1.0
    for direction in ("image_to_text", "text_to_image"):
        for one in found[direction].values():
            assert one["low"] <= one["recall"] <= one["high"]
            assert one["unfolded"] == one["recall"]
            assert one["drop"]["drop"] == 0.0
    shown = run("evaluate", clip / "clip.fold", *common).stdout
    assert "image to text, recall at 1: " in shown
    assert "text to image, recall at 5: 100.00%" in shown
    np.save(clip / "texts.npy", rows[1].numpy())
    given = run_json("evaluate", clip / "clip.fold", *common[:4], "--text-tower", clip / "texts.npy")["retrieval"]
    assert {**given, "texts": None} == {**found, "texts": None}


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (("--retrieval", "{clip}/pairs.csv"), "captions need a text tower", 2),
        (("--text-tower", "hf:{clip}/model"), "needs --retrieval PAIRS.csv", 2),
        (("--retrieval", "{clip}/pairs.csv", "--text-tower", "hf:{clip}/model", "--limit", "2"), "leave --limit", 2),
        (("--retrieval", "{clip}/none.csv", "--text-tower", "hf:{clip}/model"), "with the columns image,caption", 1),
        (("--retrieval", "{clip}/lost.csv", "--text-tower", "hf:{clip}/model"), "names 1 images that are not in", 1),
        (("--retrieval", "{clip}/pairs.csv", "--text-tower", "hf:{clip}/images"), "images", 1),
        (
            ("--retrieval", "{clip}/pairs.csv", "--text-tower", "{clip}/few.npy"),
            "5 captions and a model of width 12",
            1,
        ),
    ],
)
def test_what_does_not_fit_is_refused(clip, options, message, code):
    (clip / "lost.csv").write_text("image,caption\ncats/0.png,a cat\ncats/9.png,a dog\n")
    np.save(clip / "few.npy", np.ones((3, 12), np.float32))
    given = [text.replace("{clip}", str(clip)) for text in options]
    assert message in error("evaluate", clip / "clip.fold", "--images", clip / "images", *given, code=code)
