"""Floats in bfloat16: where the processor multiplies them, and as float32 where it does not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vitfold import pipeline
from vitfold.artifacts.bundle import Bundle
from vitfold.engines import ENGINES, engine_obstacle, open_session
from vitfold.errors import EngineError
from vitfold.images import ImageSet
from vitfold.model import Array, Model
from vitfold.pipeline import racing, verifying
from vitfold.pipeline.racing import NARROW, fastest
from vitfold.recipe import QuantRecipe
from vitfold.target import find_target

pytest.importorskip("openvino", reason="openvino is not installed")
OBSTACLE = engine_obstacle(NARROW)
narrow_here = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this processor be one that multiplies no bfloat16."""
    from openvino import Core

    capabilities = ["FP32", "INT8", "BIN", "EXPORT_IMPORT"]
    asked = Core.get_property

    def answer(core: Any, *names: Any) -> Any:
        return capabilities if names == ("CPU", "OPTIMIZATION_CAPABILITIES") else asked(core, *names)

    monkeypatch.setattr(Core, "get_property", answer)


def written_for_narrow(bundle: Bundle) -> Bundle:
    """The bundle as one that a machine with bfloat16 made; its graph is the same."""
    target = find_target(NARROW).to_dict()
    return replace(bundle, manifest=replace(bundle.manifest, target=target))


@pytest.mark.usefixtures("without_bfloat16")
def test_a_bundle_for_bfloat16_runs_in_float32_elsewhere_and_says_so(
    tiny_model: Callable[..., Model],
    random_images: Callable[..., Array],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = pipeline.save(pipeline.optimize(tiny_model(), merge=2, target="openvino"), tmp_path / "a.fold")
    pixels = random_images(made.manifest.spec, 2)
    with open_session(made) as session:
        expected = session(pixels)
    with caplog.at_level(logging.WARNING), open_session(written_for_narrow(made)) as session:
        assert session.engine.startswith("openvino 2")
        np.testing.assert_array_equal(session(pixels), expected)
    assert "no products of bfloat16" in caplog.text
    with pytest.raises(EngineError, match="no products of bfloat16.*take openvino"):
        open_session(made, engine=NARROW)


@pytest.mark.usefixtures("without_bfloat16")
def test_no_bundle_for_bfloat16_is_made_elsewhere(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no products of bfloat16"):
        pipeline.save(pipeline.optimize(tiny_model(), target=NARROW), tmp_path / "a.fold")
    assert not (tmp_path / "a.fold").exists()


@narrow_here
@pytest.mark.parametrize("quant", [None, QuantRecipe(method="minmax")])
@pytest.mark.parametrize("merge", [None, 3])
def test_floats_are_bfloat16_and_the_graph_is_checked_in_float32(
    tiny_model: Callable[..., Model],
    photos: ImageSet,
    random_images: Callable[..., Array],
    tmp_path: Path,
    quant: QuantRecipe | None,
    merge: int | None,
) -> None:
    plan = pipeline.optimize(tiny_model(), merge=merge, quant=quant, target=NARROW)
    plan = plan if quant is None else pipeline.calibrate_plan(plan, photos)
    bundle = pipeline.save(plan, tmp_path / "a.fold")
    verified = bundle.manifest.verified
    assert verified["engine"].startswith(f"{NARROW} ")
    assert verified["median_relative_error"] < (1e-4 if quant is None else 0.1)
    assert 1e-4 < verified["narrow_relative_error"] < 0.5
    pixels = random_images(bundle.manifest.spec, 8)
    with open_session(bundle) as session, open_session(bundle, engine="openvino") as exact:
        found, expected = session(pixels), exact(pixels)
    assert not np.array_equal(found, expected)
    errors = np.abs(found - expected).max(1) / np.abs(expected).max(1)
    assert np.median(errors) < (0.05 if merge is None else 0.5)


@narrow_here
def test_a_model_that_needs_float32_is_refused(
    tiny_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "CEILING", 1e-6)
    with pytest.raises(EngineError, match="this model needs float32: choose --target openvino$"):
        pipeline.save(pipeline.optimize(tiny_model(), target=NARROW), tmp_path / "a.fold")
    assert not (tmp_path / "a.fold").exists()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("here", [False, True])
def test_only_what_is_rounded_already_is_raced_in_bfloat16(
    tiny_model: Callable[..., Model],
    photos: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
    quantized: bool,
    here: bool,
) -> None:
    plan = pipeline.optimize(tiny_model(), quant=QuantRecipe(method="minmax") if quantized else None)
    plan = pipeline.calibrate_plan(plan, photos) if quantized else plan
    raced: list[str] = []

    @contextlib.contextmanager
    def opened(one: Any) -> Iterator[str]:
        yield one.target.engine

    def timed(sessions: Mapping[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        raced.extend(sessions)
        return {name: SimpleNamespace(trial_medians_ms=[float(len(raced) - place)]) for place, name in enumerate(raced)}

    monkeypatch.setattr(racing, "engine_obstacle", lambda engine: None if here else "not here")
    monkeypatch.setattr(racing, "opened", opened)
    monkeypatch.setattr(racing, "timed", timed)
    taken = fastest(plan)
    if quantized and racing.quantized_target("openvino").weight_bits < plan.target.weight_bits:
        assert (taken, raced) == (plan, []), "OpenVINO would saturate with these weights"
        return
    narrow = quantized and here
    assert raced == ["onnxruntime", "openvino", *([NARROW] if narrow else [])]
    assert taken.target.engine == raced[-1]
    assert ENGINES[taken.target.engine].narrow_floats == narrow
