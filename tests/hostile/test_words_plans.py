"""Choices that cannot mean what they say: refused or remarked before the work, in a dry run too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vitfold.cli.app import app

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo" / "images"
QUANT = ("--quant", "w8a8", "--images", "{images}")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    for path in sorted(path for path in DEMO.rglob("*") if path.is_file())[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@dataclass(frozen=True)
class Plan:
    id: str
    options: tuple[str, ...]
    said: tuple[str, ...]
    code: int = 0


PLANS = (
    Plan("more images than there are", (*QUANT, "--calibration-size", "100000"),
         ("calibration takes all 6 images that there are, fewer than --calibration-size 100000",)),
    Plan("the default is more than there are", QUANT, ("all 6 images", "--calibration-size 128")),
    Plan("one image", (*QUANT, "--calibration-size", "1"), ("1 calibration images are too few",), 1),
    Plan("everything float", (*QUANT, "--keep-float", "999"), ("--keep-float 999", "49 sites", "fewer than 49"), 1),
    Plan("exactly everything float", (*QUANT, "--keep-float", "49"), ("leaves nothing to quantize",), 1),
    Plan("float without bits", ("--keep-float", "3"), ("nothing is quantized; add --quant",), 1),
    Plan("one token too many for a tile", (*QUANT, "--target", "openvino"),
         ("65 tokens are 1 more than a multiple of 16, by which kernels of openvino go; --merge align",)),
    Plan("a list that ends early", ("--merge", "1,1"), ("r names 2 of 12 blocks; the last 10 merge nothing",)),
    Plan("a recipe's list that ends early", ("--recipe", "{short}"), ("r names 2 of 12 blocks",)),
    Plan("a list that goes on", ("--merge", ",".join(["1"] * 13)), ("13 entries", "12 blocks"), 1),
    Plan("two tokens left", ("--merge", "32,16,8,4,2,1,0,0,0,0,0,0"), ("leaves 2 of 65 tokens", "lower --merge")),
    Plan("as much as goes", ("--merge", "30"), ("of 65 tokens", "lower --merge")),
    Plan("more than goes", ("--merge", "40"), ("too large for block 0", "at most 32"), 1),
)  # fmt: skip


@pytest.mark.parametrize("case", PLANS, ids=lambda case: case.id)
def test_a_plan_is_judged_before_the_work(case, images, tmp_path):
    (tmp_path / "short.toml").write_text("[merge]\nr = [1, 1]\n")
    values = {"images": images, "short": tmp_path / "short.toml"}
    options = [option.format(**values) for option in case.options]
    done = CliRunner().invoke(app, ["optimize", "demo", "--dry-run", "--json", *options])
    assert done.exit_code == case.code, done.stderr
    for words in case.said:
        assert words in done.stderr
    if case.code == 0:
        assert json.loads(done.stdout)["target"]
    assert not list(tmp_path.glob("*.fold"))


USUAL = (("--merge", "4"), ("--merge", "4:-1"), (*QUANT, "--calibration-size", "4", "--keep-float", "2"), ())


@pytest.mark.parametrize("options", USUAL, ids=" ".join)
def test_a_usual_plan_is_not_remarked_on(options, images):
    chosen = [option.format(images=images) for option in options]
    done = CliRunner().invoke(app, ["optimize", "demo", "--dry-run", *chosen])
    assert done.exit_code == 0
    assert [line for line in done.stderr.splitlines() if not line.startswith("optimize:")] == []
