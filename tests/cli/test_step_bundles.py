"""Bundles of a Diffusion Transformer's steps as a user makes and uses them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from invoking import error, run, run_json
from PIL import Image

from diffusing import write_folder
from pipelining import tiny_vae

QUICK = ("--steps", "5")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"hf:{write_folder(tmp_path_factory.mktemp('dit'))}"


@pytest.fixture(scope="module")
def stack(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "stack.fold"
    found = run_json("diffusion", "optimize", source, *QUICK, "--reuse", "stack:2", "--quant", "w8a8", "-o", path)
    assert found["plan"]["reuse"] == "stack:2"
    assert found["plan"]["quant"] == "w8a8"
    assert found["parts"] == ["condition", "full", "resume"]
    assert found["verified"]["psnr_db"] > 30
    return path


@pytest.fixture(scope="module")
def plain(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "plain.fold"
    run("diffusion", "optimize", source, *QUICK, "--reuse", "none", "-o", path)
    return path


def test_graphs_share_one_file_of_weights(stack: Path, source: str, tmp_path: Path) -> None:
    names = sorted(path.name for path in stack.iterdir())
    assert names == ["condition.onnx", "full.onnx", "manifest.json", "resume.onnx", "weights.bin"]
    path = tmp_path / "tokens.fold"
    run("diffusion", "optimize", source, *QUICK, "--reuse", "tokencache", "-o", path)
    largest = max((path / f"{part}.onnx").stat().st_size for part in ("full", "refresh"))
    assert largest < (path / "weights.bin").stat().st_size


def test_a_bundle_draws_what_its_source_draws(stack: Path, source: str, tmp_path: Path) -> None:
    arguments = ("--classes", "2,0", "--trials", "1")
    found = run_json("diffusion", "sample", stack, *arguments, "-o", tmp_path / "a")
    assert [row["name"] for row in found["rows"]] == ["stack, every step", "stack", "none, 4 steps"]
    assert found["bundles"]["stack"]["reuse"] == "stack:2"
    assert (found["steps"], found["sampler"]) == (5, "ddim")
    run(
        "diffusion", "sample", source, *QUICK, *arguments, "--reuse", "stack:2", "--quant", "w8a8", "-o", tmp_path / "b"
    )
    pixels = []
    for folder in (tmp_path / "a" / "stack", tmp_path / "b" / "stack-2-w8a8"):
        with Image.open(next(folder.iterdir())) as image:
            pixels.append(np.asarray(image).astype(int))
    np.testing.assert_allclose(pixels[0], pixels[1], atol=2)


@pytest.mark.parametrize("method", ["solved:4", "fitted:4:3"])
def test_a_bundle_keeps_the_steps_that_were_chosen_for_it(method: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "chosen.fold"
    run("diffusion", "optimize", source, *QUICK, "--reuse", method, "-o", path)
    mask = run_json("inspect", path)["mask"]
    assert len(mask) == 4
    weights = json.loads((path / "manifest.json").read_text())["weights"]
    assert (weights is None) == method.startswith("solved")
    assert weights is None or [i for i, row in enumerate(weights) if not row] == mask
    assert {0, 1, 4} <= set(mask)
    found = run_json("diffusion", "sample", path, "--classes", "1", "--trials", "1")
    assert found["rows"][1]["full_steps"] == 4
    assert "chosen for 5, not for 6; leave out --steps" in error(
        "diffusion", "sample", path, "--steps", "6", "--trials", "1"
    )


def test_a_bundle_keeps_the_polynomial_that_was_fitted_for_it(source: str, tmp_path: Path) -> None:
    path = tmp_path / "tea.fold"
    run("diffusion", "optimize", source, *QUICK, "--reuse", "teacache:0.3", "-o", path)
    values = json.loads((path / "manifest.json").read_text())
    assert len(values["rescale"]) == 4
    assert values["parts"] == ["condition", "front", "rest", "resume"]
    found = run_json("diffusion", "sample", path, "--classes", "1", "--trials", "1")
    assert found["rows"][1]["name"] == "tea"


def test_a_bundle_chooses_blocks_as_it_draws(source: str, tmp_path: Path) -> None:
    path = tmp_path / "blocks.fold"
    method = "tokencache-blocks:0.4:3:3:0.5:norm"
    run("diffusion", "optimize", source, *QUICK, "--reuse", method, "-o", path)
    values = json.loads((path / "manifest.json").read_text())
    parts = ["condition", "full", "whole.0", "renew.0", "whole.1", "renew.1", "front"]
    assert (values["parts"], values["plan"]["reuse"]) == (parts, f"{method}:tprr")
    found = run_json("diffusion", "sample", path, "--classes", "1", "--trials", "1")["rows"][1]
    assert (found["full_steps"], found["reused_steps"]) == (3, 2)
    (path / "manifest.json").write_text(json.dumps({**values, "parts": [*parts[:-1], "whole.01"]}))
    assert "parts are some of" in error("diffusion", "sample", path, "--classes", "1")


def test_a_bundle_of_latents_decodes_by_itself(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "dit", in_channels=4, out_channels=4)
    tiny_vae(shift=0.2).save_pretrained(folder / "vae")
    drawn = ("--trials", "1", "--classes", "1,0", "--guidance", "2")
    run("diffusion", "sample", f"hf:{folder}", *QUICK, *drawn, "-o", tmp_path / "by-torch")
    sizes = {}
    for name, option in (("with", ()), ("without", ("--no-vae",))):
        made = ("--reuse", "none", *QUICK, *option, "-o", tmp_path / f"{name}.fold")
        sizes[name] = run_json("diffusion", "optimize", f"hf:{folder}", *made)["size_bytes"]
    assert sizes["with"] > sizes["without"]
    shutil.rmtree(folder)
    run("diffusion", "sample", tmp_path / "with.fold", *drawn, "-o", tmp_path / "by-graph")
    first, second = (
        sorted((tmp_path / "by-torch").glob("none/*.png")),
        sorted((tmp_path / "by-graph").glob("with/*.png")),
    )
    assert len(first) == len(second) == 2
    for one, other in zip(first, second, strict=True):
        a, b = (np.asarray(Image.open(path)).astype(int) for path in (one, other))
        assert a.shape == (32, 32, 3)
        assert np.abs(a - b).max() <= 1
    assert "is not there" in error("diffusion", "sample", tmp_path / "without.fold")


def test_bundles_beside_each_other(stack: Path, plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    found = run_json("diffusion", "bench", plain, stack, "--trials", "1", "--batch", "3", "-o", path)
    assert [row["name"] for row in found["rows"]] == ["plain", "stack", "none, 4 steps"]
    assert found["rows"][0]["psnr_db"] is None
    assert found["rows"][1]["psnr_db"] > 0
    assert len(found["classes"]) == 3
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == found["rows"]
    assert "leave out --images" in error("bench", plain, "--peers", "torch")


def test_what_is_in_a_bundle(stack: Path) -> None:
    said = run("inspect", stack).stdout
    assert "stack:2" in said
    assert "condition full resume" in said
    assert "w8a8 by gptq" in said
    plan = run_json("inspect", stack)["plan"]
    assert (plan["quant"], plan["method"]) == ("w8a8", "gptq")


def test_a_bundle_names_its_method_of_quantization(source: str, tmp_path: Path) -> None:
    path = tmp_path / "minmax.fold"
    asked = ("--reuse", "none", "--quant", "w8a8", "--method", "minmax")
    assert run_json("diffusion", "optimize", source, *QUICK, *asked, "-o", path)["plan"]["method"] == "minmax"
    assert "w8a8 by minmax" in run("inspect", path).stdout
    drawn = run_json("diffusion", "sample", source, *QUICK, *asked, "--trials", "1")
    assert (drawn["quant"], drawn["method"]) == ("w8a8", "minmax")


def test_an_earlier_bundle_does_not_name_it(stack: Path, tmp_path: Path) -> None:
    path = tmp_path / "earlier.fold"
    shutil.copytree(stack, path)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    del manifest["plan"]["method"]
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert run_json("inspect", path)["plan"]["method"] is None
    assert "w8a8" in run("inspect", path).stdout


def test_a_search_writes_the_winner(source: str, tmp_path: Path) -> None:
    arguments = ("--steps", "8", "--reuse", "auto", "--min-psnr", "0", "--samples", "2", "--quant", "none")
    found = run_json("diffusion", "optimize", source, *arguments, "-o", tmp_path / "auto.fold")
    assert found["bounds"] == {"min_psnr_db": 0.0, "max_psnr_drop_db": None, "max_fid_rise": None}
    assert {row["name"] for row in found["rows"]} >= {"none", "stack:2", "guidance:4", "fitted:4:4", "none, 4 steps"}
    chosen = "none" if found["held_out"]["winner"] is None else found["held_out"]["winner"]["reuse"]
    assert found["plan"]["reuse"] == chosen
    kept = run_json("inspect", tmp_path / "auto.fold")["search"]
    assert kept["winner"] == found["winner"]
    said = run("diffusion", "optimize", source, *arguments, "-o", tmp_path / "auto.fold", "--overwrite")
    assert "at least 0 dB to the unaccelerated images" in said.stderr


def test_other_commands_say_who_takes_it(stack: Path, tmp_path: Path) -> None:
    said = error("evaluate", stack, "--images", tmp_path)
    assert "holds the steps of a diffusion model" in said
    assert "vitfold diffusion sample" in said
    assert "a bundle has its own method" in error("diffusion", "sample", stack, "--reuse", "none", code=2)


def test_a_source_of_steps_needs_a_method_of_reuse(source: str, tmp_path: Path) -> None:
    for name in (source, "demo-dit"):
        assert f"vitfold diffusion optimize {name}" in error("optimize", name, "-o", tmp_path / "x.fold")


def test_damage_is_named(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.fold"
    shutil.copytree(plain, path)
    (path / "weights.bin").write_bytes(b"0")
    assert "weights.bin is damaged" in error("diffusion", "bench", path)
    (path / "weights.bin").unlink()
    assert "lacks the file weights.bin" in error("diffusion", "sample", path)


def test_models_must_be_one(plain: Path, tmp_path: Path) -> None:
    other = f"hf:{write_folder(tmp_path / 'other', num_layers=1)}"
    run("diffusion", "optimize", other, *QUICK, "--reuse", "none", "-o", tmp_path / "other.fold")
    assert "draws by another model" in error("diffusion", "bench", plain, tmp_path / "other.fold")


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("--reuse", "tailor"), "did you mean taylor", 1),
        (("--reuse", "stack:2", "--min-psnr", "30"), "a bound goes with --reuse auto", 2),
        (("--reuse", "auto", "--max-fid-rise", "1"), "give --real DIR and --features SOURCE", 2),
        (("--reuse", "stack", "--merge", "auto"), "give the tokens merged per block", 2),
        (("--reuse", "stack", "--method", "minmax"), "how --quant rounds", 2),
        (("--reuse", "stack", "--quant", "w8a8", "--method", "gptk"), "gptq", 1),
        (("--reuse", "stack", "--target", "openvino"), "steps are not written for openvino", 1),
        (("--reuse", "stack", "--quant", "w4a4"), "w4a4 does not run: integer kernels take activations of 8 bits", 1),
    ],
    ids=str,
)
def test_what_optimize_refuses(source: str, tmp_path: Path, arguments: tuple[str, ...], said: str, code: int) -> None:
    assert said in error("diffusion", "optimize", source, "-o", tmp_path / "x.fold", *arguments, code=code)
    assert not (tmp_path / "x.fold").exists()


def test_earlier_spellings_name_the_new_one(stack: Path, source: str, tmp_path: Path) -> None:
    drawn = run("diffuse", stack, "--trials", "1", "--json")
    assert json.loads(drawn.stdout)["bundles"]["stack"]["reuse"] == "stack:2"
    assert drawn.stderr.count("vitfold diffusion sample") == 1
    made = run("optimize", source, *QUICK, "--reuse", "none", "-o", tmp_path / "x.fold", "--json")
    assert json.loads(made.stdout)["plan"]["reuse"] == "none"
    assert "vitfold diffusion optimize" in made.stderr
    timed = run("bench", stack, "--trials", "1", "--batch", "1", "--json")
    assert json.loads(timed.stdout)["rows"][0]["name"] == "stack, every step"
    assert "vitfold diffusion bench" in timed.stderr
