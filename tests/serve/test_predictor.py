"""A bundle as a function of images."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitfold import pipeline
from vitfold.errors import BundleError, EngineError, ImageError, VitfoldError
from vitfold.model import Array, Model
from vitfold.serve.predictor import Prediction, Predictor, open_predictor

LABELS = tuple("abcdefghij")


@pytest.fixture
def bundle(tiny_model: Callable[..., Model], tmp_path: Path) -> Path:
    model = replace(tiny_model(), labels=LABELS)
    return pipeline.save(pipeline.optimize(model, merge=2), tmp_path / "a.fold").path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_paths_and_pillow_images_give_the_same(bundle: Path, photo: Path) -> None:
    with open_predictor(bundle) as vit:
        (by_path,) = vit(photo)
        (by_image,) = vit(Image.open(photo))
        several = vit([str(photo), photo, Image.open(photo)], batch=2)
    np.testing.assert_array_equal(by_path.output, by_image.output)
    assert len(several) == 3
    np.testing.assert_allclose(several[2].output, by_path.output, rtol=1e-5, atol=1e-5)


def test_the_output_is_that_of_the_reference(
    bundle: Path, photo: Path, tiny_model: Callable[..., Model], run_torch: Callable[..., Array]
) -> None:
    model = tiny_model()
    expected = run_torch(model, model.preprocess(Image.open(photo))[None], (2, 2))[0]
    with open_predictor(bundle) as vit:
        np.testing.assert_allclose(vit(photo)[0].output, expected, rtol=1e-4, atol=1e-5)


def test_top_is_sorted_and_sums_to_one(bundle: Path, photo: Path) -> None:
    with open_predictor(bundle) as vit:
        ranked = vit(photo)[0].top(10)
    probabilities = [p for _, p in ranked]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1.0)
    assert {label for label, _ in ranked} == set(LABELS)


def test_without_labels_positions_are_named() -> None:
    prediction = Prediction(output=np.array([0.0, 2.0, 1.0], np.float32), labels=None)
    assert [label for label, _ in prediction.top(2)] == ["1", "2"]


def test_no_image_gives_no_prediction(bundle: Path) -> None:
    with open_predictor(bundle) as vit:
        assert vit([]) == []


def test_what_cannot_be_read_is_named(bundle: Path, tmp_path: Path) -> None:
    with open_predictor(bundle) as vit, pytest.raises(ImageError, match=r"absent\.png"):
        vit(tmp_path / "absent.png")
    with pytest.raises(BundleError, match="no such bundle"):
        open_predictor(tmp_path / "absent.fold")


def test_serving_imports_no_torch(bundle: Path, photo: Path) -> None:
    script = (
        "import sys, vitfold\n"
        f"with vitfold.open({str(bundle)!r}) as vit: print(vit({str(photo)!r})[0].top(1)[0][0])\n"
        "heavy = {'torch', 'timm', 'transformers', 'onnx_ir', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in LABELS


# Heads.


def saved(model: Model, folder: Path) -> Path:
    return pipeline.save(pipeline.optimize(model), folder / "a.fold").path


def test_labels_of_their_own_have_sigmoids(tiny_model: Callable[..., Model], tmp_path: Path, photo: Path) -> None:
    model = replace(tiny_model(problem="multi_label"), labels=LABELS)
    with open_predictor(saved(model, tmp_path)) as vit:
        assert vit.head == "multi_label"
        assert vit.classifies
        (found,) = vit(photo)
    expected = 1 / (1 + np.exp(-found.output))
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-6)
    chosen = found.top(10, threshold=0.5)
    assert {label for label, _ in chosen} == {LABELS[i] for i in np.flatnonzero(expected >= 0.5)}
    assert abs(found.probabilities.sum() - 1) > 0.1, "no softmax"


def test_one_logit_is_a_probability_of_its_own(tiny_model: Callable[..., Model], tmp_path: Path, photo: Path) -> None:
    with open_predictor(saved(tiny_model(outputs=1), tmp_path)) as vit:
        assert vit.head == "multi_label"
        ((_, probability),) = vit(photo)[0].top()
    assert 0 < probability < 1


def test_a_regression_gives_its_numbers(tiny_model: Callable[..., Model], tmp_path: Path, photo: Path) -> None:
    model = replace(tiny_model(outputs=2, problem="regression"), labels=("age", "height"))
    with open_predictor(saved(model, tmp_path)) as vit:
        assert not vit.classifies
        (found,) = vit(photo)
    assert found.values() == [("age", pytest.approx(found.output[0])), ("height", pytest.approx(found.output[1]))]
    with pytest.raises(VitfoldError, match="numbers of a regression and has no probabilities"):
        found.top()


def test_arrays_tensors_and_bytes_give_what_the_file_gives(bundle: Path, photo: Path) -> None:
    import torch

    pixels = np.asarray(Image.open(photo))
    with open_predictor(bundle) as vit:
        (expected,) = vit(photo)
        for item in (pixels, torch.from_numpy(pixels.copy()).permute(2, 0, 1), photo.read_bytes()):
            np.testing.assert_array_equal(vit(item)[0].output, expected.output)
        assert len(vit(np.stack([pixels] * 3), batch=2)) == 3


def test_orientation_is_followed_as_the_bundle_says(
    tiny_model: Callable[..., Model], tmp_path: Path, photo: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo).save(tmp_path / "turned.png", exif=exif)
    Image.open(photo).transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    model = tiny_model()
    follows = replace(model, preprocess=replace(model.preprocess, exif="apply"))
    with open_predictor(saved(follows, tmp_path)) as vit:
        np.testing.assert_array_equal(vit(tmp_path / "turned.png")[0].output, vit(tmp_path / "upright.png")[0].output)
    ignores = pipeline.save(pipeline.optimize(model), tmp_path / "b.fold").path
    with open_predictor(ignores) as vit:
        np.testing.assert_array_equal(vit(tmp_path / "turned.png")[0].output, vit(photo)[0].output)


def overflowing(model: Model) -> Model:
    """A model whose logits are beyond float32."""
    return replace(model, params={**model.params, "head.weight": model.params["head.weight"] * np.float32(3e38)})


def test_infinite_outputs_are_an_error_that_names_the_image(
    tiny_model: Callable[..., Model], tmp_path: Path, photo: Path
) -> None:
    from vitfold.artifacts.bundle import open_bundle

    opened = open_bundle(pipeline.save(pipeline.optimize(tiny_model()), tmp_path / "a.fold").path)
    pipeline.writing.write_graph(pipeline.optimize(overflowing(tiny_model())), opened.onnx_path)
    with Predictor(opened) as vit, pytest.raises(EngineError, match=r"output for .*photo\.png is NaN or infinite"):
        vit(photo)


# Many images.


def test_a_stream_reads_no_further_than_it_prepares(bundle: Path, photo: Path) -> None:
    taken = []

    def images() -> Iterator[Path]:
        for i in range(1000):
            taken.append(i)
            yield photo

    with open_predictor(bundle) as vit:
        stream = vit.stream(images(), batch=4)
        first = next(stream)
        assert isinstance(first, Prediction)
        assert len(taken) <= 16
        stream.close()
        np.testing.assert_allclose(first.output, vit(photo)[0].output, rtol=1e-5, atol=1e-5)


def test_a_stream_gives_the_error_of_an_image_in_its_place(bundle: Path, photo: Path) -> None:
    images = [b"no", b"image", photo, b"at all", photo]
    with open_predictor(bundle) as vit:
        found = list(vit.stream(images, batch=2, skip_bad=True))
        assert [isinstance(one, ImageError) for one in found] == [True, True, False, True, False]
        with pytest.raises(ImageError, match="not an image"):
            list(vit.stream(images, batch=2))
        with pytest.raises(VitfoldError, match="batch"):
            vit.stream(images, batch=0)
