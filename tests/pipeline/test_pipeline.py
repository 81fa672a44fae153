"""From a model to a bundle: verified, compared, and loud where something is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specs import vit_base
from vitfold import pipeline
from vitfold.artifacts.bundle import MODEL, QUANTIZERS, Bundle, open_bundle
from vitfold.bench.timing import Protocol
from vitfold.engines import Session, engine_obstacle, open_graph, open_session
from vitfold.engines.trtexec import trtexec_command
from vitfold.errors import EngineError, RecipeError, TargetError
from vitfold.images import ImageSet
from vitfold.model import Model
from vitfold.pipeline.racing import raced
from vitfold.pipeline.trial import opened
from vitfold.quantizer import load_quant_params
from vitfold.recipe import MergeRecipe, QuantRecipe, Recipe

pytestmark = pytest.mark.usefixtures("own_cache")


def test_optimize_resolves_and_folds(tiny_model: Callable[..., Model]) -> None:
    folded = pipeline.optimize(tiny_model(layer_scale=True), merge="3,2")
    assert folded.recipe.merge.r == (3, 2)
    assert folded.tokens == (17, 14, 12)
    assert not folded.folded.spec.layer_scale
    assert folded.model.spec.layer_scale


def test_a_bundle_says_what_it_is(tiny_model: Callable[..., Model], tmp_path: Path, photos: ImageSet) -> None:
    folded = pipeline.optimize(tiny_model(), merge=2)
    bundle = pipeline.save(folded, tmp_path / "a.fold", images=photos)
    manifest = open_bundle(bundle.path).manifest
    assert manifest.tokens == (17, 15, 13)
    assert manifest.macs == sum(cost.macs for cost in folded.costs())
    assert manifest.model_digest == folded.model.digest()
    assert manifest.verified["median_relative_error"] < 1e-5
    assert manifest.fidelity is not None
    assert manifest.fidelity["images"] == 6
    assert 0.0 <= manifest.fidelity["agreement"] <= 1.0
    assert manifest.fidelity["cosine"] < 1.0


def test_without_merging_nothing_changes(tiny_model: Callable[..., Model], tmp_path: Path, photos: ImageSet) -> None:
    bundle = pipeline.save(pipeline.optimize(tiny_model()), tmp_path / "a.fold", images=photos)
    assert bundle.manifest.fidelity is not None
    assert bundle.manifest.fidelity["agreement"] == 1.0
    assert bundle.manifest.fidelity["cosine"] == pytest.approx(1.0, abs=1e-9)


def test_the_same_input_gives_the_same_digest(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    first = pipeline.save(pipeline.optimize(tiny_model(), merge=2), tmp_path / "a.fold")
    second = pipeline.save(pipeline.optimize(tiny_model(), merge=2), tmp_path / "b.fold")
    other = pipeline.save(pipeline.optimize(tiny_model(), merge=3), tmp_path / "c.fold")
    assert first.digest == second.digest != other.digest


def test_an_overflowing_model_never_becomes_a_bundle(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    model = tiny_model()
    huge = {name: (a * np.float32(1e30) if "fc" in name else a) for name, a in model.params.items()}
    with pytest.raises(EngineError, match="NaN or infinite"):
        pipeline.save(pipeline.optimize(model.with_params(model.spec, huge)), tmp_path / "a.fold")
    assert not (tmp_path / "a.fold").exists()


@pytest.mark.parametrize(
    ("bits", "target"), [(8, "portable"), (8, "cpu-vnni"), (8, "tensorrt-int8"), (8, "integer"), (4, "simulation")]
)
def test_a_quantized_model_becomes_a_bundle(
    tiny_model: Callable[..., Model], tmp_path: Path, photos: ImageSet, bits: int, target: str
) -> None:
    """Planned, calibrated, saved; opened again it computes what the simulation computes."""
    quant = QuantRecipe(weights=bits, activations=bits, method="minmax")
    folded = pipeline.optimize(tiny_model(), recipe=Recipe(merge=MergeRecipe(r=(2, 2)), quant=quant), target=target)
    assert folded.needs_calibration
    with pytest.raises(RecipeError, match="not calibrated"):
        pipeline.save(folded, tmp_path / "a.fold", images=photos)
    done = pipeline.calibrate_plan(folded, photos)
    assert not done.needs_calibration
    bundle = open_bundle(pipeline.save(done, tmp_path / "a.fold", images=photos).path)
    assert done.quantizers is not None
    assert load_quant_params(bundle.path / QUANTIZERS).digest() == done.quantizers.digest()
    assert bundle.manifest.calibration is not None
    assert bundle.manifest.calibration["quantizers"] == done.quantizers.digest()
    assert pipeline.recorded_images(bundle.manifest.calibration, None).paths == photos.paths
    pixels = np.random.default_rng(0).standard_normal((8, 3, 32, 32), dtype=np.float32)
    with open_session(bundle, engine=None if target == "simulation" else "onnxruntime") as session:
        found = session(pixels)
    expected = pipeline.run_reference(done, pixels)
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.min() < (0.02 if target.startswith("tensorrt") else 1e-5)
    assert np.median(errors) < 0.02


@pytest.mark.parametrize(("batch", "sizes"), [(None, (1, 8, 64)), ((2, 4, 16), (2, 4, 16))], ids=["default", "chosen"])
def test_a_bundle_for_tensorrt_says_how_its_engine_is_built(
    tiny_model: Callable[..., Model], tmp_path: Path, batch: tuple[int, int, int] | None, sizes: tuple[int, int, int]
) -> None:
    folded = pipeline.optimize(tiny_model(), target="tensorrt-fp16", batch=batch)
    target = open_bundle(pipeline.save(folded, tmp_path / "a.fold").path).manifest.target
    assert target["trtexec"] == trtexec_command(MODEL, sizes, image_size=(32, 32))
    assert target.get("batch") == (None if batch is None else list(batch))
    assert "trtexec" not in pipeline.save(pipeline.optimize(tiny_model()), tmp_path / "b.fold").manifest.target


@pytest.fixture
def int8(tiny_model: Callable[..., Model], tmp_path: Path, photos: ImageSet) -> tuple[Bundle, pipeline.Plan]:
    quant = QuantRecipe(method="minmax")
    folded = pipeline.optimize(tiny_model(), recipe=Recipe(quant=quant), target="tensorrt-int8", batch=(1, 2, 4))
    done = pipeline.calibrate_plan(folded, photos)
    return pipeline.save(done, tmp_path / "int8.fold"), done


@pytest.mark.skipif(engine_obstacle("tensorrt") is None, reason="TensorRT starts here")
def test_where_tensorrt_does_not_start_there_is_no_race(int8: tuple[Bundle, pipeline.Plan]) -> None:
    assert pipeline.race(*int8) is None


def test_where_tensorrt_starts_it_races_half_precision(int8: tuple[Bundle, pipeline.Plan]) -> None:
    """ONNX Runtime stands in for TensorRT; the float graph covers the same batches."""
    asked: list[tuple[str, object]] = []

    def stand_in(path: Path, engine: str, *, products: Any, batch: tuple[int, int, int] | None = None) -> Session:
        asked.append((engine, batch))
        return open_graph(path, "onnxruntime", literal=True)

    bundle, plan = int8
    with opened(pipeline.float_plan(plan), stand_in) as plain, open_session(bundle, engine="onnxruntime") as quantized:
        found = raced(plain, quantized, plan, Protocol(trials=3, seconds=0.05))
    assert asked == [("tensorrt", (1, 2, 4))]
    assert found.reason is None or "GPU" in found.reason
    assert pipeline.float_plan(plan).target.name == "tensorrt-fp16"


def test_a_recipe_file_is_resolved(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[merge]\nr = "2:-1"\nprop_attn = false\n')
    recipe = pipeline.read_recipe(path, tiny_model().spec)
    assert recipe.merge == MergeRecipe(r=(4, 0), prop_attn=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[merge]\nR = 2\n", "merge.R"),
        ("[merg]\nr = 2\n", "merge"),
        ("[merge\n", "not valid TOML"),
        ("[merge]\nr = 99\n", "block 0"),
        ("[merge]\nprop_attn = 1\n", "true or false"),
    ],
)
def test_bad_recipes_are_named(tiny_model: Callable[..., Model], tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        pipeline.read_recipe(path, tiny_model().spec)


def test_a_missing_recipe_is_named(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        pipeline.read_recipe(tmp_path / "no.toml", tiny_model().spec)


def test_contradictions_and_unknown_targets_are_refused(tiny_model: Callable[..., Model]) -> None:
    with pytest.raises(RecipeError, match="not both"):
        pipeline.optimize(tiny_model(), merge=2, recipe=Recipe())
    with pytest.raises(TargetError, match="cpu"):
        pipeline.optimize(tiny_model(), target="cpus")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.toml")), ids=lambda p: p.stem
)
def test_named_recipes_fit_a_base_model(path: Path) -> None:
    recipe = pipeline.read_recipe(path, vit_base())
    assert recipe.quant is not None or sum(recipe.merge.r) > 0
    assert not recipe.is_lossless


def test_ranges_may_come_from_the_model_that_does_not_merge(tiny_model: Callable[..., Model], photos: ImageSet) -> None:
    merge = {"calibrated merged": 3, "calibrated unmerged": 3, "not merged": 0}
    found = {}
    for name, r in merge.items():
        asked = QuantRecipe(method="minmax", calibrate_merged=name == "calibrated merged")
        plan = pipeline.optimize(tiny_model(), merge=r, quant=asked, target="portable")
        found[name] = pipeline.calibrate_plan(plan, photos).quantizers.digest()
    assert found["calibrated unmerged"] == found["not merged"] != found["calibrated merged"]
    assert not QuantRecipe().calibrate_merged
    assert Recipe(merge=MergeRecipe(r=(2,)), quant=QuantRecipe()).to_dict()["quant"]["calibrate_merged"] is False
    assert "calibrate_merged" not in Recipe(quant=QuantRecipe()).to_dict()["quant"]
