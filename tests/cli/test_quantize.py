"""Quantization by hand: what a user types, what comes back, and what every mistake says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoking import RANDOM, error, run, run_json
from PIL import Image
from safetensors.numpy import load_file, save_file

from vitfold import pipeline
from vitfold.artifacts.bundle import open_bundle
from vitfold.artifacts.digested import reserve_bundle
from vitfold.cli.finishing import make_bundle, publish
from vitfold.cli.optimized import OptimizeResult, report_made
from vitfold.images import find_images
from vitfold.pipeline.racing import NARROW, unmerged_plan
from vitfold.quantizer import load_quant_params
from vitfold.recipe import MergeRecipe, QuantRecipe, Recipe
from vitfold.sources import load_source

QUICK = ("--method", "minmax", "--calibration-size", "8")


@pytest.fixture(scope="module")
def quantized(folder: Path, few: Path) -> Path:
    path = folder / "w8a8.fold"
    run("optimize", "demo", "-o", path, "--quant", "w8a8", "--merge", "2", "--images", few, "--keep-slower", *QUICK)
    return path


@pytest.fixture(scope="module")
def simulated(folder: Path, few: Path, small: tuple[str, ...]) -> Path:
    run("optimize", *small, "-o", folder / "w4a4.fold", "--quant", "w4a4", "--images", few, *QUICK)
    return folder / "w4a4.fold"


def test_a_quantized_bundle_says_what_it_is(quantized: Path, few: Path) -> None:
    bundle = open_bundle(quantized)
    quant, record = bundle.manifest.recipe.quant, bundle.manifest.calibration
    assert quant is not None
    assert record is not None
    assert (quant.scheme, quant.method, quant.attention in (True, False)) == ("W8A8", "minmax", True)
    assert str(bundle.manifest.target["name"]).startswith("cpu-")
    assert len(record["images"]) == 8
    assert record["seed"] == 0
    assert record["method"]["name"] == "minmax"
    assert all((few / image["path"]).is_file() and len(image["sha256"]) == 64 for image in record["images"])
    assert bundle.size_bytes < 30e6, "a quarter of the float bundle"
    assert bundle.manifest.fidelity is not None
    assert bundle.manifest.fidelity["images"] == 12, "calibration images take no part in the comparison"
    assert bundle.manifest.fidelity["cosine"] > 0.98
    inspected = run("inspect", quantized).stdout
    assert "W8A8 by minmax" in inspected


def test_a_bundle_says_what_its_work_is_as_when_it_was_made(folder: Path, few: Path, quantized: Path) -> None:
    """Of every form: float, fused, Q/DQ, reordered, narrow, simulated."""
    path, quant = folder / "work.fold", ("--quant", "w8a8", "--images", few, "--keep-slower", *QUICK)
    for options in (
        ("--merge", "2"),
        ("--merge", "2", "--target", "portable", *quant),
        ("--target", "openvino", *quant),
        ("--target", "integer", *quant),
        ("--quant", "w4a4", "--images", few, *QUICK),
    ):
        made = run_json("optimize", *RANDOM, "-o", path, "--overwrite", *options)
        found = run_json("inspect", path)
        expected = {key: value for key, value in made["energy"].items() if key != "original_uj"}
        assert found["energy"] == expected
        assert (found["bytes"], found["macs"], found["integer"]) == (made["bytes"], made["macs"], made["integer"])
        assert (found["integer"] is None) == ("--quant" not in options)
    row = run_json("bench", quantized, "--seconds", "0.1", "--trials", "1", "--images", few)["rows"][0]
    inspected = run_json("inspect", quantized)
    assert row["work"] == {key: inspected[key] for key in ("integer", "macs", "bytes", "energy")}
    shown = run("inspect", quantized).stdout
    for words in ("of the multiply-accumulates", "MB moved per image", "mJ per image (Horowitz"):
        assert words in shown


def test_a_quantized_bundle_predicts_and_evaluates(quantized: Path, few: Path) -> None:
    values = run_json("evaluate", quantized, "--images", few)
    assert values["agreement"] >= 0.8
    assert values["top1"] >= 0.7
    top = run_json("predict", quantized, few / "ship" / sorted(p.name for p in (few / "ship").iterdir())[0])
    assert top[0]["top"][0]["label"] == "ship"


def test_a_bundle_is_made_again_from_itself(quantized: Path, few: Path, folder: Path) -> None:
    values = run_json("optimize", "--from", quantized, "-o", folder / "again.fold", "--images", few)
    again, first = open_bundle(folder / "again.fold"), open_bundle(quantized)
    assert values["bundle"] == str(folder / "again.fold")
    assert again.manifest.calibration is not None
    assert first.manifest.calibration is not None
    assert again.manifest.calibration["quantizers"] == first.manifest.calibration["quantizers"]
    assert (again.path / "model.onnx").read_bytes() == (first.path / "model.onnx").read_bytes()
    assert again.digest == first.digest


def test_a_changed_calibration_image_is_noticed(quantized: Path, few: Path, folder: Path) -> None:
    moved = folder / "moved"
    shutil.copytree(few, moved)
    record = open_bundle(quantized).manifest.calibration
    assert record is not None
    changed = moved / record["images"][0]["path"]
    changed.write_bytes(changed.read_bytes() + b"\0")
    message = error("optimize", "--from", quantized, "-o", folder / "x.fold", "--images", moved)
    assert "has changed since" in message
    changed.unlink()
    message = error("optimize", "--from", quantized, "-o", folder / "x.fold", "--images", moved)
    assert "is gone" in message
    assert "--images DIR" in message
    assert not (folder / "x.fold").exists()


def test_what_no_engine_executes_is_simulated_and_never_timed(simulated: Path, few: Path) -> None:
    bundle = open_bundle(simulated)
    assert bundle.manifest.simulated
    assert not (simulated / "model.onnx").exists()
    assert run_json("evaluate", simulated, "--images", few)["images"] == 20
    message = error("bench", simulated, "--seconds", "0.1", "--trials", "1")
    assert "simulated" in message
    assert "vitfold evaluate" in message
    assert "(simulated)" in run("inspect", simulated).stdout


def test_sensitivity_ranks_every_site(few: Path, small: tuple[str, ...]) -> None:
    values = run_json("sensitivity", *small, "--images", few, "--limit", "4", *QUICK)
    sites = values["sites"]
    assert len(sites) == 6 * 4 + 1
    assert [one["noise_ratio"] for one in sites] == sorted((one["noise_ratio"] for one in sites), reverse=True)
    assert sum(one["noise_ratio"] for one in sites) == pytest.approx(1.0)
    assert all(0 < one["macs_ratio"] < 0.2 for one in sites)


def test_the_most_sensitive_sites_stay_float(folder: Path, few: Path, small: tuple[str, ...]) -> None:
    path = folder / "kept.fold"
    values = run_json(
        *("optimize", *small, "-o", path, "--quant", "w8a8", "--images", few),
        *("--keep-float", "2", "--keep-slower", *QUICK),
    )
    kept = [site for site, scheme in values["recipe"]["quant"]["sites"].items() if scheme == "float"]
    assert len(kept) == 2
    calibration = run_json("inspect", path)["recipe"]["quant"]["sites"]
    assert set(calibration) == set(kept)


def test_the_race_is_reported(folder: Path, few: Path, small: tuple[str, ...]) -> None:
    values = run_json("optimize", *small, "-o", folder / "race.fold", "--quant", "w8a8", "--images", few, *QUICK)
    race = values["race"]
    assert race["kept"] == ("quantized" if race["speed_up"]["median"] > 1.0 else "float")
    assert (race["reason"] is None) == (race["speed_up"]["median"] > 1.0)
    assert (open_bundle(folder / "race.fold").manifest.recipe.quant is not None) == (race["kept"] == "quantized")


@pytest.fixture(scope="module")
def calibrated(few: Path, small: tuple[str, ...]) -> pipeline.Plan:
    model = load_source(small[0], arch="test_vit", image_size=32, num_classes=10).model
    plan = pipeline.optimize(model, recipe=Recipe(quant=QuantRecipe(method="minmax", calibration_size=8)))
    return pipeline.calibrate_plan(plan, find_images(few))


def raced(plan: pipeline.Plan, path: Path, race: pipeline.Race, *, keep_slower: bool = False) -> OptimizeResult:
    """What `optimize` makes of a plan where the race ends as given."""
    with reserve_bundle(path, overwrite=True) as place:
        made = make_bundle(plan, None, place, lambda _: None, race=lambda *_: race, keep_slower=keep_slower)
        return publish(made, place, None)


def test_a_faster_bundle_is_kept(calibrated: pipeline.Plan, tmp_path: Path, capsys: Any) -> None:
    won = pipeline.Race(median=1.5, iqr=0.1, reason=None)
    report_made(raced(calibrated, tmp_path / "won.fold", won), None, json=False)
    said = capsys.readouterr()
    assert "1.50x" in said.out
    assert "was kept" not in said.err
    assert open_bundle(tmp_path / "won.fold").manifest.recipe.quant is not None


def test_a_slower_bundle_gives_way_to_the_float_one(calibrated: pipeline.Plan, tmp_path: Path, capsys: Any) -> None:
    lost, path = pipeline.Race(median=0.8, iqr=0.1, reason="it is a test"), tmp_path / "lost.fold"
    report_made(raced(calibrated, path, lost), None, json=False)
    said = capsys.readouterr().err
    assert "0.80x" in said
    assert "it is a test" in said
    assert "float model was kept" in said
    assert open_bundle(path).manifest.recipe.quant is None
    report_made(raced(calibrated, path, lost, keep_slower=True), None, json=False)
    assert "kept all the same" in capsys.readouterr().err
    assert open_bundle(path).manifest.recipe.quant is not None


def test_merging_is_raced_against_the_same_without_it(
    folder: Path, few: Path, small: tuple[str, ...], capsys: Any
) -> None:
    path = folder / "merging.fold"
    arguments = ("optimize", *small, "-o", path, "--images", few, "--overwrite")
    for quant in ((), ("--quant", "w8a8", "--keep-slower", *QUICK)):
        merging = run_json(*arguments, *quant, "--merge", "2")["merging"]
        assert merging["speed_up"]["median"] > 0
        assert (merging["reason"] is None) == (merging["speed_up"]["median"] > 1.0)
    assert "over the same without it" in run(*arguments, "--merge", "2").stdout
    assert run_json(*arguments)["merging"] is None
    lost = pipeline.Race(median=0.9, iqr=0.1, reason="it is a test")
    plan = pipeline.optimize(load_source(small[0], arch="test_vit", image_size=32, num_classes=10).model, merge=2)
    with reserve_bundle(path, overwrite=True) as place:
        made = make_bundle(*(plan, None, place, lambda _: None), race=None, merging=lambda *_: lost, keep_slower=False)
        report_made(publish(made, place, None), None, json=False)
    assert "merging does not pay on this machine (0.90x): it is a test" in capsys.readouterr().err
    assert any(open_bundle(path).manifest.recipe.merge.r), "it is said, and left to the user"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with reserve_bundle(path, overwrite=True) as place:
        made = make_bundle(*(plan, None, place, lambda _: None), race=None, merging=full, keep_slower=False)
        report_made(publish(made, place, None), None, json=False)
    assert "merging was not raced against none" in capsys.readouterr().err
    assert open_bundle(path).size_bytes > 0


def test_a_plan_without_merging_has_the_same_ranges(calibrated: pipeline.Plan) -> None:
    merged = replace(calibrated, recipe=replace(calibrated.recipe, merge=MergeRecipe(r=(2,) * 6, compensate=True)))
    plain = unmerged_plan(merged)
    assert plain.quantizers is calibrated.quantizers
    assert plain.recipe == replace(calibrated.recipe, merge=MergeRecipe(r=(0,) * 6))


def test_a_ladder_goes_on_where_it_stopped(folder: Path, few: Path, small: tuple[str, ...]) -> None:
    path = folder / "ladder.json"
    images = ("--images", few, "--calibration-images", few)
    base = ("ladder", *small, *images, "--limit", "6", "--calibration-size", "4")
    first = run_json(*base, "--methods", "minmax", "--quant", "w8a8,w4a4", "--seeds", "0", "-o", path)
    assert [(row["scheme"], row["engine"]) for row in first["rows"]] == [
        ("W8A8", "onnxruntime"),
        ("W4A4", "simulation"),
    ]
    before = path.read_text()
    again = run_json(*base, "--methods", "minmax", "--quant", "w8a8,w4a4", "--seeds", "0", "-o", path)
    assert again["rows"] == json.loads(before)["rows"]
    more = run_json(*base, "--methods", "minmax,mse", "--quant", "w4a4", "--seeds", "0", "-o", path)
    assert [row["method"] for row in more["rows"]] == ["minmax", "minmax", "mse"]
    assert "minutes are numbers" in error(*base, "--polish", "0,soon", code=2)
    message = error("ladder", *small, *images, "--limit", "5", "-o", path)
    assert "another model, merging or image folder" in message
    (folder / "not.json").write_text("[]")
    assert "not the JSON of a ladder" in error(*base, "-o", folder / "not.json")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--quant", "w9a9"), "w8a8"),
        (("--quant", "int8"), "w8a8"),
        (("--quant", "w8a8", "--method", "ptq4vti"), "ptq4vit"),
        (("--quant", "fp8", "--target", "tensorrt-fp8", "--polish", "2"), "fp8 has none"),
        (("--quant", "w6a6", "--target", "openvino"), "--target simulation"),
        (("--target", "integer"), "add --quant w8a8"),
    ],
)
def test_what_cannot_be_quantized_says_what_can(
    folder: Path, few: Path, arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in error("optimize", *RANDOM, "-o", folder / "bad.fold", "--images", few, *arguments)
    assert not (folder / "bad.fold").exists()


def test_polishing_goes_with_a_quantization_that_is_named(folder: Path, few: Path) -> None:
    arguments = ("optimize", *RANDOM, "-o", folder / "bad.fold", "--images", few, "--polish", "2")
    assert "--polish needs --quant" in error(*arguments, code=2)
    assert "a search chooses" in error(*arguments, "--quant", "w8a8", "--max-drop", "1", code=2)


def test_polishing_and_codes_handed_on_exclude_each_other(folder: Path, few: Path) -> None:
    recipe = folder / "polished-codes.toml"
    recipe.write_text("[quant]\noutputs = true\npolish_minutes = 1.0\n")
    arguments = ("optimize", *RANDOM, "-o", folder / "bad.fold", "--images", few, "--recipe", recipe)
    message = error(*arguments, "--target", "integer")
    assert "leave --polish out, or set quant.outputs = false" in message
    assert not (folder / "bad.fold").exists()


def test_quantization_asks_for_images(folder: Path) -> None:
    assert "--images DIR" in error("optimize", *RANDOM, "-o", folder / "bad.fold", "--quant", "w8a8")


def test_bad_images_are_named_before_calibration_starts(folder: Path, few: Path) -> None:
    mixed = folder / "mixed-images"
    mixed.mkdir()
    for i, path in enumerate(sorted(path for name in ("cat", "dog", "ship") for path in (few / name).iterdir())):
        shutil.copy(path, mixed / f"{i}.jpg")
    (mixed / "z.jpg").write_text("junk")
    arguments = ("optimize", *RANDOM, "-o", folder / "mixed-images.fold", "--quant", "w8a8", "--images", mixed)
    options = ("--method", "minmax", "--calibration-size", "6", "--keep-slower")
    message = error(*arguments, *options)
    assert "z.jpg" in message
    assert "collecting" not in message
    result = run(*arguments, *options, "--skip-bad")
    assert "z.jpg" in result.stderr


def test_an_existing_bundle_is_noticed_before_calibration_starts(quantized: Path, few: Path) -> None:
    message = error("optimize", "demo", "-o", quantized, "--quant", "w8a8", "--images", few)
    assert "--overwrite" in message
    assert "collecting" not in message


def test_one_image_is_too_few(folder: Path, few: Path) -> None:
    one = folder / "one"
    one.mkdir()
    shutil.copy(next((few / "ship").iterdir()), one)
    message = error("optimize", *RANDOM, "-o", folder / "bad.fold", "--quant", "w8a8", "--images", one)
    assert "too few" in message


def test_a_plan_whose_glob_matches_nothing_names_the_nearest_site(folder: Path, few: Path) -> None:
    recipe = folder / "plan.toml"
    recipe.write_text('[quant]\nmethod = "minmax"\n[quant.sites]\n"blocks.3.attn.qvk" = "float"\n')
    message = error("optimize", *RANDOM, "-o", folder / "bad.fold", "--images", few, "--recipe", recipe)
    assert "blocks.3.attn.qkv" in message
    recipe.write_text('[quant]\nmethdo = "minmax"\n')
    assert "method" in error("optimize", *RANDOM, "-o", folder / "bad.fold", "--images", few, "--recipe", recipe)
    recipe.write_text("[quant]\nweights = 16\n")
    assert "2 to 8 bits" in error("optimize", *RANDOM, "-o", folder / "bad.fold", "--images", few, "--recipe", recipe)


def test_a_mixed_plan_from_a_recipe_keeps_sites_float(folder: Path, few: Path, small: tuple[str, ...]) -> None:
    recipe = folder / "mixed.toml"
    recipe.write_text('[quant]\nmethod = "minmax"\ncalibration_size = 6\n[quant.sites]\n"blocks.[45].*" = "float"\n')
    path = folder / "mixed.fold"
    run("optimize", *small, "-o", path, "--images", few, "--recipe", recipe, "--keep-slower")
    quantizers = load_quant_params(path / "quantizers.safetensors")
    assert "blocks.3.mlp.fc1.w" in quantizers
    assert not any(site.startswith(("blocks.4.", "blocks.5.")) for site in quantizers)


def test_constant_images_name_the_site(folder: Path, small: tuple[str, ...]) -> None:
    grey = folder / "grey"
    grey.mkdir()
    for i in range(4):
        Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(grey / f"{i}.png")
    weights = load_file(small[0])
    for name in list(weights):
        if name.startswith("blocks.0.norm1"):
            weights[name] = np.zeros_like(weights[name])
    save_file(weights, folder / "flat.safetensors")
    message = error(
        *("optimize", folder / "flat.safetensors", *small[1:], "-o", folder / "bad.fold"),
        *("--quant", "w8a8", "--images", grey, *QUICK),
    )
    assert "blocks.0.attn.qkv" in message
    assert "constant" in message


def test_reordering_leaves_no_dequantization_before_a_product(folder: Path, few: Path) -> None:
    found = {}
    for target in ("portable", "integer"):
        path = folder / f"count-{target}.fold"
        arguments = ("--quant", "w8a8", "--images", few, "--target", target, "--keep-slower", *QUICK)
        found[target] = run_json("optimize", *RANDOM, "-o", path, *arguments)["integer"]
    assert found["portable"]["dequantized_operands"] > 0
    assert found["integer"]["dequantized_operands"] == 0
    assert 0.5 < found["portable"]["macs_ratio"] <= found["integer"]["macs_ratio"] < 1.0


def test_the_fastest_engine_is_found_by_a_race(folder: Path, few: Path) -> None:
    path = folder / "fastest.fold"
    arguments = ("--quant", "w8a8", "--images", few, "--target", "fastest", "--keep-slower", *QUICK)
    assert run_json("optimize", *RANDOM, "-o", path, *arguments)["target"] == open_bundle(path).manifest.target["name"]
    assert open_bundle(path).manifest.target["engine"] in ("onnxruntime", "openvino", NARROW)


def test_other_targets_are_written_too(folder: Path, few: Path) -> None:
    for target in ("portable", "integer", "cpu-avx2", "tensorrt-int8"):
        path = folder / f"{target}.fold"
        run(
            *("optimize", *RANDOM, "-o", path, "--quant", "w8a8", "--images", few, "--target", target),
            *("--keep-slower", *QUICK),
        )
        assert open_bundle(path).manifest.target["name"] == target
