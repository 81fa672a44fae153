"""Compensation in the pipeline: which images, what a bundle records of it, what is kept, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from picturing import gradient_pictures
from vitfold import pipeline
from vitfold.artifacts.bundle import open_bundle
from vitfold.artifacts.cache import cache_entries
from vitfold.engines import open_session
from vitfold.errors import CalibrationError, RecipeError
from vitfold.images import ImageSet
from vitfold.model import Model
from vitfold.pipeline import compensate_plan, divide_for_compensation, recorded_division
from vitfold.pipeline.pruning import pruning_losses
from vitfold.pipeline.search import enough_for_refitting
from vitfold.quant import Progress
from vitfold.recipe import QuantRecipe


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """350 small pictures of random gradients."""
    return gradient_pictures(tmp_path_factory.mktemp("many"), 350)


def test_images_are_divided_once_and_found_again(many: ImageSet) -> None:
    chosen, others = divide_for_compensation(many)
    assert (len(chosen.paths), len(others.paths)) == (350 - 87, 87)
    assert not set(chosen.paths) & set(others.paths)
    record = {"root": many.root, "digest": chosen.digest()}
    assert recorded_division(record, None)[0].paths == chosen.paths
    with pytest.raises(CalibrationError, match="are not those that merging was compensated on"):
        recorded_division({**record, "digest": "0" * 64}, None)


def test_too_few_images_are_refused_before_any_work(many: ImageSet) -> None:
    with pytest.raises(CalibrationError, match="225 of 300 are too few; give at least 342"):
        divide_for_compensation(many.first(300))


@pytest.mark.parametrize("bits", [None, 8])
def test_a_compensated_model_becomes_a_bundle(
    tiny_model: Callable[..., Model], tmp_path: Path, own_cache: Path, many: ImageSet, bits: int | None
) -> None:
    """What was refitted stands in the manifest; the graph holds the refitted weights, rounded or not."""
    quant = None if bits is None else QuantRecipe(weights=bits, activations=bits, method="minmax")
    model = tiny_model(layer_scale=True)
    plan = pipeline.optimize(model, merge=3, compensate=True, quant=quant, target="cpu" if bits is None else "portable")
    with pytest.raises(RecipeError, match="call compensate_plan"):
        pipeline.save(plan, tmp_path / "a.fold") if bits is None else pipeline.calibrate_plan(plan, many.first(4))
    chosen, others = divide_for_compensation(many)
    done = compensate_plan(plan, chosen)
    assert not done.needs_compensation
    assert done.compensation is not None
    assert done.compensation["error_after"] < done.compensation["error_before"]
    if bits is not None:
        done = pipeline.calibrate_plan(done, chosen.first(16))
    bundle = open_bundle(pipeline.save(done, tmp_path / "a.fold", images=others).path)
    assert bundle.manifest.recipe.merge.compensate
    assert bundle.manifest.compensation == done.compensation
    pixels = np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32)
    with open_session(bundle) as session:
        found = session(pixels)
    np.testing.assert_allclose(found, pipeline.run_reference(done, pixels), rtol=0.05, atol=0.05 * np.abs(found).max())
    plain = pipeline.run_reference(pipeline.optimize(model, merge=3), pixels)
    assert np.abs(found - plain).max() > 0.01 * np.abs(plain).max()


def test_the_second_time_it_is_read_from_the_cache(
    tiny_model: Callable[..., Model], own_cache: Path, many: ImageSet
) -> None:
    plan = pipeline.optimize(tiny_model(), merge=3, compensate=True)
    first = compensate_plan(plan, many)
    assert len(list((own_cache / "compensation").glob("*.safetensors"))) == 1
    second = compensate_plan(plan, many)
    assert first.compensation == second.compensation
    assert first.folded.digest() == second.folded.digest() != plan.folded.digest()
    other = compensate_plan(
        replace(plan, recipe=pipeline.optimize(tiny_model(), merge=2, compensate=True).recipe), many
    )
    assert other.folded.digest() != first.folded.digest()


def test_without_merging_nothing_is_to_be_done(tiny_model: Callable[..., Model], many: ImageSet) -> None:
    plan = pipeline.optimize(tiny_model(), merge=0, compensate=True)
    assert compensate_plan(plan, many) is plan


def test_whoever_is_interrupted_measures_no_block_twice(
    tiny_model: Callable[..., Model], own_cache: Path, many: ImageSet
) -> None:
    """What was kept of the first block is taken as it is, even where it is not what would be measured."""
    model = tiny_model()

    def stop(step: str) -> None:
        if "2/" in step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruning_losses(model, many, progress=Progress(step=stop))
    (entry,) = (one.path for one in cache_entries() if one.kind == "pruning")
    record = json.loads(load_file(entry)["record"].tobytes())
    record["1"]["32"] = 0.123
    save_file({"record": np.frombuffer(json.dumps(record).encode(), np.uint8)}, entry)
    losses = pruning_losses(model, many)
    assert losses.units[0][32] == 0.123
    assert losses.units[1][32] != 0.123
    assert pruning_losses(model, many) == losses


def test_a_search_refits_on_images_that_a_bundle_finds_again(many: ImageSet) -> None:
    chosen = enough_for_refitting(many)
    assert chosen is not None
    fewer = chosen.sample(300, seed=0)
    record = {"root": many.root, "images": 300, "digest": fewer.digest()}
    assert recorded_division(record, None)[0].paths == fewer.paths
    assert enough_for_refitting(many.first(255)) is None
