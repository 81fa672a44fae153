"""`vitfold optimize --compensate`: what it makes, what it says, and that it is made again alike."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from invoking import error, run, run_json
from PIL import Image

from vitfold.artifacts.bundle import open_bundle

SOURCE = ("timm:test_vit", "--weights", "random", "--image-size", 64, "--num-classes", 10)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """350 small pictures of one colour each, with a little noise."""
    folder, draw = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    for i in range(350):
        pixels = draw.uniform(0, 255, (1, 1, 3)) + draw.normal(0, 12, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def profiled_macs(bundle: Path) -> int:
    """The work that a profile divides its times by."""
    return sum(kind["macs"] for kind in run_json("profile", bundle, "--runs", 2, "--no-ceiling")["kinds"])


def test_a_bundle_with_compensated_merging_says_so_and_is_made_again(many: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.fold", tmp_path / "b.fold"
    made = run_json("optimize", *SOURCE, "--merge", 3, "--compensate", "--images", many, "-o", first)
    assert made["recipe"]["merge"]["compensate"] is True
    found = run_json("inspect", first)
    assert found["compensation"]["images"] == 350 - 87
    assert found["compensation"]["error_after"] <= found["compensation"]["error_before"]
    assert "refitted" in run("inspect", first).stdout
    run("optimize", "--from", first, "-o", second)
    assert run_json("inspect", second)["digest"] == found["digest"]


def test_what_compensation_needs_is_said_before_any_work(many: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(many.iterdir())[:20]:
        (few / path.name).write_bytes(path.read_bytes())
    line = ("optimize", *SOURCE, "--merge", 3, "--compensate", "-o", tmp_path / "a.fold")
    assert "--compensate needs --images" in error(*line, code=2)
    unmerged = ("optimize", *SOURCE, "--compensate", "--images", few, "-o", tmp_path / "a.fold")
    assert "--compensate needs --images" in error(*unmerged, code=2)
    assert "15 of 20 are too few; give at least 342" in error(*line, "--images", few)


def test_a_narrower_bundle_says_so_and_is_made_again(many: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.fold", tmp_path / "b.fold"
    narrow = ("--prune-mlp", 0.5, "--merge", 3)
    int8 = ("--quant", "w8a8", "--target", "portable", "--method", "minmax", "--keep-slower")
    line = (*narrow, *int8)
    made = run_json("optimize", *SOURCE, *line, "--images", many, "-o", first)
    assert made["recipe"]["prune"] == {"mlp": 0.5}
    found = run_json("inspect", first)
    (units,) = {layer["units"] for layer in found["compensation"]["layers"] if layer["layer"].endswith("fc2")}
    assert f"{units} hidden units left" in run("inspect", first).stdout
    assert profiled_macs(first) == found["macs"]
    run("optimize", "--from", first, "-o", second)
    assert run_json("inspect", second)["digest"] == found["digest"]
    assert len(run_json("predict", first, sorted(many.iterdir())[0])) == 1


def test_a_share_of_the_work_is_divided_among_the_blocks(many: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.fold", tmp_path / "b.fold"
    int8 = ("--quant", "w8a8", "--target", "portable", "--method", "minmax", "--keep-slower")
    line = ("optimize", *SOURCE, "--prune", 0.4, "--merge", "3,0", *int8, "--images", many)
    made = run_json(*line, "-o", first)
    whole = run_json("optimize", *SOURCE, "--merge", "3,0", "--dry-run")
    assert made["macs"] < 0.7 * whole["macs"]
    assert set(made["recipe"]["prune"]) == {"units", "heads", "head_dims"}
    assert made["energy"]["integer_uj"] > 0.0
    assert made["energy"]["total_uj"] < 0.5 * made["energy"]["original_uj"]
    assert whole["energy"]["original_uj"] == made["energy"]["original_uj"]
    found = run_json("inspect", first)
    assert found["recipe"]["prune"] == made["recipe"]["prune"]
    assert profiled_macs(first) == found["macs"]
    run("optimize", "--from", first, "-o", second)
    assert run_json("inspect", second)["digest"] == found["digest"]
    assert len(run_json("predict", first, sorted(many.iterdir())[0])) == 1


def test_what_pruning_needs_is_said_before_any_work(many: Path, tmp_path: Path) -> None:
    line = ("optimize", *SOURCE, "-o", tmp_path / "a.fold")
    assert "--prune and --prune-mlp refit weights on images" in error(*line, "--prune-mlp", 0.5, code=2)
    both = ("--prune", 0.5, "--prune-mlp", 0.5, "--images", many)
    assert "give either --prune or --prune-mlp" in error(*line, *both, code=2)
    assert "a share of the blocks' work, below" in error(*line, "--prune", 0.999, "--images", many)
    assert "prune.mlp is the share of the units to go" in error(*line, "--prune-mlp", 1.5, "--images", many)
    (tmp_path / "r.toml").write_text("[prune]\n")
    planned = run(*line[:-2], "--prune-mlp", 0.5, "--images", many, "--dry-run").stdout
    assert "of the hidden units of every MLP" in " ".join(planned.split())
    assert "[prune] names either mlp" in error(*line, "--recipe", tmp_path / "r.toml", "--images", many)
    (tmp_path / "r.toml").write_text("[prune]\nmpl = 0.5\n")
    assert "unknown key prune.mpl" in error(*line, "--recipe", tmp_path / "r.toml", "--images", many)


def test_weights_are_refitted_on_images_of_their_own(many: Path, tmp_path: Path) -> None:
    """All of `--images` compares then, and the bundle is made again without naming a folder."""
    few, first, second = tmp_path / "few", tmp_path / "a.fold", tmp_path / "b.fold"
    few.mkdir()
    for path in sorted(many.iterdir())[:20]:
        (few / path.name).write_bytes(path.read_bytes())
    line = ("optimize", *SOURCE, "--prune-mlp", 0.5, "--images", few, "--calibration-images", many)
    run(*line, "-o", first)
    found = run_json("inspect", first)
    assert found["compensation"]["images"] == 350
    assert found["compensation"]["root"] == str(many)
    run("optimize", "--from", first, "-o", second)
    again = run_json("inspect", second)["compensation"]
    assert again == found["compensation"]
    assert "leave it out" in error("optimize", "--from", first, "--calibration-images", few, "-o", second, code=2)


def test_refitted_rows_of_a_sweep_stand_beside_plain_ones(
    few: Path, small: tuple[str, ...], tmp_path: Path, many: Path
) -> None:
    line = ("sweep", *small, "--merge", "0,1", "--compensate", "no,yes", "--images", few, "--calibration-images", many)
    rows = run_json(*line, "-o", tmp_path / "s")["rows"]
    assert [(row["recipe"], row["compensate"]) for row in rows] == [
        ("r0", False),
        ("r1", False),
        ("r1-compensated", True),
    ]
    compensation = open_bundle(tmp_path / "s" / "r1-compensated.fold").manifest.compensation
    assert compensation is not None
    assert Path(compensation["root"]) == many
    words = shlex.split(rows[2]["commands"][0])
    assert "--compensate" in words
    assert words[words.index("--calibration-images") + 1] == str(many)
