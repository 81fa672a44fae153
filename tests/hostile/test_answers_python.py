"""The Python interface handed what it does not take: an error that says what was expected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitfold
from vitfold import pipeline
from vitfold.errors import VitfoldError
from vitfold.serve.predictor import Prediction, Predictor

PHOTO = Image.new("RGB", (40, 40), 90)
LOGITS = Prediction(output=np.arange(4, dtype=np.float32), labels=None)
EMBEDDING = Prediction(output=np.arange(4, dtype=np.float32), labels=None, head="features")
AGE = Prediction(output=np.ones(1, np.float32), labels=("age",), head="regression")
BROKEN = Prediction(output=np.array([1, np.nan], np.float32), labels=None)
ENDLESS = Prediction(output=np.array([1, np.inf], np.float32), labels=None, head="multi_label")


@dataclass(frozen=True)
class Case:
    id: str
    call: Callable[[Predictor], Any]
    said: tuple[str, ...]


CASES = (
    Case("no images at once", lambda p: p(PHOTO, batch=0), ("batch must be a whole number of at least 1, found 0",)),
    Case("fewer than none", lambda p: p(PHOTO, batch=-1), ("batch", "at least 1, found -1")),
    Case("half an image", lambda p: p(PHOTO, batch=1.5), ("batch", "found 1.5")),
    Case("a batch of text", lambda p: p(PHOTO, batch="8"), ("batch", "found '8'")),
    Case("a batch of None", lambda p: p(PHOTO, batch=None), ("batch", "found None")),
    Case("a batch of True", lambda p: p(PHOTO, batch=True), ("batch", "found True")),
    Case("a negative top", lambda _: LOGITS.top(-1), ("k must be a whole number of at least 1, found -1",)),
    Case("an empty top", lambda _: LOGITS.top(0), ("k", "found 0")),
    Case("a fractional top", lambda _: LOGITS.top(2.5), ("k", "found 2.5")),
    Case("a top of text", lambda _: LOGITS.top("5"), ("k", "found '5'")),
    Case("a threshold above one", lambda _: LOGITS.top(threshold=50), ("threshold", "from 0 to 1, found 50")),
    Case("a threshold of text", lambda _: LOGITS.top(threshold="half"), ("threshold", "found 'half'")),
    Case("a threshold that is no number", lambda _: LOGITS.top(threshold=np.nan), ("threshold", "found nan")),
    Case("the top of an embedding", lambda _: EMBEDDING.top(), ("an embedding", ".output")),
    Case("the top of a number", lambda _: AGE.top(), ("numbers of a regression", ".values()")),
    Case("the top of NaN", lambda _: BROKEN.top(), ("NaN or infinite",)),
    Case("the top of infinity", lambda _: ENDLESS.top(), ("NaN or infinite",)),
    Case("None for an image", lambda p: p(None), ("found NoneType", "a Pillow image")),
    Case("a number for an image", lambda p: p(3), ("found int",)),
    Case("a mapping of images", lambda p: p({"a.png": PHOTO}), ("found dict",)),
    Case("None among images", lambda p: p([PHOTO, None]), ("cannot read an image from NoneType",)),
    Case("images in images", lambda p: p([[PHOTO]]), ("cannot read an image from list",)),
    Case("floats", lambda p: p(np.zeros((8, 8, 3))), ("float64 has no defined white", "uint8")),
    Case("five dimensions", lambda p: p(np.zeros((1, 1, 8, 8, 3), np.uint8)), ("is no image",)),
    Case("open nothing", lambda _: vitfold.open(None), ("open takes the path of a bundle, found NoneType",)),
    Case("open a number", lambda _: vitfold.open(7), ("found int",)),
    Case("load nothing", lambda _: vitfold.load(None), ("a source is text", "found NoneType")),
    Case("load a path", lambda _: vitfold.load(Path("a.onnx")), ("a source is text",)),
    Case("adapt a name", lambda _: vitfold.adapt("timm:vit_tiny"), ("torch.nn.Module", "load_source")),
    Case("optimize a name", lambda _: vitfold.optimize("demo"), ("takes a Model", "found str")),
    Case("find images in nothing", lambda _: vitfold.find_images(None), ("the path of a folder", "NoneType")),
    Case("find images in images", lambda _: vitfold.find_images([PHOTO]), ("the path of a folder", "found list")),
)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("python")
    with vitfold.open(pipeline.save(pipeline.optimize(tiny_model()), folder / "a.fold").path) as opened:
        yield opened


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_wrong_arguments_say_what_was_expected(predictor, without_type_checks, case):
    with pytest.raises(VitfoldError) as caught:
        case.call(predictor)
    for words in case.said:
        assert words in str(caught.value)
    assert len(predictor([PHOTO] * 3, batch=2)) == 3, "and the predictor works as before"
