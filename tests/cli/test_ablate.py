"""`vitfold diffusion ablate` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from invoking import error, run_json

from diffusing import write_folder
from vitfold.diffusion import find_method
from vitfold.diffusion.ablation import ablations, main_effects


def test_pieces_are_taken_away_one_by_one(tmp_path: Path) -> None:
    source = f"hf:{write_folder(tmp_path / 'dit')}"
    asked = ("--steps", "9", "--trials", "1", "--classes", "1,2", "--reuse", "tokencache-blocks:0.4:2:3:0.5")
    found = run_json("diffusion", "ablate", source, *asked, "-o", tmp_path / "ablation.json")
    assert json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8")) == found
    rows = {row["name"]: row for row in found["rows"]}
    variants = [name for name in rows if name.startswith("tokencache-blocks")]
    assert len(variants) == 18
    assert len(rows) == 20, "all compute as many steps, so one plain alternative stands beside them"
    assert len({rows[name]["full_steps"] for name in variants}) == 1
    assert {*found["effects"]} == {"scores", "blocks", "schedule"}
    norms = [rows[name]["psnr_db"] for name in variants if ":norm:" in name]
    assert found["effects"]["scores"]["norm"] == pytest.approx(sum(norms) / 6)


def test_what_has_no_pieces_to_take_away() -> None:
    assert "chooses no blocks" in error("diffusion", "ablate", "demo-dit", "--reuse", "tokencache")
    assert "below 1" in error("diffusion", "ablate", "demo-dit", "--reuse", "tokencache-blocks:0.5:2:4:1")


def test_means_are_of_all_variants_or_none() -> None:
    variants = ablations(find_method("tokencache-blocks"))
    assert len({one.method.text for one in variants}) == 18
    assert find_method("tokencache-blocks").text in {one.method.text for one in variants}
    dbs = {one.method.text: 40.0 if one.factors["blocks"] == "all" else 30.0 for one in variants}
    assert main_effects(variants, dbs)["blocks"] == {"chosen": 30.0, "all": 40.0}
    equal = {**dbs, variants[0].method.text: None}
    assert main_effects(variants, equal)["scores"] == {"predictor": None, "random": 35.0, "norm": 35.0}
