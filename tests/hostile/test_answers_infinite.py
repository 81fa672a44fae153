"""Outputs that are NaN or infinite: said wherever outputs are looked at, never counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitfold import pipeline
from vitfold.bench.comparison import Subject, compare
from vitfold.bench.evaluation import finite_outputs, run_over
from vitfold.bench.reference import Reference, reference_outputs
from vitfold.engines import Session, open_graph
from vitfold.errors import EngineError
from vitfold.model import Model
from vitfold.pipeline.writing import write_graph


@pytest.fixture
def overflowing(tiny_model: Callable[..., Model]) -> Model:
    """Finite weights, whose products are beyond float32."""
    model = tiny_model()
    return replace(model, params={**model.params, "head.weight": model.params["head.weight"] * np.float32(3e38)})


@pytest.fixture
def session(overflowing: Model, tmp_path: Path) -> Any:
    write_graph(pipeline.optimize(overflowing), tmp_path / "model.onnx")
    with open_graph(tmp_path / "model.onnx", "onnxruntime") as opened:
        yield opened


def test_evaluating_names_the_image(session: Session, overflowing: Model, photos) -> None:
    with pytest.raises(EngineError, match=r"output for .*0\.png is NaN or infinite \(. of 6.*--target cpu"):
        run_over(session, photos, overflowing.preprocess)


def test_timing_names_the_row(session: Session, overflowing: Model) -> None:
    subject = Subject(name="broken", session=session, preprocess=overflowing.preprocess, fidelity=None)
    with pytest.raises(EngineError, match="output for broken on onnxruntime .* is NaN or infinite"):
        compare([subject], batch=1, images=None, trials=1, iterations=1)


def test_no_reference_is_made_of_them(overflowing: Model, photos, own_cache: Path) -> None:
    with pytest.raises(EngineError, match="NaN or infinite"):
        reference_outputs(overflowing.digest(), photos, overflowing.preprocess, lambda: Reference(model=overflowing))
    assert not [path for path in own_cache.rglob("*") if path.is_file()], "and none is kept"


def test_no_bundle_is_made_of_them(overflowing: Model, photos, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="NaN or infinite"):
        pipeline.save(pipeline.optimize(overflowing), tmp_path / "a.fold", images=photos)
    assert not (tmp_path / "a.fold").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_is_enough(value: float) -> None:
    outputs = np.zeros((3, 4), np.float32)
    assert finite_outputs(outputs, "x") is outputs
    outputs[1, 2] = value
    with pytest.raises(EngineError, match=r"output for b is NaN or infinite \(1 of 3"):
        finite_outputs(outputs, ["a", "b", "c"])
