"""Batches of tables: what frameworks for large tables hand to a worker, and what comes back."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitfold import pipeline
from vitfold.artifacts.bundle import open_bundle
from vitfold.errors import ArgumentError, BundleError, EngineError, ImageError, VitfoldError
from vitfold.model import Model
from vitfold.serve import BatchPredictor
from vitfold.serve.predictor import Predictor, open_predictor

LABELS = tuple("abcdefghij")


@pytest.fixture
def bundle(tiny_model: Callable[..., Model], tmp_path: Path) -> Path:
    return pipeline.save(pipeline.optimize(replace(tiny_model(), labels=LABELS)), tmp_path / "a.fold").path


@pytest.fixture
def encoder(tiny_model: Callable[..., Model], tmp_path: Path) -> Path:
    model = tiny_model(outputs=0, output="image_embeds")
    return pipeline.save(pipeline.optimize(model), tmp_path / "encoder.fold").path


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    return paths


def test_paths_bytes_and_arrays_get_the_same_columns(bundle: Path, photos: list[Path]) -> None:
    predict = BatchPredictor(bundle, threads=1)
    arrays = np.stack([np.asarray(Image.open(path)) for path in photos])
    batches = [[str(path) for path in photos], [path.read_bytes() for path in photos], arrays]
    found = [predict({"image": images, "id": np.arange(4)}) for images in batches]
    with open_predictor(bundle) as vit:
        best = [one.top(1)[0] for one in vit(photos)]
    for one in found:
        assert list(one) == ["image", "id", "label", "score", "error"]
        assert one["label"].tolist() == [label for label, _ in best]
        np.testing.assert_allclose(one["score"], [score for _, score in best], rtol=1e-5)
        assert one["id"].tolist() == [0, 1, 2, 3]
        assert one["error"].tolist() == [None] * 4
    assert list(found[1]["image"]) == batches[1]


def test_a_broken_image_is_a_row(bundle: Path, encoder: Path, photos: list[Path]) -> None:
    images = [b"broken", str(photos[0]), None]
    found = BatchPredictor(bundle)({"image": images})
    assert found["label"].tolist()[::2] == [None, None]
    assert np.isnan(found["score"]).tolist() == [True, False, True]
    assert [one is None for one in found["error"]] == [False, True, False]
    embedded = BatchPredictor(encoder, image="bytes")({"bytes": images})
    assert list(embedded) == ["bytes", "embedding", "error"]
    assert np.isnan(embedded["embedding"]).all(1).tolist() == [True, False, True]
    assert BatchPredictor(encoder)({"image": [b"", b"x"]})["embedding"].shape == (2, 32)


class Overflowing(Predictor):
    """A bundle whose second image of every batch overflows."""

    def run(self, pixels: Any) -> Any:
        made = super().run(pixels)
        return {name: np.where(np.arange(len(rows))[:, None] == 1, np.nan, rows) for name, rows in made.items()}


def test_an_output_that_is_no_number_is_a_row(bundle: Path, photos: list[Path]) -> None:
    with Overflowing(open_bundle(bundle), threads=1) as vit:
        found = list(vit.stream(photos, batch=4, skip_bad=True))
        assert [isinstance(one, ImageError) for one in found] == [False, True, False, False]
        assert "1.png is NaN or infinite" in str(found[1])
        with pytest.raises(EngineError, match="NaN or infinite"):
            vit(photos, batch=4)


def test_processes_open_the_bundle_themselves(bundle: Path, photos: list[Path]) -> None:
    predict = BatchPredictor(bundle, threads=1)
    batches = [{"image": [str(path), "absent.png"]} for path in photos]
    expected = [predict(batch)["label"].tolist() for batch in batches]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(predict, batches))
    assert [one["label"].tolist() for one in found] == expected
    assert all("no such image" in one["error"][1] for one in found)


def test_copies_in_a_process_share_one_session(bundle: Path) -> None:
    predict = BatchPredictor(bundle, threads=1)
    assert pickle.loads(pickle.dumps(predict)).predictor is predict.predictor
    assert len(pickle.dumps(predict)) < 1000


def test_another_bundle_in_its_place_is_refused(bundle: Path, tiny_model: Callable[..., Model]) -> None:
    predict = BatchPredictor(bundle)
    pipeline.save(pipeline.optimize(tiny_model(seed=1)), bundle, overwrite=True)
    with pytest.raises(BundleError, match="was replaced"):
        predict({"image": [b""]})


def test_what_is_no_batch_is_refused(bundle: Path) -> None:
    predict = BatchPredictor(bundle)
    with pytest.raises(ArgumentError, match=r"no column 'image' but id, path; .* image="):
        predict({"id": [1], "path": ["a.png"]})
    with pytest.raises(ArgumentError, match="found int"):
        predict(3)


def test_frames_and_iterators_of_frames(bundle: Path, encoder: Path, photos: list[Path]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"image": [str(photos[0]), "absent.png"]}, index=[5, 6])
    found = BatchPredictor(bundle)(frame)
    assert list(found.columns) == ["image", "label", "score", "error"]
    assert found.index.tolist() == [5, 6]
    assert found.label[5] in LABELS
    assert "absent.png" in found.error[6]
    several = list(BatchPredictor(encoder)(iter([frame, frame])))
    assert len(several) == 2
    assert len(several[1].embedding[5]) == 32
    assert several[1].embedding[6] is None


def test_embeddings_and_logits_are_one_array(bundle: Path, encoder: Path, photos: list[Path]) -> None:
    with open_predictor(bundle) as vit:
        np.testing.assert_array_equal(vit.logits(photos), np.stack([one.output for one in vit(photos)]))
        assert vit.logits([]).shape == (0, 10)
        with pytest.raises(VitfoldError, match=r"gives logits .* no embedding; make a bundle with --outputs embedding"):
            vit.embed(photos)
    with open_predictor(encoder) as vit:
        assert vit.embed(photos, batch=3).shape == (4, 32)
        with pytest.raises(VitfoldError, match=r"gives image_embeds .* no logits"):
            vit.logits(photos)


def test_a_classifier_that_gives_its_embedding_too(
    tiny_model: Callable[..., Model], tmp_path: Path, photos: list[Path]
) -> None:
    path = pipeline.save(pipeline.optimize(tiny_model(also=("image_embeds",))), tmp_path / "both.fold").path
    with open_predictor(path) as vit:
        embeds, logits = vit.embed(photos), vit.logits(photos)
    assert (embeds.shape, logits.shape) == ((4, 32), (4, 10))
    found = BatchPredictor(path)({"image": photos})
    assert list(found) == ["image", "label", "score", "embedding", "error"]
    np.testing.assert_allclose(found["embedding"], embeds, rtol=1e-4, atol=1e-5)
