"""Zero-shot classification: the nearest text in angle, and files of embeddings that are something else."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from vitfold.bench.evaluation import Outputs
from vitfold.bench.zero_shot import check_embeds, read_embeds, zero_shot
from vitfold.errors import VitfoldError


def test_cosines_with_every_class_whatever_the_lengths():
    draw = np.random.default_rng(0)
    images, texts = draw.standard_normal((5, 8)).astype(np.float32), draw.standard_normal((3, 8)).astype(np.float32)
    outputs = Outputs(values=images * 7.0, index=(0, 1, 2, 3, 4), skipped=())
    found = zero_shot(outputs, texts * 0.1)
    for b in range(5):
        for c in range(3):
            expected = images[b] @ texts[c] / np.linalg.norm(images[b]) / np.linalg.norm(texts[c])
            assert found.values[b, c] == pytest.approx(float(expected), abs=1e-5)
    assert found.index == outputs.index


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_files_come_back(tmp_path, suffix):
    texts = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float16)
    path = tmp_path / f"texts{suffix}"
    if suffix == ".npy":
        np.save(path, texts)
    else:
        save_file({"any": texts}, path)
    assert np.array_equal(read_embeds(path), texts.astype(np.float32))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3, np.float32), r"float32\(3,\)"),
        (np.zeros((2, 3), np.int64), r"int64\(2, 3\)"),
        (np.full((2, 3), np.nan, np.float32), "finite reals"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(VitfoldError, match=message):
        read_embeds(tmp_path / "a.npy")


def test_other_files_are_refused(tmp_path):
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros((2, 3), np.float32)}, tmp_path / "two.safetensors")
    (tmp_path / "text.npy").write_text("cat")
    for name, message in (("two.safetensors", "2 arrays"), ("text.npy", "holds no text"), ("none.npy", "No such file")):
        with pytest.raises(VitfoldError, match=message):
            read_embeds(tmp_path / name)


def test_embeddings_have_to_fit_model_and_folders():
    texts = np.zeros((3, 8), np.float32)
    check_embeds(texts, classes=3, width=8, name="t.npy")
    with pytest.raises(VitfoldError, match="width 8, the model's image embeddings have 16"):
        check_embeds(texts, classes=3, width=16, name="t.npy")
    with pytest.raises(VitfoldError, match="3 classes, the images are in 2 class folders"):
        check_embeds(texts, classes=2, width=8, name="t.npy")
