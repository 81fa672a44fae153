"""Bundles of a pipeline that draws by prompts, as a user makes and uses them: from a folder that is then gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from invoking import error, run, run_json
from PIL import Image
from safetensors.torch import save_file

from pipelining import tiny_pipe, tiny_vae

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with NumPy 2
HOW = ("--steps", "6", "--reuse", "fitted:4")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, prompts, their embeddings and a quantized bundle; the pipeline is then moved away."""
    home = tmp_path_factory.mktemp("home")
    pipe, prompts, _ = tiny_pipe("pixart", tiny_vae())
    pipe.save_pretrained(home / "pipe")
    rows = {name: torch.cat([one[name] for one in prompts]) for name in prompts[0] if prompts[0][name] is not None}
    save_file(rows, home / "prompts.safetensors")
    source, prompted = f"hf:{home / 'pipe'}", ("--prompts", home / "prompts.safetensors")
    run("diffusion", "embed", source, *prompted, "-o", home / "given.safetensors")
    found = run_json("diffusion", "optimize", source, *prompted, *HOW, "--quant", "w8a8", "-o", home / "fast.fold")
    assert found["plan"]["quant"] == "w8a8"
    assert found["plan"]["method"] == "gptq"
    assert 30 < found["fidelity"].pop("psnr_db") < 120
    assert found["fidelity"] == {"of": "images", "images": 4, "seed": 100_000}
    assert 0 < found["decode_bytes"] < found["size_bytes"]
    shutil.move(home / "pipe", home / "elsewhere")
    return home


def test_images_come_without_the_folder(home: Path, tmp_path: Path) -> None:
    given = ("--embeddings", home / "given.safetensors")
    found = run_json(
        "diffusion", "sample", home / "fast.fold", *given, "--trials", "1", "--classes", "3", "-o", tmp_path
    )
    assert [row["name"] for row in found["rows"]] == ["fast, every step", "fast", "none, 4 steps"]
    (image,) = (tmp_path / "fast").glob("*.png")
    pixels = np.asarray(Image.open(image))
    assert pixels.shape == (16, 16, 3)
    assert pixels.std() > 0


def test_inspect_says_what_images_take(home: Path) -> None:
    shown = run("inspect", home / "fast.fold").stdout
    assert "16 x 16, by the graph decode" in shown
    assert "dB to float steps, images of 4 held-out seeds" in shown
    found = run_json("inspect", home / "fast.fold")
    assert found["decode"]["image_shape"] == [3, 16, 16]
    assert found["decode_bytes"] == (home / "fast.fold" / "decode.onnx").stat().st_size


def test_bench_needs_embeddings_of_the_model(home: Path, tmp_path: Path) -> None:
    bench = ("diffusion", "bench", home / "fast.fold", "--trials", "1", "--batch", "2")
    found = run_json(*bench, "--embeddings", home / "given.safetensors")
    assert found["quant"] == "w8a8"
    assert found["classes"] == [0, 1]
    assert "--embeddings" in error(*bench)
    save_file({"encoder_hidden_states": torch.zeros(2, 7, 3)}, tmp_path / "other.safetensors")
    assert "of shape" in error(*bench, "--embeddings", tmp_path / "other.safetensors")


def test_without_the_decoder_the_folder_is_needed(home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "fast.fold"
    shutil.copytree(home / "fast.fold", copy)
    values = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    del values["decode"]
    (copy / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    given = ("--embeddings", home / "given.safetensors", "--trials", "1")
    said = error("diffusion", "sample", copy, *given)
    assert f"is not there ({home / 'pipe' / 'vae'})" in said
    assert "--latents" in said
    run("diffusion", "sample", copy, *given, "--latents", "-o", tmp_path / "latents")
    assert np.load(tmp_path / "latents" / "latents.npz")["fast"].shape == (1, 4, 8, 8)
    shutil.copytree(home / "fast.fold", tmp_path / "damaged.fold")
    (tmp_path / "damaged.fold" / "decode.onnx").unlink()
    assert "decode.onnx" in error("diffusion", "sample", tmp_path / "damaged.fold", *given)


def test_a_folder_without_what_it_names_is_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "elsewhere", tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "vae")
    how = ("--prompts", home / "prompts.safetensors", "--reuse", "none", "-o", tmp_path / "no.fold")
    said = error("diffusion", "optimize", f"hf:{tmp_path / 'pipe'}", *how)
    assert "lacks the folder vae, which its model_index.json names (AutoencoderKL)" in said


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("--quant", "w4a4"), "w4a4 does not run", 1),
        (("--quant", "w8a8", "--method", "gtpq"), "gptq", 1),
        (("--merge", "4"), "--merge", 2),
        (("--reuse", "auto"), "--reuse fitted:14", 2),
    ],
)
def test_what_optimize_refuses(home: Path, tmp_path: Path, arguments: tuple[str, ...], said: str, code: int) -> None:
    how = ("--prompts", home / "prompts.safetensors", "-o", tmp_path / "no.fold", *HOW)
    assert said in error("diffusion", "optimize", f"hf:{home / 'elsewhere'}", *how, *arguments, code=code)
    assert not list(tmp_path.iterdir())
