"""What commands say about classes, heads and orientation, as a user types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from invoking import error, run, run_json
from PIL import Image

BRANDS = {0: "red", 1: "green", 2: "blue"}


def write_classifier(folder: Path, **options: Any) -> str:
    """A folder of transformers with a random classifier whose outputs are far from zero."""
    config = hf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = hf.ViTForImageClassification(config).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    module.save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, few: Path) -> dict[str, Path]:
    """One bundle per kind of head."""
    folder = tmp_path_factory.mktemp("heads")
    names = {"id2label": BRANDS, "label2id": {name: i for i, name in BRANDS.items()}}
    options = {
        "labels": {"problem_type": "multi_label_classification", **names},
        "one": {"num_labels": 1},
        "number": {"num_labels": 1, "problem_type": "regression"},
    }
    for name, values in options.items():
        source = write_classifier(folder / name, **values)
        run("optimize", source, "--merge", 2, "--images", few, "-o", folder / f"{name}.fold")
    return {name: folder / f"{name}.fold" for name in options}


@pytest.fixture(scope="module")
def photo(few: Path) -> Path:
    return next((few / "cat").iterdir())


def test_labels_of_their_own_are_shown_from_the_threshold_on(made, photo) -> None:
    (found,) = run_json("predict", made["labels"], photo)
    assert {entry["label"] for entry in found["top"]} == set(BRANDS.values())
    assert [entry["chosen"] for entry in found["top"]] == [entry["probability"] >= 0.5 for entry in found["top"]]
    every = run("predict", made["labels"], photo, "--threshold", 0).stdout
    assert all(name in every for name in BRANDS.values())
    assert "none; " in run("predict", made["labels"], photo, "--threshold", 1).stdout


def test_one_logit_is_not_always_sure(made, photo) -> None:
    (found,) = run_json("predict", made["one"], photo)
    assert 0 < found["top"][0]["probability"] < 1


def test_a_regression_is_printed_as_numbers(made, photo) -> None:
    (found,) = run_json("predict", made["number"], photo)
    assert set(found) == {"image", "values"}
    assert "values" in run("predict", made["number"], photo).stdout


def test_fidelity_of_each_head_has_figures_that_can_fail(made, few) -> None:
    labels = run_json("evaluate", made["labels"], "--images", few)
    assert 0 < labels["probability_error"] < 0.5
    assert 0.5 < labels["agreement"] <= 1
    assert labels["top1"] is None
    number = run_json("evaluate", made["number"], "--images", few)
    assert 0 < number["relative_error"] < 1
    assert (number["agreement"], number["cosine"]) == (None, None)
    assert number["sqnr_db"] > 0
    shown = run("evaluate", made["labels"], "--images", few)
    assert "of labels" in shown.stdout
    assert "mean difference of probabilities" in shown.stdout
    assert "no top-1, because the model answers every label by itself" in shown.stderr
    assert "of the mean absolute value" in run("evaluate", made["number"], "--images", few).stdout
    assert "regression" in run("inspect", made["number"]).stdout


@pytest.mark.parametrize(
    ("name", "gate", "said"),
    [
        ("labels", ("--max-error", "0"), "the error is 0."),
        ("labels", ("--min-sqnr", "200"), "SQNR (dB) is "),
        ("labels", ("--min-top1", "0.1"), "top-1 is not measured"),
        ("number", ("--max-error", "0"), "the error is 0."),
        ("number", ("--min-agreement", "0.1"), "agreement is not measured"),
    ],
)
def test_gates_of_heads_exit_with_three(made, few, name, gate, said) -> None:
    result = run("evaluate", made[name], "--images", few, *gate, code=3)
    assert said in result.stderr
    assert run("evaluate", made[name], "--images", few, "--max-error", "1", "--min-sqnr", "-50").exit_code == 0


def test_bench_shows_what_each_head_is_judged_by(made, few) -> None:
    quick = ("--images", few, "--trials", 1, "--seconds", 0.1)
    assert "diff p %" in run("bench", made["labels"], *quick).stdout
    assert "error %" in run("bench", made["number"], *quick).stdout


def test_a_search_needs_decisions(made, few, tmp_path) -> None:
    source = f"hf:{made['number'].with_suffix('')}"
    said = error("optimize", source, "--images", few, "--max-drop", 5, "-o", tmp_path / "x.fold")
    assert "this model gives numbers (a regression)" in said


def test_numbered_folders_are_indices(few, tmp_path) -> None:
    """The twelfth folder of text order is not the twelfth class."""
    names = sorted(path.name for path in few.iterdir())
    for i, name in enumerate(names):
        shutil.copytree(few / name, tmp_path / "numbers" / str(i))
    shutil.copytree(few / "cat", tmp_path / "caps" / "CAT")
    run("optimize", "demo", "-o", tmp_path / "d.fold")
    plain = run_json("evaluate", tmp_path / "d.fold", "--images", few)["top1"]
    assert run_json("evaluate", tmp_path / "d.fold", "--images", tmp_path / "numbers")["top1"] == plain
    assert run_json("evaluate", tmp_path / "d.fold", "--images", tmp_path / "caps")["top1"] is not None


def test_folders_that_do_not_fit_are_said_before_the_work(few, small, tmp_path) -> None:
    shutil.copytree(few / "cat", tmp_path / "images" / "zebra")
    result = run("optimize", *small, "--images", tmp_path / "images", "-o", tmp_path / "a.fold")
    said = result.stderr
    assert said.index("no top-1, because the class folders of") < said.index("emitting ONNX")
    assert json.loads((tmp_path / "a.fold" / "manifest.json").read_text())["fidelity"]["top1"] is None


def test_a_mapping_by_position_is_said_with_its_pairs(few, small, tmp_path) -> None:
    for i, path in enumerate(sorted(few.iterdir())):
        shutil.copytree(path, tmp_path / "images" / f"n{i:02}")
    result = run("optimize", *small, "--images", tmp_path / "images", "-o", tmp_path / "a.fold")
    assert "they are taken in sorted order: n00 = output 0, n01 = output 1" in " ".join(result.stderr.split())


def test_what_is_left_out_of_a_folder_is_said(few, small, tmp_path) -> None:
    shutil.copytree(few, tmp_path / "images")
    (tmp_path / "images" / "labels.csv").write_text("")
    said = " ".join(run("optimize", *small, "--images", tmp_path / "images", "-o", tmp_path / "a.fold").stderr.split())
    assert "as no image files: 1 (labels.csv)" in said


def test_orientation_is_the_sources_unless_told(made, photo, tmp_path) -> None:
    """Models of transformers follow it."""
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(photo).convert("RGB").save(tmp_path / "turned.png", exif=exif)
    Image.open(photo).convert("RGB").save(tmp_path / "plain.png")
    Image.open(photo).convert("RGB").rotate(180).save(tmp_path / "upright.png")

    def value(name: str, *arguments: str) -> float:
        return run_json("predict", made["number"], tmp_path / name, *arguments)[0]["values"][0]["value"]

    assert value("turned.png") == value("upright.png") == value("turned.png", "--exif", "apply")
    assert value("turned.png", "--exif", "ignore") == value("plain.png") != value("upright.png")
    assert "EXIF orientation applied" in run("inspect", made["number"]).stdout


def test_a_picture_of_12_bits_is_warned_of_once(made, tmp_path) -> None:
    for i in range(3):
        Image.fromarray(np.full((40, 40), 4095, np.uint16)).save(tmp_path / f"{i}.png")
    said = run("predict", made["number"], *sorted(tmp_path.glob("*.png"))).stderr
    assert " ".join(said.split()).count("as if it held 12 bits") == 1
