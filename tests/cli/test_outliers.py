"""`outliers`, `optimize --registers`, `ladder --registers` and `evaluate --zero-shot`, as users type them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from invoking import DEMO, error, run, run_json
from PIL import Image

from vitfold.artifacts.bundle import open_bundle
from vitfold.recipe import RegistersRecipe

EXPLICIT = """
[merge]
r = [1, 0, 0, 0, 0, 0]

[quant]
calibration_size = 8

[registers]
remedy = "regcache"
site = "blocks.2.mlp.fc2"
start = 1
average = 4
tau = 2.5
block = 3
deletions = 1
"""


def test_outliers_says_where_they_are_and_what_helps(small, few, folder):
    picture, document = folder / "sinks.png", folder / "outliers.json"
    options = ("--images", few, "--calibration-size", 12, "--picture", picture, "-o", document)
    found = run_json("outliers", *small, *options)
    assert [row["block"] for row in found["blocks"]] == list(range(6))
    assert all(row["max_norm"] >= row["mean_norm"] > 0 for row in found["blocks"])
    assert re.fullmatch(r"blocks\.\d\.(attn\.(qkv|proj)|mlp\.fc[12])", found["sensitive_site"])
    assert found["layers"][0]["layer"] == found["sensitive_site"]
    assert found["remedies"][0]["name"] == "none"
    assert {"name", "max_norm", "cosine", "sqnr_db", "top1", "recipe"} <= set(found["remedies"][0])
    assert {row["name"] for row in found["remedies"]} >= {"prefix", "delete", "regcache", "leave-out", "float-sinks"}
    assert found["likeness"]["outliers"] <= 1 >= found["likeness"]["others"]
    assert f"of the remedies against sinks {found['chosen']} is taken" in found["advice"]
    assert found["chosen"] in {row["name"] for row in found["remedies"]}
    for row in found["remedies"][1:]:
        assert RegistersRecipe(**{**row["recipe"], "layers": tuple(row["recipe"].get("layers", ()))}).resolved
    assert json.loads(document.read_text()) == found
    with Image.open(picture) as drawn:
        assert drawn.width > 400
    shown = run("outliers", *small, *options[:4]).stdout
    assert "W8A8, plain ranges: what helps (* chosen)\n" in shown
    assert "\n  prefix" in shown
    assert found["advice"].split()[0] in shown


def test_registers_are_found_kept_and_repeated(small, few, folder):
    bundle, again = folder / "auto.fold", folder / "again.fold"
    options = (
        "--quant",
        "w8a8",
        "--registers",
        "regcache",
        "--images",
        few,
        "--calibration-size",
        8,
        "--keep-slower",
        "--method",
        "minmax",
    )
    found = run_json("optimize", *small, *options, "-o", bundle)
    assert found["recipe"]["registers"]["remedy"] == "regcache"
    assert found["recipe"]["registers"]["site"] == found["remedies"]["sensitive_site"]
    assert found["remedies"]["chosen"] == "regcache"
    deleted = found["recipe"]["registers"]["deletions"]
    within = found["recipe"]["registers"].get("block", 0) > 0 or "deletion_site" in found["recipe"]["registers"]
    assert found["tokens"][-1] == found["tokens"][0] - deleted * within
    assert "registers  regcache (site" in run("inspect", bundle).stdout
    assert run_json("inspect", bundle)["recipe"] == found["recipe"]
    run("optimize", "--from", bundle, "-o", again)
    assert open_bundle(again).digest == open_bundle(bundle).digest


def test_a_recipe_says_everything_and_goes_with_merging(small, few, folder):
    recipe, bundle = folder / "registers.toml", folder / "explicit.fold"
    recipe.write_text(EXPLICIT)
    found = run_json("optimize", *small, "--recipe", recipe, "--images", few, "--keep-slower", "-o", bundle)
    assert found["tokens"] == [5, 4, 4, 3, 3, 3, 3]
    assert "remedies" not in found
    assert found["recipe"]["registers"]["tau"] == 2.5
    evaluated = run_json("evaluate", bundle, "--images", few)
    assert evaluated["cosine"] > 0.5


def test_a_ladder_has_a_line_for_each_remedy(small, few, folder):
    output = folder / "ladder.json"
    options = (
        "--images",
        few,
        "--calibration-images",
        few,
        "--calibration-size",
        8,
        "--methods",
        "minmax",
        "--seeds",
        "0",
    )
    chosen = ("--quant", "w8a8", "--both", "", "--registers", "none,leave-out", "-o", output)
    found = run_json("ladder", *small, *options, *chosen)
    assert [row.get("registers") for row in found["rows"]] == [None, "leave-out"]
    assert found["rows"][1]["registers_recipe"]["remedy"] == "leave-out"
    assert "minmax + leave-out" in run("ladder", *small, *options, *chosen).stdout
    assert json.loads(output.read_text())["rows"] == found["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quant", "w8a8", "--registers", "prefixes"), "registers.remedy cannot be 'prefixes'; did you mean prefix?"),
        (("--registers", "auto"), "registers help quantization and cost something without it; add --quant w8a8"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_wrong_registers_are_refused(small, few, folder, arguments, message):
    assert message in error("optimize", *small, *arguments, "--images", few, "-o", folder / "no.fold")
    assert not (folder / "no.fold").exists()


def test_an_unknown_key_offers_the_nearest(small, few, folder):
    recipe = folder / "typo.toml"
    recipe.write_text('[quant]\nweights = 8\n[registers]\nremedy = "prefix"\ndeletion = 3\n')
    said = error("optimize", *small, "--recipe", recipe, "--images", few, "-o", folder / "no.fold")
    assert "unknown key registers.deletion; did you mean deletions or deletion_site?" in said


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Path:
    """A bundle whose output is an embedding of width 64."""
    made = folder / "encoder.fold"
    demo = DEMO / "images"
    arguments = ("--weights", "random", "--image-size", 32, "--num-classes", 0, "--images", demo)
    run("optimize", "timm:test_vit", *arguments, "-o", made)
    return made


def test_zero_shot_takes_the_nearest_text(encoder, few, folder):
    width = open_bundle(encoder).manifest.spec.output_width
    texts = np.random.default_rng(0).standard_normal((10, width)).astype(np.float32)
    np.save(folder / "texts.npy", texts)
    found = run_json("evaluate", encoder, "--images", few, "--zero-shot", folder / "texts.npy")
    assert found["agreement"] == 1.0
    assert found["zero_shot"]["unfolded_top1"] == found["top1"]
    assert 0.0 <= found["top1"] <= found["top5"] <= 1.0
    assert found["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert "unfolded" in run("evaluate", encoder, "--images", few, "--zero-shot", folder / "texts.npy").stdout
    np.save(folder / "narrow.npy", texts[:, :-1])
    said = error("evaluate", encoder, "--images", few, "--zero-shot", folder / "narrow.npy")
    assert f"the model's image embeddings have {width}" in said
    names = folder / "names.txt"
    names.write_text("cat\ndog\n")
    said = error("evaluate", encoder, "--images", few, "--zero-shot", "hf:/nowhere", "--class-names", names)
    assert "2 names for 10 class folders" in said
    said = error("evaluate", encoder, "--images", few / "cat", "--zero-shot", folder / "texts.npy")
    assert "one sub-folder of --images per class" in said


def test_zero_shot_options_need_texts_and_an_encoder(encoder, few, folder, small):
    assert "need --zero-shot" in error("evaluate", encoder, "--images", few, "--template", "{}", code=2)
    classifier = folder / "classifier.fold"
    run("optimize", *small, "-o", classifier)
    said = error("evaluate", classifier, "--images", few, "--zero-shot", folder / "texts.npy")
    assert "this model's output is logits" in said
