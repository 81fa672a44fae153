"""Models that take no images: videos, spectrograms and texts come as arrays of NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vitfold
from vitfold.cli.app import app
from vitfold.decoding import as_array
from vitfold.errors import ImageError, SourceError
from vitfold.model import Preprocess, preprocess_from_dict
from vitfold.model.preprocess import preprocess_of_arrays
from vitfold.pipeline import calibrate_plan
from vitfold.sources import load_source

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def module(kind: str, config: str, **options: Any) -> Any:
    torch.manual_seed(0)
    made = getattr(transformers, kind)(getattr(transformers, config)(**SMALL, **options)).eval()
    with torch.no_grad():
        for one in made.parameters():
            if not one.any():
                torch.nn.init.normal_(one, std=0.1)
    return made


def video() -> Any:
    return module(
        "VideoMAEForVideoClassification", "VideoMAEConfig", image_size=32, patch_size=16, num_frames=4, num_labels=3
    )


def sound() -> Any:
    return module("ASTForAudioClassification", "ASTConfig", max_length=64, num_mel_bins=32, num_labels=3)


def text() -> Any:
    return module("SiglipTextModel", "SiglipTextConfig", vocab_size=50, max_position_embeddings=8)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    draw = np.random.default_rng(0)
    for i in range(12):
        np.save(folder / f"{i:02}.npy", draw.standard_normal((4, 3, 32, 32), dtype=np.float32))
    return folder


@pytest.mark.parametrize(
    ("make", "name", "shape"),
    [
        (video, "pixel_values", (4, 3, 32, 32)),
        (sound, "input_values", (64, 32)),
        (text, "input_ids", (8,)),
    ],
    ids=["video", "sound", "text"],
)
def test_they_are_quantized_on_arrays_and_run(make: Any, name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    original = make()
    model = vitfold.adapt(original)
    assert (model.spec.input, model.spec.input_shape, model.preprocess.arrays) == (name, shape, shape)
    assert bool(model.spec.unmergeable) == (make is text)
    draw = np.random.default_rng(0)
    whole = make is text
    examples = draw.integers(0, 50, (12, *shape)) if whole else draw.standard_normal((12, *shape), dtype=np.float32)
    (tmp_path / "arrays").mkdir()
    for i, example in enumerate(examples):
        np.save(tmp_path / "arrays" / f"{i:02}.npy", example)
    arrays = vitfold.find_images(tmp_path / "arrays")
    plan = calibrate_plan(vitfold.optimize(model, quant="w8a8", merge=None if whole else 1), arrays)
    bundle = vitfold.save(plan, tmp_path / "a.fold")
    with torch.inference_mode():
        expected = original(torch.from_numpy(examples))[0].numpy()
    with vitfold.open(bundle.path) as fold:
        by_file = fold(list(arrays.paths))
        by_array = fold(examples)
        (single,) = fold(examples[3])
    found = np.stack([one.output for one in by_file])
    np.testing.assert_array_equal(found, np.stack([one.output for one in by_array]))
    np.testing.assert_allclose(found[3], single.output, rtol=1e-5, atol=1e-5)
    if not whole:
        cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert np.median(cosine) > 0.95


def test_the_command_line_takes_them(videos: Path, tmp_path: Path) -> None:
    video().save_pretrained(tmp_path / "model")

    def run(*words: object, code: int = 0) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == code, done.output
        return done.output

    bundle = tmp_path / "v.fold"
    run("optimize", f"hf:{tmp_path / 'model'}", "--inputs", videos, "--quant", "w8a8", "--keep-slower", "-o", bundle)
    assert "arrays as they are" in run("inspect", bundle)
    assert "agreement" in run("evaluate", bundle, "--inputs", videos)
    assert "00.npy" in run("predict", bundle, videos / "00.npy")
    picture = Path(__file__).parents[2] / "assets" / "demo" / "images" / "cat"
    assert "arrays of shape (4, 3, 32, 32)" in run("predict", bundle, next(picture.iterdir()), code=1)


def test_a_part_is_taken(tmp_path: Path) -> None:
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config={**SMALL, "image_size": 32, "patch_size": 16},
            text_config={**SMALL, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
        )
    )
    whole.save_pretrained(tmp_path / "clip")
    tower = load_source(f"hf:{tmp_path / 'clip'}", part="vision_model").model
    assert tower.origin.arguments["part"] == "vision_model"
    assert tower.spec.num_layers == 2
    with pytest.raises(SourceError, match="did you mean vision_model"):
        load_source(f"hf:{tmp_path / 'clip'}", part="vision_modle")


def test_pictures_may_come_as_arrays(tmp_path: Path) -> None:
    model = load_source("timm:test_vit", weights="random", num_classes=3).model
    draw = np.random.default_rng(0)
    for i in range(8):
        np.savez(tmp_path / f"{i}.npz", draw.standard_normal(model.spec.input_shape, dtype=np.float32))
    plan = calibrate_plan(vitfold.optimize(model, quant="w8a8"), vitfold.find_images(tmp_path))
    assert plan.quantizers


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (np.zeros((2, 4)), "shape \\(2, 4\\), and the model takes \\(4,\\); it holds several"),
        (np.zeros(5), "save it in that shape"),
        (np.array([0, np.nan, 0, 0]), "NaN"),
        (np.array(["a"] * 4), "no numbers"),
        (np.array([{}] * 4), "no array of NumPy"),
    ],
)
def test_arrays_that_do_not_fit(content: Any, error: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    with pytest.raises(ImageError, match=error):
        as_array(tmp_path / "a.npy", (4,))


def test_files_that_are_cut_or_hold_several(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", np.zeros(4), np.zeros(4))
    with pytest.raises(ImageError, match="2 arrays"):
        as_array(tmp_path / "two.npz", (4,))
    for name in ("cut.npy", "cut.npz"):
        np.save(tmp_path / "whole.npy", np.zeros(400)) if name.endswith("y") else np.savez(
            tmp_path / "whole.npz", np.zeros(400)
        )
        (tmp_path / name).write_bytes((tmp_path / f"whole{name[3:]}").read_bytes()[:300])
        with pytest.raises(ImageError, match="no array of NumPy"):
            as_array(tmp_path / name, (400,))
    with pytest.raises(ImageError, match="no such file"):
        as_array(tmp_path / "absent.npy", (4,))


def test_what_takes_arrays_says_so_in_json() -> None:
    made = preprocess_of_arrays((4, 3, 32, 32))
    assert preprocess_from_dict(made.to_dict()) == made
    assert made.shape == (4, 3, 32, 32)
    usual = Preprocess(
        resize="none", resize_size=(4, 6), crop_size=(4, 6), interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3
    )
    assert "arrays" not in usual.to_dict(), "digests of what was there before stay"
    assert usual.shape == (3, 4, 6)
